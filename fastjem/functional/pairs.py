"""SigLIP's loss of each row, with options: several positives, pairs that don't count, smoothed targets; over ranks.

A pair is a decision of its own, so a row's loss is a sum over columns, and the gradient of rows that are weighted
anyhow is one more pass over the pairs. What is made of the rows' losses (weights, reduction) is `options.reduced`.
Over ranks each rank's rows go round the ring as in `rings.py`, with ids, masks and, in backward, what the rows weigh.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastjem.collectives import columns_of_ranks, others_in_turn
from fastjem.functional.precision import in_float32, loss_dtype
from fastjem.kernels.arithmetic import widest
from fastjem.ops import direct, transforms
from fastjem.ops.autograd import found, known, needs_gradient, ops, refuse_second_order
from fastjem.ops.forward_mode import refuse_forward_mode


class Pairs(NamedTuple):
    """Which pairs belong together and which count; constants."""

    ids: Tensor | None  # [N] int64
    positives: Tensor | None  # [N, all ranks' N] bool
    exclude: Tensor | None  # [N, all ranks' N] bool
    label_smoothing: Tensor  # 0-dim


class Ranks(NamedTuple):
    sizes: list[int]  # each rank's N
    group: dist.ProcessGroup | None

    def columns_of(self, mask: Tensor | None, ranks: list[int]) -> Tensor | None:
        """The part of a mask [N, all ranks' N] that is of some ranks' columns."""
        if mask is None or self.group is None:
            return mask
        return columns_of_ranks(mask, self.sizes, ranks)

    def me(self) -> list[int]:
        return [0 if self.group is None else dist.get_rank(self.group)]

    def others(self, *tensors: Tensor | None) -> Iterator[tuple[list[int], list[Tensor | None]]]:
        """Other ranks and their tensors, as `other_ranks` brings them: the first are on their way."""
        if self.group is None:
            return iter(())
        return others_in_turn(tensors, 0, self.sizes, self.group)


def _losses(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, pairs: Pairs, ranks: Ranks) -> Tensor:
    """[N], in the widest dtype."""
    rows = x.shape[0]
    me = ranks.me()
    ids, positives, exclude, smoothing = pairs
    total = widest(x.new_zeros(rows))
    others = ranks.others(y, ids)
    if rows:
        own = ranks.columns_of(positives, me), ranks.columns_of(exclude, me)
        total = ops.siglip_pairs(x, y, scale, bias, smoothing, None, ids, ids, *own, 0, [False, False])[0]
    for turn, (ys, their_ids) in others:
        theirs = ranks.columns_of(positives, turn), ranks.columns_of(exclude, turn)
        arguments = (smoothing, None, ids, their_ids, *theirs, -rows, [False, False])
        total = total + ops.siglip_pairs(x, ys, scale, bias, *arguments)[0]
    return total


def _gradients(
    x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, weights: Tensor, pairs: Pairs, ranks: Ranks, wanted: list[bool]
) -> list[Tensor]:
    """Of the sum over all ranks' rows of weights [N] times losses: over the scale for x and y, for scale and bias."""
    rows = x.shape[0]
    me = ranks.me()
    ids, positives, exclude, smoothing = pairs
    of_x, of_y = in_float32(torch.zeros_like(x)), in_float32(torch.zeros_like(y))
    of_scale, of_bias = (widest(torch.zeros_like(scale)) for _ in range(2))
    others = ranks.others(x, y, ids, positives, exclude, weights)
    if rows:
        own = ranks.columns_of(positives, me), ranks.columns_of(exclude, me)
        arguments = (smoothing, weights, ids, ids, *own, 0, wanted)
        _, (own_x, own_y), of_scale, of_bias = ops.siglip_pairs(x, y, scale, bias, *arguments)
        of_x = own_x if wanted[0] else of_x
        of_y = own_y if wanted[1] else of_y
    if ranks.group is not None:
        of_x, of_y = in_float32(of_x), in_float32(of_y)
    for turn, (xs, ys, their_ids, their_positives, their_exclude, their_weights) in others:
        theirs = ranks.columns_of(positives, turn), ranks.columns_of(exclude, turn)
        arguments = (smoothing, weights, ids, their_ids, *theirs, -rows, [wanted[0], False])
        _, (part, _), scale_part, bias_part = ops.siglip_pairs(x, ys, scale, bias, *arguments)
        of_scale = of_scale + scale_part
        of_bias = of_bias + bias_part
        if wanted[0]:
            of_x = of_x + part
        if wanted[1]:
            mine = ranks.columns_of(their_positives, me), ranks.columns_of(their_exclude, me)
            assert xs is not None
            arguments = (smoothing, their_weights, their_ids, ids, *mine, -xs.shape[0], [False, True])
            of_y = of_y + ops.siglip_pairs(xs, y, scale, bias, *arguments)[1][1]
    return [of_x, of_y, of_scale, of_bias]


class _LossesOfRows(torch.autograd.Function):
    """Differentiable for x, y, scale and bias; a Function as transforms of torch.func take them."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        y: Tensor,
        scale: Tensor,
        bias: Tensor,
        ids: Tensor | None,
        positives: Tensor | None,
        exclude: Tensor | None,
        smoothing: Tensor,
        ranks: Ranks,
    ) -> Tensor:
        return _losses(x, y, scale, bias, Pairs(ids, positives, exclude, smoothing), ranks)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.ranks = inputs
        ctx.in_transform = transforms.active()
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, upstream: Tensor):
        if not ctx.in_transform:  # a transform's backward has create_graph=True in any case
            refuse_second_order("siglip_loss")
        transforms.refuse_batched_gradients("siglip_loss", upstream)
        x, y, scale, bias, *options = ctx.saved_tensors
        wanted = list(ctx.needs_input_grad[:2])
        found = _gradients(x, y, scale, bias, upstream, Pairs(*options), ctx.ranks, wanted)
        factors = (in_float32(scale), in_float32(scale), 1.0, 1.0)
        given = (x, y, scale, bias)
        gradients = []
        for gradient, factor, like, want in zip(found, factors, given, ctx.needs_input_grad[:4], strict=True):
            scaled = (gradient * factor).to(like.dtype) if want else None
            gradients.append(scaled if scaled is None else transforms.once("siglip_loss", scaled, *given))
        return *gradients, None, None, None, None, None


def losses_of_rows(
    x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, pairs: Pairs, sizes: list[int], group: dist.ProcessGroup | None
) -> Tensor:
    """[N], in the widest dtype: this rank's rows' losses against all ranks' columns."""
    given = (x, y, scale, bias)
    refuse_forward_mode("siglip_loss", given)
    if not any(needs_gradient(z) for z in given):
        return _losses(x, y, scale, bias, pairs, Ranks(sizes, group))
    return _LossesOfRows.apply(*given, *pairs, Ranks(sizes, group))


def loss_at_once(
    x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, pairs: Pairs, weights: Tensor | None, count: float | Tensor
) -> Tensor:
    """The sum of weights [N] times losses over `count`, 0-dim.

    What each row weighs is known, so the gradients come with the loss: one pass over the pairs in place of two.
    """
    given = (x, y, scale, bias)
    constants = [z.detach() for z in given]
    wanted = [needs_gradient(z) for z in (x, y)]
    ids, positives, exclude, smoothing = pairs
    of_rows = None if weights is None else widest(weights)
    arguments = (smoothing, of_rows, ids, ids, positives, exclude, 0, wanted)
    losses, gradients, of_scale, of_bias = direct.call("siglip_pairs", *constants, *arguments)
    total = losses.sum() if of_rows is None else torch.where(of_rows == 0, 0, losses).mul_(of_rows).sum()
    # Where numbers can be read, backward is one call. Of rows that all weigh nothing the mean is NaN.
    if x.is_cpu and direct.nothing_watches() and float(count) != 0:
        each = 1 / float(count)
        factor = scale.item() * each
        numbers = [of.to(z.dtype) if needs_gradient(z) else None for of, z in ((of_scale, scale), (of_bias, bias))]
        all_four = [*(g if want else None for g, want in zip(gradients, wanted, strict=True)), *numbers]
        return found("siglip_loss", (total * each).to(loss_dtype(x)), given, all_four, (factor, factor, each, each))
    each = 1 / count
    factor = in_float32(constants[2]) * each
    all_four = [*gradients, of_scale, of_bias]
    return known("siglip_loss", (total * each).to(loss_dtype(x)), given, all_four, (factor, factor, each, each))
