"""A batch's loss and gradients by micro-batches, exactly those of the batch at once: what `--micro-batch` does.

A method whose loss is a mean over images takes them one after the other, each with its share. For every other one the
encoder goes by micro-batches and the heads and the loss are the whole batch's (`fastjem.micro_batches`).

    passes = Passes(64)
    loss, notes = forward_backward(step, batch, i, passes)  # in place of: loss, notes = step(batch, i); loss.backward()
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fastjem.data.batch import Batch, part_of
from fastjem.encoders import has_batch_norm
from fastjem.gradients import kept_here
from fastjem.methods import Codes
from fastjem.micro_batches import EncoderPass, Passes, parts_of
from fastjem.step import Step

Around = Callable[[], AbstractContextManager[Any]]


def forward_backward(
    step: Step,
    batch: Batch,
    number: int | Tensor,
    passes: Passes,
    *,
    model: nn.Module | None = None,
    around: Around = nullcontext,
    scaled: Callable[[Tensor], Tensor] = lambda loss: loss,
) -> tuple[Tensor, dict[str, Any]]:
    """The detached loss of a batch and its notes, as `Step` gives them; gradients are added to the parameters'.

    Args:
        number: of the step.
        passes: with how many images each; the same object for all steps.
        model: what wraps the step (DistributedDataParallel, torch.compile). The ranks' gradients aren't averaged.
        around: makes what a forward pass runs in, autocast say; a new one for each.
        scaled: what of a loss is differentiated: one that is divided, or a `GradScaler`'s.
    """
    model = step if model is None else model
    alone = step.method.mean_over_images and not has_batch_norm(step.method)
    one = _by_images if alone else _by_features
    with kept_here(model):
        return one(step, model, batch, number, passes, around, scaled)


def _by_images(
    step: Step,
    model: nn.Module,
    batch: Batch,
    number: int | Tensor,
    passes: Passes,
    around: Around,
    scaled: Callable[[Tensor], Tensor],
) -> tuple[Tensor, dict[str, Any]]:
    """Of a mean over images: each micro-batch is a batch, weighted by its share of the images."""
    images = len(batch.index)
    losses = []
    noted = []
    for at in parts_of(images, passes.size):
        part = part_of(batch, at)
        share = len(part.index) / images
        with around():
            loss, notes = model(part, number)
        loss = loss * share
        scaled(loss).backward()
        losses.append(loss.detach())
        noted.append((share, notes))
    return torch.stack(losses).sum(), joined_notes(noted)


def _by_features(
    step: Step,
    model: nn.Module,
    batch: Batch,
    number: int | Tensor,
    passes: Passes,
    around: Around,
    scaled: Callable[[Tensor], Tensor],
) -> tuple[Tensor, dict[str, Any]]:
    """Of any loss: of the whole batch's features, whose gradient goes into the encoder by micro-batches."""
    whole = getattr(model, "_orig_mod", model)  # heads and loss aren't compiled: their graph would hold all passes
    passes.calls = []
    step.passes = passes
    try:
        with around():
            loss, notes = whole(batch, number)
        scaled(loss).backward()
    finally:
        step.passes = None

    def second_pass(given: EncoderPass) -> Any:
        return model(given, number)

    passes.replay(second_pass, around)
    return loss.detach(), notes


def joined_notes(noted: Sequence[tuple[float, dict[str, Any]]]) -> dict[str, Any]:
    """A batch's notes from those of its parts with their shares of the images: rows behind one another, means of
    figures.
    """
    found = {}
    for name, first in noted[-1][1].items():
        values = [notes[name] for _, notes in noted]
        if isinstance(first, Codes):
            found[name] = first._replace(features=torch.cat([codes.features for codes in values]))
        elif first.dim():
            found[name] = torch.cat(values)
        else:
            found[name] = torch.stack([share * value for (share, _), value in zip(noted, values, strict=True)]).sum()
    return found


__all__ = ["forward_backward", "joined_notes"]
