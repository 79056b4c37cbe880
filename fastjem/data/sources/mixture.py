"""Several sources as one: images of all of them, those of some more or less often than once in an epoch."""

import bisect
import os
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from fastjem.data.sources import naming
from fastjem.data.sources.labels import is_integer
from fastjem.data.sources.pairs import Pairs, Part
from fastjem.errors import UserError


class Mixture:
    """The images of each part, one part behind the other.

    An image is called by its name behind as much of its part's root as tells the parts apart. Classes are united by
    name where all parts have labels; where one has none there are none.

    Args:
        parts: the sources; `fastjem.data.source.mixed` takes all that is one.
        weights: how often each image of a part is seen in an epoch: 0.3: another 30 % of them in each; 2: twice, with
            other views; None: once.

    Raises:
        UserError: for a part that is there twice, for pairs, for a weight that isn't positive, and for another number
            of weights than of parts.
    """

    def __init__(self, parts: Sequence[Part], weights: Sequence[float | None] | None = None):
        self.parts = list(parts)
        given = [None] * len(self.parts) if weights is None else list(weights)
        if len(given) != len(self.parts) or not given:
            raise UserError(f"Mixture: a weight, or None, for each of {len(self.parts)} parts; got {len(given)}")
        self.weights = [1.0 if weight is None else float(weight) for weight in given]
        for part, weight in zip(self.parts, self.weights, strict=True):
            if isinstance(part, (Pairs, Mixture)):
                raise UserError(f"{part.root}: a part of several sources must be one source")
            if not 0 < weight <= 1000:
                raise UserError(f"{part.root}:{weight:g}: the number behind the colon must be above 0, 1000 at most")
        roots = [part.root for part in self.parts]
        self.root = naming.SEPARATOR.join(map(naming.weighed, roots, self.weights))
        self.called = called(roots)
        counts = [len(part) for part in self.parts]
        self.starts = [0, *np.cumsum(counts).tolist()]
        self.parts_of_epoch = tuple(zip(counts, self.weights, strict=True))
        self.decoded = any(part.decoded for part in self.parts)
        self.classes, self.labels = united(self.parts)
        self.others: Counter[str] = sum((Counter(getattr(part, "others", {})) for part in self.parts), Counter())
        self.unlisted = [one for part in self.parts for one in getattr(part, "unlisted", ())]

    def __len__(self) -> int:
        return self.starts[-1]

    def place(self, i: int) -> tuple[Any, int]:
        """The part that has image i, and its number there."""
        part = self._part(i)
        return self.parts[part], i - self.starts[part]

    def _part(self, i: int) -> int:
        return bisect.bisect_right(self.starts, i) - 1

    def name(self, i: int) -> str:
        part = self._part(i)
        return f"{self.called[part]}/{self.parts[part].name(i - self.starts[part])}"

    def read(self, i: int) -> bytes | np.ndarray:
        part, at = self.place(i)
        return part.read(at)

    @staticmethod
    def part_named(roots: Sequence[str], name: str) -> tuple[str, str]:
        """(root, name there) of the image that a mixture of these parts calls `name`."""
        for root, prefix in zip(roots, called(roots), strict=True):
            if name.startswith(prefix + "/"):
                return root, name[len(prefix) + 1 :]
        raise UserError(f"no part of {naming.SEPARATOR.join(roots)} has an image {name}")


def called(roots: Sequence[str]) -> list[str]:
    """As many of the last folders in the roots as tell them apart: ["a/train", "b/train"].

    Raises:
        UserError: where two are the same.
    """
    split = [os.path.normpath(naming.split_options(root)[0]).split(os.sep) for root in roots]
    for depth in range(1, max(map(len, split), default=0) + 1):
        names = ["/".join(parts[-depth:]) for parts in split]
        if len(set(names)) == len(names):
            return names
    twice = next(root for root, count in Counter(roots).items() if count > 1 or len(set(roots)) == len(roots))
    raise UserError(f"{twice} is named twice; {twice}:2 shows its images twice in an epoch")


def united(parts: Sequence[Part]) -> tuple[list[str], np.ndarray | None]:
    """(all classes, [N] int32 labels that number them); in the order of the parts' where that is one, else sorted."""
    if any(part.labels is None for part in parts):
        return [], None
    classes = parts[0].classes
    if any(part.classes != classes for part in parts):
        names = {name for part in parts for name in part.classes}
        classes = sorted(names, key=int if all(map(is_integer, names)) else str)
    number = {name: i for i, name in enumerate(classes)}
    labels = [
        np.array([number[name] for name in part.classes], np.int32)[part.labels]
        for part in parts  # type: ignore[index]
    ]
    return list(classes), np.concatenate(labels)
