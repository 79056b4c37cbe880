"""The gradient's weights times rows where rows are few: a product of ours, whose programs finish what they have.

A gradient whose sum doesn't fit in registers (float32, rows of more than 256 columns) has its weights in memory. torch
multiplies many of them. But at few rows a loss takes as long as its launches, and torch's product is one for each side,
with another to finish it. Here both sides are one grid, and a program finishes its block of rows and columns: the terms
of a row's own image, the way through the unit length, the scale.

Of whole rows it needs but one number, the radial part <u, dL/du>. That is the sum of a row's weights times similarities
as well, and the kernel of weights, which has both in hand, leaves it in parts: `row_dots`, a line for each block of
columns, and of columns `column_dots`, a line for each block of rows.

Where that is worth it, and where torch's product is faster: `fits`, and docs/gpu.md.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import chips, launch, tiling
from .tiles import add_product, load_rows, with_remainders

# Rows of either side up to which a product is ours: a program's walk is as long as the other side, and is not shared.
MOST_ROWS = 4096
# Multiplications of half precision up to which it is. Of more torch's product is faster by more than launches take. Its
# float32 product, which has no tensor cores, is no faster at any size.
MOST_MULTIPLICATIONS = 1 << 29
PADDED = 128  # memory of weights goes on to whole tiles, which have at most so many rows and columns
AT_ONCE = tl.constexpr(4096)  # numbers that one program adds at a time


def tile(dtype: torch.dtype) -> dict:
    """Small, so that a few hundred rows are programs for all multiprocessors."""
    if dtype.itemsize == 2:
        return {"BLOCK_K": 64} | chips.product_tile(rows=64, columns=64, warps=4, stages=3, summed="BLOCK_K")
    return {"BLOCK_K": 32} | chips.product_tile(rows=32, columns=64, warps=4, stages=3, summed="BLOCK_K")


def bytes_of(rows: int, columns: int, dtype: torch.dtype) -> int:
    """What `memory` takes."""
    return triton.cdiv(rows, PADDED) * triton.cdiv(columns, PADDED) * PADDED * PADDED * dtype.itemsize


def in_one_piece(rows: int, columns: int, width: int, dtype: torch.dtype) -> bool:
    """Whether all weights are in memory at once, a product of ours isn't too slow, and the chip has tensor cores."""
    few = dtype.itemsize > 2 or rows * columns * width <= MOST_MULTIPLICATIONS
    return few and bytes_of(rows, columns, dtype) <= tiling.WEIGHTS_BYTES and chips.current().tensor_cores


def fits(rows: int, columns: int, width: int, dtype: torch.dtype) -> bool:
    """The same for a product of both sides, whose programs go through all rows of the other one."""
    return max(rows, columns) <= MOST_ROWS and in_one_piece(rows, columns, width, dtype)


def blocks_of(n: int, d: int, tile: dict) -> int:
    """Programs for a gradient [N, D]."""
    return triton.cdiv(n, tile["BM"]) * triton.cdiv(d, tile["BN"])


def memory(rows: int, columns: int, like: Tensor) -> Tensor:
    """For weights in whole tiles, in the dtype of rows."""
    padded = (triton.cdiv(n, PADDED) * PADDED for n in (rows, columns))
    return torch.empty(*padded, dtype=like.dtype, device=like.device)


@triton.jit
def place(program, D, BM: tl.constexpr, BN: tl.constexpr):
    """(the first row, the first column) of a program among those of a gradient; neighbours share rows of weights."""
    columns = tl.cdiv(D, BN)
    return program // columns * BM, program % columns * BN


@triton.jit
def product(
    weights,  # rows s_weights * 8 apart, whole tiles of them; times GAIN
    x,  # [K, D]
    first_row,
    first_column,
    K,
    D,
    s_weights,
    TRANSPOSED: tl.constexpr,  # a row's weights are a column in memory
    GAIN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """`weights @ x` of BM rows and BN columns, float32."""
    i_row = first_row + tl.arange(0, BM)
    acc = tl.zeros([BM, BN], tl.float32)
    acc_right = tl.zeros([BM, BN], tl.float32)
    acc_left = tl.zeros([BM, BN], tl.float32)
    for first in range(0, K, BLOCK_K):
        i_k = first + tl.arange(0, BLOCK_K)
        if TRANSPOSED:
            at = launch.row_start(i_k, s_weights, 8)[None, :] + i_row[:, None]
        else:
            at = launch.row_start(i_row, s_weights, 8)[:, None] + i_k[None, :]
        b_x = load_rows(x, i_k, K, D, first_column, BN)
        acc, acc_right, acc_left = add_product(acc, acc_right, acc_left, tl.load(weights + at), b_x)
    if x.dtype.element_ty == tl.float32:
        acc = with_remainders(acc, acc_right, acc_left)
    return acc / GAIN


@triton.jit
def store_block(out, i_row, first_column, N, D, value, BN: tl.constexpr):
    column = first_column + tl.arange(0, BN)
    mask = (i_row < N)[:, None] & (column < D)[None, :]
    tl.store(out + launch.row_start(i_row, D, 1)[:, None] + column[None, :], value.to(out.dtype.element_ty), mask)


@triton.jit
def sum_of_lines(sums, i_row, N, lines):
    """[rows] float32, of [lines, N]."""
    total = tl.zeros(i_row.shape, tl.float64)
    for line in range(0, lines):
        total += tl.load(sums + launch.row_start(line, N, 1) + i_row, i_row < N, 0.0).to(tl.float64)
    return total.to(tl.float32)


@triton.jit
def through_unit(g, radial, unit, divisors, i_row, first_column, N, D, EPS: tl.constexpr, BN: tl.constexpr):
    """The gradient for a block of rows as they came, given that for the unit rows and <unit row, its gradient>."""
    u = load_rows(unit, i_row, N, D, first_column, BN).to(tl.float32)
    divisor = tl.load(divisors + i_row, i_row < N, 1.0)
    return (g - tl.where(divisor > EPS, radial, 0.0)[:, None] * u) / divisor.to(tl.float32)[:, None]


@triton.jit
def sum_of_all(sums, count):
    """Float64, of contiguous numbers, by one program in one order."""
    index = tl.arange(0, AT_ONCE)
    total = tl.zeros([AT_ONCE], tl.float64)
    for i in range(0, count, AT_ONCE):
        total += tl.load(sums + i + index, index < count - i, 0.0).to(tl.float64)
    return tl.sum(total, 0)
