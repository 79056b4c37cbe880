"""Contrastive losses whose candidates are on other ranks.

Each rank's rows are broadcast in turn, the next while the current ones are used: memory stays that of one batch, and
every rank adds in the same order. No gradient is communicated: a row's owner computes all of it, from the rows and
log-sum-exps of others.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from fastjem.functional._collectives import sum_over_ranks, world_size
from fastjem.ops.autograd import _refuse_second_order, known, ops


def _sizes(n: int, group: dist.ProcessGroup, device: torch.device) -> list[int]:
    mine = torch.tensor([n], device=device)
    sizes = [torch.empty_like(mine) for _ in range(world_size(group))]
    dist.all_gather(sizes, mine, group=group)
    return torch.cat(sizes).tolist()  # shapes must be known on the host: the one synchronisation of a distributed loss


def _others(tensors: list[Tensor], dim: int, sizes: list[int], group: dist.ProcessGroup) -> Iterator[list[Tensor]]:
    """The same tensors of each other rank, in the order of ranks; they differ in length along `dim`."""
    me = dist.get_rank(group)
    mine = [x.detach().movedim(dim, 0).contiguous() for x in tensors]

    def start(rank: int) -> tuple[list, list]:
        theirs = mine if rank == me else [x.new_empty(sizes[rank], *x.shape[1:]) for x in mine]
        source = dist.get_global_rank(group, rank)
        return theirs, [dist.broadcast(x, source, group=group, async_op=True) for x in theirs]

    following = start(0)
    for rank in range(len(sizes)):
        theirs, works = following
        if rank + 1 < len(sizes):
            following = start(rank + 1)
        for work in works:
            work.wait()
        if rank != me:
            yield [x.movedim(0, dim) for x in theirs]


def _loss_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _wide(x: Tensor) -> Tensor:
    return x.to(_loss_dtype(x))


class _NTXent(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z: Tensor, weights: Tensor | None, options: tuple, group: dist.ProcessGroup) -> Tensor:
        n = z.shape[1]
        ctx.sizes = _sizes(n, group, z.device)
        positives, lse = ops.nt_xent(z, z, 0, *options)
        for (others,) in _others([z], 1, ctx.sizes, group):
            lse = torch.logaddexp(lse, ops.nt_xent(z, others, -n, *options)[1])
        total = (lse - (positives if weights is None else positives * weights)).sum()
        ctx.save_for_backward(z, lse, weights)
        ctx.options, ctx.group, ctx.count = options, group, len(z) * sum(ctx.sizes)
        return (sum_over_ranks(total, group) / ctx.count).to(_loss_dtype(z))

    @staticmethod
    def backward(ctx, upstream: Tensor):
        _refuse_second_order("nt_xent")
        (z, lse, weights), n = ctx.saved_tensors, ctx.saved_tensors[0].shape[1]
        gradient = _wide(ops.nt_xent_backward(z, z, lse, lse, weights, 0, *ctx.options))
        for others, their_lse in _others([z, lse], 1, ctx.sizes, ctx.group):
            gradient += ops.nt_xent_backward(z, others, lse, their_lse, None, -n, *ctx.options)
        scale = world_size(ctx.group) / (ctx.count * ctx.options[0])
        return (gradient * (upstream * scale)).to(z.dtype), None, None, None


def nt_xent(z: Tensor, weights: Tensor | None, options: tuple, group: dist.ProcessGroup) -> Tensor:
    return _NTXent.apply(z, weights, options, group)


class _Clip(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, y: Tensor, scale: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        positives, x_lse, y_lse = ops.clip_loss(x, y, scale, 0)
        ctx.sizes = [len(x)]
        if group is not None:
            ctx.sizes = _sizes(len(x), group, x.device)
            for xs, ys in _others([x, y], 0, ctx.sizes, group):
                x_lse = torch.logaddexp(x_lse, ops.clip_loss(x, ys, scale, -len(x))[1])
                y_lse = torch.logaddexp(y_lse, ops.clip_loss(xs, y, scale, -len(xs))[2])
        total = ((x_lse - positives) + (y_lse - positives)).sum()
        ctx.save_for_backward(x, y, scale, x_lse, y_lse)
        ctx.group, ctx.count = group, 2 * sum(ctx.sizes)
        return (sum_over_ranks(total, group) / ctx.count).to(_loss_dtype(x))

    @staticmethod
    def backward(ctx, upstream: Tensor):
        _refuse_second_order("clip_loss")
        x, y, scale, x_lse, y_lse = ctx.saved_tensors
        wanted = list(ctx.needs_input_grad[:2])
        (x_gradient, y_gradient), scale_gradient = ops.clip_loss_backward(x, y, scale, x_lse, y_lse, 0, wanted)
        if ctx.group is not None:
            x_gradient, y_gradient = _wide(x_gradient), _wide(y_gradient)
            for xs, ys, xs_lse, ys_lse in _others([x, y, x_lse, y_lse], 0, ctx.sizes, ctx.group):
                (part, _), share = ops.clip_loss_backward(x, ys, scale, x_lse, ys_lse, -len(x), [wanted[0], False])
                x_gradient += part
                scale_gradient = scale_gradient + share
                if wanted[1]:
                    y_gradient += ops.clip_loss_backward(xs, y, scale, xs_lse, y_lse, -len(xs), [False, True])[0][1]
        factor = upstream * (world_size(ctx.group) / ctx.count)
        gradients = []
        for gradient, like, want in ((x_gradient, x, wanted[0]), (y_gradient, y, wanted[1])):
            if want:
                ops.rescale_(gradient, factor * scale.to(factor.dtype))
            gradients.append(gradient.to(like.dtype) if want else None)
        return *gradients, (scale_gradient * factor).to(scale.dtype) if ctx.needs_input_grad[2] else None, None


def clip_loss(x: Tensor, y: Tensor, scale: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    return _Clip.apply(x, y, scale, group)


def siglip_loss(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    wanted = [torch.is_grad_enabled() and z.requires_grad for z in (x, y)]
    rows, columns, *parameters = (z.detach() for z in (x, y, scale, bias))
    total, gradients, scale_gradient, bias_gradient = ops.siglip_loss(rows, columns, *parameters, 0, wanted)
    count = len(x)
    if group is not None:
        sizes = _sizes(len(x), group, x.device)
        count = sum(sizes)
        gradients = [_wide(g) for g in gradients]
        for xs, ys in _others([rows, columns], 0, sizes, group):
            part, own, s, b = ops.siglip_loss(rows, ys, *parameters, -len(x), [wanted[0], False])
            total, scale_gradient, bias_gradient = total + part, scale_gradient + s, bias_gradient + b
            gradients[0] = gradients[0] + own[0]
            if wanted[1]:
                gradients[1] += ops.siglip_loss(xs, columns, *parameters, -len(xs), [False, True])[1][1]
    loss = (sum_over_ranks(total, group) / count).to(_loss_dtype(x))
    share = world_size(group) / count
    factor = parameters[0].to(_loss_dtype(x)) * share
    everything = [*gradients, scale_gradient, bias_gradient]
    return known("siglip_loss", loss, (x, y, scale, bias), everything, (factor, factor, share, share))
