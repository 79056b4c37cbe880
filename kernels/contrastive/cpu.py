"""The contrastive operators on the CPU: composed.py with cpu_engine.py; SigLIP and nearest neighbours use its tiles."""

import math
from functools import partial

import torch
from torch import Tensor

from .. import _C
from ..native import address_of_row
from . import (
    composed,
    cpu_classes,
    cpu_engine,
    cpu_koleo,
    cpu_pairs,
    cpu_queries,
    cpu_sigmoid,
    cpu_views,
    cpu_visible,
    visible,
)

nt_xent = partial(composed.nt_xent, cpu_engine)
nt_xent_backward = partial(composed.nt_xent_backward, cpu_engine)
nt_xent_of_views = cpu_views.nt_xent_of_views
nt_xent_of_views_backward = cpu_views.nt_xent_of_views_backward
supcon = cpu_classes.supcon
supcon_backward = cpu_classes.supcon_backward
info_nce = cpu_queries.info_nce
info_nce_backward = cpu_queries.info_nce_backward
clip_loss = partial(composed.clip_loss, cpu_engine)
clip_loss_backward = partial(composed.clip_loss_backward, cpu_engine)
clip_loss_of_pairs = cpu_pairs.clip_loss_of_pairs
clip_loss_of_pairs_backward = cpu_pairs.clip_loss_of_pairs_backward
siglip_loss_of_pairs = cpu_pairs.siglip_loss_of_pairs
siglip_loss_of_pairs_backward = cpu_pairs.siglip_loss_of_pairs_backward
similarity_logsumexp = partial(visible.similarity_logsumexp, cpu_visible)
similarity_logsumexp_backward = partial(visible.similarity_logsumexp_backward, cpu_visible)
koleo_neighbors = cpu_koleo.koleo_neighbors
koleo = cpu_koleo.koleo


def siglip_loss(
    x: Tensor, y: Tensor, logit_scale: Tensor, logit_bias: Tensor, offset: int, wanted: list[bool]
) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    totals, of_x, of_y = cpu_sigmoid.sums(x, y, logit_scale.item(), logit_bias.item(), offset, wanted)
    loss, dots, slopes = (total.clone() for total in totals)
    return loss, _gradients((x, of_x), (y, of_y)), dots, slopes


def _gradients(*sides: tuple[Tensor, Tensor | None]) -> list[Tensor]:
    """Of inputs and the sums for them, None where none is wanted."""
    return [x.new_empty(0) if total is None else total.to(x.dtype) for x, total in sides]


def siglip_pairs(
    x: Tensor,
    y: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    label_smoothing: Tensor,
    weights: Tensor | None,
    row_ids: Tensor | None,
    column_ids: Tensor | None,
    positives: Tensor | None,
    exclude: Tensor | None,
    offset: int,
    wanted: list[bool],
) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    a, _ = cpu_engine.unit_rows(x, False)
    b, _ = cpu_engine.unit_rows(y, False)
    factor = logit_scale.item()
    bias = logit_bias.item()
    low = label_smoothing.item() / 2
    weights = None if weights is None else weights.double().contiguous()
    masks = [None if mask is None else mask.contiguous() for mask in (positives, exclude)]
    ids = [None if of is None else of.contiguous() for of in (row_ids, column_ids)]
    a_sum = torch.empty_like(a) if wanted[0] else None
    b_sum = torch.empty_like(b) if wanted[1] else None
    losses, weight_sums, dots = torch.zeros(3, len(a), dtype=torch.float64)
    for tile in cpu_engine.tiles(a, b):
        _C.siglip_pairs(
            *tile.arguments(),
            factor,
            bias,
            tile.row + offset - tile.column,
            address_of_row(ids[0], tile.row),
            address_of_row(ids[1], tile.column),
            *(0 if mask is None else address_of_row(mask, tile.row) + tile.column for mask in masks),
            len(b),
            1 - low,
            low,
            address_of_row(weights, tile.row),
            address_of_row(losses, tile.row),
            address_of_row(weight_sums, tile.row),
            address_of_row(dots, tile.row),
            torch.get_num_threads(),
        )
        cpu_sigmoid.add_products(tile, a, b, a_sum, b_sum)
    return losses, _gradients((x, a_sum), (y, b_sum)), dots.sum(), weight_sums.sum()


def normalize_rows(rows: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    unit, divisors = cpu_engine.unit_rows(rows, True, eps=eps)
    assert divisors is not None
    return unit, divisors


def normalize_rows_backward(gradient: Tensor, unit: Tensor, divisors: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    out = torch.empty_like(unit) if dtype == unit.dtype else None
    rows = (gradient.contiguous(), unit.contiguous(), divisors.contiguous())
    return cpu_engine.through_unit_rows(*rows, dtype, out=out, eps=eps)


def nearest_neighbors(query: Tensor, bank: Tensor) -> Tensor:
    unit_query, _ = cpu_engine.unit_rows(query, True)
    best = torch.full((len(unit_query),), -math.inf, dtype=unit_query.dtype)
    index = torch.full((len(unit_query),), -1, dtype=torch.int64)
    for tile, _ in cpu_engine.bank_tiles(unit_query, bank):
        _C.similarity_best(
            *tile.arguments(),
            tile.column,
            address_of_row(best, tile.row),
            address_of_row(index, tile.row),
            torch.get_num_threads(),
        )
    return index
