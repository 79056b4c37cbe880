"""What every method learns under one budget: kNN accuracy beside the untrained encoder's, images a second, memory.

    python benchmarks/quality.py [--methods simclr mae ...] [--steps 400] [--batch 64] [--out benchmarks/results]
    python benchmarks/quality.py --train DIR --test DIR --size 32      on images of your own, in class folders

Each method runs by `fastjem.pretrain` in a process of its own, on the embedded data set where no other is named: 4,000
images of ten shapes to train on, 1,000 to test, k = 20. All have one optimiser and rate (--learning-rate, of AdamW for
256 images), or with --own each its own; encoders are test_resnet (0.4 M parameters), or test_vit where patches are
hidden.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fastjem
from fastjem import backbones
from fastjem.bench import machine
from fastjem.data import shapes
from fastjem.data.source import open_source
from fastjem.methods import METHODS
from fastjem.probes import knn_accuracy
from fastjem.runs import open_run

# What a method needs for so small a run beside its defaults: sizes that fit 4,000 images and batches of 64
OPTIONS: dict[str, dict[str, Any]] = {
    "wmse": {"dim": 32, "whitening_size": 64},
    "mae": {"decoder_width": 64, "decoder_depth": 2, "decoder_heads": 4},
    "ijepa": {"predictor_width": 48, "predictor_depth": 2, "predictor_heads": 4},
    "capi": {"predictor_depth": 2, "predicted": 0.25},
}


def is_transformer(name: str) -> bool:
    kind = METHODS[name]
    return bool(kind.views.mask or kind.mask_token)


def fields_of(name: str, options: argparse.Namespace, folder: Path, given: str) -> dict[str, Any]:
    """What `fastjem.pretrain` is told."""
    vit = is_transformer(name)
    fields: dict[str, Any] = {
        "method": name,
        "backbone": options.vit if vit else options.backbone,
        "image_size": options.size,
        "batch_size": options.batch,
        "max_steps": options.steps,
        "epochs": 10_000,
        "out": str(folder / name),
        "data": options.train or str(shapes.folder() / "train"),
        "workers": 1,
        "knn_every": 0,
        "report": False,
        "seed": options.seed,
        "options": dict(OPTIONS.get(name, {})),
        "loader": "memory",
    }
    if vit:
        fields["patch_size"] = options.size // 8
    else:
        fields["stem"] = "standard"
    if not options.own:
        rate = options.learning_rate / (4 if vit else 1)
        fields |= {"optimizer": "adamw", "learning_rate": rate, "weight_decay": 1e-4}
    if name in ("clip", "siglip"):  # two sources: the images twice, each cropped by itself
        fields["data"] = f"{fields['data']},{fields['data']}"
        fields |= {"loader": "torch", "recipe": "simclr"}
    if name == "distill":
        fields["options"]["given"] = given
    return fields


def one(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Pretrain and evaluate, in this process; the row."""
    train = open_source(options.train or shapes.folder() / "train")
    test = open_source(options.test or shapes.folder() / "test")
    with tempfile.TemporaryDirectory() as folder:
        fields = fields_of(name, options, Path(folder), options.given)
        begin = time.perf_counter()
        result = fastjem.pretrain(**fields)
        seconds = time.perf_counter() - begin
        opened = open_run(result.out)
        trained = knn_accuracy(opened.encoder, train, test, opened.pixels)
        untrained = knn_accuracy(untrained_encoder(name, options), train, test, opened.pixels)
        lines = (Path(result.out) / "metrics.jsonl").read_text().splitlines()
    rates = sorted(row["images_per_second"] for row in map(json.loads, lines) if row.get("images_per_second"))
    return {
        "method": name,
        "encoder": fields["backbone"],
        "untrained": round(100 * untrained, 1),
        "kNN": round(100 * trained, 1),
        "seconds": round(seconds, 1),
        "images/s": round(rates[len(rates) // 2], 1) if rates else None,
    }


def untrained_encoder(name: str, options: argparse.Namespace) -> nn.Module:
    torch.manual_seed(options.seed)
    vit = is_transformer(name)
    return backbones.create(
        options.vit if vit else options.backbone,
        options.size,
        stem="auto" if vit else "standard",
        patch=options.size // 8 if vit else 0,
        pool=METHODS[name].pool,
    )


def given_encoder(options: argparse.Namespace, folder: str) -> str:
    """A SimCLR run of twice the steps, which distillation has as its given encoder."""
    out = Path(folder) / "given"
    fields = fields_of("simclr", options, Path(folder), "") | {"out": str(out), "max_steps": 2 * options.steps}
    fastjem.pretrain(**fields)
    return str(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", nargs="+", default=[*METHODS])
    parser.add_argument("--train")
    parser.add_argument("--test")
    parser.add_argument("--size", type=int, default=48)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--own", action="store_true", help="each method's own optimiser and rate")
    parser.add_argument("--backbone", default="test_resnet")
    parser.add_argument("--vit", default="test_vit")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--given", default="")
    parser.add_argument("--alone", help=argparse.SUPPRESS)  # one method, in a process of its own
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.alone:
        print("ROW " + json.dumps(one(options.alone, options)), flush=True)
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        if "distill" in options.methods and not options.given:
            options.given = given_encoder(options, folder)
        words = [word for word in sys.argv[1:] if word != "--methods" and word not in options.methods]
        for name in options.methods:
            command = [sys.executable, __file__, *words, "--given", options.given, "--alone", name]
            done = subprocess.run(command, capture_output=True, text=True)
            found = [line[4:] for line in done.stdout.splitlines() if line.startswith("ROW ")]
            error = (done.stderr.strip().splitlines() or ["no output"])[-1]
            rows.append(json.loads(found[0]) if found else {"method": name, "error": error})
            print(json.dumps(rows[-1]), flush=True)
            if options.out:
                write(options, rows)


def write(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    facts = machine.describe(torch.device("cpu"))
    settings = {key: str(value) for key, value in vars(options).items() if key not in ("out", "alone", "given")}
    path = options.out / f"quality-{machine.slug(facts)}"
    found = {"machine": facts, "run": machine.now(), "settings": settings, "rows": rows}
    path.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    keys = list(dict.fromkeys(key for row in rows for key in row))
    lines = [
        f"# What methods learn in {options.steps} steps of {options.batch} images",
        "",
        *(f"- {key}: {value}" for key, value in {**facts, **machine.now(), **settings}.items()),
        "",
        "kNN accuracy in percent, k = 20; seconds and images a second of the whole run.",
        "",
        "| " + " | ".join(keys) + " |",
        "|" + "---|" * len(keys),
        *("| " + " | ".join(str(row.get(key, "")) for key in keys) + " |" for row in rows),
    ]
    path.with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
