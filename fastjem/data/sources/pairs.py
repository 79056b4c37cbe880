"""Several sources whose images belong together: the same things seen otherwise, in files of the same names."""

import os
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np

from fastjem.data.sources.naming import SEPARATOR, split
from fastjem.errors import UserError
from fastjem.printing import say


class Part(Protocol):
    """A `fastjem.data.source.Source`."""

    root: str
    labels: np.ndarray | None
    classes: list[str]
    decoded: bool

    def __len__(self) -> int: ...

    def name(self, i: int) -> str: ...

    def read(self, i: int) -> bytes | np.ndarray: ...


class Pairs:
    """The images of two or more sources that have one name in all of them, the ending aside.

    What looks at single images (fingerprint, reports, the encoder's trial) sees the first source's; `read_all` reads
    those of all. Labels are the first source's.

    Args:
        parts: the sources.

    Raises:
        UserError: where no name is in all of them, or one source has a name twice.
    """

    def __init__(self, parts: Sequence[Part]):
        self.parts = list(parts)
        self.root = SEPARATOR.join(part.root for part in self.parts)
        stems = [_stems(part) for part in self.parts]
        common = [stem for stem in stems[0] if all(stem in others for others in stems[1:])]
        if not common:
            firsts = [next(iter(names)) for names in stems]
            found = " and ".join(f"{name!r} in {part.root}" for name, part in zip(firsts, parts, strict=True))
            raise UserError(f"no image has the same name in {self.root}: there are {found}, say")
        alone = [len(names) - len(common) for names in stems]
        if any(alone):
            counts = " and ".join(f"{count} in {part.root}" for count, part in zip(alone, parts, strict=True) if count)
            say(f"fastjem: {len(common)} images are in all of {self.root}; without a partner, left out: {counts}")
        self.rows = [np.array([names[stem] for stem in common]) for names in stems]  # in each source
        first = self.parts[0]
        self.labels = None if first.labels is None else first.labels[self.rows[0]]
        self.classes = first.classes
        self.decoded = first.decoded

    def __len__(self) -> int:
        return len(self.rows[0])

    def place(self, i: int) -> tuple[Part, int]:
        """The first source, and which of its images is meant."""
        return self.parts[0], int(self.rows[0][i])

    def name(self, i: int) -> str:
        return self.parts[0].name(int(self.rows[0][i]))

    def read(self, i: int) -> bytes | np.ndarray:
        return self.parts[0].read(int(self.rows[0][i]))

    def read_all(self, i: int) -> list[bytes | np.ndarray]:
        """The i-th image of each source."""
        return [part.read(int(rows[i])) for part, rows in zip(self.parts, self.rows, strict=True)]


def _stems(source: Part) -> dict[str, int]:
    """Names without their endings, and which image of the source has each."""
    names: dict[str, int] = {}
    for i in range(len(source)):
        name = source.name(i)
        stem = os.path.splitext(name)[0]
        if stem in names:
            raise UserError(f"{source.root}: {name} and {source.name(names[stem])} have one name, the ending aside")
        names[stem] = i
    return names


def roots(data: str) -> list[str]:
    """ "a,b" -> ["a", "b"]; a path that is there is one root, whatever is in its name. UserError for weights."""
    parts = split(data)
    if weights := [f"{root}:{weight:g}" for root, weight in parts if weight is not None]:
        raise UserError(f"images that belong together are seen alike: no number behind a colon, got {weights[0]}")
    return [root for root, _ in parts]


def check_sources(wanted: int, given: Iterable[object], data: object) -> None:
    """UserError where a method wants another number of sources than there are."""
    count = len(list(given))
    if count != wanted:
        example = SEPARATOR.join(["FOLDER"] * wanted)
        raise UserError(
            f"the method compares images of {wanted} sources, got {count} ({data}); --data {example} names them, and "
            "images belong together by their names"
        )
