"""Files of a store are fetched before an order comes to them; and which order it may be, where copies of all of them
don't fit the disk.
"""

import threading
from collections.abc import Generator, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np

from fastjem.data.copies import FETCHING, GIGABYTES, gigabytes
from fastjem.data.loaders.protocol import Order, Windows
from fastjem.data.remote import is_remote
from fastjem.data.source import Source, inner
from fastjem.data.sources.mixture import Mixture
from fastjem.data.sources.pairs import Pairs
from fastjem.data.sources.shards import Shards
from fastjem.data.sources.table import Table
from fastjem.errors import UserError

T = TypeVar("T")


def stored(source: Source) -> list[tuple[int, Shards]]:
    """The tar files in stores among a source's parts, and the number of the first image of each."""
    given = inner(source)
    parts = given.parts if isinstance(given, (Mixture, Pairs)) else [given]
    firsts = given.starts[:-1] if isinstance(given, Mixture) else [0] * len(parts)
    both = zip(firsts, parts, strict=True)
    return [(first, part) for first, part in both if isinstance(part, Shards) and part.copies is not None]


def files_at_a_time(source: Source, before: Sequence[int] | None) -> list[int]:
    """Of each of `stored` how many files a window has: as many as fit in half of the budget, so that there is room for
    those of the next one; 0 for all of them where copies of all files fit, and any order will do.

    Args:
        before: what it was when the run began, which holds as long as there are as many stores.

    Raises:
        UserError: where there is no room for two files, and for pairs that don't fit.
    """
    if before is not None and len(before) == len(stored(source)):
        return list(before)
    parts = [part.copies for _, part in stored(source) if part.copies is not None]
    budget = min((copies.budget for copies in parts), default=0) - _of_tables(source)
    size = sum(copies.size for copies in parts)
    if size <= budget:
        return [0] * len(parts)
    if isinstance(inner(source), Pairs):
        raise UserError(
            f"{source.root}: pairs of images are read in any order, from copies of all {gigabytes(size)}; "
            f"{gigabytes(budget)} may be kept: {GIGABYTES} says how many"
        )
    most = [int(budget / 2 * copies.size / size // copies.largest) for copies in parts]
    needed = sum(2 * max(count, 1) * copies.largest for count, copies in zip(most, parts, strict=True))
    if needed > budget:
        raise UserError(
            f"{source.root}: two files of each store at a time take {gigabytes(needed)}, and {gigabytes(budget)} may "
            f"be kept: {GIGABYTES} says how many"
        )
    return [max(count, 1) for count in most]


def _of_tables(source: Source) -> int:
    """Bytes of the copies of tables among a source's parts, all of which stay."""
    given = inner(source)
    parts = given.parts if isinstance(given, (Mixture, Pairs)) else [given]
    return sum(sum(part.sizes.values()) for part in parts if isinstance(part, Table) and is_remote(part.root))


def windows(source: Source, most: Sequence[int]) -> tuple[Windows, ...]:
    """What an order has to keep to. most: as `files_at_a_time` found it, when the run began."""
    return tuple(
        Windows(first, tuple(np.diff(part.index.starts).tolist()), count)
        for (first, part), count in zip(stored(source), most, strict=True)
        if count
    )


def order_told(source: Source, most: Sequence[int]) -> list[str]:
    """In words, what order the images have, where it isn't any, or can't be kept to at speed."""
    said = []
    for (_, part), count in zip(stored(source), most, strict=True):
        assert part.copies is not None
        if count and part.copies.fits:
            said.append(
                f"{part.root}: the run keeps the order that it began with: {count} of the {len(part.files)} files at a "
                f"time, though copies of all of them fit here"
            )
        elif count:
            said.append(
                f"{part.root}: {gigabytes(part.copies.size)} don't fit in the {gigabytes(part.copies.budget)} of "
                f"copies ({GIGABYTES}): images are shuffled among those of {min(count, len(part.files))} of the "
                f"{len(part.files)} files at a time, which are taken in another order each epoch"
            )
        elif not part.copies.fits:
            said.append(
                f"{part.root}: the run keeps the random order that it began with, and {gigabytes(part.copies.size)} "
                f"don't fit in the {gigabytes(part.copies.budget)} of copies here ({GIGABYTES}): images are fetched "
                "one by one"
            )
    return said


def begins(source: Source, order: object) -> None:
    """Before the processes that read by it are begun: an order by files reads whole ones."""
    firsts = {part.first for part in order.windows} if isinstance(order, Order) else set()
    for first, part in stored(source):
        part.whole |= first in firsts


def followed(batches: Iterator[T], source: Source, order: object) -> Iterator[T]:
    """The batches, one for each of the order's, while the files of those to come are fetched; of pairs, whose images
    have other numbers in each source, they are fetched when it is their turn."""
    parts = [(first, part) for first, part in stored(source) if part.whole]
    if not (parts and isinstance(order, Order)) or isinstance(inner(source), Pairs):
        return batches
    return _followed(batches, Ahead(parts, order))


def _followed(batches: Iterator[T], ahead: "Ahead") -> Iterator[T]:
    ahead.begin()
    try:
        for batch in batches:
            ahead.goes_on()
            yield batch
    finally:
        ahead.end()
        if isinstance(batches, Generator):  # whose workers end with it
            batches.close()


class Ahead:
    """Threads that fetch the files of an order in the order in which it comes to them.

    In windows they go as far as the next one, so that there is room for what is fetched; else as far as there are files
    that aren't here. What can't be fetched is left to whoever reads it, who says so.
    """

    def __init__(self, parts: Sequence[tuple[int, Shards]], order: Order):
        self.order = order
        self.parts = list(parts)
        limits = {window.first: 2 * window.most for window in order.windows}
        self.most = [limits.get(first, len(part.files)) for first, part in self.parts]
        self.all = [int(np.count_nonzero(np.diff(part.index.starts))) for _, part in self.parts]  # files with images
        self.needed: list[dict[int, int]] = [{} for _ in self.parts]  # of each part file -> the last batch that has it
        self.taken = 0  # batches
        self.ended = False
        self.moved = threading.Condition()
        self.fetching = threading.Lock()  # of who asks for the next file
        self.files = self._files()

    def begin(self) -> None:
        for number in range(FETCHING):
            threading.Thread(target=self._work, name=f"ahead {number}", daemon=True).start()

    def goes_on(self) -> None:
        """Another batch was taken."""
        with self.moved:
            self.taken += 1
            self.moved.notify_all()

    def end(self) -> None:
        with self.moved:
            self.ended = True
            self.moved.notify_all()

    def _work(self) -> None:
        while not self.ended:
            with self.fetching:
                found = next(self.files, None)
            if found is None:
                return
            copies: Any = found[0].copies
            try:
                copies.fetch(found[1])
            except Exception:  # its reader says it
                continue

    def _files(self) -> Iterator[tuple[Shards, int]]:
        """The files that are to be fetched, one after the other, each when its time has come."""
        for number, keys in enumerate(self.order):
            samples = np.array([sample for _, sample in keys]) % self.order.samples
            for (first, part), needed, most in zip(self.parts, self.needed, self.most, strict=True):
                images = samples[(samples >= first) & (samples < first + len(part))] - first
                for file in np.unique(np.searchsorted(part.index.starts, images, side="right") - 1).tolist():
                    if file not in needed and not self._waited(needed, most):
                        return
                    new = file not in needed
                    needed[file] = number
                    if new and part.copies is not None:
                        for one in needed:  # none of which may go for what is fetched now
                            part.copies.touch(one)
                        if not part.copies.has(file):
                            yield part, file
            if [len(needed) for needed in self.needed] == self.all:
                return  # there is nothing left that could be missing

    def _waited(self, needed: dict[int, int], most: int) -> bool:
        """Wait until fewer files are needed than may be here; False where the order isn't followed any more."""
        with self.moved:
            while not self.ended:
                if len(needed) < most:
                    return True
                behind = [file for file, last in needed.items() if last < self.taken]
                for file in behind:
                    del needed[file]
                if not behind:
                    self.moved.wait()
        return False
