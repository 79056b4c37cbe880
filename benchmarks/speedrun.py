"""What `--preset fast` learns in a time, and what other recipes do that differ from it in one thing each.

    python benchmarks/speedrun.py --train DIR --test DIR [--seconds 60] [--seeds 0 1 2] [--cores 0 1] [--out DIR]

DIR has a folder of images for each class. Each run is `fastjem.pretrain` in a process of its own, for as many steps as
fit the seconds, and its embeddings are measured by the kNN and the linear probe of benchmarks/learning.py.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastjem import encoders
from fastjem.bench import machine
from fastjem.methods import METHODS

sys.path.insert(0, str(Path(__file__).parent))
import learning
import tables

ABOUT = (
    "kNN (k = 20) and linear accuracy on the test images in percent after the same time; means over the seeds, and\n"
    "the deviation between them."
)


def recipes(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Fields of `fastjem.pretrain` beside `--preset fast`, by what they change: its ingredients are taken out, then
    others are added."""
    papers = METHODS[options.method].defaults
    patch = options.patch_size or 1
    half = round(options.size / 2 / patch) * patch
    found: dict[str, dict[str, Any]] = {
        "fast": {},
        "without all of it, the method's defaults": {"preset": "imagenet"},
        "the method's augmentation": {"recipe": METHODS[options.method].views.recipe},
        f"the paper's {papers.optimizer.upper()}": {
            "optimizer": papers.optimizer,
            "learning_rate": papers.learning_rate,
        },
        "files read anew each time": {"loader": "torch"},
        "2 large views": {"large_views": 2},
        "2 large and 4 small views": {"large_views": 2, "small_views": 4},
        "and temperature 0.2": {"options": {"temperature": 0.2}},
        "and half the size for 60 %": {"image_size": f"{half}:60%,{options.size}"},
    }
    if encoders.takes_masks(learning.encoder_of(options)):
        found["whole views"] = {"mask": 0.0}
        found["half of the patches"] = {"mask": 0.5}
    return found


def row(name: str, recipe: dict[str, Any], seed: int, options: argparse.Namespace, core: int | None) -> dict[str, Any]:
    fields = {"preset": "fast", **recipe}
    changed = argparse.Namespace(**{**vars(options), "fields": [*fields.items()]})
    found = learning.in_a_process(options.method, "ours", seed, changed, core, seconds=options.seconds)
    kept = ("steps", "seconds", "images/s", *learning.FIGURES.values(), "error")
    return {"recipe": name, "seed": seed, **{key: found[key] for key in kept if key in found}}


def write(options: argparse.Namespace, names: Sequence[str], rows: list[dict[str, Any]]) -> None:
    """A page of the rows, in the order of their names."""
    facts = tables.describe(options.cores)
    kept = ("train", "test", "seconds", "method", "size", "batch", "backbone", "stem", "patch_size", "seeds")
    settings = {key: str(getattr(options, key)) for key in kept}
    data = Path(options.train).parent.name
    page = f"speedrun-{data}-{options.method}-{options.backbone}-{options.seconds:g}-seconds-{machine.slug(facts)}"
    rows = sorted(rows, key=lambda row: (names.index(row["recipe"]), row["seed"]))
    means = tables.over_seeds(rows, "recipe", learning.FIGURES.values())
    title = f"--preset fast in {options.seconds:g} seconds, and what differs from it in one thing"
    tables.write(options.out / page, title, ABOUT, facts, settings, rows, means)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    learning.add_arguments(parser)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--method", default="simclr")
    parser.add_argument("--rows", nargs="+", help="by their names; all that concern the encoder")
    options = parser.parse_args()
    options.minutes = options.seconds / 60
    options.seed = options.seeds[0]
    options.alone = options.method  # whose encoder it is
    found = recipes(options)
    names = [*found]
    if wrong := [name for name in options.rows or () if name not in names]:
        parser.error(f"there is no row {wrong[0]!r}, but {names}")
    runs = [(name, found[name], seed) for seed in options.seeds for name in options.rows or names]
    rows: list[dict[str, Any]] = []
    for done in tables.spread(lambda run, core: row(*run, options, core), runs, options.cores):
        rows.append(done)
        print(json.dumps(done), flush=True)
        if options.out:
            write(options, names, rows)


if __name__ == "__main__":
    main()
