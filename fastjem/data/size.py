"""How large images are: the side of a square, or (height, width) of any other rectangle, in pixels.

A square is always one number, so that `Size`s can be compared, and so that a run of squares is written as it ever was.
"""

import re
from collections.abc import Sequence
from typing import TypeAlias

Size: TypeAlias = int | tuple[int, int]
TEXT = re.compile(r"([0-9]{1,9})(?:x([0-9]{1,9}))?")  # "224", "224x448"


def height_and_width(size: Size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def as_size(height: int, width: int) -> Size:
    return height if height == width else (height, width)


def shorter(size: Size) -> int:
    """The shorter side: what decides about blur, small views and a ResNet's stem, and about a short name's patches."""
    return min(height_and_width(size))


def written(size: Size) -> str:
    """ "224", or "224x448": height, then width."""
    return "x".join(map(str, dict.fromkeys(height_and_width(size))))


def from_text(text: str) -> Size | None:
    """What `written` wrote; None for anything else."""
    found = TEXT.fullmatch(text)
    return as_size(int(found[1]), int(found[2] or found[1])) if found else None


def as_given(size: int | Sequence[int]) -> Size:
    """Of a file, which has lists: [224, 448]."""
    return size if isinstance(size, int) else as_size(*size)


def in_patches(size: Size, patch: int) -> tuple[int, int]:
    """Whole patches in height and in width."""
    height, width = height_and_width(size)
    return height // patch, width // patch


def scaled(size: Size, factor: tuple[int, int], patch: int = 1) -> Size:
    """Each side times `factor`, a fraction as (numerator, denominator), in whole patches, one at least."""
    sides = (max(round(side * factor[0] / factor[1] / patch), 1) * patch for side in height_and_width(size))
    return as_size(*sides)
