"""What of a run reaches the disk: checkpoints, at a step's end and finite, and the encoder at the end."""

import contextlib
import dataclasses
import json
import time
from collections.abc import Iterable

import torch
from torch import Tensor

from fastjem import checkpoints, encoders
from fastjem.build import Training
from fastjem.data.loaders import holds_images
from fastjem.errors import DivergedError, UserError
from fastjem.exports import TEACHER
from fastjem.journal import Journal
from fastjem.prepare import ENCODER
from fastjem.reading import why_not


class Saver:
    """Checkpoints of a run: when they are due, what is in them, and which is the last.

    Weights that aren't finite are never saved: they can't be trained any further, and would take the place of some
    that can.
    """

    def __init__(self, training: Training, journal: Journal):
        self.training = training
        self.journal = journal
        self.saved_at = time.monotonic()
        self.saved: int | None = training.start if training.resumed else None  # the step of the last checkpoint
        state = training.step.state_dict()
        # A module of one's own may hold infinities from the beginning, in a mask say.
        self.watched = [name for name, finite in zip(state, finite_ones(state.values()), strict=True) if finite]

    def planned(self, done: int) -> bool:
        """By steps, as all ranks know alike."""
        every = self.training.config.checkpoint_steps
        return every > 0 and done % every == 0

    def due(self) -> bool:
        """By the clock, which is the first rank's."""
        config = self.training.config
        if config.checkpoint_steps or not self.training.ranks.first:
            return False
        return time.monotonic() - self.saved_at > config.checkpoint_every

    def finite(self) -> bool:
        """Whether the weights are finite and no figure of the optimizer is NaN. Waits for the device, once."""
        state = self.training.step.state_dict()
        model = [state[name] for name in self.watched if name in state]
        optimizer = [value for values in self.training.optimizer.state.values() for value in values.values()]
        tensors = [value for value in optimizer if isinstance(value, Tensor)]
        return all(finite_ones(model)) and all(finite_ones(tensors, nan_only=True))

    def begin(self) -> None:
        """A checkpoint of step 0: a run killed before its first one starts again there, and a full disk is seen now."""
        if self.training.ranks.first and (problem := self._write(0)):
            raise UserError(f"{problem}: nothing of this run would be kept; it ends before its first step")

    def save(self, done: int) -> None:
        """A checkpoint; the run goes on where the disk refuses it, and tries again with the next."""
        if self.training.ranks.first and (problem := self._write(done)):
            stays = "" if self.saved is None else f"; the last good one, of step {self.saved}, stays"
            self.journal.say(problem + stays)
        self.saved_at = time.monotonic()

    def _write(self, done: int) -> str | None:
        training = self.training
        state = {
            **training.state(done),
            "defaults": dataclasses.asdict(training.defaults),
            "config": json.dumps(dataclasses.asdict(training.config)),
            "unreadable": sorted(self.journal.unreadable),
            "decoder_share": training.loader.decoder_share,  # it decides about pixels
            "holds_images": holds_images(training.loader),
            "seed": training.config.seed,  # every generator follows from it and the step
            **training.facts,
        }
        checkpoints.keep_earlier(training.out, training.config.keep_checkpoints)
        problem = checkpoints.save(training.out, state)
        if problem is None:
            self.saved = done
        return problem

    def rescue(self) -> None:
        """Behind an error or a broken-off wait: save the end of the last step, if that can still be had."""
        training = self.training
        done = training.done
        if not training.ranks.first or done == self.saved:
            return
        hint = f"; --resume --out {training.out} goes on from step {self.saved}"
        if not training.step_end.restore():
            self.journal.say(f"step {done + 1} was broken off where it changes the weights: nothing is saved{hint}")
        elif not self.finite():
            self.journal.say(f"the weights of step {done} aren't finite: they aren't saved{hint}")
        else:
            self.save(done)
            if self.saved == done:
                self.journal.say(f"step {done} is saved; --resume --out {training.out} goes on from there")

    def diverged(self, done: int, since: int | None) -> DivergedError:
        """The end of a run whose weights aren't finite any more, with a way back."""
        loss = f"the loss is not a number since step {since}, and " if since else ""
        saved = self.saved or 0
        return DivergedError(
            f"step {done}: the run is collapsing: {loss}the weights are not finite any more. The checkpoint of step "
            f"{saved} is the last good one: fastjem pretrain --resume --out {self.training.out} --learning-rate RATE "
            f"goes on from it with a smaller rate than {self.training.rate:g}; --clip 1 may help, too"
            f"{self._further_back()}"
        )

    def _further_back(self) -> str:
        """What to do where a run goes on from weights that are finite, and too large to be trained any more."""
        training = self.training
        if not training.resumed or self.saved != training.start:
            return ""
        last, *others = checkpoints.present(training.out) or [training.out]
        for path in others:
            with contextlib.suppress(UserError):
                step = checkpoints.read(path, mmap=True)["step"]
                if step < training.start:
                    return f". If it ends here again: without {last} the run goes on from {path.name}, of step {step}"
        return ""


def finite_ones(tensors: Iterable[Tensor], *, nan_only: bool = False) -> list[bool]:
    """For each tensor whether it is finite (nan_only: not NaN), with one wait for the device."""
    tensors = list(tensors)
    numbers = [i for i, x in enumerate(tensors) if x.is_floating_point() and x.numel()]
    found = [True] * len(tensors)
    if not numbers:
        return found
    device = tensors[numbers[0]].device
    # The largest size; it is NaN where one element is.
    sizes = [torch.linalg.vector_norm(tensors[i].detach(), torch.inf).float().to(device) for i in numbers]
    stacked = torch.stack(sizes)
    good = ~stacked.isnan() if nan_only else stacked.isfinite()
    for i, one in zip(numbers, good.tolist(), strict=True):
        found[i] = one
    return found


def export(training: Training, *, named: bool) -> str | None:
    """Write the encoder; what went wrong, in words. named: by a backbone's name, else only its owner can build it."""
    config = training.config
    about = training.pixels.to_metadata()
    if named:
        pool = training.step.method.pool
        about = encoders.metadata(config.backbone, config.stem, config.patch_size, pool, training.pixels)
    if config.teacher:
        about[TEACHER] = "true"
    try:
        encoders.save(training.encoder, str(training.out / ENCODER), about)
    except OSError as error:
        return (
            f"{ENCODER} could not be written ({why_not(error)}); "
            f"--resume --out {training.out} writes it once there is room"
        )
    return None


__all__ = ["Saver", "export"]
