"""Contrastive losses whose candidates are on other ranks: NT-Xent and its family, CLIP, SigLIP.

**A ring of ranks.** Every row needs the similarities with all ranks' rows, but only their log-sum-exp. So no rank ever
holds them all: each rank's rows are broadcast in turn, and while the next ones travel, every rank compares its own rows
with the current ones and adds to its log-sum-exps (`collectives.other_ranks`). The first travel while it compares its
own rows with each other: so a ring is started before that, and walked after. Beside its own rows a rank holds those of
two others, whatever the number of ranks. NT-Xent and CLIP go round a
second time in backward, where the log-sum-exps travel along with the rows.

**No gradient is communicated.** A row's gradient has two parts: from its own log-sum-exp, in which it compares itself
with all candidates, and from those of the other rows, in which it is a candidate. Both are softmax probabilities times
rows, and a probability is `exp(similarity - log-sum-exp)` of two rows and one number. So the row's owner computes both
parts by itself from what it receives, other ranks' rows and log-sum-exps, and sends none. The factor W in the gradients
is told of in `fastjem.collectives`.

Operators take an `offset`: candidate `offset + i` is row i itself (its pair, for CLIP and SigLIP), which isn't a
negative of it. On this rank it is 0; of other ranks' candidates none is, which an offset of -N says for N rows.

A rank without rows has no part in any sum. It calls no operator, but walks the ring to its end.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from fastjem.collectives import gradient_factor, other_ranks, sum_over_ranks
from fastjem.functional.precision import in_float32, loss_dtype
from fastjem.kernels.arithmetic import widest
from fastjem.ops import transforms
from fastjem.ops.autograd import distinct, known, needs_gradient, ops, refuse_second_order, rescaled_in_place
from fastjem.ops.forward_mode import refuse_forward_mode


class _NTXent(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        z: Tensor,
        weights: Tensor | None,
        counted: Tensor | None,
        options: tuple,
        sizes: list[int],
        group: dist.ProcessGroup,
    ) -> Tensor:
        n = z.shape[1]
        ctx.sizes = sizes
        ring = other_ranks([z], 1, ctx.sizes, group)
        positives, lse = ops.nt_xent(z, z, 0, *options) if n else _nothing(2, z.shape[:2], z)
        for (others,) in ring:
            lse = torch.logaddexp(lse, ops.nt_xent(z, others, -n, *options)[1])
        terms = lse - (positives if weights is None else positives * weights)
        if counted is not None:  # a row that doesn't count has no probabilities
            terms = terms.where(counted, 0)
            lse = lse.where(counted, torch.inf)
        ctx.save_for_backward(z, lse, weights)
        ctx.options, ctx.group = options, group
        ctx.count = z.shape[0] * sum(ctx.sizes)
        return _as_loss(sum_over_ranks(terms.sum(), group) / ctx.count, z)

    @staticmethod
    def backward(ctx, upstream: Tensor):
        refuse_second_order("nt_xent")
        z, lse, weights = ctx.saved_tensors
        ring = other_ranks([z, lse], 1, ctx.sizes, ctx.group)
        own = ops.nt_xent_backward(z, z, lse, lse, weights, 0, *ctx.options) if z.shape[1] else torch.zeros_like(z)
        gradient = in_float32(own)
        for others, others_lse in ring:
            gradient += ops.nt_xent_backward(z, others, lse, others_lse, None, -z.shape[1], *ctx.options)
        temperature = ctx.options[0]
        scale = gradient_factor(ctx.group) / (ctx.count * temperature)
        return (gradient * (upstream * scale)).to(z.dtype), None, None, None, None, None


def _as_loss(value: Tensor, like: Tensor) -> Tensor:
    """In the dtype of a loss, and a tensor of its own: what a Function returns twice, torch.compile (torch 2.11) takes
    for an output that nobody uses, and the gradients are 0. It returns every intermediate value, too."""
    return value.to(loss_dtype(like), copy=True)


def _nothing(count: int, shape: tuple[int, ...], like: Tensor) -> list[Tensor]:
    """What an operator returns of no rows."""
    return [widest(like.new_zeros(shape)) for _ in range(count)]


def nt_xent(
    z: Tensor,  # [V, N, D]
    weights: Tensor | None,  # [V, N] of the positives
    options: tuple,  # temperature, decoupled, normalize: the operator's
    sizes: list[int],  # each rank's N
    group: dist.ProcessGroup,
    counted: Tensor | None = None,  # [V, N] bool: which rows are anchors
) -> Tensor:
    """The mean over all ranks' rows of the log-sum-exp less the weighted positives."""
    refuse_forward_mode("nt_xent", (z,))
    return _NTXent.apply(z, weights, counted, options, sizes, group)


def sums_of_own_classes(
    tensors: list[Tensor],  # [N, ...] each
    labels: Tensor,  # [N]
    sizes: list[int],  # each rank's N
    group: dist.ProcessGroup,
) -> list[Tensor]:
    """For each of this rank's images the sums over the images of its class on other ranks; constants."""
    sums = [torch.zeros_like(x, requires_grad=False) for x in tensors]
    for *others, their_labels in other_ranks([*tensors, labels], 0, sizes, group):
        classes, order = their_labels.sort()
        begin = torch.searchsorted(classes, labels)
        end = torch.searchsorted(classes, labels, right=True)
        found = end > begin
        # Each of their images is added to the place where its class begins.
        class_begin = torch.searchsorted(classes, classes)
        for total, x in zip(sums, others, strict=True):
            by_class = torch.zeros_like(x).index_put((class_begin,), x[order], accumulate=True)
            of_own_class = by_class[begin.clamp_max(x.shape[0] - 1)]
            total += of_own_class.where(found.view(-1, *[1] * (x.dim() - 1)), 0)
    return sums


class _Clip(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x: Tensor, y: Tensor, scale: Tensor, sizes: list[int], group: dist.ProcessGroup | None, local: bool
    ) -> Tensor:
        positives, x_lse, y_lse = _clip_of_all_rows(x, y, scale, sizes, group)
        ctx.sizes = sizes
        total = ((x_lse - positives) + (y_lse - positives)).sum()
        ctx.save_for_backward(x, y, scale, x_lse, y_lse)
        ctx.group = group
        ctx.count = 2 * sum(ctx.sizes)
        if local:
            return _as_loss(total / (2 * max(x.shape[0], 1)), x)
        return _as_loss(sum_over_ranks(total, group) / ctx.count, x)

    @staticmethod
    def backward(ctx, upstream: Tensor):
        refuse_second_order("clip_loss")
        x, y, scale, x_lse, y_lse = ctx.saved_tensors
        x_wanted, y_wanted, scale_wanted = ctx.needs_input_grad[:3]
        gradients = [torch.zeros_like(x), torch.zeros_like(y)]
        scale_gradient = widest(torch.zeros_like(scale))
        ring = None if ctx.group is None else other_ranks([x, y, x_lse, y_lse], 0, ctx.sizes, ctx.group)
        if x.shape[0]:
            gradients, scale_gradient = ops.clip_loss_backward(x, y, scale, x_lse, y_lse, 0, [x_wanted, y_wanted])
        if ring is not None:
            x_gradient, y_gradient = (in_float32(gradient) for gradient in gradients)
            for xs, ys, xs_lse, ys_lse in ring:
                (of_x, _), of_scale = ops.clip_loss_backward(
                    x, ys, scale, x_lse, ys_lse, -x.shape[0], [x_wanted, False]
                )
                x_gradient += of_x
                scale_gradient = scale_gradient + of_scale
                if y_wanted:
                    (_, of_y), _ = ops.clip_loss_backward(xs, y, scale, xs_lse, y_lse, -xs.shape[0], [False, True])
                    y_gradient += of_y
            gradients = [x_gradient, y_gradient]
        factor = upstream * (gradient_factor(ctx.group) / ctx.count)
        scaled = []
        for gradient, like, wanted in ((gradients[0], x, x_wanted), (gradients[1], y, y_wanted)):
            if wanted:
                gradient = rescaled_in_place(gradient, factor * scale.to(factor.dtype))
            scaled.append(gradient.to(like.dtype) if wanted else None)
        return *scaled, (scale_gradient * factor).to(scale.dtype) if scale_wanted else None, None, None, None


def _clip_of_all_rows(
    x: Tensor, y: Tensor, scale: Tensor, sizes: list[int], group: dist.ProcessGroup | None
) -> Sequence[Tensor]:
    """Positives, and the log-sum-exps of x's rows over all ranks' y and of y's over all ranks' x, [N] each."""
    ring = None if group is None else other_ranks([x, y], 0, sizes, group)
    positives, x_lse, y_lse = ops.clip_loss(x, y, scale, 0) if x.shape[0] else _nothing(3, x.shape[:1], x)
    if ring is not None:
        for xs, ys in ring:
            x_lse = torch.logaddexp(x_lse, ops.clip_loss(x, ys, scale, -x.shape[0])[1])
            y_lse = torch.logaddexp(y_lse, ops.clip_loss(xs, y, scale, -xs.shape[0])[2])
    return positives, x_lse, y_lse


def clip_loss(
    x: Tensor,  # [N, D]
    y: Tensor,  # [N, D]
    scale: Tensor,  # 0-dim
    sizes: list[int],  # each rank's N
    group: dist.ProcessGroup | None,
    local: bool = False,
) -> Tensor:
    """`local`: the value is the mean over this rank's rows; the gradient stays that of the global loss."""
    refuse_forward_mode("clip_loss", (x, y, scale))
    if transforms.active():
        return _clip_at_once(x, y, scale)
    x, y = distinct((x, y))
    return _Clip.apply(x, y, scale, sizes, group, local)


def _clip_at_once(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """Within a transform of torch.func: the gradients with the loss."""
    wanted = [needs_gradient(z) for z in (x, y)]
    rows, columns, factor = (z.detach() for z in (x, y, scale))
    positives, x_lse, y_lse = ops.clip_loss(rows, columns, factor, 0)
    per_row = 1 / (2 * x.shape[0])
    loss = (((x_lse - positives) + (y_lse - positives)).sum() * per_row).to(loss_dtype(x))
    if not any(needs_gradient(z) for z in (x, y, scale)):
        return loss
    gradients, of_scale = ops.clip_loss_backward(rows, columns, factor, x_lse, y_lse, 0, wanted)
    row_factor = factor.to(loss_dtype(x)) * per_row
    return known("clip_loss", loss, (x, y, scale), (*gradients, of_scale), (row_factor, row_factor, per_row))


def clip_loss_of_constant_candidates(
    x: Tensor, y: Tensor, scale: Tensor, sizes: list[int], group: dist.ProcessGroup
) -> Tensor:
    """The mean over this rank's rows of both directions; a candidate gets no gradient, not even one of this rank."""
    wanted = [torch.is_grad_enabled() and z.requires_grad for z in (x, y)]
    rows, columns, factor = (z.detach() for z in (x, y, scale))
    positives, x_lse, y_lse = _clip_of_all_rows(rows, columns, factor, sizes, group)
    per_row = 1 / (2 * max(x.shape[0], 1))
    loss = (((x_lse - positives) + (y_lse - positives)).sum() * per_row).to(loss_dtype(x))
    if not (torch.is_grad_enabled() and any(z.requires_grad for z in (x, y, scale))):
        return loss

    def gradients_of(xs: Tensor, ys: Tensor, own: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Of `rows` against the candidates ys, and of `columns` against xs.

        An infinite log-sum-exp makes a candidate's own probabilities 0: what it would get as an anchor is left out.
        """
        no_x, no_y = (torch.full((z.shape[0],), torch.inf, dtype=x_lse.dtype, device=x.device) for z in (xs, ys))
        x_offset, y_offset = (0, 0) if own else (-rows.shape[0], -xs.shape[0])
        (of_x, _), x_scale = ops.clip_loss_backward(rows, ys, factor, x_lse, no_y, x_offset, [wanted[0], False])
        (_, of_y), y_scale = ops.clip_loss_backward(xs, columns, factor, no_x, y_lse, y_offset, [False, wanted[1]])
        return of_x, of_y, x_scale + y_scale

    ring = other_ranks([rows, columns], 0, sizes, group)
    of_x, of_y, scale_gradient = torch.zeros_like(rows), torch.zeros_like(columns), widest(torch.zeros_like(factor))
    if x.shape[0]:
        of_x, of_y, scale_gradient = gradients_of(rows, columns, own=True)
    # The operator subtracts a pair's logit once for each direction; with one of them left out that is once too often.
    x_gradient = in_float32(of_x) + in_float32(columns) if wanted[0] else in_float32(of_x)
    y_gradient = in_float32(of_y) + in_float32(rows) if wanted[1] else in_float32(of_y)
    scale_gradient = scale_gradient + 2 * (widest(rows) * widest(columns)).sum()
    for xs, ys in ring:
        of_x, of_y, of_scale = gradients_of(xs, ys, own=False)
        x_gradient = x_gradient + of_x
        y_gradient = y_gradient + of_y
        scale_gradient = scale_gradient + of_scale
    row_factor = factor.to(x_gradient.dtype) * per_row
    gradients = (x_gradient, y_gradient, scale_gradient)
    return known("clip_loss", loss, (x, y, scale), gradients, (row_factor, row_factor, per_row))


def siglip_loss(
    x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, sizes: list[int], group: dist.ProcessGroup | None
) -> Tensor:
    """The sum over all pairs of all ranks, over the images. Its gradients come in the forward pass."""
    wanted = [needs_gradient(z) for z in (x, y)]
    rows, columns, *parameters = (z.detach() for z in (x, y, scale, bias))
    ring = None if group is None else other_ranks([rows, columns], 0, sizes, group)
    if x.shape[0]:
        total, gradients, scale_gradient, bias_gradient = ops.siglip_loss(rows, columns, *parameters, 0, wanted)
    else:
        gradients = [rows, columns]
        total, scale_gradient, bias_gradient = _nothing(3, (), rows)
    count = sum(sizes)
    if ring is not None:
        x_gradient, y_gradient = (in_float32(gradient) for gradient in gradients)
        for xs, ys in ring:
            of_rows = ops.siglip_loss(rows, ys, *parameters, -x.shape[0], [wanted[0], False])
            total = total + of_rows[0]
            x_gradient = x_gradient + of_rows[1][0]
            scale_gradient = scale_gradient + of_rows[2]
            bias_gradient = bias_gradient + of_rows[3]
            if wanted[1]:
                of_columns = ops.siglip_loss(xs, columns, *parameters, -xs.shape[0], [False, True])
                y_gradient += of_columns[1][1]
        gradients = [x_gradient, y_gradient]
    loss = (sum_over_ranks(total, group) / count).to(loss_dtype(x))
    per_image = gradient_factor(group) / count
    row_factor = parameters[0].to(loss_dtype(x)) * per_image
    factors = (row_factor, row_factor, per_image, per_image)
    return known("siglip_loss", loss, (x, y, scale, bias), [*gradients, scale_gradient, bias_gradient], factors)
