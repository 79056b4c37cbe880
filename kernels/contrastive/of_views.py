"""The specification of NT-Xent as one loss, whose rows and candidates are the views of one batch.

`in_parts.nt_xent` and `in_parts.nt_xent_backward` are for candidates that come in parts, from other ranks say; a loss
is made of their results in steps of torch, which cost a GPU more than the work of a small batch. These two operators
are the whole of it, the mean, the unit length, the upstream gradient and that for the temperature among them.
"""

import math

import torch
from torch import Tensor

from ..arithmetic import compute_dtype, no_gradient, through_unit_rows, unit_rows, widen, widest, widest_dtype
from . import in_parts

STATE_ROWS = 128  # the rows or columns of the largest tile of weights, or a multiple of them


def state_rows(n: int) -> int:
    """How many numbers a state of n log-sum-exps has memory for, as it is read a whole tile at a time."""
    return (n + STATE_ROWS - 1) // STATE_ROWS * STATE_ROWS


def dtype_of_products(x: Tensor) -> torch.dtype:
    """That of unit rows: a GPU multiplies them in the dtype they come in."""
    return x.dtype if x.is_cuda else compute_dtype(x.dtype)


def divisor_of(temperature: float, learned: Tensor | None) -> float | Tensor:
    """What logits are divided by: of a learned temperature that isn't positive NaN, as nobody has looked at it."""
    return temperature if learned is None else torch.where(learned > 0, widest(learned), math.nan)


def stacked(views: list[Tensor]) -> Tensor:
    """[V, N, D]"""
    return views[0] if len(views) == 1 else torch.stack(views)


def nt_xent_of_views(
    views: list[Tensor],  # one [V, N, D], or two [N, D]
    weights: Tensor | None,  # [V, N] of the positives
    learned: Tensor | None,  # 0-dim: the temperature, instead of the number
    temperature: float,
    decoupled: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`(lse - weights * positives).mean()` of `in_parts.nt_xent`, and what its gradient is made of.

    That is: rows of unit length [V, N, D], what they were divided by [V, N], the log-sum-exps [V, N], a state that only
    a GPU's kernels fill [2, >= V N] float32, and 1 / temperature, 0-dim; float64 but for the first and the state.
    """
    z = stacked(views)
    divided_by = divisor_of(temperature, learned)
    positives, lse = in_parts.nt_xent(z, z, 0, divided_by, decoupled, True)  # pyright: ignore[reportArgumentType]
    loss = (lse - (positives if weights is None else positives * weights)).mean()
    unit, norm = unit_rows(widen(z))
    factor = torch.ones((), dtype=widest_dtype(z.device), device=z.device) / divided_by
    state = torch.zeros(2, state_rows(z.shape[0] * z.shape[1]), dtype=torch.float32, device=z.device)
    rows = unit.to(dtype_of_products(z), copy=True)
    return loss.to(compute_dtype(z.dtype)), rows, widest(norm[..., 0]).clone(), lse, state, factor


def nt_xent_of_views_backward(
    upstream: Tensor,  # 0-dim
    unit: Tensor,
    divisors: Tensor,
    lse: Tensor,
    state: Tensor,
    factor: Tensor,
    weights: Tensor | None,
    learned: Tensor | None,
    temperature: float,
    decoupled: bool,
    dtype: torch.dtype,  # of the rows as they came
    wanted: list[bool],  # for the rows and the temperature
) -> tuple[Tensor, Tensor]:
    """The gradient for the rows [V, N, D], and that for a learned temperature, 0-dim; empty where there is none.

    Logits are quadratic in the unit rows: their products with their gradient are twice the logits' with theirs, and the
    temperature divides logits.
    """
    rows = widen(unit)
    divided_by = divisor_of(temperature, learned)
    of_unit = in_parts.nt_xent_backward(rows, rows, lse, lse, weights, 0, divided_by, decoupled, False)  # pyright: ignore[reportArgumentType]
    scale = widest(upstream) * factor / lse.numel()
    gradient = through_unit_rows(of_unit, rows, divisors[..., None].to(rows.dtype)) * scale.to(rows.dtype)
    if learned is None or not wanted[1]:
        return gradient.to(dtype), no_gradient(lse)
    along = widest(of_unit * rows).sum()
    return gradient.to(dtype), (-along / 2 * scale * factor).to(learned.dtype)
