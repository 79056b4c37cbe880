"""`fastjem pretrain` and `fastjem.pretrain(...)`: a run from its folder to its last checkpoint, top to bottom."""

import contextlib
import dataclasses
import json
import signal
import sys
import time
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from fastjem import checkpoints, encoders, health, optim
from fastjem import config as configuration
from fastjem.build import ENCODER, MakeOptimizer, Objects, Training, build
from fastjem.config import Config
from fastjem.data import shapes
from fastjem.data.batch import Batch, Crops, finish
from fastjem.data.source import Source
from fastjem.errors import UserError
from fastjem.journal import Journal
from fastjem.kernels.arithmetic import widest_dtype
from fastjem.loggers import Logger
from fastjem.methods import Method
from fastjem.printing import say
from fastjem.ranks import Ranks, join, leave
from fastjem.report import Watch

EARLY_STEPS = 100  # in which every fifth step is logged: collapse is early


@dataclass(frozen=True)
class Result:
    """Where the run is, how far it came, and the last logged figures."""

    out: Path
    steps: int
    finished: bool
    metrics: dict[str, Any]


def pretrain(
    config: Config | None = None,
    *,
    encoder: str | torch.nn.Module | None = None,
    method: str | type[Method] | Method | None = None,
    source: Source | None = None,
    optimizer: str | MakeOptimizer | None = None,
    loggers: Sequence[Logger] = (),
    **fields: Any,
) -> Result:
    """Pretrain an encoder on images; fields as in `fastjem.config.Config`, `out` among them.

    Args:
        config: all fields at once, in place of `fields`.
        encoder: a backbone's name, or any module [B, 3, H, W] -> [B, D] in place of one.
        method: a name, or a subclass of `fastjem.methods.Method`, or one that is made for the encoder's width.
        source: any object with `len` and `read(i)` (bytes of an image file, or pixels [H, W, 3]) in place of `data`.
        optimizer: a name, or what makes one of parameter groups (a class of `torch.optim`, a `functools.partial`).
        loggers: objects with `begin`, `log` and `close` beside the configured ones, see `fastjem.loggers`.

    Raises:
        UserError: (a ValueError) for what can't be done, with the reason.
    """
    if isinstance(method, str):
        fields["method"] = method
        method = None
    if isinstance(optimizer, str):
        fields["optimizer"] = optimizer
        optimizer = None
    if isinstance(encoder, str):
        if "backbone" in fields:
            raise UserError(f"pretrain takes encoder or backbone, got both ({encoder!r} and {fields['backbone']!r})")
        fields["backbone"] = encoder
        encoder = None
    objects = Objects(encoder, method, source, optimizer)
    wrong = [logger for logger in loggers if not isinstance(logger, Logger)]
    if wrong:
        raise UserError(f"loggers must have begin, log and close (fastjem.loggers.Logger), got {wrong[0]!r}")
    if config is None:
        config = configuration.from_fields(fields)
    elif fields:
        raise UserError(f"pretrain takes a Config or fields, got both ({', '.join(fields)})")
    if isinstance(method, Method) and config.options:
        raise UserError("options are arguments of a method that the run makes; this one is made already")
    if source is not None and config.data:
        raise UserError(f"pretrain takes data or source, got both (data={config.data!r})")
    if method is not None:
        config = replace(config, method=_name_of(method))
    configuration.check(config, named_method=method is None)
    if source is not None:
        config = replace(config, data=_name_of(source))
    embedded = config.data is None
    if embedded:
        config = replace(config, data=str(shapes.folder() / "train"))
    ranks = join(config.device)
    if embedded and ranks.first:
        say(f"no data is named: the embedded data set, ten shapes, is trained on ({config.data})")
    try:
        with Stop() as stop:
            return run(config, ranks, objects, loggers, stop)
    finally:
        leave(ranks)


def main(config: Config) -> int:
    """The command line's exit code."""
    return 0 if pretrain(config).finished else 130  # stopped as asked to, with everything saved


def _name_of(thing: object) -> str:
    kind = thing if isinstance(thing, type) else type(thing)
    return f"{kind.__module__}.{kind.__qualname__}"


def run(config: Config, ranks: Ranks, objects: Objects, loggers: Sequence[Logger], stop: "Stop") -> Result:
    """Open the folder, build, train. A run that took no step leaves no trace: the corrected command can use `out`."""
    out = Path(config.out)
    state = resumed(config, out) if config.resume else None
    if not config.resume:
        check_free(out, ranks)
    training = build(config, ranks, objects, out, state)
    if ranks.first and not config.resume:
        configuration.write(out, config, training.pixels, training.step.method.pool)
    try:
        return train(training, objects, loggers, stop, state)
    except BaseException:
        if ranks.first and not config.resume and training.done == 0:
            for name in (checkpoints.LAST, configuration.FILE):
                (out / name).unlink(missing_ok=True)
        raise


def resumed(config: Config, out: Path) -> dict[str, Any] | None:
    """The checkpoint to go on from, if there is one yet."""
    if not (out / configuration.FILE).exists():
        raise UserError(f"--resume: there is no run in {out}")
    before, _, _ = configuration.read(out)
    configuration.check_resumed(config, before)
    return checkpoints.load(out)


def check_free(out: Path, ranks: Ranks) -> None:
    """UserError if a run is there; all ranks have looked before one of them writes."""
    if (out / configuration.FILE).exists() and ranks.first:
        raise UserError(f"{out} holds a run already; --resume goes on with it, another --out starts a new one")
    ranks.barrier()


def train(
    training: Training, objects: Objects, loggers: Sequence[Logger], stop: "Stop", state: dict[str, Any] | None
) -> Result:
    """From the first step to the last, or to where somebody asked to stop."""
    out, ranks = training.out, training.ranks
    journal = Journal(training, loggers, (state or {}).get("unreadable", ()))
    for notice in training.notices:
        journal.say(notice)
    watch = Watch(training, journal.say)
    saver = Saver(training, journal)
    if not state:
        saver.save(0)  # a run killed before its first checkpoint starts at step 0; a full disk is seen now
    watch.begin()
    meter = Meter(training)
    try:
        for taken in optimizer_steps(training, journal):
            done = training.done = taken.done
            for row in meter.rows(taken):
                journal.log(*row)
            watch.after_step(done)
            asked = ranks.any(stop.signal is not None)
            if asked or saver.due(done) or done == training.steps:
                for row in meter.waiting():  # a row that the checkpoint has passed would be lost with a kill
                    journal.log(*row)
                saver.save(done)
                if done < training.steps:
                    watch.refresh()
            if asked:
                break
        for row in meter.waiting():
            journal.log(*row)
    except ValueError as error:
        if objects.method is None and training.done == training.start:
            raise UserError(str(error)) from error  # an operator's contract, broken by an option: a temperature of 0
        raise
    finally:
        journal.close()
    done = training.done
    if ranks.first and done == training.steps:
        journal.say(export(training, named=objects.encoder is None))
    watch.end()
    ranks.barrier()
    if stop.signal is not None and ranks.first:
        print(f"stopped at step {done}; go on with --resume --out {out}", file=sys.stderr)
    return Result(out, done, done == training.steps, journal.last_row)


@dataclass
class Taken:
    """One optimiser step that was taken."""

    done: int  # steps so far
    images: int  # of this rank
    waited: float  # seconds for data
    losses: list[Tensor]  # of its micro-batches, 0-dim
    notes: dict[str, Any]  # of the last of them
    gradient_norm: Tensor | None  # before clipping
    scheduled: dict[str, Tensor]  # learning rate, weight decay, momentum


def optimizer_steps(training: Training, journal: Journal) -> Iterator[Taken]:
    """Train, one optimiser step at a time. Nothing here waits for the device."""
    step, model, optimizer = training.step, training.model, training.optimizer
    device = training.ranks.device
    parameters = [p for p in step.parameters() if p.requires_grad]
    momentum = torch.zeros((), dtype=widest_dtype(device), device=device)
    number = torch.zeros((), dtype=torch.long, device=device)
    batches = timed(training, journal)
    model.train()
    for done in range(training.start, training.steps):
        seed_generators(training.config.seed, done, training.ranks)
        if done % training.steps_per_epoch == 0:
            step.method.epoch_begins(done // training.steps_per_epoch)
        scheduled = training.schedule.apply(optimizer, done)
        number.fill_(done)
        optimizer.zero_grad(set_to_none=True)
        taken = Taken(done + 1, 0, 0.0, [], {}, None, scheduled)
        for part in range(training.config.accumulate):
            batch, waited = next(batches)
            is_last = part == training.config.accumulate - 1
            loss, taken.notes = forward_backward(training, batch, number, synchronise=is_last)
            taken.losses.append(loss)
            taken.waited += waited
            taken.images += len(batch.index)
        if training.clip:
            taken.gradient_norm = optim.clip_(parameters, training.clip)
        optimizer.step()
        momentum.fill_(scheduled["momentum"].item())
        step.step_ends(number, momentum)
        yield taken


def forward_backward(
    training: Training, batch: Batch, number: Tensor, *, synchronise: bool
) -> tuple[Tensor, dict[str, Any]]:
    """The detached loss of a micro-batch and its notes; gradients are added up, and over ranks with the last one."""
    model = training.model
    together = contextlib.nullcontext() if synchronise or training.ranks.size == 1 else cast(Any, model).no_sync()
    with together:
        with torch.autocast(training.ranks.device.type, training.autocast, enabled=training.autocast is not None):
            loss, notes = model(batch, number)
        (loss / training.config.accumulate).backward()
    return loss.detach(), notes


def timed(training: Training, journal: Journal) -> Iterator[tuple[Batch, float]]:
    """Batches on the device, and the seconds that each was waited for."""
    crops: Iterator[Crops] = iter(training.loader)
    while True:
        begin = time.perf_counter()
        arrived = next(crops, None)
        if arrived is None:
            return
        journal.skip(arrived.unreadable)
        batch = finish(
            arrived,
            training.specs,
            training.ranks.device,
            masks=training.masks,
            seed=training.config.seed,
            **training.layout,
        )
        yield batch, time.perf_counter() - begin


def seed_generators(seed: int, step: int, ranks: Ranks) -> None:
    """Dropout and drop path depend on (seed, step, rank) alone: a resumed run needs no saved generator.

    Not torch.manual_seed: where CUDA hasn't started it formats a stack trace, 0.46 ms.
    """
    generators = [torch.default_generator]
    if ranks.device.type == "cuda":
        generators.append(torch.cuda.default_generators[ranks.device.index or 0])
    for generator in generators:
        generator.manual_seed(((seed * 1_000_003 + step) * 4099 + ranks.rank) % 2**63)


Row = tuple[int, dict[str, Any]]


class Meter:
    """The figures of logged steps, each given one logged step late: no step waits for the device to know its loss."""

    def __init__(self, training: Training):
        self.training = training
        self.pending: tuple[int, list[str], Tensor, Any, dict[str, Any]] | None = None
        self.images = 0
        self.waited = 0.0
        self.since = time.perf_counter()

    def rows(self, taken: Taken) -> Iterator[Row]:
        """The rows that are ready now; on the CPU this step's own, elsewhere those of the logged step before."""
        self.images += taken.images
        self.waited += taken.waited
        if not self._logs(taken.done):
            return
        yield from self.waiting()
        figures = {"loss": torch.stack(taken.losses).mean(), **health.figures(taken.notes)}
        if taken.gradient_norm is not None:
            figures["gradient_norm"] = taken.gradient_norm
        values = torch.stack([value.float() for value in figures.values()])
        event = None
        if values.device.type == "cuda":
            values = values.to("cpu", non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        known = {name: value.item() for name, value in taken.scheduled.items()} | self._rates()
        self.pending = (taken.done, list(figures), values, event, known)
        if event is None:
            yield from self.waiting()

    def waiting(self) -> Iterator[Row]:
        """The row that isn't given yet, if there is one; its figures are waited for."""
        if self.pending is None:
            return
        done, names, values, event, known = self.pending
        self.pending = None
        if event is not None:
            event.synchronize()
        yield done, {**known, **dict(zip(names, values.tolist(), strict=True))}

    def _logs(self, done: int) -> bool:
        every = self.training.config.log_every
        return done % every == 0 or done == self.training.steps or (done < EARLY_STEPS and done % 5 == 0)

    def _rates(self) -> dict[str, float]:
        now = time.perf_counter()
        elapsed = now - self.since
        rates = {"images_per_second": self.images / elapsed, "data_wait": min(self.waited / elapsed, 1.0)}
        self.images = 0
        self.waited = 0.0
        self.since = now
        return rates


class Saver:
    """Checkpoints of a run: when they are due, and what is in them."""

    def __init__(self, training: Training, journal: Journal):
        self.training = training
        self.journal = journal
        self.saved_at = time.monotonic()

    def due(self, done: int) -> bool:
        """By steps or by the clock; all ranks agree. A collective call."""
        config, ranks = self.training.config, self.training.ranks
        if config.checkpoint_steps:
            return done % config.checkpoint_steps == 0
        return ranks.any(ranks.first and time.monotonic() - self.saved_at > config.checkpoint_every)

    def save(self, done: int) -> None:
        training = self.training
        if training.ranks.first:
            state = {
                **training.state(done),
                "defaults": dataclasses.asdict(training.defaults),
                "config": json.dumps(dataclasses.asdict(training.config)),
                "unreadable": sorted(self.journal.unreadable),
                "decoder_share": training.loader.decoder_share,  # it decides about pixels
                "seed": training.config.seed,  # every generator follows from it and the step
            }
            self.journal.say(checkpoints.save(training.out, state))
        self.saved_at = time.monotonic()


def export(training: Training, *, named: bool) -> str | None:
    """Write the encoder; what went wrong, in words. named: by a backbone's name, else only its owner can build it."""
    config, step = training.config, training.step
    pool = step.method.pool
    about = encoders.metadata(config.backbone, config.stem, config.patch_size, pool, training.pixels) if named else {}
    try:
        encoders.save(step.encoder.backbone, str(training.out / ENCODER), about)
    except OSError as error:
        return f"{ENCODER} could not be written ({error.strerror}); --resume tries again"
    return None


class Stop:
    """SIGTERM and Ctrl-C ask the loop to end after its step; a second Ctrl-C ends it at once."""

    signal: int | None = None

    def __enter__(self) -> "Stop":
        self.old_handlers: dict[int, Any] = {}
        for number in (signal.SIGTERM, signal.SIGINT):
            with contextlib.suppress(ValueError):  # not in the main thread: the caller's business
                self.old_handlers[number] = signal.signal(number, self.ask)
        return self

    def ask(self, number: int, frame: types.FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number

    def __exit__(self, *_: object) -> None:
        for number, handler in self.old_handlers.items():
            signal.signal(number, handler)
