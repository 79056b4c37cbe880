"""NT-Xent and its kin, InfoNCE and CLIP with options: what a row sees, and its loss from that.

A loss without options takes another way, which needs half of the work or less (`contrastive.py`, `image_text.py`).
Temperatures are in the rows here, as learned ones and those of single rows need it.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from fastjem.functional import one_tile
from fastjem.functional.options import (
    Negatives,
    Options,
    dots_of_rows,
    is_given,
    losses_of_rows,
    reduced,
    with_hard,
)
from fastjem.functional.precision import in_float32, without_autocast
from fastjem.functional.seen import Side, Sums, View, sums_of_seen
from fastjem.functional.unit import unit_rows
from fastjem.kernels.arithmetic import widest
from fastjem.ops.forward_mode import refuse_forward_mode


def _scaled(side: Side, rows: float, logits: float) -> Side:
    """The rows and the limits of their logits, by a factor each."""
    return Side(side.rows * rows, side.ids, None if side.limit is None else side.limit * logits)


def negatives_of(
    rows: Side, columns: Side | None, exclude: Tensor | None, view: View, hardness: float
) -> tuple[Negatives, Negatives | None]:
    """Of the rows; and of the columns, if `view` says so. columns None: the rows themselves."""
    sums = sums_of_seen(rows, columns, exclude, view)
    harder: list[tuple[Sums, Sums | None]] = []
    for by in (1 + hardness, hardness) if is_given(hardness) else ():
        of_rows = _scaled(rows, by**0.5 if columns is None else by, by)
        of_columns = None if columns is None else _scaled(columns, 1, by)
        harder.append(sums_of_seen(of_rows, of_columns, exclude, view._replace(totals=False)))
    of_columns = None if sums[1] is None else _side_of_negatives(sums, harder, 1, view.totals)
    return _side_of_negatives(sums, harder, 0, view.totals), of_columns


def _side_of_negatives(sums: tuple, harder: list[tuple], side: int, totals: bool) -> Negatives:
    lse, total, count = sums[side]
    of_harder = (harder[0][side].lse, harder[1][side].lse) if harder else None
    return Negatives(lse, total if totals else None, count if totals else None, of_harder)


def hard_logits(a: Tensor, hard: Tensor) -> Tensor:
    """[V, N, H] of rows [V, N, D] and each image's own [N, H, D]. Not by a product, which autocast would change."""
    return torch.stack([dots_of_rows(rows.unsqueeze(1), hard) for rows in a.unbind()])


def loss_of_views(
    z: Tensor,  # [V, N, D]
    temperature: float | Tensor,  # 0-dim, [N] or [V, N] if it is a tensor
    options: Options,
    sizes: list[int],
    group: dist.ProcessGroup | None,
    op: str = "nt_xent",
    decoupled: bool = False,
    pull: Tensor | None = None,  # [V, N], what positives are multiplied by
) -> Tensor:
    """0-dim, or [V, N] without a reduction."""
    refuse_forward_mode(op, (z, temperature, *options))
    with without_autocast(z):
        if group is None and pull is None and not decoupled:
            losses = one_tile.of_views(z, temperature, options)
            if losses is not None:
                return reduced(losses, options, z, None)
        unit = unit_rows(z)
        inverse = _inverse(temperature, unit)
        if isinstance(inverse, Tensor) and inverse.dim():
            a = unit * inverse.to(unit.dtype).unsqueeze(-1)
            b = unit
        else:  # rows and columns are the same: half of the work
            a = b = unit * (inverse.to(unit.dtype).sqrt() if isinstance(inverse, Tensor) else inverse**0.5)
        views = z.shape[0]
        positives = [dots_of_rows(a, b.roll(-step, 0)) for step in range(1, views)]
        logits = positives[0][..., None] if views == 2 else torch.stack(positives, -1)  # [V, N, V - 1]
        ids = None if options.ids is None else options.ids.expand(z.shape[:2]).contiguous()
        limit = _limit(logits, inverse, options)
        columns = None if b is a else Side(b, ids)
        view = View(op, 0, False, options.needs_totals(), z.dtype, sizes, group)
        negatives, _ = negatives_of(Side(a, ids, limit), columns, options.exclude, view, options.hardness)
        if options.hard_negatives is not None:
            hard = unit_rows(options.hard_negatives)
            factor = inverse if b is not a else _root(inverse)
            hard = hard if b is not a else hard * factor
            negatives = with_hard(negatives, hard_logits(a, hard), options.hardness)
        losses = losses_of_rows(logits, negatives, options, inverse, options.prior, decoupled, pull)
        return reduced(losses, options, z, group)


def _inverse(temperature: float | Tensor, like: Tensor) -> float | Tensor:
    return 1 / (widest(temperature) if isinstance(temperature, Tensor) else temperature)


def _root(number: float | Tensor) -> float | Tensor:
    return number.sqrt() if isinstance(number, Tensor) else number**0.5


def _limit(positives: Tensor, inverse: float | Tensor, options: Options) -> Tensor | None:
    """The logit above which a row takes no negative, [...]: of its most similar positive, and the margin."""
    margin = options.false_negative_margin
    if margin is None:
        return None
    return (positives.amax(-1) + margin * inverse).detach()


def info_nce(
    query: Tensor,  # [N, D]
    positive: Tensor,  # [N, D]
    negatives: Tensor,  # [K, D]
    negative_ids: Tensor | None,  # [K]
    offset: int | None,
    temperature: float | Tensor,  # 0-dim or [N] if it is a tensor
    options: Options,
) -> Tensor:
    """0-dim, or [N] without a reduction."""
    refuse_forward_mode("info_nce", (query, positive, negatives, temperature, *options))
    with without_autocast(query):
        losses = one_tile.info_nce(query, positive, negatives, negative_ids, offset, temperature, options)
        if losses is not None:
            return reduced(losses, options, query, None)
        inverse = _inverse(temperature, query)
        unit, of_positive, columns = (unit_rows(x) for x in (query, positive, negatives))
        by = inverse.to(unit.dtype) if isinstance(inverse, Tensor) else inverse
        a = unit * (by.unsqueeze(-1) if isinstance(by, Tensor) and by.dim() else by)
        logits = dots_of_rows(a, of_positive)[None, :, None]  # [1, N, 1]
        limit = _limit(logits, inverse, options)
        rows = Side(a[None], None if options.ids is None else options.ids[None], limit)
        candidates = Side(columns[None], None if negative_ids is None else negative_ids[None])
        view = View("info_nce", offset, False, options.needs_totals(), query.dtype, [query.shape[0]], None)
        seen, _ = negatives_of(rows, candidates, options.exclude, view, options.hardness)
        if options.hard_negatives is not None:
            hard = unit_rows(options.hard_negatives)
            seen = with_hard(seen, hard_logits(a[None], hard), options.hardness)
        losses = losses_of_rows(logits, seen, options, inverse, options.prior)
        return reduced(losses[0], options, query, None)


def clip_loss(
    x: Tensor,  # [N, D]
    y: Tensor,  # [N, D]
    scale: Tensor,  # 0-dim or [N]
    options: Options,
    sizes: list[int],
    group: dist.ProcessGroup | None,
    local: bool,
) -> Tensor:
    """0-dim, or [N] without a reduction: the mean of both directions."""
    refuse_forward_mode("clip_loss", (x, y, scale, *options))
    with without_autocast(x):
        losses = one_tile.clip_loss(x, y, scale, options) if group is None else None
        if losses is not None:
            return reduced(losses, options, x, None)
        a, b = (in_float32(z) for z in (x, y))
        factor = scale.to(a.dtype)
        factor = factor.unsqueeze(-1) if scale.dim() else factor
        a_scaled = a * factor
        logits = dots_of_rows(a_scaled, b)[None, :, None]  # [1, N, 1]
        inverse = widest(scale)
        limit = _limit(logits, inverse, options)
        ids = None if options.ids is None else options.ids[None]
        exclude = options.exclude
        of_columns_alone = exclude is not None and exclude.dim() == 1
        view = View("clip_loss", 0, True, options.needs_totals(), x.dtype, sizes, group)
        if scale.dim() or of_columns_alone:  # the directions' logits differ, or what they see does
            one_way = view._replace(columns=False)
            back = exclude.T if exclude is not None and exclude.dim() == 2 else exclude
            of_x, _ = negatives_of(
                Side(a_scaled[None], ids, limit), Side(b[None], ids), exclude, one_way, options.hardness
            )
            of_y, _ = negatives_of(
                Side((b * factor)[None], ids, limit), Side(a[None], ids), back, one_way, options.hardness
            )
        else:
            of_x, of_y = negatives_of(
                Side(a_scaled[None], ids, limit), Side(b[None], ids, limit), exclude, view, options.hardness
            )
        assert of_y is not None
        if options.hard_negatives is not None:
            hard = hard_logits(a_scaled[None], in_float32(options.hard_negatives))
            of_x = with_hard(of_x, hard, options.hardness)
        losses = losses_of_rows(logits, _together(of_x, of_y), options, inverse, options.prior)  # [2, N]
        both = group is None and options.reduction == "mean"  # then the mean over rows is that over directions, too
        return reduced(losses if both else losses.mean(0), options, x, group, local)


def _together(x: Negatives, y: Negatives) -> Negatives:
    """Of both directions, [1, N] each, as [2, N]: their losses in half of the launches."""

    def of(a: Tensor | None, b: Tensor | None) -> Tensor | None:
        return None if a is None or b is None else torch.cat([a, b])

    harder = None
    if x.harder is not None and y.harder is not None:
        harder = torch.cat([x.harder[0], y.harder[0]]), torch.cat([x.harder[1], y.harder[1]])
    return Negatives(torch.cat([x.lse, y.lse]), of(x.total, y.total), of(x.count, y.count), harder)
