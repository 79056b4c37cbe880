"""What `--preset fast` learns in a time, and what it learns without each of its ingredients, or with what it left out.

    python benchmarks/speedrun.py --train DIR --test DIR [--seconds 60] [--seeds 0 1 2] [--cores 0 1] [--out DIR]

DIR has a folder of images for each class. Each run is `fastjem.pretrain` in a process of its own, for as many steps as
fit the seconds, and its embeddings are measured by the kNN and the linear probe of benchmarks/learning.py.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import learning
import tables
import torch

from fastjem.bench import machine
from fastjem.machine import available_cores

# What is changed of the preset, by the row's name: fields of `fastjem.pretrain`.
ROWS: dict[str, dict[str, Any]] = {
    "fast": {},
    "the method's defaults": {"preset": "imagenet"},
    "2 large views for 4": {"large_views": 2},
    "SimCLR's augmentation for MoCo v2's": {"recipe": "simclr"},
    "the paper's LARS for AdamW": {"optimizer": "lars", "learning_rate": 1.2},
    "files read anew": {"loader": "torch"},
    "whole views of a transformer": {"mask": 0.0},
    "with 4 small views for 2 large": {"large_views": 2, "small_views": 4},
    "with half the size for 60 %": {"image_size": "half"},
    "with temperature 0.2": {"options": {"temperature": 0.2}},
}
ONLY_OF_TRANSFORMERS = "whole views of a transformer"


def fields_of(name: str, options: argparse.Namespace) -> list[tuple[str, Any]]:
    fields = {"preset": "fast", **ROWS[name]}
    if fields.get("image_size") == "half":
        fields["image_size"] = f"{options.size // 2}:60%,{options.size}"
    return list(fields.items())


def row(name: str, seed: int, options: argparse.Namespace, core: int | None) -> dict[str, Any]:
    changed = argparse.Namespace(**{**vars(options), "fields": fields_of(name, options)})
    found = learning.in_a_process(options.method, "ours", seed, changed, core, seconds=options.seconds)
    kept = ("steps", "seconds", "images/s", *learning.FIGURES.values(), "error")
    return {"recipe": name, "seed": seed, **{key: found[key] for key in kept if key in found}}


def over_seeds(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each recipe: means, and of accuracies the deviation between seeds where there are several."""
    found = []
    for name in [name for name in ROWS if any(row["recipe"] == name for row in rows)]:
        own = [row for row in rows if row["recipe"] == name and "error" not in row]
        means: dict[str, Any] = {"recipe": name, "seeds": len(own)}
        for key in own[0].keys() - {"recipe", "seed"} if own else ():
            values = [row[key] for row in own]
            spread = (
                f" ± {statistics.stdev(values):.1f}" if len(values) > 1 and key in learning.FIGURES.values() else ""
            )
            means[key] = f"{statistics.mean(values):.1f}{spread}"
        found.append({key: means[key] for key in ("recipe", "seeds", *own[0]) if key in means} if own else means)
    return found


def write(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    facts = machine.describe(torch.device("cpu"))
    kept = ("train", "test", "seconds", "method", "size", "batch", "backbone", "stem", "patch_size", "seeds", "cores")
    settings = {key: str(getattr(options, key)) for key in kept}
    data = Path(options.train).parent.name
    path = options.out / f"speedrun-{data}-{options.backbone}-{machine.slug(facts)}"
    about = "kNN (k = 20) and linear accuracy on the test images in percent after the same time; means over the seeds."
    title = f"--preset fast in {options.seconds:g} seconds, and without each of its ingredients"
    tables.write(path, title, about, facts, settings, rows, over_seeds(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", required=True)
    parser.add_argument("--test", required=True)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--method", default="simclr")
    parser.add_argument("--rows", nargs="+", choices=[*ROWS], help="all that concern the encoder")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--backbone", default="test_resnet")
    parser.add_argument("--stem", default="standard")
    parser.add_argument("--patch-size", type=int, default=0)
    parser.add_argument("--workers", type=int, default=available_cores())
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--cores", type=int, nargs="*", default=[], help="runs side by side, each on one of these")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    options.minutes = options.seconds / 60
    options.rows = options.rows or [row for row in ROWS if options.patch_size or row != ONLY_OF_TRANSFORMERS]
    runs = [(name, seed) for seed in options.seeds for name in options.rows]
    rows: list[dict[str, Any]] = []
    for found in tables.spread(lambda run, core: row(*run, options, core), runs, options.cores):
        rows.append(found)
        print(json.dumps(found), flush=True)
        if options.out:
            write(options, rows)


if __name__ == "__main__":
    main()
