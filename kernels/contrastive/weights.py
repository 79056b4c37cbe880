"""Triton kernels of the gradients' weights, on tiles of similarities.

With the weights G = exp(logit - lse_row) + exp(logit - lse_column), a gradient is G @ b. A log-sum-exp comes as a pivot
and an adjustment (`rows.lse_states`); rows or columns without log-sum-exps have None, and no term in G. Where rows have
classes, those of one class pull each other: G is less by the sum of both rows' pulls.
"""

import triton
import triton.language as tl

from .. import launch
from .tiles import (
    LOG2_E,
    images_of_block,
    in_class,
    load_rows,
    load_tile,
    log1p_of_unit,
    may_hide,
    seen_columns,
    similarities,
)


@triton.jit
def _load_state(pivots, adjustments, i_row, N, RUNNING: tl.constexpr):
    """(pivot, adjustment) of each row, see `rows.lse_states`."""
    b_adjustment = tl.load(adjustments + i_row)
    b_pivot = b_adjustment  # a placeholder, never read: unless RUNNING, one pivot serves all rows
    if RUNNING:
        b_pivot = tl.load(pivots + i_row)
    return b_pivot, b_adjustment


@triton.jit
def _weights(s, a_pivots, a_adjustments, i_a, N, b_pivots, b_adjustments, i_b, M, pivot, rate, RUNNING: tl.constexpr):
    """G of a tile, [BM, BN], as if every column were seen."""
    g = tl.zeros(s.shape if RUNNING else [1, 1], tl.float32)
    if a_adjustments is not None:
        a_pivot, a_adjustment = _load_state(a_pivots, a_adjustments, i_a, N, RUNNING)
        if RUNNING:
            g += tl.exp2((s - a_pivot[:, None]) * rate + a_adjustment[:, None])
        else:
            g += a_adjustment[:, None]
    if b_adjustments is not None:
        b_pivot, b_adjustment = _load_state(b_pivots, b_adjustments, i_b, M, RUNNING)
        if RUNNING:
            g += tl.exp2((s - b_pivot[None, :]) * rate + b_adjustment[None, :])
        else:
            g += b_adjustment[None, :]
    if not RUNNING:
        g = tl.exp2(s * rate - pivot * rate) * g
    return g


@triton.jit
def less_pulls(g, a_classes, a_pulls, i_a, b_classes, b_pulls, i_b):
    if a_classes is not None:
        pull = tl.load(a_pulls + i_a)[:, None] + tl.load(b_pulls + i_b)[None, :]
        g -= tl.where(in_class(a_classes, i_a, b_classes, i_b), pull, 0.0)
    return g


@triton.jit
def walk_of_owner(
    b_a, b, i_a, begin, end, low, high, a_pivots, a_adjustments, b_pivots, b_adjustments, pivot, factor_value, N, M, D,
    first_row, row_period, offset, column_period, HAS_OWN_IMAGE: tl.constexpr, RUNNING: tl.constexpr,
    DOTS: tl.constexpr, GAIN: tl.constexpr, EVEN: tl.constexpr, BLOCK_D: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, a_classes=None, a_pulls=None, b_classes=None, b_pulls=None,
):  # fmt: skip
    """(G @ b * GAIN [BM, BLOCK_D], (G * similarities).sum(1) if DOTS) of the rows b_a and tiles begin .. end of b.

    See `owner_kernel`; low and high are `images_of_block`.
    """
    rate = (factor_value * LOG2_E).to(tl.float32)
    acc = tl.zeros([BM, BLOCK_D], tl.float32)
    dot = tl.zeros([BM], tl.float32)
    for t in range(begin, end):
        i_b = t * BN + tl.arange(0, BN)
        b_b = load_tile(b, t * BN, M, D, BLOCK_D, BN, EVEN)
        s = tl.dot(b_a, b_b)
        g = _weights(s, a_pivots, a_adjustments, i_a, N, b_pivots, b_adjustments, i_b, M, pivot, rate, RUNNING)
        g = less_pulls(g, a_classes, a_pulls, i_a, b_classes, b_pulls, i_b)
        if may_hide(t * BN, M, low, high, column_period, HAS_OWN_IMAGE, BN):
            seen = seen_columns(i_a, i_b, N, M, first_row, row_period, offset, column_period, HAS_OWN_IMAGE)
            g = tl.where(seen, g, 0.0)
        if DOTS:
            dot += tl.sum(g * s, 1)
        acc = tl.dot((g * GAIN).to(b_b.dtype), tl.trans(b_b), acc)
    return acc, dot


@triton.jit(do_not_specialize=["N", "M", "first_row", "row_period", "offset", "column_period", "tiles_per_program"])
def owner_kernel(
    a,  # [N, D]
    b,  # [M, D]
    factor,  # 0-dim
    a_pivots,  # [N] float32; None unless RUNNING
    a_adjustments,  # [N] float32; None if rows have no log-sum-exp
    b_pivots,  # [M] float32; None unless RUNNING
    b_adjustments,  # [M] float32; None if columns have no log-sum-exp
    a_classes,  # [N] int32, as the next three or None
    a_pulls,  # [N] float32
    b_classes,  # [M] int32
    b_pulls,  # [M] float32
    out,  # [splits, N, D] float32: G @ b
    dots,  # [splits, N] float32, (G * similarities).sum(1); or None
    N,
    M,
    D,
    first_row,  # the number of a's first row, and what composed.OwnImage says:
    row_period,
    offset,
    column_period,
    tiles_per_program,
    pivot,
    HAS_OWN_IMAGE: tl.constexpr,
    RUNNING: tl.constexpr,
    GAIN: tl.constexpr,  # see launch.gain
    EVEN: tl.constexpr,  # D is BLOCK_D
    BLOCK_D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    split = tl.program_id(1)
    i_a = tl.program_id(0) * BM + tl.arange(0, BM)
    b_a = load_rows(a, i_a, N, D, 0, BLOCK_D)
    low, high = images_of_block(first_row + tl.program_id(0) * BM, row_period, offset, BM)
    begin = split * tiles_per_program
    acc, dot = walk_of_owner(
        b_a, b, i_a, begin, tl.minimum(begin + tiles_per_program, tl.cdiv(M, BN)), low, high, a_pivots, a_adjustments,
        b_pivots, b_adjustments, pivot, tl.load(factor).to(tl.float64), N, M, D, first_row, row_period, offset,
        column_period, HAS_OWN_IMAGE, RUNNING, dots is not None, GAIN, EVEN, BLOCK_D, BM, BN, a_classes, a_pulls,
        b_classes, b_pulls,
    )  # fmt: skip
    at = launch.row_start(split, N, 1) + i_a
    column = tl.arange(0, BLOCK_D)
    mask = (i_a < N)[:, None] & (column < D)[None, :]
    tl.store(out + (at * D)[:, None] + column[None, :], acc / GAIN, mask)
    if dots is not None:
        tl.store(dots + at, dot, i_a < N)


@triton.jit
def blocks_of_tile(N, BM: tl.constexpr):
    """(block of rows, block of columns) of a program that makes one tile; programs of the same columns are in a row."""
    blocks = tl.cdiv(N, BM)
    return tl.program_id(0) % blocks, tl.program_id(0) // blocks


@triton.jit
def sum_of_tile(tile):
    """Of all its elements, in float32: a thread adds some dozens of them, and then the threads' sums go two by two.

    Not of the rows' sums: that fails to compile for sm_100 (Triton 3.6).
    """
    return tl.sum(tile).to(tl.float64)


@triton.jit
def store_tile(out, i_a, i_b, s_out, tile):
    """Whole: `gpu_engine.bands` has memory for all of a tile. With a mask each number would be stored by itself."""
    at = launch.row_start(i_a, s_out, 8)[:, None] + i_b[None, :]
    tl.store(out + at, tile.to(out.dtype.element_ty))


@triton.jit
def weights_of_tile(
    a, b, factor_value, a_pivots, a_adjustments, b_pivots, b_adjustments, block_a, block_b, N, M, D, first_row,
    row_period, offset, column_period, pivot, HAS_OWN_IMAGE: tl.constexpr, RUNNING: tl.constexpr,
    BLOCK_D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, a_classes=None, a_pulls=None, b_classes=None,
    b_pulls=None,
):  # fmt: skip
    """(G, similarities) of a tile, [BM, BN]: G is 0 where a column isn't seen, both are beyond the last rows.

    See `weights_kernel`. Hidden similarities that are no numbers make none of a gradient, as 0 times them does.
    """
    i_a = block_a * BM + tl.arange(0, BM)
    i_b = block_b * BN + tl.arange(0, BN)
    rate = (factor_value * LOG2_E).to(tl.float32)
    # the first i_a stands in for rows that are loaded already (b_a), which WHOLE = False doesn't read
    s = similarities(a, b, i_a, i_a, i_b, N, M, D, False, BLOCK_D)
    g = _weights(s, a_pivots, a_adjustments, i_a, N, b_pivots, b_adjustments, i_b, M, pivot, rate, RUNNING)
    g = less_pulls(g, a_classes, a_pulls, i_a, b_classes, b_pulls, i_b)
    low, high = images_of_block(first_row + block_a * BM, row_period, offset, BM)
    ends = (block_a + 1) * BM > N  # rows beyond the last are in the sums
    if ends | may_hide(block_b * BN, M, low, high, column_period, HAS_OWN_IMAGE, BN):
        seen = seen_columns(i_a, i_b, N, M, first_row, row_period, offset, column_period, HAS_OWN_IMAGE)
        g = tl.where(seen, g, 0.0)
        inside = (i_a < N)[:, None] & (i_b < M)[None, :]
        s = tl.where(inside, s, 0.0)  # of an infinite row and none NaN
    return g, s


@triton.jit
def as_stored(g, dtype: tl.constexpr, GAIN: tl.constexpr):
    """Weights as a product has them, rounded to the dtype of rows.

    <unit row, gradient> is made of these: then what rounding adds along the row is taken away with it.
    """
    return (g * GAIN).to(dtype).to(tl.float32) / GAIN


@triton.jit(do_not_specialize=["N", "M", "first_row", "row_period", "offset", "column_period", "s_out"])
def weights_kernel(
    a,  # [N, D]
    b,  # [M, D]
    factor,  # 0-dim, or None
    factor_number: tl.float64,  # otherwise
    a_pivots,  # [N] float32; None unless RUNNING
    a_adjustments,  # [N] float32; None if rows have no log-sum-exp
    b_pivots,  # [M] float32; None unless RUNNING
    b_adjustments,  # [M] float32; None if columns have no log-sum-exp
    a_classes,  # [N] int32, as the next three or None
    a_pulls,  # [N] float32
    b_classes,  # [M] int32
    b_pulls,  # [M] float32
    out,  # [N, M], rows s_out * 8 apart: G * GAIN; or None
    dots,  # [programs] float64, the sum of G * similarities; or None
    row_dots,  # [blocks of columns, N] float32, each row's sum of G as it is stored times similarities; or None
    column_dots,  # [blocks of rows, M] float32, each column's; or None
    N,
    M,
    D,
    first_row,  # the number of a's first row, and what composed.OwnImage says:
    row_period,
    offset,
    column_period,
    s_out,
    pivot,
    HAS_OWN_IMAGE: tl.constexpr,
    RUNNING: tl.constexpr,
    GAIN: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    block_a, block_b = blocks_of_tile(N, BM)
    i_a = block_a * BM + tl.arange(0, BM)
    i_b = block_b * BN + tl.arange(0, BN)
    g, s = weights_of_tile(
        a, b, launch.number(factor, factor_number), a_pivots, a_adjustments, b_pivots, b_adjustments, block_a, block_b,
        N, M, D, first_row, row_period, offset, column_period, pivot, HAS_OWN_IMAGE, RUNNING, BLOCK_D, BM, BN,
        a_classes, a_pulls, b_classes, b_pulls,
    )  # fmt: skip
    if dots is not None:
        tl.store(dots + tl.program_id(0), sum_of_tile(g * s))
    if row_dots is not None:
        part = tl.sum(as_stored(g, b.dtype.element_ty, GAIN) * s, 1)
        tl.store(row_dots + launch.row_start(block_b, N, 1) + i_a, part, i_a < N)
    if column_dots is not None:
        part = tl.sum(as_stored(g, b.dtype.element_ty, GAIN) * s, 0)
        tl.store(column_dots + launch.row_start(block_a, M, 1) + i_b, part, i_b < M)
    if out is not None:
        store_tile(out, i_a, i_b, s_out, g * GAIN)


@triton.jit(do_not_specialize=["N", "M", "offset", "first_part", "parts", "s_out"])
def sigmoid_kernel(
    a,  # [N, D]
    b,  # [M, D]
    factor,  # 0-dim, or None; these four: the scale and the bias, each a tensor or a number
    bias,  # 0-dim, or None
    factor_number: tl.float64,
    bias_number: tl.float64,
    out,  # [N, M], rows s_out * 8 apart: G * GAIN; or None
    sums,  # [3, parts] float64, a program's sums of loss, G * similarity, and G = d loss / d logit
    N,
    M,
    D,
    offset,
    first_part,  # where this launch's begin
    parts,
    s_out,
    GAIN: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    block_a, block_b = blocks_of_tile(N, BM)
    i_a = block_a * BM + tl.arange(0, BM)
    i_b = block_b * BN + tl.arange(0, BN)
    # the first i_a stands in for rows that are loaded already (b_a), which WHOLE = False doesn't read
    s = similarities(a, b, i_a, i_a, i_b, N, M, D, False, BLOCK_D)
    logit = s * launch.number(factor, factor_number).to(tl.float32) + launch.number(bias, bias_number).to(tl.float32)
    partner = block_a * BM + offset  # of the block's first row
    has_partners = (block_b * BN < partner + BM) & (partner < block_b * BN + BN)
    special = has_partners | (block_a * BM + BM > N) | (block_b * BN + BN > M)
    if special:  # the loss is softplus(logit), of the row's own pair softplus(-logit), and of no pair 0
        logit = tl.where(i_b[None, :] == (i_a + offset)[:, None], -logit, logit)
        inside = (i_a < N)[:, None] & (i_b < M)[None, :]
        logit = tl.where(inside, logit, -float("inf"))
        s = tl.where(inside, s, 0.0)  # of an infinite row and none NaN
    e = tl.exp2(tl.abs(logit) * -LOG2_E)
    less = e / (1 + e)
    g = tl.where(logit > 0, 1 - less, less)
    loss = tl.maximum(logit, 0.0) + log1p_of_unit(e)
    if special:
        g = tl.where(i_b[None, :] == (i_a + offset)[:, None], -g, g)
    at = sums + first_part + tl.program_id(0)
    tl.store(at, sum_of_tile(loss))
    tl.store(at + launch.row_start(parts, 1, 1), sum_of_tile(g * s))
    tl.store(at + launch.row_start(parts, 2, 1), sum_of_tile(g))
    if out is not None:
        store_tile(out, i_a, i_b, s_out, g * GAIN)
