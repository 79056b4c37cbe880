"""Optimiser steps, one at a time: batches, forward, backward, update, and what moves behind it."""

import contextlib
import time
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastjem import large_batches, optim, precision, step_graph
from fastjem.build import Training
from fastjem.data.batch import Batch, Crops, finish
from fastjem.gradients import averaged
from fastjem.journal import Journal
from fastjem.kernels.arithmetic import widest_dtype
from fastjem.meter import Taken
from fastjem.ranks import Ranks
from fastjem.sharding import is_sharded, without_exchange
from fastjem.step_graph import Found
from fastjem.stopping import Stop


def optimizer_steps(training: Training, journal: Journal, stop: Stop) -> Iterator[Taken]:
    """Train, one optimiser step at a time. Nothing here waits for the device."""
    work = Work(training)
    graph = step_graph.of_run(training, work, journal.say)
    arriving = timed(training, journal, stop)
    training.model.train()
    for done in range(training.start, training.steps):
        seed_generators(training.config.seed, done, training.ranks)
        if done % training.steps_per_epoch == 0:
            training.step.method.epoch_begins(done // training.steps_per_epoch)
        scheduled = work.begins(done)
        taken = Taken(done + 1, 0, 0.0, [], {}, None, scheduled)
        batches = counted(arriving, training.config.accumulate, taken)
        found = work.take(batches) if graph is None else graph.take(list(batches))
        taken.losses, taken.notes, taken.gradient_norm = found
        yield taken


def counted(arriving: Iterator[tuple[Batch, float]], count: int, taken: Taken) -> Iterator[Batch]:
    """So many batches, and what they took in the step's figures; RuntimeError where there are fewer."""
    for _ in range(count):
        batch, waited = next(arriving)
        taken.waited += waited
        taken.images += len(batch.index)
        yield batch


class Work:
    """What a step is on the device: from its batches to the weights behind it.

    What changes from step to step lies in memory that stays: the step's number, the momentum encoder's momentum and the
    optimiser's rates. So one step's work, captured as a CUDA graph, is every step's.

    keep_gradients: gradients stay in the memory that they have, and begin with zeros; else each step makes them anew.
    """

    def __init__(self, training: Training):
        self.training = training
        device = training.ranks.device
        self.parameters = [p for p in training.step.parameters() if p.requires_grad]
        self.momentum = torch.zeros((), dtype=widest_dtype(device), device=device)
        self.number = torch.zeros((), dtype=torch.long, device=device)
        self.keep_gradients = False
        self.done = 0

    def begins(self, done: int) -> dict[str, Tensor]:
        """The figures of a step that is to be taken, which are returned, go where its work reads them."""
        self.done = done
        scheduled = self.training.schedule.apply(self.training.optimizer, done)
        self.number.fill_(done)
        self.momentum.fill_(scheduled["momentum"].item())
        return scheduled

    def seeds(self) -> None:
        """Once more for the step that has begun."""
        seed_generators(self.training.config.seed, self.done, self.training.ranks)

    def state(self) -> list[Tensor]:
        """What a step changes: parameters, the momentum copies' too, buffers, what the optimiser has of them, and the
        loss's scale."""
        step, optimizer = self.training.step, self.training.optimizer
        of_optimizer = [x for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]
        return [*step.parameters(), *step.buffers(), *of_optimizer, *precision.state_of(self.training.scaler)]

    def take(self, batches: Iterable[Batch]) -> Found:
        """Forward and backward of each batch, and the update."""
        training = self.training
        self._without_gradients()
        found = Found([], {}, None)
        for part, batch in enumerate(batches):
            if part == 0:
                training.step_end.begins()
            is_last = part == training.config.accumulate - 1
            loss, notes = self.forward_backward(batch, synchronise=is_last)
            found.losses.append(loss)
            found = found._replace(notes=notes)
        training.step_end.moves()
        norm = self._update()
        training.step_end.ends()
        return found._replace(gradient_norm=norm)

    def forward_backward(self, batch: Batch, *, synchronise: bool) -> tuple[Tensor, dict[str, Any]]:
        """Model and loss, all that is of a size; `fastjem bench --steps` times what a step does around it."""
        return forward_backward(self.training, batch, self.number, synchronise=synchronise)

    def _without_gradients(self) -> None:
        if not self.keep_gradients:
            self.training.optimizer.zero_grad(set_to_none=True)
            return
        if gradients := [p.grad for p in self.parameters if p.grad is not None]:
            torch._foreach_zero_(gradients)

    def _update(self) -> Tensor | None:
        """The optimiser's step and what moves behind it; the gradients' norm where it is clipped."""
        training, step, optimizer = self.training, self.training.step, self.training.optimizer
        norm = None
        if training.clip:
            if training.scaler:
                training.scaler.unscale_(optimizer)
            norm = optim.clip_(self.parameters, training.clip)
        # Parameters and momentum copies in one pass, or copies behind it.
        fused = isinstance(optimizer, optim.Fused)
        options: dict[str, Any] = {"teacher_momentum": self.momentum} if fused else {}
        if training.scaler:  # a step whose gradients overflow changes no weight
            training.scaler.step(optimizer, **options)
            training.scaler.update()
        else:
            optimizer.step(**options)
        step.step_ends(self.number, None if fused else self.momentum)
        return norm


def forward_backward(
    training: Training, batch: Batch, number: Tensor, *, synchronise: bool
) -> tuple[Tensor, dict[str, Any]]:
    """The detached loss of a micro-batch and its notes; gradients are added up, and over ranks with the last one."""
    step, model, passes, ranks = training.step, training.model, training.passes, training.ranks
    autocast = partial(torch.autocast, ranks.device.type, training.autocast, enabled=training.autocast is not None)

    def scaled(loss: Tensor) -> Tensor:
        loss = loss / training.config.accumulate
        return training.scaler.scale(loss) if training.scaler else loss

    with contextlib.nullcontext() if synchronise else without_exchange(model):
        if passes is not None and passes.size < len(batch.index):
            found = large_batches.forward_backward(
                step, batch, number, passes, model=model, around=autocast, scaled=scaled
            )
            if synchronise and ranks.group is not None and not is_sharded(step):
                averaged([p for p in step.parameters() if p.requires_grad], ranks.group)
            return found
        with autocast():
            loss, notes = model(batch, number)
        scaled(loss).backward()
    return loss.detach(), notes


def timed(training: Training, journal: Journal, stop: Stop) -> Iterator[tuple[Batch, float]]:
    """Batches on the device, and the seconds that each was waited for."""
    crops: Iterator[Crops] = iter(training.loader)
    stop.hold_back("SIGCHLD")
    while True:
        begin = time.perf_counter()
        with stop.waiting():
            arrived = next(crops, None)
        if arrived is None:
            return
        journal.skip(arrived.unreadable)
        stage = training.stage
        batch = finish(
            arrived,
            stage.specs,
            training.ranks.device,
            masks=stage.masks,
            seed=training.config.seed,
            step=training.done,
            late=training.passes is not None and training.passes.size < len(arrived.index),
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
