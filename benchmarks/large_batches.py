"""Memory and time of a step by micro-batches, for batches from 256 to 16,384, beside the step at once.

    python benchmarks/large_batches.py [--methods simclr dino] [--batches 256 1024] [--micro-batch 256] [--out DIR]

Every row is a process of its own. Its step has what `fastjem pretrain --micro-batch` has: crops of a byte a channel,
colours, both passes, heads, loss, optimiser and momentum encoder. Images are random: nothing here depends on what they
show. The encoder (timm's test_vit, 300,000 parameters, four patches of a 32-pixel image) and the heads (256 wide) are
so small that a batch of 16,384 fits at once, too: minutes on two cores; --backbone, --patch and --size choose others. A
batch that would take more than `--most` of the free memory at once, by what the one before took, isn't tried so.
"""

import argparse
import ctypes
import json
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastjem import backbones, encoders, optim
from fastjem.bench import machine
from fastjem.data.batch import Crops, finish
from fastjem.data.parameters import Parameters
from fastjem.large_batches import forward_backward
from fastjem.machine import keep_memory
from fastjem.methods import METHODS, RunFacts, views_of
from fastjem.micro_batches import Passes
from fastjem.step import Step

sys.path.insert(0, str(Path(__file__).parent))
import tables

HEADS: dict[str, dict[str, Any]] = {
    "simclr": {"hidden": 256, "dim": 128, "norm": "layer"},
    "vicreg": {"hidden": 256},
    "swav": {"hidden": 256, "dim": 128, "prototypes": 512, "frozen_epochs": 0, "norm": "layer"},
    "dino": {"hidden": 256, "bottleneck": 128, "prototypes": 512, "frozen_epochs": 0},
}
MIB = 1 << 20
IMAGES = 1_000_000  # that a run is taken to have: prototypes have their number of it


class Resident:
    """Peaks of this process's memory, as the system counts it (Linux): in all, and in each pass of the encoder.

    Freed memory is given back before each pass, so that what one takes shows, whatever was in use before.
    """

    def __init__(self) -> None:
        self.start = self._restart()
        self.highest = self.start
        self.passes: list[int] = []  # what was taken in each stretch between two beginnings

    def begins(self) -> None:
        """A forward pass: of the whole loss first, then of each second pass of the encoder."""
        self.ends()
        self.before = self._restart()

    def ends(self) -> None:
        if hasattr(self, "before"):
            peak = self._kilobytes("VmHWM")
            self.highest = max(self.highest, peak)
            self.passes.append(peak - self.before)

    @contextmanager
    def around(self) -> Iterator[None]:
        self.begins()
        yield

    def _restart(self) -> int:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        return self._kilobytes("VmRSS")

    def _kilobytes(self, field: str) -> int:
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(lines[field].split()[0])


class Run:
    """A method with all that its steps need, and one batch of crops."""

    def __init__(self, name: str, batch: int, options: argparse.Namespace):
        torch.manual_seed(0)
        kind = METHODS[name]
        module = backbones.create(options.backbone, options.size, patch=options.patch)
        encoder = encoders.wrap(module)
        facts = RunFacts(images=IMAGES, steps=10_000, steps_per_epoch=100, batch=batch, image_size=options.size)
        views = views_of(name, options.size)
        specs = views.specs(options.size, patch=encoder.patch)
        self.specs = specs
        self.step = Step(encoder, kind(encoder.width, facts, **HEADS.get(name, {}))).train()
        self.optimizer = optim.build("adamw", optim.parameter_groups(self.step))
        optim.separate_groups(self.optimizer)
        self.batch = batch
        self.crops = self.made(batch)
        self.embeddings = self.views * batch * encoder.width * 4 * (2 + bool(self.step.teacher))
        self.done = 0

    @property
    def views(self) -> int:
        return len(self.specs)

    def made(self, batch: int) -> Crops:
        shape = batch, self.specs[0].size, self.specs[0].size, 3
        views = [torch.randint(0, 256, shape, dtype=torch.uint8) for _ in self.specs]
        tables = [torch.from_numpy(x) for x in Parameters(self.specs)(0, 0, np.arange(batch), 40, 40)]
        return Crops(views, tables, torch.arange(batch), 0, None, [])

    def take(self, crops: Crops, size: int, resident: Resident | None = None) -> None:
        """One step. size: of micro-batches; 0: at once."""
        self.optimizer.zero_grad(set_to_none=True)
        batch = finish(crops, self.specs, "cpu", late=bool(size))
        if size:
            around = {"around": resident.around} if resident else {}
            forward_backward(self.step, batch, self.done, Passes(size), **around)
        else:
            self.step(batch, self.done)[0].backward()
        if resident:
            resident.ends()
        self.optimizer.step()
        self.step.step_ends(self.done, 0.99)
        self.done += 1


def measured(name: str, batch: int, size: int, options: argparse.Namespace) -> dict[str, Any]:
    """The row of one method and batch. Time: the fastest step, of one or a few; memory: of another step."""
    keep_memory()
    run = Run(name, batch, options)
    small = run.made(min(batch, 256))
    for _ in range(2):  # what is made once: the optimiser's state, the operators' threads
        run.take(small, min(size, 128))
    passes = []
    for _ in range(2 if batch < 4096 else 1):
        resident = Resident()
        if not size:
            resident.begins()
        run.take(run.crops, size, resident)
        passes += resident.passes[1:]
    times = []
    for _ in range(1 if batch > 4096 else 2 if batch > 1024 else 4):
        begin = time.perf_counter()
        run.take(run.crops, size)
        times.append(time.perf_counter() - begin)
    values = sum(view.numel() for view in run.crops.views)
    row = {
        "method": name,
        "batch": batch,
        "passes": f"by {size}" if size else "at once",
        "peak MiB": round((resident.highest - resident.start) / 1024),
        "encoder MiB": round(statistics.median(passes) / 1024, 1) if size else None,
        "encoder, highest MiB": round(max(passes) / 1024, 1) if size else None,
        "heads and loss MiB": round(resident.passes[0] / 1024) if size else None,
        "embeddings MiB": round(run.embeddings / MIB, 1),
        "views MiB": round(values / MIB, 1),
        "views as floats MiB": round(4 * values / MIB, 1),
        "seconds": round(min(times), 3),
        "images a second": round(batch / min(times), 1),
    }
    return {key: value for key, value in row.items() if value is not None}


def free_mib() -> float:
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) / 1024


def command(name: str, batch: int, size: int, options: argparse.Namespace) -> list[str]:
    own = ["--backbone", options.backbone, "--size", str(options.size), "--patch", str(options.patch)]
    return [sys.executable, __file__, "--one", name, str(batch), str(size), *own]


def rows_of(name: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """At once, as far as that fits, then by micro-batches, each beside the largest batch at once."""
    largest: dict[str, Any] | None = None
    for batch in options.batches:
        if largest and largest["peak MiB"] * batch / largest["batch"] > options.most * free_mib():
            break
        row = tables.row_of(command(name, batch, 0, options))
        yield row
        if "error" in row:
            break
        largest = row
    for batch in options.batches:
        row = tables.row_of(command(name, batch, options.micro_batch, options))
        if largest and "error" not in row:
            row["times the time at once"] = round(largest["images a second"] / row["images a second"], 2)
            row["of batch"] = largest["batch"]
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", nargs="+", default=[*HEADS])
    parser.add_argument("--batches", type=int, nargs="+", default=[256, 1024, 4096, 16384])
    parser.add_argument("--micro-batch", type=int, default=256)
    parser.add_argument("--backbone", default="test_vit")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--patch", type=int, default=16)
    parser.add_argument("--most", type=float, default=0.5, help="of the free memory that a batch at once may take")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", nargs=3, metavar=("METHOD", "BATCH", "MICRO_BATCH"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        name, batch, size = options.one
        print("ROW " + json.dumps(measured(name, int(batch), int(size), options)))
        return
    rows = []
    for name in options.methods:
        for row in rows_of(name, options):
            rows.append(row)
            print(json.dumps(row), flush=True)
    if options.out:
        write(options, rows)


def write(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    facts = machine.describe(torch.device("cpu"))
    about = (
        "Peaks are of a step beyond what was in use before it, in MiB. encoder: what a second pass takes (the median "
        "of all, and the highest, in which is what the allocator happens to hold), with its graph and its views as "
        "floats. heads and loss: what is taken from the first of all passes "
        "to the end of the loss's backward pass, the embeddings among it. embeddings: of all views with their "
        "gradients, and the momentum encoder's, by their size. views: the batch as bytes, in use before the step, and "
        "what it would be as floats. times the time at once: for an image, beside the largest batch at once."
    )
    settings = {"backbone": options.backbone, "size": options.size, "patch": options.patch}
    settings |= {"micro-batch": options.micro_batch, "heads": json.dumps(HEADS)}
    title = f"{facts['cpu']}: large batches by micro-batches"
    tables.write(options.out / f"large-batches-{machine.slug(facts)}", title, about, facts, settings, rows)


if __name__ == "__main__":
    main()
