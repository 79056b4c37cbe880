"""Millions of names in few bytes each: compressed in blocks, of which the one that is asked for is opened."""

import os
import zlib
from array import array
from collections.abc import Iterable, Iterator
from typing import Any

BLOCK = 64  # names: one is found in 10 microseconds, and names of one folder take some 5 bytes each
END = b"\0"  # which no name of a file contains


class Packed:
    """Names as the file system has them, in an order that is kept.

    Two arrays and no object for each name: a forked worker copies no reference counts, a spawned one is sent few bytes.
    """

    def __init__(self, names: Iterable[bytes]):
        self.count = 0
        self.packed = bytearray()
        self.ends = array("Q")  # of each block
        block: list[bytes] = []
        for name in names:
            block.append(name)
            if len(block) == BLOCK:
                self._close(block)
                block = []
        if block:
            self._close(block)

    def _close(self, block: list[bytes]) -> None:
        self.packed += zlib.compress(END.join(block), 1)
        self.ends.append(len(self.packed))
        self.count += len(block)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> bytes:
        if not -self.count <= i < self.count:
            raise IndexError(f"{i} of {self.count} names")
        block, place = divmod(i % self.count, BLOCK)
        return self._opened(block).split(END)[place]

    def __iter__(self) -> Iterator[bytes]:
        for block in range(len(self.ends)):
            yield from self._opened(block).split(END)

    @property
    def nbytes(self) -> int:
        return len(self.packed) + len(self.ends) * self.ends.itemsize

    def hash_into(self, into: Any) -> None:
        """Each name as UTF-8 with a zero byte behind it, without an object for each."""
        for block in range(len(self.ends)):
            into.update(os.fsdecode(self._opened(block) + END).encode("utf-8", "surrogatepass"))

    def _opened(self, block: int) -> bytes:
        return zlib.decompress(self.packed[self.ends[block - 1] if block else 0 : self.ends[block]])
