"""NT-Xent on the views of one batch on the CPU, with the engine: see of_views.py."""

import math

import torch
from torch import Tensor

from ..arithmetic import compute_dtype, no_gradient
from . import composed, cpu_engine
from .of_views import stacked, state_rows


def number_of(temperature: float, learned: Tensor | None) -> float:
    """As of_views.divisor_of."""
    number = temperature if learned is None else learned.item()
    return number if number > 0 else math.nan


def _flat(unit: Tensor) -> composed.Views:
    views, n, width = unit.shape
    rows = unit.view(views * n, width)
    return composed.Views(True, rows, None, rows, composed.OwnImage(n, 0, n), views > 1)


def nt_xent_of_views(
    views: list[Tensor], weights: Tensor | None, learned: Tensor | None, temperature: float, decoupled: bool
) -> tuple[Tensor, ...]:
    z = stacked(views)
    shape = (z.shape[0], z.shape[1], z.shape[2])
    flat_rows = z.reshape(-1, shape[2])
    rows = torch.empty(flat_rows.shape, dtype=compute_dtype(z.dtype))
    _, divisors = cpu_engine.unit_rows(flat_rows, True, out=rows)
    assert divisors is not None
    unit = rows.view(shape)
    number = number_of(temperature, learned)
    scaling = cpu_engine.scaling_of(1 / number, 1.0, rows, rows)
    positives, lse = composed.positives_and_lse(cpu_engine, _flat(unit), shape, scaling, number, decoupled)
    loss = (lse - (positives if weights is None else positives * weights)).mean().to(rows.dtype)
    state = torch.zeros(2, state_rows(len(rows)))
    return loss, unit, divisors.view(shape[:2]), lse, state, torch.full((), 1 / number, dtype=torch.float64)


def nt_xent_of_views_backward(
    upstream: Tensor,
    unit: Tensor,
    divisors: Tensor,
    lse: Tensor,
    state: Tensor,
    factor: Tensor,
    weights: Tensor | None,
    learned: Tensor | None,
    temperature: float,
    decoupled: bool,
    dtype: torch.dtype,
    wanted: list[bool],
) -> tuple[Tensor, Tensor]:
    shape = (unit.shape[0], unit.shape[1], unit.shape[2])
    flat = _flat(unit)
    number = number_of(temperature, learned)
    scaling = cpu_engine.scaling_of(1 / number, 1.0, flat.rows, flat.rows)
    weights = None if weights is None else weights.double()
    of_unit = composed.gradient_of_unit_rows(cpu_engine, flat, shape, scaling, lse, lse, weights, number, decoupled)
    scale = upstream.item() / (lse.numel() * number)
    of_temperature = no_gradient(lse)
    if learned is not None and wanted[1]:
        along = (of_unit.double() * flat.rows).sum()
        of_temperature = (-along / 2 * (scale / number)).to(learned.dtype)
    gradient = cpu_engine.through_unit_rows(of_unit, flat.rows, divisors.view(-1), dtype, scale)
    return gradient.view(shape), of_temperature
