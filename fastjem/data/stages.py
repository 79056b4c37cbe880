"""Image sizes over a run: small views first, of the final size towards its end (`--image-size 112:75%,224`); each is a
square or, as `224x448`, height and width.

A run's optimiser steps are parted into stages, each with large views of one size. The last size is the run's own:
the encoder is built for it, images are held in memory for it, kNN and pictures have it, it is exported; and what is
decided by the size of the images (blur, small views, the stem) is decided by it, once for all stages.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

from fastjem.data.pixels import LARGEST
from fastjem.data.size import TEXT, Size, as_size, height_and_width, written
from fastjem.data.views import MaskSpec, ViewSpec
from fastjem.errors import UserError
from fastjem.fields import came

EXAMPLE = "112:75%,224"
PART = re.compile(rf"({TEXT.pattern})(?::([0-9]{{1,9}}(?:\.[0-9]{{1,9}})?)%)?")


@dataclass(frozen=True)
class Sizes:
    """What `--image-size` says: pixels of the large views in each stage, which rise, and the share of the run's steps
    of each stage but the last, which takes what is left."""

    pixels: tuple[Size, ...]
    shares: tuple[Fraction, ...] = ()

    @classmethod
    def of(cls, given: int | str) -> "Sizes":
        """`224`, or text: "224x448", "112:75%,224", "64:50%,112x224:25%,224x448".

        Raises:
            UserError: for anything else, sizes that don't rise, and shares that leave nothing to the last stage.
        """
        if isinstance(given, int):
            return cls((_size(given, given),))
        parts = [PART.fullmatch(part.strip()) for part in given.split(",")]
        last = parts[-1]
        form = (
            "a number of pixels, height x width as 224x448, or a size and a share of the steps for each stage but the "
            f"last, as in {EXAMPLE}"
        )
        is_number = len(parts) == 1 and last is not None and not last[3]  # which from Python is no text
        wrong = last is None or last[4] or not all(part and part[4] for part in parts[:-1])
        if is_number or wrong:
            raise UserError(f"--image-size must be {form}; got {came(given)}")
        found = cls(
            tuple(_size(int(part[2]), int(part[3] or part[2])) for part in parts if part),
            tuple(Fraction(part[4]) / 100 for part in parts[:-1] if part),
        )
        if not all(_rises(before, after) for before, after in pairwise(found.pixels)):
            raise UserError(f"--image-size: sizes must rise from stage to stage, as in {EXAMPLE}; got {given}")
        if not all(found.shares) or sum(found.shares) >= 1:
            raise UserError(
                f"--image-size: the shares of the steps must be above 0, and together below 100 %, as in {EXAMPLE}; "
                f"got {given}"
            )
        return found

    def __str__(self) -> str:
        """As `of` takes it, written in one way."""
        sizes = [written(size) for size in self.pixels]
        early = [f"{size}:{float(100 * share):.12g}%" for size, share in zip(sizes, self.shares, strict=False)]
        return ",".join([*early, sizes[-1]])

    @property
    def given(self) -> int | str:
        """As a configuration has it: a number where there is one stage, of squares."""
        return self.last if not self.shares and isinstance(self.last, int) else str(self)

    @property
    def last(self) -> Size:
        return self.pixels[-1]

    def borders(self, steps: int) -> list[int]:
        """The number of steps that are taken before each stage but the first, in a run of so many.

        Raises:
            UserError: where a stage would have no step at all.
        """
        found = self.planned(steps)
        if not all(before < after for before, after in pairwise([0, *found, steps])):
            raise UserError(f"--image-size {self}: of {steps} steps each stage must have one at least; it has none")
        return found

    def planned(self, steps: int) -> list[int]:
        """`borders`, whether or not a stage is empty."""
        return [round(steps * sum(self.shares[: i + 1])) for i in range(len(self.shares))]

    def moved(self, borders: Sequence[int], steps: int, start: int) -> list[int]:
        """The borders of a run that has taken `start` steps and is made longer or shorter, `steps` in all.

        What it has seen stays as it was: a border behind it stays where it is, one before it goes to where it would be
        in a run of the new length, but not behind it.
        """
        planned = self.planned(steps)
        return [old if old < start else max(new, start) for old, new in zip(borders, planned, strict=True)]


def _size(height: int, width: int) -> Size:
    size = as_size(height, width)
    if min(height, width) < 1:
        raise UserError(f"--image-size must be at least 1, got {written(size)}")
    if max(height, width) > LARGEST:
        raise UserError(f"--image-size must be at most {LARGEST}, got {written(size)}")
    return size


def _rises(before: Size, after: Size) -> bool:
    """Whether no side becomes shorter, and one becomes longer."""
    pairs = zip(height_and_width(before), height_and_width(after), strict=True)
    return before != after and all(side <= longer for side, longer in pairs)


@dataclass(frozen=True)
class Stage:
    """The optimiser steps from `start` to before `stop`, and what the views of their batches are."""

    start: int
    stop: int
    specs: list[ViewSpec]
    masks: list[MaskSpec]

    @property
    def size(self) -> Size:
        """Pixels of the large views."""
        return self.specs[0].size


def stage_at(stages: Sequence[Stage], step: int) -> Stage:
    """That in which step number `step`, counted from 0, is taken."""
    return next(stage for stage in stages if step < stage.stop)


def told(stages: Sequence[Stage]) -> str:
    """In words, from where on views have which size; "" of one stage."""
    taken = [stage for stage in stages if stage.start < stage.stop]
    if len(taken) < 2:
        return ""
    sizes = [f"{written(stage.size)} pixels from step {stage.start + 1} on" for stage in taken]
    return f"views have {', '.join(sizes)}"


__all__ = ["Sizes", "Stage", "stage_at", "told"]
