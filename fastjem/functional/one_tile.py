"""Contrastive losses with options, of so few rows that one tile holds all similarities, on the CPU.

A tile's exponentials, or its derivatives, are kept from the forward pass to the backward pass
(kernels/contrastive/seen_tile.py, class_tile.py). Each function gives a loss of each row, or None where the loss is too
large or has other options: NT-Xent, InfoNCE and CLIP take ids, `exclude` and label smoothing, SupCon takes hardness.
Then `candidates.py` and `supcon.py`, which call them, go the way that is right for all.
"""
# pyright: reportPossiblyUnboundVariable=false

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastjem.functional.options import Options, is_given
from fastjem.functional.precision import without_autocast
from fastjem.kernels.native import CODES, scalar
from fastjem.kernels.plain import plain
from fastjem.ops import transforms
from fastjem.ops.autograd import refuse_second_order
from fastjem.ops.direct import keeps_graph, nothing_watches

try:
    from fastjem.kernels.contrastive import class_tile, cpu_engine, seen_tile
    from fastjem.kernels.contrastive.composed import OwnImage
except ImportError:
    _is_built = False
else:
    _is_built = True


def _simple(options: Options, rows: Sequence[Tensor], number: float | Tensor) -> bool:
    """Whether these options, of these rows, and a temperature or scale, are what one tile is enough for."""
    return (
        options.false_negative_margin is None
        and options.hard_negatives is None
        and not is_given(options.prior)
        and not is_given(options.hardness)
        and _are_plain(rows, number, options.ids, options.exclude, options.label_smoothing)
    )


def _are_plain(rows: Sequence[Tensor], number: float | Tensor, *others: float | Tensor | None) -> bool:
    return (
        _is_built
        and nothing_watches()
        and not (isinstance(number, Tensor) and number.dim())
        and all(x.dtype == rows[0].dtype and x.dtype in CODES and x.shape[-1] for x in rows)
        and plain((*rows, number, *others))
    )


def _number(x: float | Tensor) -> float:
    return float(x.item() if isinstance(x, Tensor) else x)


def _inverse(temperature: float | Tensor) -> float | None:
    """What logits are similarities times. None for a tensor of 0, or not finite: the long way says what comes of it."""
    number = _number(temperature)
    return 1 / number if number and math.isfinite(number) else None


def _mask(exclude: Tensor | None) -> Tensor | None:
    """[n, m] for one [n, m] or [m]."""
    return exclude[None] if exclude is not None and exclude.dim() == 1 else exclude


def _is_wanted(*inputs: Tensor | float) -> bool:
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs)


class _Saved:
    """What each of the Functions does first in backward."""

    def __init__(self, op: str, ctx, slopes: Tensor):
        refuse_second_order(op)
        transforms.refuse_batched_gradients(op, slopes)
        tensors = ctx.saved_tensors
        self.tile = seen_tile.Tile(*tensors[:4])
        self.others = tensors[4:]
        self.plan: seen_tile.Plan = ctx.plan
        flat = slopes.reshape(-1)
        self.weights, self.of_positives = seen_tile.weights(self.plan, self.tile, flat, in_place=not keeps_graph())


def of_views(z: Tensor, temperature: float | Tensor, options: Options) -> Tensor | None:
    """NT-Xent: [V, N] for [V, N, D] and a temperature that is one number."""
    v, n, width = z.shape
    if not _simple(options, (z,), temperature) or not seen_tile.fits(v * n, v * n):
        return None
    factor = _inverse(temperature)
    if factor is None or factor < 0:  # whose root the long way takes: NaN, whatever the batch's size
        return None
    rows = z.detach().reshape(v * n, width)
    unit, divisors = cpu_engine.unit_rows(rows, True)
    sides = seen_tile.ROWS if options.exclude is not None else seen_tile.SAME
    shape = seen_tile.Shape(sides, OwnImage(n, 0, n), v - 1, n, True)
    plan = seen_tile.Plan(shape, factor, _number(options.label_smoothing))
    ids = None if options.ids is None else options.ids.repeat(v)
    found = seen_tile.losses(unit, unit, unit, plan, ids, ids, _mask(options.exclude))
    if found is None:
        return None
    losses = found[0].view(v, n)
    if not _is_wanted(z, temperature):
        return losses
    return _Views.apply((losses,), plan, (*found[1], divisors), z, temperature)


class _Views(torch.autograd.Function):
    @staticmethod
    def forward(ctx, losses: tuple, plan, memory: Sequence[Tensor], z: Tensor, temperature: float | Tensor) -> Tensor:
        ctx.save_for_backward(*memory)
        ctx.plan = plan
        ctx.dtype = z.dtype
        ctx.temperature = temperature.dtype if isinstance(temperature, Tensor) else None
        return losses[0]

    @staticmethod
    def backward(ctx, slopes: Tensor):
        with without_autocast(slopes):
            saved = _Saved("nt_xent", ctx, slopes)
            factor = saved.plan.factor
            unit = saved.tile.rows
            gradient = torch.mm(saved.weights, unit)
            is_symmetric = saved.plan.shape.sides == seen_tile.SAME
            of_temperature = None
            if ctx.needs_input_grad[4]:
                twice = seen_tile.inner_product(unit, gradient) * (0.5 if is_symmetric else 1)
                of_temperature = scalar(-twice * factor**2, ctx.temperature)
            if not is_symmetric:
                gradient.addmm_(saved.weights.T, unit)
            of_rows = cpu_engine.through_unit_rows(gradient, unit, saved.others[0], ctx.dtype, factor)
            return None, None, None, of_rows.view(*slopes.shape, -1), of_temperature


def info_nce(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor,
    negative_ids: Tensor | None,
    offset: int | None,
    temperature: float | Tensor,
    options: Options,
) -> Tensor | None:
    """[N] for rows [N, D] and [K, D]."""
    n = query.shape[0]
    k = negatives.shape[0]
    given = (query, positive, negatives)
    if not _simple(options, given, temperature) or not plain((negative_ids,)) or not seen_tile.fits(n, k):
        return None
    if (factor := _inverse(temperature)) is None:
        return None
    units = [cpu_engine.unit_rows(x.detach(), True) for x in given]
    (q, of_q), (p, of_p), (bank, of_bank) = units
    own_image = OwnImage(n, offset, k) if offset is not None and -n < offset < k else OwnImage()
    shape = seen_tile.Shape(seen_tile.ROWS, own_image, 1, 0, False)
    plan = seen_tile.Plan(shape, factor, _number(options.label_smoothing))
    found = seen_tile.losses(q, bank, p, plan, options.ids, negative_ids, _mask(options.exclude))
    if found is None:
        return None
    losses, tile = found
    if not _is_wanted(*given, temperature):
        return losses
    return _InfoNCE.apply((losses,), plan, (*tile, p, of_q, of_p, of_bank), *given, temperature)


class _InfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, losses: tuple, plan, memory: Sequence[Tensor], *inputs: Tensor | float) -> Tensor:
        ctx.save_for_backward(*memory)
        ctx.plan = plan
        ctx.dtypes = [x.dtype if isinstance(x, Tensor) else None for x in inputs]
        return losses[0]

    @staticmethod
    def backward(ctx, slopes: Tensor):
        wanted = ctx.needs_input_grad[3:]
        with without_autocast(slopes):
            saved = _Saved("info_nce", ctx, slopes)
            factor = saved.plan.factor
            q, bank, *_ = saved.tile
            positive, *divisors = saved.others
            of_positives = saved.of_positives
            assert of_positives is not None
            found: list[Tensor | None] = [None] * 4
            if wanted[0] or wanted[3]:
                found[0] = torch.mm(saved.weights, bank).addcmul_(of_positives, positive)
            if wanted[3] and found[0] is not None:
                slope = -seen_tile.inner_product(q, found[0]) * factor**2
                found[3] = scalar(slope, ctx.dtypes[3])
            if wanted[1]:
                found[1] = of_positives * q
            if wanted[2]:
                found[2] = torch.mm(saved.weights.T, q)
            for i, (unit, of_unit) in enumerate(zip((q, positive, bank), divisors, strict=True)):
                gradient = found[i]
                if gradient is not None:
                    found[i] = cpu_engine.through_unit_rows(gradient, unit, of_unit, ctx.dtypes[i], factor)
            return None, None, None, *found


def clip_loss(x: Tensor, y: Tensor, scale: Tensor, options: Options) -> Tensor | None:
    """[N], the mean of both directions, for x and y [N, D] and a 0-dim scale."""
    n = x.shape[0]
    if not _simple(options, (x, y), scale) or not seen_tile.fits(n, n):
        return None
    if options.exclude is not None and options.exclude.dim() == 1:  # then directions see different pairs
        return None
    a, b = (cpu_engine.unit_rows(z.detach(), False)[0] for z in (x, y))
    shape = seen_tile.Shape(seen_tile.BOTH, OwnImage(n, 0, n), 1, 0, True)
    plan = seen_tile.Plan(shape, scale.item(), _number(options.label_smoothing))
    found = seen_tile.losses(a, b, b, plan, options.ids, options.ids, options.exclude)
    if found is None:
        return None
    losses, tile = found
    if not _is_wanted(x, y, scale):
        return losses
    return _Clip.apply((losses,), plan, tile, x, y, scale)


class _Clip(torch.autograd.Function):
    @staticmethod
    def forward(ctx, losses: tuple, plan, memory: Sequence[Tensor], x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(*memory)
        ctx.plan = plan
        ctx.dtypes = [z.dtype for z in (x, y, scale)]
        return losses[0]

    @staticmethod
    def backward(ctx, slopes: Tensor):
        wanted = ctx.needs_input_grad[3:]
        with without_autocast(slopes):
            saved = _Saved("clip_loss", ctx, slopes)
            factor = saved.plan.factor
            a, b, *_ = saved.tile
            of_x = of_y = of_scale = None
            if wanted[0] or wanted[2]:
                of_x = torch.mm(saved.weights, b)
            if wanted[2] and of_x is not None:
                of_scale = scalar(seen_tile.inner_product(a, of_x), ctx.dtypes[2])
            if wanted[1]:
                of_y = torch.mm(saved.weights.T, a).mul_(factor).to(ctx.dtypes[1])
            of_rows = of_x.mul_(factor).to(ctx.dtypes[0]) if wanted[0] and of_x is not None else None
            return None, None, None, of_rows, of_y, of_scale


def supcon(
    z: Tensor,
    labels: Tensor,  # [N] int64
    temperature: float | Tensor,
    count: int,  # of views that are anchors
    normalize: bool,
    options: Options,
) -> Tensor | None:
    """SupCon: [A, N] for [V, N, D] and a temperature that is one number."""
    v, n, width = z.shape
    if options.exclude is not None or options.hard_negatives is not None:
        return None
    if not _are_plain((z,), temperature, labels) or not class_tile.fits(count * n, v * n):
        return None
    if (factor := _inverse(temperature)) is None:
        return None
    unit, divisors = cpu_engine.unit_rows(z.detach().reshape(v * n, width), normalize)
    wanted = _is_wanted(z, temperature)
    found = class_tile.losses(unit, count * n, labels.repeat(v), factor, options.hardness, wanted)
    if found is None:
        return None
    losses, derivatives = found
    losses = losses.view(count, n)
    if not wanted:
        return losses
    return _SupCon.apply((losses,), factor, (unit, divisors, derivatives), z, temperature)


class _SupCon(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, losses: tuple, factor: float, memory: Sequence[Tensor], z: Tensor, temperature: float | Tensor
    ) -> Tensor:
        ctx.save_for_backward(*memory)
        ctx.factor = factor
        ctx.dtypes = [x.dtype if isinstance(x, Tensor) else None for x in (z, temperature)]
        ctx.shape = z.shape
        return losses[0]

    @staticmethod
    def backward(ctx, slopes: Tensor):
        refuse_second_order("supcon")
        transforms.refuse_batched_gradients("supcon", slopes)
        unit, divisors, derivatives = ctx.saved_tensors
        by_row = slopes.reshape(-1, 1).to(derivatives.dtype)
        with without_autocast(unit):
            weights = derivatives * by_row if keeps_graph() else derivatives.mul_(by_row)
            anchors = unit[: by_row.shape[0]]
            of_anchors = torch.mm(weights, unit)
            of_temperature = None
            if ctx.needs_input_grad[4]:
                slope = -seen_tile.inner_product(anchors, of_anchors) * ctx.factor**2
                of_temperature = scalar(slope, ctx.dtypes[1])
            if of_anchors.shape == unit.shape:
                gradient = of_anchors.addmm_(weights.T, anchors)
            else:
                gradient = torch.mm(weights.T, anchors)
                gradient[: by_row.shape[0]] += of_anchors
            of_rows = cpu_engine.through_unit_rows(gradient, unit, divisors, ctx.dtypes[0], ctx.factor)
            return None, None, None, of_rows.view(ctx.shape), of_temperature
