"""Losses of the batch of all ranks, for which every rank gathers it and keeps the gradient of its own rows."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from fastjem.functional._collectives import gather_rows, sum_over_ranks, world_size


def of_global_batch(loss_of: Callable[..., Tensor], group: dist.ProcessGroup | None, *inputs: Tensor) -> Tensor:
    """`loss_of(*inputs)`, or of all ranks' rows with the gradient that DistributedDataParallel makes the global one."""
    return loss_of(*inputs) if group is None else _ThisRanksPart.apply(loss_of, group, *inputs)


class _ThisRanksPart(torch.autograd.Function):
    """The loss of all ranks' rows; its gradient for this rank's rows, times the ranks (which DDP divides by)."""

    @staticmethod
    def forward(ctx, loss_of: Callable, group: dist.ProcessGroup, *inputs: Tensor) -> Tensor:
        gathered = [gather_rows(x, group) for x in inputs]
        whole = [x.requires_grad_() for x, _ in gathered]
        with torch.enable_grad():
            loss = loss_of(*whole)
        wanted = [x for x, needed in zip(whole, ctx.needs_input_grad[2:], strict=True) if needed]
        gradients = iter(torch.autograd.grad(loss, wanted) if wanted else ())
        offset, length = gathered[0][1], len(inputs[0])
        mine = [next(gradients)[offset : offset + length] if needed else None for needed in ctx.needs_input_grad[2:]]
        ctx.save_for_backward(*(None if g is None else g * world_size(group) for g in mine))
        return loss.detach()

    @staticmethod
    def backward(ctx, upstream: Tensor):
        return None, None, *(None if g is None else g * upstream for g in ctx.saved_tensors)


def sum_of_ranks(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The sum over ranks; its gradient for this rank's part is times the ranks, which DistributedDataParallel divides
    by."""
    return x if group is None else _SumOfRanks.apply(x, group)


class _SumOfRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.ranks = world_size(group)
        return sum_over_ranks(x, group)

    @staticmethod
    def backward(ctx, upstream: Tensor):
        return upstream * ctx.ranks, None
