"""The supervised contrastive loss of one rank's batch on the CPU, with the engine: see of_classes.py.

The sum over positives of a row's similarities is one product of it with a sum of rows, so that classes cost N D.
"""

import math

import torch
from torch import Tensor

from ..arithmetic import compute_dtype, no_gradient
from . import cpu_engine
from .composed import OwnImage
from .cpu_views import number_of
from .of_classes import class_table
from .of_views import state_rows


def _classes(ids: Tensor | None, n: int) -> tuple[Tensor, Tensor]:
    """The first image of each image's class and how many it has, [N] each."""
    if ids is None:
        return torch.arange(n), torch.ones(n, dtype=torch.int64)
    ids = ids.contiguous()
    ordered = ids.sort(stable=True)
    begin = torch.searchsorted(ordered.values, ids)
    return ordered.indices[begin], torch.searchsorted(ordered.values, ids, right=True) - begin


def _sums_of_classes(rows: Tensor, first: Tensor) -> Tensor:
    """[N, D] float64: for each image the sum over its class of rows [views, N, D]."""
    of_images = rows.sum(0, dtype=torch.float64)
    # in float64 index_put adds in one order
    return torch.zeros_like(of_images).index_put_((first,), of_images, accumulate=True)[first]


def _share(table: Tensor, n: int) -> Tensor:
    """[N] float64: 1 / the number of positives of an image's anchors, 0 where they have none."""
    count = table[1, :n]
    return torch.where(count > 0, 1 / count.clamp_min(1).double(), 0)


def _scaling(number: float, normalize: bool, rows: Tensor) -> cpu_engine.Scaling:
    return cpu_engine.scaling_of(1 / number, 1.0 if normalize else None, rows, rows)


def supcon(
    z: Tensor, ids: Tensor | None, learned: Tensor | None, temperature: float, one_anchor: bool, normalize: bool
) -> tuple[Tensor, ...]:
    v, n, d = z.shape
    flat_rows = z.reshape(-1, d)
    rows = torch.empty(flat_rows.shape, dtype=compute_dtype(z.dtype))
    divisors = None
    if normalize:
        _, divisors = cpu_engine.unit_rows(flat_rows, True, out=rows)
    else:
        rows.copy_(flat_rows)
    anchors = n if one_anchor else v * n
    first, count = _classes(ids, n)
    table = class_table(first, count, v, 1 if one_anchor else v)
    number = number_of(temperature, learned)
    own = OwnImage(anchors, 0, v * n)
    scaling = _scaling(number, normalize, rows)
    lse = torch.full((v * n,), math.inf, dtype=torch.float64)
    lse[:anchors] = cpu_engine.row_log_sum_exps(rows[:anchors], rows, scaling, own, symmetric=not one_anchor)
    counted = table[1, : v * n] > 0
    total = lse.where(counted, 0).sum()
    lse.masked_fill_(~counted, math.inf)
    unit = rows.view(v, n, d)
    of_anchors = rows[:anchors].view(-1, n, d)
    sums = _sums_of_classes(unit, first)
    dots = (of_anchors.sum(0, dtype=torch.float64) * sums).sum(1)
    dots -= cpu_engine.dots(rows[:anchors], rows[:anchors]).view(-1, n).sum(0)  # each anchor's with itself
    share = _share(table, n)
    positives = dots.mul_(share).masked_fill_(share == 0, 0).sum() / number
    loss = (total - positives) / anchors
    divisors = lse.new_empty(0) if divisors is None else divisors.view(v, n)
    state = torch.zeros(3, state_rows(v * n))
    factor = torch.full((), 1 / number, dtype=torch.float64)
    return loss.to(rows.dtype), unit, divisors, lse.view(v, n), table, state, factor


def supcon_backward(
    upstream: Tensor,
    unit: Tensor,
    divisors: Tensor,
    lse: Tensor,
    table: Tensor,
    state: Tensor,
    factor: Tensor,
    learned: Tensor | None,
    temperature: float,
    one_anchor: bool,
    normalize: bool,
    dtype: torch.dtype,
    wanted: list[bool],
) -> tuple[Tensor, Tensor]:
    v, n, d = unit.shape
    rows = unit.view(v * n, d)
    anchors = n if one_anchor else v * n
    number = number_of(temperature, learned)
    flat_lse = lse.view(-1)
    of_rows = torch.zeros_like(rows)
    cpu_engine.add_weighted(
        rows, rows, _scaling(number, normalize, rows), OwnImage(v * n, 0, v * n), flat_lse, flat_lse, of_rows, of_rows,
        symmetric=True,
    )  # fmt: skip
    # An anchor pulls its positives and is pulled by them; neither by itself, which is in the sums of its class.
    first = table[0, :n].long()
    share = _share(table, n)[:, None]
    by_anchors = _sums_of_classes(rows[:anchors].view(-1, n, d), first)
    of_classes = _sums_of_classes(unit, first) if one_anchor else by_anchors
    of_unit = of_rows.view(v, n, d)
    of_unit -= (share * by_anchors).to(rows.dtype)
    of_anchors = of_rows[:anchors].view(-1, n, d)
    of_anchors -= (share * of_classes).to(rows.dtype)
    of_anchors += (2 * share).to(rows.dtype) * rows[:anchors].view(-1, n, d)
    scale = upstream.item() / (anchors * number)
    of_temperature = no_gradient(lse)
    if learned is not None and wanted[1]:
        along = (of_rows.double() * rows).sum()
        of_temperature = (-along / 2 * (scale / number)).to(learned.dtype)
    gradient = cpu_engine.through_unit_rows(of_rows, rows, divisors.view(-1) if normalize else None, dtype, scale)
    return gradient.view(v, n, d), of_temperature
