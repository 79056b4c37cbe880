"""The contrastive operators on a GPU: composed.py with gpu_engine.py. float64 is the reference's."""

import torch
from torch import Tensor

from . import (
    composed,
    gpu_classes,
    gpu_engine,
    gpu_koleo,
    gpu_pairs,
    gpu_queries,
    gpu_sigmoid,
    gpu_views,
    gpu_visible,
    of_classes,
    of_pairs,
    of_queries,
    of_views,
    pairs,
    reference,
    rows,
    visible,
)

koleo_neighbors = gpu_koleo.koleo_neighbors
koleo = gpu_koleo.koleo


def _supported(*tensors: Tensor) -> bool:
    return all(x.dtype in (torch.float32, torch.bfloat16, torch.float16) for x in tensors)


def nt_xent(rows: Tensor, candidates: Tensor, *options) -> tuple[Tensor, Tensor]:
    if not _supported(rows, candidates):
        return reference.nt_xent(rows, candidates, *options)
    return composed.nt_xent(gpu_engine, rows, candidates, *options)


def nt_xent_backward(rows: Tensor, candidates: Tensor, *options) -> Tensor:
    if not _supported(rows, candidates):
        return reference.nt_xent_backward(rows, candidates, *options)
    return composed.nt_xent_backward(gpu_engine, rows, candidates, *options)


def nt_xent_of_views(views: list[Tensor], *options) -> tuple[Tensor, ...]:
    if not _supported(*views):
        return of_views.nt_xent_of_views(views, *options)
    return gpu_views.forward(views, *options)


def nt_xent_of_views_backward(upstream: Tensor, unit: Tensor, *saved) -> tuple[Tensor, Tensor]:
    if not _supported(unit):
        return of_views.nt_xent_of_views_backward(upstream, unit, *saved)
    return gpu_views.backward(upstream, unit, *saved[:-2], wanted=saved[-1])  # gradients are in the dtype of unit rows


def supcon(z: Tensor, *options) -> tuple[Tensor, ...]:
    if not _supported(z):
        return of_classes.supcon(z, *options)
    return gpu_classes.forward(z, *options)


def supcon_backward(upstream: Tensor, unit: Tensor, *saved) -> tuple[Tensor, Tensor]:
    if not _supported(unit):
        return of_classes.supcon_backward(upstream, unit, *saved)
    return gpu_classes.backward(upstream, unit, *saved[:-2], wanted=saved[-1])  # gradients are in the dtype of the rows


def info_nce(query: Tensor, positive: Tensor, negatives: Tensor, *options) -> tuple[Tensor, ...]:
    if not _supported(query, positive, negatives):
        return of_queries.info_nce(query, positive, negatives, *options)
    return gpu_queries.forward(query, positive, negatives, *options)


def info_nce_backward(upstream: Tensor, of_query: Tensor, of_positive: Tensor, *saved) -> list[Tensor]:
    if not _supported(of_query, of_positive, saved[3]):
        return of_queries.info_nce_backward(upstream, of_query, of_positive, *saved)
    return gpu_queries.backward(upstream, of_query, of_positive, *saved)


def clip_loss(x: Tensor, y: Tensor, *options) -> tuple[Tensor, Tensor, Tensor]:
    if not _supported(x, y):
        return reference.clip_loss(x, y, *options)
    return composed.clip_loss(gpu_engine, x, y, *options)


def clip_loss_backward(x: Tensor, y: Tensor, *options) -> tuple[list[Tensor], Tensor]:
    if not _supported(x, y):
        return reference.clip_loss_backward(x, y, *options)
    return composed.clip_loss_backward(gpu_engine, x, y, *options)


def clip_loss_of_pairs(x: Tensor, y: Tensor, *scale) -> tuple[Tensor, Tensor, Tensor]:
    if not _supported(x, y):
        return of_pairs.clip_loss_of_pairs(x, y, *scale)
    return gpu_pairs.forward(x, y, *scale)


def clip_loss_of_pairs_backward(upstream: Tensor, x: Tensor, y: Tensor, *saved) -> tuple[list[Tensor], Tensor]:
    if not _supported(x, y):
        return of_pairs.clip_loss_of_pairs_backward(upstream, x, y, *saved)
    return gpu_pairs.backward(upstream, x, y, *saved)


def siglip_loss(
    x: Tensor, y: Tensor, logit_scale: Tensor, logit_bias: Tensor, offset: int, wanted: list[bool]
) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    if not _supported(x, y):
        return reference.siglip_loss(x, y, logit_scale, logit_bias, offset, wanted)
    return gpu_sigmoid.of_part(x, y, logit_scale, logit_bias, offset, wanted)


def siglip_loss_of_pairs(x: Tensor, y: Tensor, *options) -> tuple[Tensor, list[Tensor], Tensor]:
    if not _supported(x, y):
        return of_pairs.siglip_loss_of_pairs(x, y, *options)
    return gpu_sigmoid.forward(x, y, *options)


def siglip_loss_of_pairs_backward(upstream: Tensor, sums: list[Tensor], *saved) -> tuple[list[Tensor], Tensor, Tensor]:
    if not _supported(*sums):
        return of_pairs.siglip_loss_of_pairs_backward(upstream, sums, *saved)
    return gpu_sigmoid.backward(upstream, sums, *saved)


def similarity_logsumexp(a: Tensor, b: Tensor, *options) -> tuple[Tensor, ...]:
    if not _supported(a, b):
        return reference.similarity_logsumexp(a, b, *options)
    return visible.similarity_logsumexp(gpu_visible, a, b, *options)


def similarity_logsumexp_backward(a: Tensor, b: Tensor, *options) -> list[Tensor]:
    if not _supported(a, b):
        return reference.similarity_logsumexp_backward(a, b, *options)
    return visible.similarity_logsumexp_backward(gpu_visible, a, b, *options)


def siglip_pairs(
    x: Tensor, y: Tensor, logit_scale: Tensor, logit_bias: Tensor, smoothing: Tensor, weights: Tensor | None, *options
) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    if not _supported(x, y):
        arguments = (logit_scale, logit_bias, smoothing, weights, *options)
        return reference.siglip_pairs(x, y, *arguments)
    *options, wanted = options
    x = x.contiguous()
    y = y.contiguous()
    largest = None
    if weights is not None:  # between -1 and 1, so that no derivative leaves half precision
        finite = torch.where(weights.isfinite(), weights.abs(), 0)
        largest = finite.max().double().clamp_min(1e-30)
        weights = weights / largest
    x_sum = torch.zeros(x.shape, dtype=torch.float32, device=x.device) if wanted[0] else None
    y_sum = torch.zeros(y.shape, dtype=torch.float32, device=y.device) if wanted[1] else None
    given: list = [logit_scale, logit_bias, smoothing, weights, *options, x_sum, y_sum]
    losses, dots, slopes = pairs.siglip_pairs(x, y, *given)
    if largest is not None:
        dots, slopes = dots * largest, slopes * largest
        x_sum, y_sum = (None if z is None else z * largest.float() for z in (x_sum, y_sum))
    gradients = [
        x.new_empty(0) if x_sum is None else x_sum.to(x.dtype),
        y.new_empty(0) if y_sum is None else y_sum.to(y.dtype),
    ]
    return losses, gradients, dots, slopes


def normalize_rows(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return (rows if _supported(x) else reference).normalize_rows(x, eps)


def normalize_rows_backward(gradient: Tensor, unit: Tensor, divisors: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    if not _supported(unit):
        return reference.normalize_rows_backward(gradient, unit, divisors, eps, dtype)
    return rows.through_unit_rows(gradient, unit.contiguous(), divisors.contiguous(), dtype, eps)


def nearest_neighbors(query: Tensor, bank: Tensor) -> Tensor:
    if not _supported(query, bank):
        return reference.nearest_neighbors(query, bank)
    unit_query, _ = gpu_engine.unit_rows(query, True)
    unit_bank, _ = gpu_engine.unit_rows(bank, True)
    return gpu_engine.best(unit_query, unit_bank)
