"""What of a run reaches the disk: checkpoints, at a step's end and finite, and the encoder at the end."""

import contextlib
import dataclasses
import json
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from fastjem import checkpoints, encoders
from fastjem.build import Training
from fastjem.data.loaders import holds_images
from fastjem.errors import DivergedError, UserError
from fastjem.exports import TEACHER
from fastjem.functional.shards import local
from fastjem.journal import Journal
from fastjem.prepare import ENCODER
from fastjem.reading import why_not
from fastjem.sharding import is_sharded

BEST = "best"  # the key of a checkpoint's state where the best one so far is named


@dataclasses.dataclass(frozen=True)
class Best:
    """The step whose encoder had the best kNN accuracy, and that."""

    step: int
    accuracy: float

    @classmethod
    def of(cls, path: Path | None) -> "Best | None":
        """What a checkpoint says of it; None where it says nothing, or isn't there."""
        try:
            found = checkpoints.read(path, mmap=True).get(BEST) if path else None
        except UserError:
            return None
        if not isinstance(found, dict):
            return None
        step, accuracy = found.get("step"), found.get("accuracy")
        return cls(step, accuracy) if isinstance(step, int) and isinstance(accuracy, float) else None


class Saver:
    """Checkpoints of a run: when they are due, what is in them, and which are the last and the best.

    One is a file, which the first rank writes, or where weights are in shards a folder, which all ranks write together.
    Weights that aren't finite are never saved: they can't be trained any further, and would take the place of some
    that can.
    """

    def __init__(self, training: Training, journal: Journal):
        self.training = training
        self.journal = journal
        self.saved_at = time.monotonic()
        self.saved: int | None = training.start if training.resumed else None  # the step of the last checkpoint
        self.in_shards = is_sharded(training.step)
        self.best = self._best_so_far() if training.ranks.first else None
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
        state = self.training.step.state_dict()  # of this rank's shards
        model = [state[name] for name in self.watched if name in state]
        optimizer = [value for values in self.training.optimizer.state.values() for value in values.values()]
        tensors = [value for value in optimizer if isinstance(value, Tensor)]
        return all(finite_ones(model)) and all(finite_ones(tensors, nan_only=True))

    def begin(self) -> None:
        """A checkpoint of step 0: a run killed before its first one starts again there, and a full disk is seen now."""
        problem = self._write(0) if self.in_shards else None
        with self.training.ranks.together():
            if self.training.ranks.first and not self.in_shards:
                problem = self._write(0)
            if self.training.ranks.first and problem:
                raise UserError(f"{problem}: nothing of this run would be kept; it ends before its first step")

    def save(self, done: int, best: Best | None = None) -> None:
        """A checkpoint; the run goes on where the disk refuses it, and tries again with the next.

        best: of this step, if it is the best one so far: then the checkpoint is kept as such, too. On the first rank.
        """
        first = self.training.ranks.first
        problem = self._write(done, best) if first or self.in_shards else None
        if first and problem:
            stays = "" if self.saved is None else f"; the last good one, of step {self.saved}, stays"
            self.journal.say(problem + stays)
        elif first and best is not None:
            self.best = best
            self.journal.say(checkpoints.keep_best(self.training.out))
        self.saved_at = time.monotonic()

    def is_best(self, accuracy: float | None) -> bool:
        """On the first rank, whether a kNN accuracy that was measured now is better than that of the best checkpoint,
        if that is to be kept."""
        if accuracy is None or not self.training.config.keep_best:
            return False
        return self.best is None or accuracy > self.best.accuracy

    def _best_so_far(self) -> Best | None:
        """Of a run that goes on; None where that checkpoint is no longer there, or of a step that is still to come."""
        training = self.training
        if not training.resumed:
            return None
        if training.config.keep_best:
            last = Best.of(checkpoints.earlier(training.out, 0))
            if last and last.step == training.start:  # a kill may have come before it was kept
                self.journal.say(checkpoints.keep_best(training.out))
        best = Best.of(checkpoints.best(training.out))
        return best if best and best.step <= training.start else None

    def _write(self, done: int, best: Best | None = None) -> str | None:
        training = self.training
        best = best or self.best
        state = {
            **training.state(done),
            "defaults": dataclasses.asdict(training.defaults),
            "config": json.dumps(dataclasses.asdict(training.config)),
            "unreadable": sorted(self.journal.unreadable),
            "decoder_share": training.loader.decoder_share,  # it decides about pixels
            "holds_images": holds_images(training.loader),
            "seed": training.config.seed,  # every generator follows from it and the step
            "ranks": training.ranks.size,
            **({BEST: dataclasses.asdict(best)} if best else {}),
            **training.facts,
        }
        if self.in_shards:
            problem = checkpoints.save_in_shards(training.out, state, training.config.keep_checkpoints, training.ranks)
        else:
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
        if self.in_shards:
            self.journal.say(f"step {done} isn't saved: its weights are in shards, and ranks no longer meet{hint}")
        elif not training.step_end.restore():
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
    """For each tensor whether it, or this rank's shard of it, is finite (nan_only: not NaN), with one wait for the
    device."""
    tensors = [local(x) for x in tensors]
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


def export(training: Training, encoder: nn.Module, *, named: bool) -> str | None:
    """Write the encoder, `Training.whole_encoder()`; what went wrong, in words.

    named: by a backbone's name, else only its owner can build it.
    """
    config = training.config
    about = training.pixels.to_metadata()
    if named:
        pool = training.step.method.pool
        about = encoders.metadata(config.backbone, config.stem, config.patch_size, pool, training.pixels)
    if config.teacher:
        about[TEACHER] = "true"
    try:
        encoders.save(encoder, str(training.out / ENCODER), about)
    except OSError as error:
        return (
            f"{ENCODER} could not be written ({why_not(error)}); "
            f"--resume --out {training.out} writes it once there is room"
        )
    return None


__all__ = ["Best", "Saver", "export"]
