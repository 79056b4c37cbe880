"""What every method learns under one budget, beside its untrained encoder: kNN and linear accuracy, effective rank.

    python benchmarks/quality.py [--methods simclr mae ...] [--steps 400] [--batch 64] [--seeds 0 1 2] [--out DIR]
    python benchmarks/quality.py --train DIR --test DIR --size 32      on images of your own, in class folders
    python benchmarks/quality.py --cores 0 1                           two runs at a time, each on a core of its own

Each run is of `fastjem.pretrain` in a process of its own, on the embedded data set where no other is named: 4,000
images of ten shapes to train on, 1,000 to test. A method has its own defaults, those of a short run; --learning-rate
gives all of them AdamW at one rate. Encoders are timm's test_resnet (0.4 M parameters), or test_vit where patches are
hidden.
"""

import argparse
import json
import resource
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
from fastjem.data.pixels import Pixels
from fastjem.data.source import Source, open_source
from fastjem.methods import METHODS, needs_patches
from fastjem.probes import embed, measure
from fastjem.runs import open_run

sys.path.insert(0, str(Path(__file__).parent))
import tables

FIGURES = {"knn": "kNN", "linear_probe": "linear", "rankme": "rank"}  # of `fastjem.probes.measure` -> a column
SECTION = "## A short run"  # of a method's page
ABOUT = (
    "kNN (k = 20) and linear accuracy on the test images in percent, effective rank of the training images'\n"
    "embeddings (RankMe), the untrained encoder's beside each; seconds and images a second of the whole run, and\n"
    "the process's memory at its peak."
)

# What a method needs for so small a run beside its defaults: sizes that fit 4,000 images and batches of 64
OPTIONS: dict[str, dict[str, Any]] = {
    "wmse": {"dim": 32, "whitening_size": 64},
    "mae": {"decoder_width": 64, "decoder_depth": 2, "decoder_heads": 4},
    "ijepa": {"predictor_width": 48, "predictor_depth": 2, "predictor_heads": 4},
    "capi": {"predictor_depth": 2, "predicted": 0.25},
}


def fields_of(name: str, options: argparse.Namespace, folder: Path, given: str) -> dict[str, Any]:
    """What `fastjem.pretrain` is told."""
    vit = needs_patches(METHODS[name])
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
    if options.learning_rate:
        fields |= {"optimizer": "adamw", "learning_rate": options.learning_rate, "weight_decay": 1e-4}
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
        given = options.given or (given_encoder(options, folder) if name == "distill" else "")
        fields = fields_of(name, options, Path(folder), given)
        begin = time.perf_counter()
        result = fastjem.pretrain(**fields)
        seconds = time.perf_counter() - begin
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        opened = open_run(result.out)
        figures = figures_of(opened.encoder, train, test, opened.pixels)
        lines = (Path(result.out) / "metrics.jsonl").read_text().splitlines()
    before = figures_of(untrained_encoder(name, options), train, test, opened.pixels)
    rates = sorted(row["images_per_second"] for row in map(json.loads, lines) if row.get("images_per_second"))
    row = {"method": name, "encoder": fields["backbone"], "seed": options.seed}
    for key, column in FIGURES.items():
        row[f"{column}, untrained"] = before[key]
        row[column] = figures[key]
    row |= {"seconds": round(seconds, 1), "images/s": rates[len(rates) // 2] if rates else None, "MiB": round(peak)}
    return {key: round(value, 1) if isinstance(value, float) else value for key, value in row.items()}


def figures_of(encoder: nn.Module, train: Source, test: Source, pixels: Pixels) -> dict[str, float]:
    """Accuracies in percent, and the effective rank, of embeddings of whole images."""
    found = measure(*embed(encoder, train, pixels), *embed(encoder, test, pixels))
    return {key: found[key] * (1 if key == "rankme" else 100) for key in FIGURES}


def untrained_encoder(name: str, options: argparse.Namespace) -> nn.Module:
    torch.manual_seed(options.seed)
    vit = needs_patches(METHODS[name])
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
    parser.add_argument("--learning-rate", type=float, default=0.0, help="of AdamW for all methods, of 256 images")
    parser.add_argument("--backbone", default="test_resnet")
    parser.add_argument("--vit", default="test_vit")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument(
        "--cores", type=int, nargs="*", default=[], help="runs side by side, each bound to one of these"
    )
    parser.add_argument("--given", default="", help="of distill: a run's folder; without it, SimCLR of twice the steps")
    parser.add_argument("--alone", help=argparse.SUPPRESS)  # one method, in a process of its own
    parser.add_argument("--out", type=Path)
    parser.add_argument("--pages", type=Path, help="docs/methods: only write each row of --out's results into its page")
    options = parser.parse_args()
    if options.pages:
        return write_pages(options)
    options.seed = options.seeds[0]
    if options.alone:
        print("ROW " + json.dumps(one(options.alone, options)), flush=True)
        return
    rows = []
    runs = [(name, seed) for name in options.methods for seed in options.seeds]
    for row in tables.spread(lambda run, core: in_a_process(*run, options, core), runs, options.cores):
        rows.append(row)
        print(json.dumps(row), flush=True)
        if options.out:
            write(options, rows)


def in_a_process(name: str, seed: int, options: argparse.Namespace, core: int | None) -> dict[str, Any]:
    command = [sys.executable, __file__, "--alone", name, "--seeds", str(seed)]
    for key in ("train", "test", "size", "steps", "batch", "learning_rate", "backbone", "vit", "given"):
        if value := getattr(options, key):
            command += ["--" + key.replace("_", "-"), str(value)]
    return {"method": name, "seed": seed, **tables.row_of(command, core)}


def write(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """The rows, beside those that the file has of other methods and seeds with the same settings."""
    facts = tables.describe(options.cores)
    left_out = ("out", "alone", "given", "methods", "seed", "seeds", "cores", "pages")
    settings = {key: str(value) for key, value in vars(options).items() if key not in left_out}
    path = results_of(options, facts)
    rows, note = tables.beside_earlier(path, settings, rows, ("method", "seed"))
    rows = sorted(rows, key=lambda row: ([*METHODS].index(row["method"]), row["seed"]))
    title = f"What methods learn in {options.steps} steps of {options.batch} images"
    tables.write(path, title, ABOUT, facts, settings, rows, tables.over_seeds(rows, "method", FIGURES.values()), note)


def results_of(options: argparse.Namespace, facts: dict[str, Any]) -> Path:
    """The files of results of this data on this machine, without their suffix."""
    data = Path(options.train).parent.name if options.train else "shapes"
    return options.out / f"quality-{data}-{machine.slug(facts)}"


def write_pages(options: argparse.Namespace) -> None:
    """Each method's row of the results as the first paragraph of a section of its page; other paragraphs stay."""
    path = results_of(options, tables.describe(options.cores)).with_suffix(".json")
    found = json.loads(path.read_text())
    of = found["settings"]
    for row in tables.over_seeds(found["rows"], "method", FIGURES.values()):
        if "error" in row:
            continue
        page = options.pages / f"{row['method']}.md"
        before, _, section = page.read_text().partition(f"\n{SECTION}\n")
        rest = section.strip().partition("\n\n")[2]
        given = "".join(f", `{key}={value}`" for key, value in OPTIONS.get(row["method"], {}).items())
        figures = [f"kNN {row['kNN, untrained']} and **{row['kNN']} %**"]
        if "linear" in row:
            figures.append(f"linear probe {row['linear, untrained']} and {row['linear']} %")
            figures.append(f"effective rank {row['rank, untrained']} and {row['rank']}")
        paragraph = (
            f"{of['steps']} steps of {of['batch']} images of the embedded data, {of['size']} pixels, "
            f"timm's `{row['encoder']}`, default options{given}.\nBefore and after: {', '.join(figures)} "
            f"([all methods](../../{path.with_suffix('.md')}))."
        )
        page.write_text("\n\n".join(part for part in (before.rstrip(), SECTION, paragraph, rest) if part) + "\n")


if __name__ == "__main__":
    main()
