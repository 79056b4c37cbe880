"""A training step of every method taken apart, what masks save, and lightly's examples on the same encoder beside ours.

    python benchmarks/steps.py [--size 32 224] [--methods dino mae ...] [--batch 32] [--rounds 5] [--out DIR]
    python benchmarks/steps.py --masks             images a second with 0, 50 and 75 % of the patches dropped: of the
                                                   encoder alone, and of whole steps of methods with `--mask`

Times are minima over rounds, in milliseconds, of one process; ours and lightly's alternate. Images are random: nothing
here depends on what they show. Encoders are small, so that what is outside of them shows; --backbone and --vit choose
others.
"""

import argparse
import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastjem import backbones, encoders, optim
from fastjem.bench import machine
from fastjem.data.batch import Batch, Crops, finish
from fastjem.data.loaders import Order
from fastjem.data.loaders.memory import ImageArray, MemoryLoader
from fastjem.data.masking import mask_specs, masks_of_run
from fastjem.machine import keep_memory
from fastjem.methods import METHODS, RunFacts, needs_patches, views_of
from fastjem.step import Step

sys.path.insert(0, str(Path(__file__).parent))
import tables
from lightly_steps import THEIRS, Theirs

PARTS = ("data", "augmentation", "teacher", "forward", "heads and loss", "backward", "optimiser and EMA", "step's end")
MASKED = (0.0, 0.5, 0.75)  # shares of the patches
IMAGES = 50_000  # that a run is taken to have: prototypes and queues have their sizes of it


class Clock:
    """Seconds by part, on the host; a GPU is waited for at each end."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        begin = self.now()
        yield
        self.seconds[name] += self.now() - begin


@dataclass
class Ours:
    """A method with all that its steps need."""

    name: str
    step: Step
    specs: list
    masks: list
    crops: list[Crops]
    loader: MemoryLoader
    device: torch.device
    optimizer: torch.optim.Optimizer = field(init=False)
    done: int = 0

    def __post_init__(self) -> None:
        self.optimizer = optim.build("adamw", optim.parameter_groups(self.step, self.step.method.constant_rate))
        optim.separate_groups(self.optimizer)
        if isinstance(self.optimizer, optim.Fused):
            self.optimizer.attach_teacher(*self.step.teacher_and_student())
        self.schedule = optim.Schedule(steps=10_000, learning_rate=1e-4)
        self.momentum = torch.tensor(0.99, dtype=torch.float64)

    def finished(self, crops: Crops) -> Batch:
        return finish(crops, self.specs, self.device, masks=self.masks, step=self.done)

    def run(self, batch: Batch, clock: Clock | None = None) -> None:
        """One step of a batch, taken apart by the clock."""
        clock = clock or Clock(self.device)
        self.schedule.apply(self.optimizer, self.done)
        self.optimizer.zero_grad(set_to_none=True)
        whole = Clock(self.device)
        inner = Clock(self.device)
        with watched(self.step, inner), whole.part("all"):
            loss, _ = self.step(batch, self.done)
        for part, seconds in inner.seconds.items():
            clock.seconds[part] += seconds
        clock.seconds["heads and loss"] += whole.seconds["all"] - sum(inner.seconds.values())
        with clock.part("backward"):
            loss.backward()
        with clock.part("optimiser and EMA"):
            fused = isinstance(self.optimizer, optim.Fused)
            if fused:
                self.optimizer.step(teacher_momentum=self.momentum)
            else:
                self.optimizer.step()
        with clock.part("step's end"):
            self.step.step_ends(self.done, None if fused else self.momentum)
        self.done += 1


@contextmanager
def watched(step: Step, clock: Clock) -> Iterator[None]:
    """The clock gets the time within the encoder, and within its momentum copy."""
    handles = []
    copies = dict(step.teacher.items())
    for part, module in (("forward", step.encoder), ("teacher", copies.get("encoder"))):
        if module is None:
            continue
        begun: list[float] = []
        handles.append(module.register_forward_pre_hook(lambda *_, begun=begun: begun.append(clock.now())))

        def ends(*_: object, begun: list[float] = begun, part: str = part) -> None:
            clock.seconds[part] += clock.now() - begun.pop()

        handles.append(module.register_forward_hook(ends))
    yield
    for handle in handles:
        handle.remove()


def backbone_of(name: str, size: int, options: argparse.Namespace) -> str:
    kind = METHODS[name]
    return options.vit if needs_patches(kind) else options.backbone


def ours(name: str, size: int, options: argparse.Namespace, given: str, mask: float | None = None) -> Ours:
    """The method as a run on `IMAGES` images of that size has it, and some batches of crops.

    mask: a run's share of hidden patches, or 0, on a vision transformer; None: the method's own encoder and masks.
    """
    torch.manual_seed(0)
    kind = METHODS[name]
    device = torch.device(options.device)
    patch = 4 if size <= 64 else 16
    backbone = backbone_of(name, size, options) if mask is None else options.vit
    is_vit = backbone == options.vit
    module = backbones.create(backbone, size, patch=patch if is_vit else 0, pool=kind.pool)
    encoder = encoders.wrap(module.to(device), mask_token=kind.mask_token)
    facts = RunFacts(
        images=IMAGES, classes=10, steps=10_000, steps_per_epoch=100, batch=options.batch, image_size=size,
        patch=encoder.patch, batch_norm=encoders.has_batch_norm(encoder),
    )  # fmt: skip
    extra: dict[str, Any] = {"given": given} if name == "distill" else {}
    if name == "wmse":
        extra = {"dim": min(64, options.batch // 2), "whitening_size": options.batch}
    method = kind(encoder.width, facts, **extra)
    views = views_of(method, size)
    specs = views.specs(size, patch=encoder.patch)
    method.mean, method.std = specs[0].mean, specs[0].std
    stored = torch.randint(0, 256, (256, size * 8 // 7, size * 8 // 7, 3), dtype=torch.uint8)
    array = ImageArray(stored.to(device), torch.arange(256) % 10)
    loader = MemoryLoader(array, specs, Order(samples=256, batch=options.batch, stop=10**6))
    crops = [next(iter(loader))]
    step = Step(encoder, method).to(device)
    masks = (
        masks_of_run(specs, encoder.patch, mask, "random") if mask else mask_specs(method.views, size, encoder.patch)
    )
    return Ours(name, step, specs, masks, crops, loader, device)


def taken_apart(run: Ours, rounds: int) -> dict[str, float]:
    """Milliseconds by part, the round with the least sum."""
    found = []
    batches = iter(run.loader)
    for _ in range(rounds + 1):
        clock = Clock(run.device)
        with clock.part("data"):
            crops = next(batches)
        with clock.part("augmentation"):
            batch = run.finished(crops)
        run.run(batch, clock)
        found.append(dict(clock.seconds))
    best = min(found[1:], key=lambda parts: sum(parts.values()))
    return {part: 1000 * best.get(part, 0.0) for part in PARTS}


def beside(run: Ours, theirs: Theirs, rounds: int) -> tuple[float, float]:
    """Milliseconds of a step, ours and lightly's, on the same views, alternating."""
    batch = run.finished(run.crops[0])
    sides: dict[str, Callable[[], None]] = {"ours": lambda: run.run(batch), "theirs": lambda: theirs.run(batch)}
    best = dict.fromkeys(sides, float("inf"))
    clock = Clock(run.device)
    for i in range(rounds + 1):
        for name in sorted(sides, reverse=bool(i % 2)):
            begin = clock.now()
            sides[name]()
            if i:
                best[name] = min(best[name], clock.now() - begin)
    return 1000 * best["ours"], 1000 * best["theirs"]


def masked_rates(options: argparse.Namespace) -> list[dict]:
    """Images a second, forward and backward, of a vision transformer that is given a share of its patches."""
    device = torch.device(options.device)
    rows = []
    for size in options.size:
        patch = 4 if size <= 64 else 16
        encoder = encoders.wrap(backbones.create(options.vit, size, patch=patch).to(device))
        images = torch.randn(options.batch, 3, size, size, device=device)
        patches = (size // patch) ** 2
        rates = {}
        for share in MASKED:
            kept = patches - round(patches * share)
            visible = torch.rand(options.batch, patches, device=device).argsort(1)[:, :kept]
            best = float("inf")
            clock = Clock(device)
            for i in range(options.rounds + 1):
                begin = clock.now()
                encoder(images, visible=None if share == 0 else visible).pooled.sum().backward()
                best = min(best, clock.now() - begin) if i else best
            rates[f"{share:.0%}"] = round(options.batch / best, 1)
        rows.append({"of": "encoder", "size": size, "backbone": options.vit, "patches": patches, **rates})
        rows += [masked_steps(name, size, options, patches) for name in options.methods]
    return rows


def masked_steps(name: str, size: int, options: argparse.Namespace, patches: int) -> dict:
    """Images a second of a method's whole step behind the loader, with its views' colours, by the share of patches that
    its trained encoder isn't given; shares alternate."""
    runs = {share: ours(name, size, options, "", share) for share in MASKED}
    best = dict.fromkeys(runs, float("inf"))
    for i in range(options.rounds + 1):
        for share, run in runs.items():
            clock = Clock(run.device)
            begin = clock.now()
            run.run(run.finished(run.crops[0]))
            best[share] = min(best[share], clock.now() - begin) if i else best[share]
    rates = {f"{share:.0%}": round(options.batch / seconds, 1) for share, seconds in best.items()}
    return {"of": name, "size": size, "backbone": options.vit, "patches": patches, **rates}


def given_weights(folder: Path, backbone: str) -> str:
    """A file with an encoder's weights, for distillation."""
    path = folder / "given.safetensors"
    if not path.exists():
        from fastjem.data.pixels import Pixels

        module = backbones.create(backbone, 32)
        encoders.save(module, str(path), encoders.metadata(backbone, "auto", 0, None, Pixels(32)))
    return str(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, nargs="+", default=[32, 224])
    parser.add_argument("--methods", nargs="+", default=None, help="all; with --masks simclr, byol, vicreg and dino")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backbone", default="test_resnet")
    parser.add_argument("--vit", default="test_vit")
    parser.add_argument("--masks", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    options.methods = options.methods or (["simclr", "byol", "vicreg", "dino"] if options.masks else [*METHODS])
    keep_memory()  # as `fastjem pretrain` does; lightly's steps, in the same process, have it from that too

    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as folder:
        if options.masks:
            rows = masked_rates(options)
            print("\n".join(json.dumps(row) for row in rows))
        else:
            given = given_weights(Path(folder), options.backbone)
            for size in options.size:
                for name in options.methods:
                    rows.append(measured(name, size, options, given))
                    print(json.dumps(rows[-1]), flush=True)
    if options.out:
        write(options, rows)


def measured(name: str, size: int, options: argparse.Namespace, given: str) -> dict:
    run = ours(name, size, options, given)
    row: dict[str, Any] = {"method": name, "size": size, "backbone": backbone_of(name, size, options)}
    parts = taken_apart(run, options.rounds)
    row |= {part: round(value, 2) for part, value in parts.items()}
    row["all"] = round(sum(parts.values()), 2)
    if name in THEIRS:
        theirs = THEIRS[name](run.step, size)
        if theirs is not None:
            mine, other = beside(run, theirs, options.rounds)
            row |= {"step": round(mine, 2), "lightly": round(other, 2), "ratio": round(other / mine, 2)}
    return row


def write(options: argparse.Namespace, rows: list[dict]) -> None:
    facts = machine.describe(torch.device(options.device))
    kind = "masks" if options.masks else "steps"
    title = f"{facts.get('gpu') or facts['cpu']}: " + ("masks" if options.masks else "a step taken apart")
    about = "Milliseconds, minima over rounds. ratio: lightly's example on the same encoder and views, over ours."
    if options.masks:
        about = "Images a second by the share of patches dropped: an encoder forward and backward, and whole steps."
    settings = {"batch": options.batch, "rounds": options.rounds}
    tables.write(options.out / f"{kind}-{machine.slug(facts)}", title, about, facts, settings, rows)


if __name__ == "__main__":
    main()
