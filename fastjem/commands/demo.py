"""`fastjem demo`: train on the embedded data set for minutes, and say what that was worth."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastjem import backbones, fields
from fastjem.config import Config
from fastjem.data import shapes
from fastjem.data.pixels import Pixels
from fastjem.data.source import open_source
from fastjem.errors import UserError
from fastjem.machine import available_cores
from fastjem.printing import say
from fastjem.probes import knn_accuracy
from fastjem.report import write
from fastjem.run import pretrain
from fastjem.runs import open_run

# What learns in minutes on two cores: 0.4 M parameters at 48 pixels. AdamW, as LARS warms up longer than this lasts.
RECIPE: dict[str, Any] = {
    "method": "simclr", "backbone": "test_resnet", "image_size": 48, "stem": "standard", "batch_size": 64,
    "optimizer": "adamw", "learning_rate": 4e-3, "weight_decay": 1e-4, "options": {"temperature": 0.2},
    "log_every": 20, "epochs": 1000,
}  # fmt: skip


@dataclass
class DemoOptions:
    """Train on the embedded data set (ten shapes) and compare: raw pixels, untrained encoder, trained encoder."""

    out: str = field(
        default="runs/demo", metadata={"help": "folder of the run; a number is added if it is taken", "path": True}
    )
    steps: int = field(default=900, metadata={"help": "of 64 images"})
    seed: int = field(default=0, metadata={"help": "of weights and views"})
    device: str = field(default="auto", metadata={"help": "auto | cpu | cuda", "device": True})


def demo(options: DemoOptions) -> tuple[dict[str, float], Path]:
    """kNN accuracy of pixels, untrained and trained encoder on the test images, and the run's folder."""
    fields.conform(options, "demo: {}".format)
    if options.steps < 1:
        raise UserError(f"--steps must be at least 1, got {options.steps}")
    out = free_folder(options.out)
    root = shapes.folder()
    train = open_source(root / "train")
    test = open_source(root / "test")
    pixels = Pixels(RECIPE["image_size"])
    torch.manual_seed(options.seed)
    untrained = backbones.create(RECIPE["backbone"], pixels.size, stem=RECIPE["stem"])
    found = {
        "raw pixels": knn_accuracy(nn.Flatten(), train, test, pixels),
        "untrained encoder": knn_accuracy(untrained, train, test, pixels),
    }
    training = Config(
        **RECIPE, out=str(out), data=str(root / "train"), max_steps=options.steps, seed=options.seed,
        device=options.device, workers=min(available_cores(), 2),
    )  # fmt: skip
    if not pretrain(training).finished:
        raise KeyboardInterrupt
    opened = open_run(out)
    found["trained encoder"] = knn_accuracy(opened.encoder, train, test, opened.pixels)
    return found, out


def free_folder(name: str) -> Path:
    """`name`, or name-2, name-3, ... where there is a run in it already."""
    folder = Path(name)
    number = 1
    while (folder / "config.yaml").exists():
        number += 1
        folder = Path(f"{name}-{number}")
    return folder


def main(options: DemoOptions) -> int:
    from rich.console import Console
    from rich.table import Table

    found, out = demo(options)
    table = Table("compared by", "right of 1000 test images (kNN, k = 20)", title="ten shapes; chance is 10.0%")
    for name, accuracy in found.items():
        table.add_row(name, f"{accuracy:.1%}")
    Console().print(table)
    say(f"report: {write(out)}", sys.stdout)
    return 0
