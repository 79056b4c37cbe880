"""Columns of both views: centred, or divided by their standard deviation too, and a gradient taken back through that.

A program owns a few columns of both views and walks down their rows, up to three times; after the first they come from
the L2 cache. Sums have a fixed order, so the bits are the same at every call.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launch, tiling
from ..arithmetic import compute_dtype


@triton.jit
def _load(x, i_row, s_x, column, mask, COMPUTE: tl.constexpr):
    return tl.load(x + launch.row_start(i_row, s_x, 1)[:, None] + column[None, :], mask, 0).to(COMPUTE)


@triton.jit
def _moments(x, s_x, column, inside, N, CORRECTION: tl.constexpr, eps, COMPUTE: tl.constexpr, ROWS: tl.constexpr):
    """Of columns: the mean as high + low, and the standard deviation.

    In two numbers, as the rounding of one may be as large as what is left of a column without it.
    """
    total = tl.zeros([ROWS, column.shape[0]], COMPUTE)
    for i in range(0, N, ROWS):
        i_row = i + tl.arange(0, ROWS)
        total += _load(x, i_row, s_x, column, (i_row < N)[:, None] & inside[None, :], COMPUTE)
    high = tl.sum(total, 0) / N
    remainder = tl.zeros([ROWS, column.shape[0]], COMPUTE)
    squares = tl.zeros([ROWS, column.shape[0]], COMPUTE)
    for i in range(0, N, ROWS):
        i_row = i + tl.arange(0, ROWS)
        mask = (i_row < N)[:, None] & inside[None, :]
        centred = tl.where(mask, _load(x, i_row, s_x, column, mask, COMPUTE) - high[None, :], 0.0)
        remainder += centred
        squares += centred * centred
    low = tl.sum(remainder, 0) / N
    b_squares = tl.sum(squares, 0) - low * low * N
    # NaN stays, or a column with one would have the least deviation there is
    variance = tl.maximum(b_squares, 0.0, propagate_nan=tl.PropagateNan.ALL) / (N - CORRECTION)
    return high, low, tl.sqrt(variance + tl.full((), eps, COMPUTE))


@triton.jit(do_not_specialize=["N"])
def _standardise_kernel(
    x,  # [N, D], rows s_x apart
    y,  # [N, D], rows s_y apart
    out,  # [2, N, D] contiguous
    figures,  # [2, D + 1], of which the standard deviations [2, D] are written
    sums,  # [D]: of products of the normalised columns, if NORMALISE, else of squared differences of the views
    N,
    D,
    s_x,
    s_y,
    eps: tl.float64,
    COMPUTE: tl.constexpr,
    CORRECTION: tl.constexpr,  # std = sqrt(sum of squares / (N - CORRECTION) + eps)
    NORMALISE: tl.constexpr,  # columns are divided by their std, not centred alone
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < D
    x_high, x_low, x_std = _moments(x, s_x, column, inside, N, CORRECTION, eps, COMPUTE, ROWS)
    y_high, y_low, y_std = _moments(y, s_y, column, inside, N, CORRECTION, eps, COMPUTE, ROWS)
    tl.store(figures + column, x_std, inside)
    tl.store(figures + D + 1 + column, y_std, inside)
    x_factor = tl.full([COLUMNS], 1.0, COMPUTE)
    y_factor = tl.full([COLUMNS], 1.0, COMPUTE)
    if NORMALISE:
        x_factor = 1 / x_std
        y_factor = 1 / y_std
    total = tl.zeros([ROWS, COLUMNS], COMPUTE)
    for i in range(0, N, ROWS):
        i_row = i + tl.arange(0, ROWS)
        mask = (i_row < N)[:, None] & inside[None, :]
        b_x = _load(x, i_row, s_x, column, mask, COMPUTE)
        b_y = _load(y, i_row, s_y, column, mask, COMPUTE)
        x_out = ((b_x - x_high[None, :]) - x_low[None, :]) * x_factor[None, :]
        y_out = ((b_y - y_high[None, :]) - y_low[None, :]) * y_factor[None, :]
        at = launch.row_start(i_row, D, 1)[:, None] + column[None, :]
        tl.store(out + at, x_out, mask)
        tl.store(out + launch.row_start(N, D, 1) + at, y_out, mask)
        if NORMALISE:
            total += tl.where(mask, x_out * y_out, 0.0)
        else:
            total += (b_x - b_y) * (b_x - b_y)
    tl.store(sums + column, tl.sum(total, 0), inside)


def standardised(
    x: Tensor,  # [N, D], with dense rows
    y: Tensor,  # [N, D], with dense rows
    correction: int,
    eps: float,
    normalise: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Centred columns [2, N, D] (over std if `normalise`), figures [2, D + 1] of which the first D are std, and [D]:
    `(a * b).sum(0)` of the normalised views a and b, or `(x - y).square().sum(0)`.
    """
    n, d = x.shape
    compute = compute_dtype(x.dtype)
    out = torch.empty((2, n, d), dtype=compute, device=x.device)
    figures = out.new_empty(2, d + 1)
    sums = out.new_empty(d)
    tile = tiling.covariance_columns(x.dtype)
    launch.launch(
        _standardise_kernel,
        (triton.cdiv(d, tile["COLUMNS"]),),
        x,
        y,
        out,
        figures,
        sums,
        n,
        d,
        x.stride(0),
        y.stride(0),
        float(eps),
        COMPUTE=launch.DTYPES[compute],
        CORRECTION=correction,
        NORMALISE=normalise,
        **tile,
        device_of=x,
    )
    return out, figures, sums


@triton.jit
def summed(x, size, BLOCK: tl.constexpr):
    """`x[:size].double().sum()`, by one program in a fixed order."""
    index = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    for i in range(0, size, BLOCK):
        total += tl.load(x + i + index, index < size - i, 0).to(tl.float64)
    return tl.sum(total, 0)
