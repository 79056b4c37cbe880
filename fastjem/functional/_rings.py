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
from fastjem.ops.autograd import known, ops, refuse_second_order


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
    def forward(
        ctx, z: Tensor, weights: Tensor | None, counted: Tensor | None, options: tuple, group: dist.ProcessGroup
    ) -> Tensor:
        n = z.shape[1]
        ctx.sizes = _sizes(n, group, z.device)
        positives, lse = ops.nt_xent(z, z, 0, *options)
        for (others,) in _others([z], 1, ctx.sizes, group):
            lse = torch.logaddexp(lse, ops.nt_xent(z, others, -n, *options)[1])
        terms = lse - (positives if weights is None else positives * weights)
        if counted is not None:  # a row that doesn't count has no probabilities
            terms, lse = terms.where(counted, 0), lse.where(counted, torch.inf)
        ctx.save_for_backward(z, lse, weights)
        ctx.options, ctx.group, ctx.count = options, group, len(z) * sum(ctx.sizes)
        return (sum_over_ranks(terms.sum(), group) / ctx.count).to(_loss_dtype(z))

    @staticmethod
    def backward(ctx, upstream: Tensor):
        refuse_second_order("nt_xent")
        (z, lse, weights), n = ctx.saved_tensors, ctx.saved_tensors[0].shape[1]
        gradient = _wide(ops.nt_xent_backward(z, z, lse, lse, weights, 0, *ctx.options))
        for others, their_lse in _others([z, lse], 1, ctx.sizes, ctx.group):
            gradient += ops.nt_xent_backward(z, others, lse, their_lse, None, -n, *ctx.options)
        scale = world_size(ctx.group) / (ctx.count * ctx.options[0])
        return (gradient * (upstream * scale)).to(z.dtype), None, None, None, None


def nt_xent(
    z: Tensor, weights: Tensor | None, options: tuple, group: dist.ProcessGroup, counted: Tensor | None = None
) -> Tensor:
    return _NTXent.apply(z, weights, counted, options, group)


def sums_of_own_classes(
    tensors: list[Tensor],  # [N, ...] each
    labels: Tensor,  # [N]
    group: dist.ProcessGroup,
) -> list[Tensor]:
    """For each of this rank's images the sums over the images of its class on other ranks; constants."""
    sizes = _sizes(len(labels), group, labels.device)
    sums = [torch.zeros_like(x, requires_grad=False) for x in tensors]
    for *theirs, their_labels in _others([*tensors, labels], 0, sizes, group):
        classes, order = their_labels.sort()
        first, last = torch.searchsorted(classes, labels), torch.searchsorted(classes, labels, right=True)
        # each of their images is added to the place where its class begins
        where, found = torch.searchsorted(classes, classes), last > first
        for total, x in zip(sums, theirs, strict=True):
            by_class = torch.zeros_like(x).index_put((where,), x[order], accumulate=True)
            part = by_class[first.clamp_max(len(x) - 1)]
            total += part.where(found.view(-1, *[1] * (x.dim() - 1)), 0)
    return sums


class _Clip(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, y: Tensor, scale: Tensor, group: dist.ProcessGroup | None, local: bool) -> Tensor:
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
        if local:
            return (total / (2 * len(x))).to(_loss_dtype(x))
        return (sum_over_ranks(total, group) / ctx.count).to(_loss_dtype(x))

    @staticmethod
    def backward(ctx, upstream: Tensor):
        refuse_second_order("clip_loss")
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
        return *gradients, (scale_gradient * factor).to(scale.dtype) if ctx.needs_input_grad[2] else None, None, None


def clip_loss(x: Tensor, y: Tensor, scale: Tensor, group: dist.ProcessGroup | None, local: bool = False) -> Tensor:
    """`local`: the value is this rank's share; the gradient stays that of the global loss."""
    return _Clip.apply(x, y, scale, group, local)


def clip_loss_of_constant_candidates(x: Tensor, y: Tensor, scale: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's rows of both directions; a candidate gets no gradient, not even one of this rank."""
    wanted = [torch.is_grad_enabled() and z.requires_grad for z in (x, y)]
    rows, columns, factor = (z.detach() for z in (x, y, scale))
    sizes = _sizes(len(x), group, x.device)
    positives, x_lse, y_lse = ops.clip_loss(rows, columns, factor, 0)
    for xs, ys in _others([rows, columns], 0, sizes, group):
        x_lse = torch.logaddexp(x_lse, ops.clip_loss(rows, ys, factor, -len(x))[1])
        y_lse = torch.logaddexp(y_lse, ops.clip_loss(xs, columns, factor, -len(xs))[2])
    loss = (((x_lse - positives) + (y_lse - positives)).sum() / (2 * len(x))).to(_loss_dtype(x))
    if not (torch.is_grad_enabled() and any(z.requires_grad for z in (x, y, scale))):
        return loss

    def backward(a: Tensor, b: Tensor, offset: int) -> tuple:
        """The gradients of a softmax of `rows` alone and of `columns` alone: the other's log-sum-exp is infinite."""
        infinite = [torch.full((len(z),), torch.inf, dtype=x_lse.dtype, device=x.device) for z in (a, b)]
        (x_part, _), x_share = ops.clip_loss_backward(rows, b, factor, x_lse, infinite[1], offset, [wanted[0], False])
        offset = -len(a) if offset else 0
        (_, y_part), y_share = ops.clip_loss_backward(
            a, columns, factor, infinite[0], y_lse, offset, [False, wanted[1]]
        )
        return x_part, y_part, x_share + y_share

    x_gradient, y_gradient, scale_gradient = backward(rows, columns, 0)
    # a pair's logit was subtracted in both directions of each call
    x_gradient, y_gradient = (
        _wide(g) + _wide(z) if w else _wide(g)
        for g, z, w in zip((x_gradient, y_gradient), (columns, rows), wanted, strict=True)
    )
    scale_gradient = scale_gradient + 2 * (rows.double() * columns.double()).sum()
    for xs, ys in _others([rows, columns], 0, sizes, group):
        parts = backward(xs, ys, -len(x))
        x_gradient, y_gradient, scale_gradient = x_gradient + parts[0], y_gradient + parts[1], scale_gradient + parts[2]
    share = 1 / (2 * len(x))
    scales = (factor.to(x_gradient.dtype) * share,) * 2
    return known("clip_loss", loss, (x, y, scale), (x_gradient, y_gradient, scale_gradient), (*scales, share))


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
