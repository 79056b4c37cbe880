"""Collectives inside of a graph of torch.compile, of ranks whose batches are equal."""

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

_promised = False


@contextlib.contextmanager
def equal_batches() -> Iterator[None]:
    global _promised
    before = _promised
    _promised = True
    try:
        yield
    finally:
        _promised = before


def in_graph() -> bool:
    return _promised and torch.compiler.is_compiling()


def all_gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[W, ...]"""
    from torch.distributed._functional_collectives import all_gather_tensor, wait_tensor
    x = x.detach().contiguous()
    return wait_tensor(all_gather_tensor(x[None], 0, group))


def all_reduce(x: Tensor, group: dist.ProcessGroup, kind: str = "sum") -> Tensor:
    from torch.distributed._functional_collectives import all_reduce, wait_tensor
    return wait_tensor(all_reduce(x.detach().contiguous(), kind, group))


def check_rows(who: str, rows: int, group: dist.ProcessGroup, device) -> None:
    n = torch.full((1,), rows, dtype=torch.int64, device=device)
    extremes = all_reduce(torch.cat([n, -n]), group, "max")
    torch._assert_async(extremes.sum() == 0, f"{who}: under equal_batches, every rank must have as many rows")
