"""Shuffled batches, MoCo's way without synchronised batch norm. Names and arguments as in lightly."""

import torch
import torch.distributed as dist
from torch import Tensor

from fastjem.collectives import Agreement, default_group, from_first_rank, gather_rows
from fastjem.functional import checks


@torch.no_grad()
def batch_shuffle(batch: Tensor, distributed: bool = False) -> tuple[Tensor, Tensor]:
    """The rows in a random order, and the order, which `batch_unshuffle` takes.

    Args:
        batch: [N, ...].
        distributed: over all ranks: each gets as many rows of the global batch as it has, the order is of all rows,
            and ranks draw it alike. Batches may be uneven.
    """
    if distributed:
        return batch_shuffle_distributed(batch)
    _check("batch_shuffle", batch)
    shuffle = torch.randperm(len(batch), device=batch.device)
    return batch[shuffle], shuffle


@torch.no_grad()
def batch_unshuffle(batch: Tensor, shuffle: Tensor, distributed: bool = False) -> Tensor:
    """The rows where they were before `batch_shuffle` gave this order."""
    if distributed:
        return batch_unshuffle_distributed(batch, shuffle)
    _check("batch_unshuffle", batch)
    if shuffle.shape != batch.shape[:1]:
        checks.fail("batch_unshuffle", f"shuffle must be [{len(batch)}]", tuple(shuffle.shape))
    return batch[shuffle.argsort()]


@torch.no_grad()
def concat_all_gather(x: Tensor) -> Tensor:
    """All ranks' [N, ...], one after the other, without a gradient. Batches may be uneven."""
    return _gathered("concat_all_gather", x)[0]


@torch.no_grad()
def batch_shuffle_distributed(batch: Tensor) -> tuple[Tensor, Tensor]:
    """`batch_shuffle(batch, distributed=True)`; the order that is returned is the one back."""
    everything, first = _gathered("batch_shuffle_distributed", batch)
    order = torch.randperm(len(everything), device=batch.device)
    order = from_first_rank(order, default_group())
    return everything[order[first : first + len(batch)]], order.argsort()


@torch.no_grad()
def batch_unshuffle_distributed(batch: Tensor, shuffle: Tensor) -> Tensor:
    """`batch_unshuffle(batch, shuffle, distributed=True)`."""
    everything, first = _gathered("batch_unshuffle_distributed", batch)
    if shuffle.shape != everything.shape[:1]:
        contract = f"shuffle must be [{len(everything)}], of all ranks' rows"
        checks.fail("batch_unshuffle_distributed", contract, tuple(shuffle.shape))
    return everything[shuffle[first : first + len(batch)]]


def _check(op: str, batch: Tensor) -> None:
    if not isinstance(batch, Tensor) or not batch.dim():
        checks.fail(op, "batch must be [N, ...]", checks.shape(batch))


def _gathered(op: str, x: Tensor) -> tuple[Tensor, int]:
    """All ranks' rows, and where this rank's begin. Where there is one rank alone, its own."""
    group: dist.ProcessGroup | None = default_group()
    with Agreement(op, group) as ranks:
        _check(op, x)
        ranks.rows_of(x)
    return (x, 0) if group is None else gather_rows(x, group, ranks.sizes)
