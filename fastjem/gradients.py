"""Gradients of several passes, which cross ranks once: `kept_here` around each, then `averaged`.

    for part in parts:
        with kept_here(model):
            loss(model(part)).backward()
    averaged(parameters, group)  # p.grad = mean over ranks of p.grad

DistributedDataParallel's own reduction would need all parameters in its last pass, which has the encoder alone.
"""

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

BUCKET = 1 << 23  # numbers that are sent at once: 32 MiB in float32


def kept_here(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """Within, a backward pass through the model leaves gradients with their rank, wherever the model has a way to say
    so: DistributedDataParallel, compiled or not."""
    model = getattr(model, "_orig_mod", model)
    return model.no_sync() if isinstance(model, nn.parallel.DistributedDataParallel) else contextlib.nullcontext()


@torch.no_grad()
def averaged(parameters: Sequence[nn.Parameter], group: dist.ProcessGroup | None) -> None:
    """In place, the mean over ranks of each parameter's gradient; of one without, zero counts, and one that has none on
    any rank still has none. A collective call for each `BUCKET`, the same ones on every rank.
    """
    if group is None:
        return
    for bucket in _buckets(parameters):
        has = [float(p.grad is not None) for p in bucket]
        counts = torch.tensor(has, dtype=bucket[0].dtype)
        counts = (counts.pin_memory() if bucket[0].is_cuda else counts).to(bucket[0].device, non_blocking=True)
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
        flat = torch.cat([counts, *(grad.flatten() for grad in grads)])
        dist.all_reduce(flat, group=group)
        flat.div_(dist.get_world_size(group))
        anywhere = [True] * len(bucket) if all(has) else (flat[: len(bucket)] > 0).tolist()
        summed = flat[len(bucket) :].split([p.numel() for p in bucket])
        for parameter, mean, known in zip(bucket, summed, anywhere, strict=True):
            if parameter.grad is not None:
                parameter.grad.copy_(mean.view_as(parameter))
            elif known:
                parameter.grad = mean.view_as(parameter).clone()


def _buckets(parameters: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Neighbours of one dtype, up to `BUCKET` numbers or a parameter."""
    buckets: list[list[nn.Parameter]] = []
    size = BUCKET
    for parameter in parameters:
        size += parameter.numel()
        if size > BUCKET or parameter.dtype != buckets[-1][0].dtype:
            buckets.append([])
            size = parameter.numel()
        buckets[-1].append(parameter)
    return buckets


__all__ = ["averaged", "kept_here"]
