"""Each rank's tensors to all others, one rank after the other: how `collectives.other_ranks` is made."""

import math
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor


class Turns:
    """The broadcasts of `other_ranks`: which ranks' are to come, and which are on their way."""

    def __init__(self, mine: list[Tensor], sizes: list[int], group: dist.ProcessGroup):
        self.mine = mine
        self.sizes = sizes
        self.group = group
        self.me = dist.get_rank(group)
        self.senders = iter([rank for rank, size in enumerate(sizes) if size])
        self.coming: list[tuple[list[Tensor], dist.Work]] = []
        self.sent: dist.Work | None = None

    def start_next(self) -> None:
        """Start the next broadcast that brings something; this rank's own, which doesn't, on the way."""
        for rank in self.senders:
            source = dist.get_global_rank(self.group, rank)
            if rank == self.me:
                self.sent = dist.broadcast(_packed(self.mine), source, group=self.group, async_op=True)
                continue
            shapes = [(self.sizes[rank], *x.shape[1:]) for x in self.mine]
            memory = self.mine[0].new_empty(_bytes_of(shapes, self.mine), dtype=torch.uint8)
            work = dist.broadcast(memory, source, group=self.group, async_op=True)
            assert work is not None  # this rank is in the group: its `Agreement` has seen to it
            self.coming.append((_unpacked(memory, shapes, self.mine), work))
            return

    def in_order(self, dim: int) -> Iterator[list[Tensor]]:
        while self.coming:
            current, work = self.coming.pop()
            self.start_next()
            work.wait()
            if self.sizes[self.me]:
                yield [x.movedim(0, dim) for x in current]
        if self.sent is not None:
            self.sent.wait()


# Tensors as bytes, so that one collective carries several: each begins at a multiple of so many bytes.

_ALIGNMENT = 16


def _bytes_of(shapes: list[tuple], like: list[Tensor]) -> int:
    """Of tensors of these shapes, in the dtypes of others, packed."""
    lengths = [math.prod(shape) * x.element_size() for shape, x in zip(shapes, like, strict=True)]
    return sum(length + -length % _ALIGNMENT for length in lengths)


def _unpacked(memory: Tensor, shapes: list[tuple], like: list[Tensor]) -> list[Tensor]:
    """Views of packed memory."""
    tensors = []
    begin = 0
    for shape, x in zip(shapes, like, strict=True):
        end = begin + math.prod(shape) * x.element_size()
        tensors.append(memory[begin:end].view(x.dtype).view(shape))
        begin = end + (begin - end) % _ALIGNMENT
    return tensors


def _packed(tensors: list[Tensor]) -> Tensor:
    """[bytes]: the tensors one behind the other."""
    shapes = [tuple(x.shape) for x in tensors]
    memory = tensors[0].new_empty(_bytes_of(shapes, tensors), dtype=torch.uint8)
    for place, x in zip(_unpacked(memory, shapes, tensors), tensors, strict=True):
        place.copy_(x)
    return memory
