"""Triton kernels on single rows, before and after the walks over tiles.

Unit length and its gradient, dot products, the join of log-sum-exps that several programs began, and their form for the
kernels of gradients.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launch, tiling
from ..arithmetic import UNIT_EPS, dense_rows
from .of_views import state_rows
from .tiles import LOG2_E


@triton.jit(do_not_specialize=["N"])
def _unit_kernel(
    x,  # [N, D], rows s_x apart
    out,  # [N, D], or None: the divisors alone
    divisors,  # [N] float32 or float64
    N,
    D,
    s_x,
    eps: tl.float64,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    mask = (i_row < N)[:, None] & (column < D)[None, :]
    b_x = tl.load(x + launch.row_start(i_row, s_x, 1)[:, None] + column[None, :], mask, 0).to(tl.float64)
    # float64: at temperature 0.01 the digits that a float32 norm loses are a hundred times as many in the logits
    least = tl.full((), eps, tl.float64)  # a bare number would be float32 first
    divisor = tl.maximum(tl.sqrt(tl.sum(b_x * b_x, 1)), least, propagate_nan=tl.PropagateNan.ALL)
    if out is not None:
        b_y = (b_x * (1 / divisor)[:, None]).to(tl.float32)
        tl.store(out + launch.row_start(i_row, D, 1)[:, None] + column[None, :], b_y, mask)
    tl.store(divisors + i_row, divisor, i_row < N)


@triton.jit(do_not_specialize=["N"])
def _through_unit_kernel(
    gradient,  # [N, D] float32, rows s_gradient apart
    unit,  # [N, D]
    divisors,  # [N] float32 or float64
    out,  # [N, D]
    N,
    D,
    s_gradient,
    eps: tl.float64,
    DIVIDED: tl.constexpr,  # False: `unit` is still to be divided
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    mask = (i_row < N)[:, None] & (column < D)[None, :]
    at = launch.row_start(i_row, D, 1)[:, None] + column[None, :]
    b_g = tl.load(gradient + launch.row_start(i_row, s_gradient, 1)[:, None] + column[None, :], mask, 0)
    b_u = tl.load(unit + at, mask, 0).to(tl.float32)
    divisor = tl.load(divisors + i_row, i_row < N, 1.0)
    is_longer = divisor > tl.full((), eps, tl.float64).to(divisor.dtype)  # rounded as eps is where it is the divisor
    divisor = divisor.to(tl.float32)
    if not DIVIDED:
        b_u = b_u / divisor[:, None]
    radial = tl.where(is_longer, tl.sum(b_g * b_u, 1), 0.0)
    tl.store(out + at, (b_g - radial[:, None] * b_u) / divisor[:, None], mask)


@triton.jit(do_not_specialize=["N"])
def _dots_kernel(
    a,  # [N, D]
    b,  # [N, D]
    out,  # [N] float64
    N,
    D,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    mask = (i_row < N)[:, None] & (column < D)[None, :]
    at = launch.row_start(i_row, D, 1)[:, None] + column[None, :]
    product = tl.load(a + at, mask, 0).to(tl.float32) * tl.load(b + at, mask, 0).to(tl.float32)
    tl.store(out + i_row, tl.sum(product.to(tl.float64), 1), i_row < N)


@triton.jit
def _largest(maxima, i_row, N, parts, met_once, largest):
    """The largest of `largest` and of the maxima [parts, N] of each row; see `_total`."""
    for part in range(0, parts):
        there = (i_row < N) & ((part < parts - 1) | (i_row >= met_once))
        at = launch.row_start(part, N, 1) + i_row
        largest = tl.maximum(largest, tl.load(maxima + at, there, -float("inf")))
    return largest


@triton.jit
def _total(maxima, sums, i_row, N, parts, met_once, base, abs_factor, RUNNING: tl.constexpr):
    """The sum of exp(logit - base * abs_factor) of each row, from sums [parts, N] around maxima [parts, N].

    The last part has nothing of the first `met_once` rows: its memory wasn't written there.
    """
    total = tl.zeros(i_row.shape, tl.float64)
    for part in range(0, parts):
        there = (i_row < N) & ((part < parts - 1) | (i_row >= met_once))
        at = launch.row_start(part, N, 1) + i_row
        part_sum = tl.load(sums + at, there, 0).to(tl.float64)
        if RUNNING:
            maximum = tl.load(maxima + at, there, -float("inf"))
            # a part that has seen nothing has the maximum -inf and the sum 0
            part_sum *= tl.exp((launch.finite(maximum) - base).to(tl.float64) * abs_factor)
        total += part_sum
    return total


@triton.jit
def joined_sums(
    row_max, row_sum, column_max, column_sum, i_row, N, row_parts, column_parts, met_once, abs_factor, pivot,
    RUNNING: tl.constexpr,
):  # fmt: skip
    """(a logit, the sum of exp(logits - that one)) of each row in float64, of all its parts in their order."""
    base = tl.zeros(i_row.shape, tl.float32) + pivot
    if RUNNING:
        base = _largest(row_max, i_row, N, row_parts, 0, tl.full(i_row.shape, -float("inf"), tl.float32))
        if column_sum is not None:
            base = _largest(column_max, i_row, N, column_parts, met_once, base)
        base = launch.finite(base)
    total = _total(row_max, row_sum, i_row, N, row_parts, 0, base, abs_factor, RUNNING)
    if column_sum is not None:
        total += _total(column_max, column_sum, i_row, N, column_parts, met_once, base, abs_factor, RUNNING)
    return base.to(tl.float64) * abs_factor, total


@triton.jit
def joined(
    row_max, row_sum, column_max, column_sum, i_row, N, row_parts, column_parts, met_once, abs_factor, pivot,
    RUNNING: tl.constexpr,
):  # fmt: skip
    """Each row's log-sum-exp in float64: see `_join_kernel`."""
    base, total = joined_sums(
        row_max, row_sum, column_max, column_sum, i_row, N, row_parts, column_parts, met_once, abs_factor, pivot,
        RUNNING,
    )  # fmt: skip
    return base + tl.log(total)


@triton.jit(do_not_specialize=["N", "row_parts", "column_parts", "met_once"])
def _join_kernel(
    row_max,  # [row_parts, N] float32, in units of similarities; None unless RUNNING
    row_sum,  # [row_parts, N] float32, the sums of exp(logit - maximum * |factor|)
    column_max,  # [column_parts, N] float32, of what the rows are as columns; None unless RUNNING
    column_sum,  # [column_parts, N] float32, or None
    factor,  # 0-dim
    out,  # [N] float64
    N,
    row_parts,
    column_parts,
    met_once,  # so many first rows have nothing in the last part of the columns
    pivot,  # in the place of every maximum, unless RUNNING
    RUNNING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    abs_factor = tl.abs(tl.load(factor).to(tl.float64))
    lse = joined(
        row_max, row_sum, column_max, column_sum, i_row, N, row_parts, column_parts, met_once, abs_factor, pivot,
        RUNNING,
    )  # fmt: skip
    tl.store(out + i_row, lse, i_row < N)


@triton.jit
def store_state(pivots, adjustments, i_row, mask, b_lse, factor_value, pivot, RUNNING: tl.constexpr):
    """Log-sum-exps as the kernels of gradients take them, see `lse_states`."""
    if RUNNING:
        b_pivot = (b_lse / factor_value).to(tl.float32)
        infinite = tl.abs(b_lse) == float("inf")
        b_pivot = tl.where((tl.abs(b_pivot) < float("inf")) | infinite, b_pivot, 0.0)
        adjustment = tl.where(infinite, 0.0, (b_pivot.to(tl.float64) * factor_value - b_lse) * LOG2_E)
        tl.store(pivots + i_row, b_pivot, mask)
    else:
        adjustment = tl.exp(tl.minimum(pivot * factor_value - b_lse, 87.0, propagate_nan=tl.PropagateNan.ALL))
    tl.store(adjustments + i_row, adjustment.to(tl.float32), mask)


@triton.jit(do_not_specialize=["N"])
def _state_kernel(
    lse,  # [N] float64
    factor,  # 0-dim
    pivots,  # [N] float32, in units of similarities; None unless RUNNING
    adjustments,  # [N] float32, see `lse_states`
    N,
    pivot,  # of all rows, unless RUNNING
    RUNNING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b_lse = tl.load(lse + i_row, i_row < N, 0.0)
    store_state(pivots, adjustments, i_row, i_row < N, b_lse, tl.load(factor).to(tl.float64), pivot, RUNNING)


def unit_rows(
    x: Tensor, normalize: bool, eps: float = UNIT_EPS, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor | None]:
    """Rows in the dtype of the input, which is that of the products, or in another; divisors [N] float32."""
    if not normalize:
        return x.contiguous(), None
    x = dense_rows(x)
    out = torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)
    return out, _divided(x, out, torch.float32, eps)


def normalize_rows(rows: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Unit rows [N, D] float32 and divisors [N] float64; of them `through_unit_rows` makes the gradient."""
    rows = dense_rows(rows)
    unit = torch.empty(rows.shape, dtype=torch.float32, device=rows.device)
    return unit, _divided(rows, unit, torch.float64, eps)


def _divided(x: Tensor, out: Tensor | None, dtype: torch.dtype, eps: float) -> Tensor:
    """[N], what makes unit rows of a dense x [N, D]; these are written into `out`."""
    divisors = torch.empty(len(x), dtype=dtype, device=x.device)
    if len(x):
        tile = tiling.similarity_rows(x.shape[1])
        grid = (triton.cdiv(len(x), tile["ROWS"]),)
        launch.launch(_unit_kernel, grid, x, out, divisors, *x.shape, x.stride(0), float(eps), **tile, device_of=x)
    return divisors


def lengths(x: Tensor, eps: float = UNIT_EPS) -> Tensor:
    """[N] float32: what makes unit rows of a contiguous x [N, D]."""
    return _divided(x, None, torch.float32, eps)


def through_unit_rows(
    gradient: Tensor,
    unit: Tensor,
    divisors: Tensor | None,
    dtype: torch.dtype,
    eps: float = UNIT_EPS,
    *,
    divided: bool = True,
) -> Tensor:
    """Of rows that aren't `divided` yet, `unit` is the rows as they came."""
    if divisors is None:
        return gradient.to(dtype)
    gradient = dense_rows(gradient)
    out = torch.empty(gradient.shape, dtype=dtype, device=gradient.device)
    if len(out):
        tile = tiling.similarity_rows(gradient.shape[1])
        grid = (triton.cdiv(len(gradient), tile["ROWS"]),)
        launch.launch(
            _through_unit_kernel, grid, gradient, unit, divisors, out, *out.shape, gradient.stride(0), float(eps),
            DIVIDED=divided, **tile, device_of=out,
        )  # fmt: skip
    return out


def dots(a: Tensor, b: Tensor) -> Tensor:
    """[N] float64: the dot product of each row of a [N, D] with that of b [N, D]; rows are dense."""
    out = torch.empty(len(a), dtype=torch.float64, device=a.device)
    if len(a):
        tile = tiling.similarity_rows(a.shape[1])
        grid = (triton.cdiv(len(a), tile["ROWS"]),)
        launch.launch(_dots_kernel, grid, a, b, out, *a.shape, **tile, device_of=a)
    return out


def join(
    rows: tuple[Tensor | None, Tensor],  # maxima and sums, [parts, N]
    columns: tuple[Tensor | None, Tensor] | None,
    factor: Tensor,
    pivot: float,
    running: bool,
    met_once: int = 0,
) -> Tensor:
    """[N] float64: each row's log-sum-exp, of all its parts in their order.

    The first `met_once` rows have nothing in the columns' last part, whose memory may hold anything there.
    """
    parts, n = rows[1].shape
    out = torch.empty(n, dtype=torch.float64, device=factor.device)
    column_max, column_sum = (None, None) if columns is None else columns
    tile = tiling.similarity_join()
    launch.launch(
        _join_kernel, (triton.cdiv(n, tile["BLOCK"]),), *rows, column_max, column_sum, factor, out, n,
        parts, 0 if column_sum is None else len(column_sum), met_once, pivot, RUNNING=running, **tile, device_of=factor,
    )  # fmt: skip
    return out


def lse_states(lse: Tensor | None, factor: Tensor, pivot: float, running: bool) -> tuple[Tensor | None, Tensor | None]:
    """Log-sum-exps [N] as the kernels of gradients take them: (pivots, adjustments), [N] float32 each, and more memory.

    They are read a whole tile at a time, so that memory goes on to a multiple of STATE_ROWS; nobody's gradient is made
    of what is there.

    An adjustment makes a row's `exp(logit - lse)` of an exponential around its pivot:

    * running: `exp2((s - pivot) * rate + adjustment)`. The pivot is lse / factor rounded, and the adjustment what that
      rounding lost, near 0.
    * otherwise: `exp2((s - pivot) * rate) * adjustment`. One pivot serves all rows, so no pivots are returned, and the
      adjustment is the factor exp(pivot * factor - lse).
    """
    if lse is None:
        return None, None
    lse = lse.contiguous()
    pivots, adjustments = torch.empty(2, state_rows(len(lse)), dtype=torch.float32, device=lse.device)
    pivots = pivots if running else None
    tile = tiling.similarity_join()
    grid = (triton.cdiv(len(lse), tile["BLOCK"]),)
    launch.launch(
        _state_kernel, grid, lse, factor, pivots, adjustments, len(lse), pivot, RUNNING=running, **tile, device_of=lse
    )  # fmt: skip
    return pivots, adjustments
