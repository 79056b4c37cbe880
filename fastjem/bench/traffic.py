"""The collectives of a piece of code, counted: how many there are, and what they carry."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# As PyTorch's dispatcher names them -> what is said of them, and which argument holds what a rank puts in.
_KINDS = {
    "c10d::broadcast_": ("broadcast", 0),
    "c10d::allgather_": ("gather", 1),
    "c10d::_allgather_base_": ("gather", 1),
    "c10d::allreduce_": ("sum", 0),
    "_c10d_functional::broadcast": ("broadcast", 0),
    "_c10d_functional::all_gather_into_tensor": ("gather", 0),
    "_c10d_functional::all_reduce": ("sum", 0),
}
_NO_TRAFFIC = ("c10d::barrier", "c10d::monitored_barrier_", "_c10d_functional::wait_tensor")


@dataclass(frozen=True)
class Collective:
    """One call of one rank."""

    kind: str  # broadcast | gather | sum
    bytes: int  # of the tensors that a rank puts in; of a broadcast, that its source does
    ranks: int

    @property
    def sent(self) -> float:
        """Bytes that a rank sends, and receives, in the mean over ranks, where ranks form a ring as NCCL's do.

        Of a broadcast each rank but the last hands on all, of an all-gather each hands on all but one part, and of a
        sum each does so twice with W-th parts. No way of doing it moves fewer bytes into a rank.
        """
        others = self.ranks - 1
        share = {"broadcast": others / self.ranks, "gather": others, "sum": 2 * others / self.ranks}
        return share[self.kind] * self.bytes


class Traffic(TorchDispatchMode):
    """`with Traffic() as seen:` counts the collectives that this process calls within, those of backward as well.

    `seen.collectives` are the calls in their order; `seen.sent` and `len(seen.collectives)` say the most of them. What
    isn't a broadcast, an all-gather or a sum is a NotImplementedError, rather than left out.
    """

    def __init__(self) -> None:
        super().__init__()
        self.collectives: list[Collective] = []

    @property
    def sent(self) -> float:
        """Bytes, see `Collective.sent`."""
        return sum(call.sent for call in self.collectives)

    def bytes_of(self, kind: str) -> int:
        return sum(call.bytes for call in self.collectives if call.kind == kind)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if name.startswith(("c10d::", "_c10d_functional::")) and name not in _NO_TRAFFIC:
            if name not in _KINDS:
                raise NotImplementedError(f"Traffic: broadcasts, all-gathers and sums are counted, got {name}")
            kind, place = _KINDS[name]
            self.collectives.append(Collective(kind, _bytes(args[place]), _ranks(args)))
        return func(*args, **(kwargs or {}))


def _bytes(given: object) -> int:
    if isinstance(given, Tensor):
        return given.numel() * given.element_size()
    assert isinstance(given, (list, tuple))
    return sum(map(_bytes, given))


def _ranks(args: tuple) -> int:
    """Of the group among the arguments, which is an object or a name."""
    for x in args:
        if isinstance(x, torch.ScriptObject):
            return dist.ProcessGroup.unbox(x).size()
    from torch.distributed.distributed_c10d import _resolve_process_group as resolve

    name: Any = next(x for x in reversed(args) if isinstance(x, str))
    return resolve(name).size()
