"""Triton kernels on tiles of similarities whose rows and columns don't see all of one another: see visible.Visible.

A logit is a similarity: the temperature is in the rows. The kernels of losses without options are in sums.py and
weights.py, and theirs is the faster code: what isn't asked for isn't in it.
"""

import triton
import triton.language as tl

from .. import launch
from .tiles import LOG2_E, load_columns, load_rows, seen_columns, similarities
from .weights import store_tile


@triton.jit
def _seen(
    i_a,
    i_b,
    N,
    M,
    first_row,
    row_period,
    offset,
    column_period,
    row_ids,
    column_ids,
    exclude,
    exclude_rows,
    exclude_columns,
    s_exclude_row,
    s_exclude_column,
    HAS_OWN_IMAGE: tl.constexpr,
):
    """[BM, BN]: which pairs see each other, limits aside."""
    seen = seen_columns(i_a, i_b, N, M, first_row, row_period, offset, column_period, HAS_OWN_IMAGE)
    if row_ids is not None:
        b_row_ids = tl.load(row_ids + i_a, i_a < N, 0)
        seen = seen & (b_row_ids[:, None] != tl.load(column_ids + i_b, i_b < M, 0)[None, :])
    if exclude is not None:
        at = launch.row_start((first_row + i_a) % exclude_rows, s_exclude_row, 1)[:, None]
        at += launch.row_start(i_b % exclude_columns, s_exclude_column, 1)[None, :]
        seen = seen & (tl.load(exclude + at, seen, 1) == 0)
    return seen


@triton.jit
def _below(seen, s, limits, i, n, AXIS: tl.constexpr):
    """What rows (AXIS 1) or columns (AXIS 0) see of a tile under their limits, if there are any. NaN is above none."""
    if limits is not None:
        b_limits = tl.load(limits + i, i < n, float("inf"))
        above = s > tl.expand_dims(b_limits, AXIS)
        seen = seen & (above == 0)
    return seen


@triton.jit(
    do_not_specialize=[
        "N", "M", "first_row", "row_period", "offset", "column_period", "exclude_rows", "exclude_columns",
        "tiles_per_program",
    ]
)  # fmt: skip
def visible_sums_kernel(
    a,  # [N, D]
    b,  # [M, D]
    row_ids,  # what rows and columns see: see visible.Visible. [N] int64, or None
    column_ids,  # [M] int64, or None
    exclude,  # [exclude_rows, exclude_columns] of bytes, or None
    row_limit,  # [N] float32, or None
    column_limit,  # [M] float32, or None
    row_max,  # [splits, N] float32
    row_sum,  # [splits, N] float32, the sum of exp(logit - row_max)
    row_total,  # [splits, N] float64, the sum of logits; or None
    row_count,  # [splits, N] int32, or None
    column_max,  # [blocks of rows, M] float32, or None
    column_sum,  # [blocks of rows, M] float32, or None
    column_total,  # [blocks of rows, M] float32, or None
    column_count,  # [blocks of rows, M] int32, or None
    N,
    M,
    D,
    exclude_rows,
    exclude_columns,
    s_exclude_row,
    s_exclude_column,
    first_row,  # the number of a's first row, and what composed.OwnImage says:
    row_period,
    offset,
    column_period,
    tiles_per_program,
    HAS_OWN_IMAGE: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    block = tl.program_id(0)
    split = tl.program_id(1)
    i_a = block * BM + tl.arange(0, BM)
    b_a = tl.zeros([1], tl.float32)
    if WHOLE:
        b_a = load_rows(a, i_a, N, D, 0, BLOCK_D)
    maximum = tl.full([BM], -float("inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    logits = tl.zeros([BM], tl.float64)
    count = tl.zeros([BM], tl.int32)
    for t in range(split * tiles_per_program, tl.minimum((split + 1) * tiles_per_program, tl.cdiv(M, BN))):
        i_b = t * BN + tl.arange(0, BN)
        s = similarities(a, b, b_a if WHOLE else i_a, i_a, i_b, N, M, D, WHOLE, BLOCK_D)
        seen = _seen(
            i_a, i_b, N, M, first_row, row_period, offset, column_period, row_ids, column_ids, exclude, exclude_rows,
            exclude_columns, s_exclude_row, s_exclude_column, HAS_OWN_IMAGE,
        )  # fmt: skip
        of_row = _below(seen, s, row_limit, i_a, N, 1)
        new = tl.maximum(maximum, tl.max(tl.where(of_row, s, -float("inf")), 1))
        shift = launch.finite(new)
        fade = tl.exp2((launch.finite(maximum) - shift) * LOG2_E)
        e = tl.where(of_row, tl.exp2((s - shift[:, None]) * LOG2_E), 0.0)
        total = total * fade + tl.sum(e, 1)
        maximum = new
        if row_total is not None:
            logits += tl.sum(tl.where(of_row, s, 0.0), 1).to(tl.float64)
            count += tl.sum(of_row.to(tl.int32), 1)
        if column_sum is not None:
            at = launch.row_start(block, M, 1) + i_b
            of_column = _below(seen, s, column_limit, i_b, M, 0)
            highest = tl.max(tl.where(of_column, s, -float("inf")), 0)
            e = tl.where(of_column, tl.exp2((s - launch.finite(highest)[None, :]) * LOG2_E), 0.0)
            tl.store(column_max + at, highest, i_b < M)
            tl.store(column_sum + at, tl.sum(e, 0), i_b < M)
            if column_total is not None:
                tl.store(column_total + at, tl.sum(tl.where(of_column, s, 0.0), 0), i_b < M)
                tl.store(column_count + at, tl.sum(of_column.to(tl.int32), 0), i_b < M)
    at = launch.row_start(split, N, 1) + i_a
    tl.store(row_max + at, maximum, i_a < N)
    tl.store(row_sum + at, total, i_a < N)
    if row_total is not None:
        tl.store(row_total + at, logits, i_a < N)
        tl.store(row_count + at, count, i_a < N)


@triton.jit
def _slopes(seen, s, pivots, adjustments, of_lse, of_total, i, n, AXIS: tl.constexpr):
    """The derivatives by the logits that rows (AXIS 1) or columns (AXIS 0) see: see visible.Slopes, rows.lse_states."""
    inside = i < n
    pivot = tl.load(pivots + i, inside, 0.0)
    adjustment = tl.load(adjustments + i, inside, 0.0)
    slope = tl.load(of_lse + i, inside, 0.0)
    g = tl.exp2((s - tl.expand_dims(pivot, AXIS)) * LOG2_E + tl.expand_dims(adjustment, AXIS))
    g = g * tl.expand_dims(slope, AXIS)
    if of_total is not None:
        g += tl.expand_dims(tl.load(of_total + i, inside, 0.0), AXIS)
    return tl.where(seen, g, 0.0)


@triton.jit
def _weights(
    s, seen, row_limit, column_limit, row_pivots, row_adjustments, row_slopes, row_totals, column_pivots,
    column_adjustments, column_slopes, column_totals, i_a, i_b, N, M,
):  # fmt: skip
    """G of a tile, the derivative by each logit: [BM, BN] float32."""
    g = tl.zeros(s.shape, tl.float32)
    if row_slopes is not None:
        of_row = _below(seen, s, row_limit, i_a, N, 1)
        g += _slopes(of_row, s, row_pivots, row_adjustments, row_slopes, row_totals, i_a, N, 1)
    if column_slopes is not None:
        of_column = _below(seen, s, column_limit, i_b, M, 0)
        g += _slopes(of_column, s, column_pivots, column_adjustments, column_slopes, column_totals, i_b, M, 0)
    return g


@triton.jit(
    do_not_specialize=[
        "N", "M", "first_row", "row_period", "offset", "column_period", "exclude_rows", "exclude_columns", "s_out",
    ]
)  # fmt: skip
def visible_weights_kernel(
    a,  # [N, D]
    b,  # [M, D]
    row_ids,  # what rows and columns see: as in visible_sums_kernel
    column_ids,
    exclude,
    row_limit,
    column_limit,
    row_pivots,  # [N] float32 each, see `_slopes`; None: rows have no slopes
    row_adjustments,
    row_slopes,
    row_totals,  # or None
    column_pivots,  # [M] float32 each
    column_adjustments,
    column_slopes,
    column_totals,
    out,  # [N, M], rows s_out * 8 apart: G * GAIN
    N,
    M,
    D,
    exclude_rows,
    exclude_columns,
    s_exclude_row,
    s_exclude_column,
    first_row,
    row_period,
    offset,
    column_period,
    s_out,
    HAS_OWN_IMAGE: tl.constexpr,
    GAIN: tl.constexpr,  # see launch.gain
    BLOCK_D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    blocks = tl.cdiv(N, BM)
    i_a = tl.program_id(0) % blocks * BM + tl.arange(0, BM)
    i_b = tl.program_id(0) // blocks * BN + tl.arange(0, BN)
    s = similarities(a, b, i_a, i_a, i_b, N, M, D, False, BLOCK_D)
    seen = _seen(
        i_a, i_b, N, M, first_row, row_period, offset, column_period, row_ids, column_ids, exclude, exclude_rows,
        exclude_columns, s_exclude_row, s_exclude_column, HAS_OWN_IMAGE,
    )  # fmt: skip
    g = _weights(
        s, seen, row_limit, column_limit, row_pivots, row_adjustments, row_slopes, row_totals, column_pivots,
        column_adjustments, column_slopes, column_totals, i_a, i_b, N, M,
    )  # fmt: skip
    store_tile(out, i_a, i_b, s_out, g * GAIN)


@triton.jit(
    do_not_specialize=[
        "N", "M", "first_row", "row_period", "offset", "column_period", "exclude_rows", "exclude_columns",
        "tiles_per_program",
    ]
)  # fmt: skip
def visible_owner_kernel(
    a,  # [N, D]
    b,  # [M, D]
    row_ids,  # what rows and columns see: as in visible_sums_kernel
    column_ids,
    exclude,
    row_limit,
    column_limit,
    row_pivots,  # as in visible_weights_kernel
    row_adjustments,
    row_slopes,
    row_totals,
    column_pivots,
    column_adjustments,
    column_slopes,
    column_totals,
    out,  # [splits, N, D] float32: G @ b
    N,
    M,
    D,
    exclude_rows,
    exclude_columns,
    s_exclude_row,
    s_exclude_column,
    first_row,
    row_period,
    offset,
    column_period,
    tiles_per_program,
    HAS_OWN_IMAGE: tl.constexpr,
    GAIN: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    split = tl.program_id(1)
    i_a = tl.program_id(0) * BM + tl.arange(0, BM)
    b_a = load_rows(a, i_a, N, D, 0, BLOCK_D)
    acc = tl.zeros([BM, BLOCK_D], tl.float32)
    for t in range(split * tiles_per_program, tl.minimum((split + 1) * tiles_per_program, tl.cdiv(M, BN))):
        i_b = t * BN + tl.arange(0, BN)
        b_b = load_columns(b, i_b, M, D, 0, BLOCK_D)
        s = tl.dot(b_a, b_b)
        seen = _seen(
            i_a, i_b, N, M, first_row, row_period, offset, column_period, row_ids, column_ids, exclude, exclude_rows,
            exclude_columns, s_exclude_row, s_exclude_column, HAS_OWN_IMAGE,
        )  # fmt: skip
        g = _weights(
            s, seen, row_limit, column_limit, row_pivots, row_adjustments, row_slopes, row_totals, column_pivots,
            column_adjustments, column_slopes, column_totals, i_a, i_b, N, M,
        )  # fmt: skip
        acc = tl.dot((g * GAIN).to(b_b.dtype), tl.trans(b_b), acc)
    at = launch.row_start(split, N, 1) + i_a
    column = tl.arange(0, BLOCK_D)
    mask = (i_a < N)[:, None] & (column < D)[None, :]
    tl.store(out + (at * D)[:, None] + column[None, :], acc / GAIN, mask)
