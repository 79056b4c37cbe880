"""Optimiser steps, one at a time: batches, forward, backward, update, and what moves behind it."""

import contextlib
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastjem import large_batches, optim
from fastjem.build import Training
from fastjem.data.batch import Batch, Crops, finish
from fastjem.gradients import averaged
from fastjem.journal import Journal
from fastjem.kernels.arithmetic import widest_dtype
from fastjem.meter import Taken
from fastjem.ranks import Ranks
from fastjem.sharding import is_sharded, without_exchange
from fastjem.stopping import Stop


def optimizer_steps(training: Training, journal: Journal, stop: Stop) -> Iterator[Taken]:
    """Train, one optimiser step at a time. Nothing here waits for the device."""
    step, model, optimizer = training.step, training.model, training.optimizer
    device = training.ranks.device
    parameters = [p for p in step.parameters() if p.requires_grad]
    momentum = torch.zeros((), dtype=widest_dtype(device), device=device)
    number = torch.zeros((), dtype=torch.long, device=device)
    batches = timed(training, journal, stop)
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
            if part == 0:
                training.step_end.begins()
            is_last = part == training.config.accumulate - 1
            loss, taken.notes = forward_backward(training, batch, number, synchronise=is_last)
            taken.losses.append(loss)
            taken.waited += waited
            taken.images += len(batch.index)
        training.step_end.moves()
        if training.clip:
            if training.scaler:
                training.scaler.unscale_(optimizer)
            taken.gradient_norm = optim.clip_(parameters, training.clip)
        momentum.fill_(scheduled["momentum"].item())
        # Parameters and momentum copies in one pass, or copies behind it.
        fused = isinstance(optimizer, optim.Fused)
        options: dict[str, Any] = {"teacher_momentum": momentum} if fused else {}
        if training.scaler:  # a step whose gradients overflow changes no weight
            training.scaler.step(optimizer, **options)
            training.scaler.update()
        else:
            optimizer.step(**options)
        step.step_ends(number, None if fused else momentum)
        training.step_end.ends()
        yield taken


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
