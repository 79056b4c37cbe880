"""Collectives as operators of a graph of torch.compile, for ranks that promise each other equal batches.

What ranks tell each other in an `Agreement` decides shapes, on the host, and no graph can hold it: so a compiled loss
is otherwise one opaque operator (`functional/compiled.py`), which takes uneven batches as the eager loss does. Where
every rank is known to have as many rows there is nothing to agree on. Then the loss is traced as it stands, and
`fastjem.collectives` writes PyTorch's functional collectives into the graph in place of its own: the compiler sees
them, may start them early and wait late, and the host waits for nothing.

A ring has no place in a graph, which would hold W - 1 copies of its body: one all-gather brings all ranks' rows, and
the operator that compares rows with candidates is called twice, for this rank's candidates and for all others. All
rows are then in memory, N D of each rank; the N x N scores still never are.
"""

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

_promised = False


@contextlib.contextmanager
def equal_batches() -> Iterator[None]:
    """A promise: what is compiled or runs compiled within has as many rows on every rank of its group, at every call.

    With it a loss that is given a group becomes part of the graph that torch.compile makes of its surroundings, its
    collectives too (`torch.distributed._functional_collectives`). Enter it around the compiled function's calls, on all
    ranks; a call outside is compiled anew, as one operator. Calls that aren't compiled don't change.

    The promise can't be checked before the rows travel, but beside them: a graph takes the smallest and the largest
    number of rows of all ranks and asserts that they are one, in 16 bytes a loss and without the host's waiting. A
    broken promise is then a RuntimeError on all ranks (on CUDA a device-side assertion, which ends the process).

    Raises:
        RuntimeError: from a compiled loss on every rank, where numbers of rows differ.
    """
    global _promised
    before = _promised
    _promised = True
    try:
        yield
    finally:
        _promised = before


def active() -> bool:
    """Whether collectives are to be operators of the graph that is being made."""
    return _promised and torch.compiler.is_compiling()


def all_gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[W, ...]: `x` of every rank."""
    from torch.distributed import _functional_collectives as functional

    return functional.all_gather_tensor(x.detach().contiguous()[None], 0, group)


def all_reduce(x: Tensor, group: dist.ProcessGroup, kind: str = "sum") -> Tensor:
    from torch.distributed import _functional_collectives as functional

    return functional.all_reduce(x.detach().contiguous(), kind, group)


def from_first_rank(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    from torch.distributed import _functional_collectives as functional

    return functional.broadcast(x.detach().contiguous(), 0, group)


def all_other_ranks(tensors: list[Tensor], dim: int, group: dist.ProcessGroup) -> list[Tensor]:
    """Of each tensor those of all other ranks, concatenated along `dim` in the order of ranks."""
    me = dist.get_rank(group)
    others = []
    for x in tensors:
        of_ranks = all_gather(x.detach().movedim(dim, 0), group)
        rows = torch.cat([of_ranks[:me], of_ranks[me + 1 :]]).flatten(0, 1)
        others.append(rows.movedim(0, dim))
    return others


def assert_equal_rows(who: str, x: Tensor, dim: int, group: dist.ProcessGroup) -> None:
    """See `equal_batches`."""
    rows = torch.full((1,), x.shape[dim], dtype=torch.int64, device=x.device)
    extremes = all_reduce(torch.cat([rows, -rows]), group, "max")
    message = f"{who}: within equal_batches every rank must have as many rows, got other numbers on other ranks"
    torch._assert_async(extremes.sum() == 0, message)
