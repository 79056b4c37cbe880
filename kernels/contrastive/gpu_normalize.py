"""Rows of unit length and the gradient through it, on a GPU: a launch each, where torch's `normalize` takes 3 and 14.

What is in float64 here is so for low temperatures: at 0.01 the digits that a float32 norm loses are a hundred times as
many in the logits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launch, tiling
from ..arithmetic import dense_rows


@triton.jit(do_not_specialize=["N"])
def _normalize_kernel(
    rows,  # [N, D], s_row apart
    unit,  # [N, D] float32
    divisors,  # [N] float64
    N,
    D,
    s_row,
    eps: tl.float64,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    mask = (i_row < N)[:, None] & (column < D)[None, :]
    b_x = tl.load(rows + launch.row_start(i_row, s_row, 1)[:, None] + column[None, :], mask, 0).to(tl.float64)
    least = tl.full((), eps, tl.float64)  # a bare number would be float32 first
    divisor = tl.maximum(tl.sqrt(tl.sum(b_x * b_x, 1)), least, propagate_nan=tl.PropagateNan.ALL)
    b_u = (b_x * (1 / divisor)[:, None]).to(tl.float32)
    tl.store(unit + launch.row_start(i_row, D, 1)[:, None] + column[None, :], b_u, mask)
    tl.store(divisors + i_row, divisor, i_row < N)


@triton.jit(do_not_specialize=["N"])
def _normalize_backward_kernel(
    gradient,  # [N, D] float32, for unit, s_row apart
    unit,  # [N, D] float32
    divisors,  # [N] float64
    out,  # [N, D]
    N,
    D,
    s_row,
    eps: tl.float64,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    mask = (i_row < N)[:, None] & (column < D)[None, :]
    at = launch.row_start(i_row, D, 1)[:, None] + column[None, :]
    b_g = tl.load(gradient + launch.row_start(i_row, s_row, 1)[:, None] + column[None, :], mask, 0)
    b_u = tl.load(unit + at, mask, 0)
    divisor = tl.load(divisors + i_row, i_row < N, 1.0)
    least = tl.full((), eps, tl.float64)
    radial = tl.where(divisor > least, tl.sum(b_g * b_u, 1), 0.0)
    tl.store(out + at, (b_g - radial[:, None] * b_u) / divisor.to(tl.float32)[:, None], mask)


def normalize_rows(rows: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    rows = dense_rows(rows)
    n, d = rows.shape
    unit = torch.empty(n, d, dtype=torch.float32, device=rows.device)
    divisors = torch.empty(n, dtype=torch.float64, device=rows.device)
    if n:
        tile = tiling.views_rows(d)
        grid = (triton.cdiv(n, tile["ROWS"]),)
        launch.launch(
            _normalize_kernel, grid, rows, unit, divisors, n, d, rows.stride(0), eps=float(eps), **tile, device_of=rows
        )  # fmt: skip
    return unit, divisors


def normalize_rows_backward(gradient: Tensor, unit: Tensor, divisors: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    gradient = dense_rows(gradient)
    n, d = unit.shape
    out = torch.empty(n, d, dtype=dtype, device=unit.device)
    if n:
        tile = tiling.views_rows(d)
        launch.launch(
            _normalize_backward_kernel, (triton.cdiv(n, tile["ROWS"]),), gradient, unit.contiguous(),
            divisors.contiguous(), out, n, d, gradient.stride(0), eps=float(eps), **tile, device_of=unit,
        )  # fmt: skip
    return out
