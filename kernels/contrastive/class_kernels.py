"""Triton kernels of the supervised contrastive loss of one batch, around the walks over tiles: see gpu_classes.py.

Rows [V, N, D] are numbered r = v N + n. `table` [2, S] int32 is of_classes.class_table.
"""

import triton
import triton.language as tl

from .. import launch
from .rows import joined, store_state
from .tiles import load_rows
from .views import factor_of, store_rows, unit_rows_of


@triton.jit
def class_of_images(ids, image, N, BLOCK: tl.constexpr):
    """(the first image of each image's class, how many it has)."""
    own = tl.load(ids + image, image < N, 0)
    first = tl.zeros([image.shape[0], BLOCK], tl.int32) + N
    count = tl.zeros([image.shape[0], BLOCK], tl.int32)
    for begin in range(0, N, BLOCK):
        other = begin + tl.arange(0, BLOCK)
        same = (tl.load(ids + other, other < N, 0)[None, :] == own[:, None]) & (other < N)[None, :]
        first = tl.minimum(first, tl.where(same, other[None, :], N))
        count += same.to(tl.int32)
    return tl.min(first, 1), tl.sum(count, 1)


@triton.jit(do_not_specialize=["N", "V", "anchor_views"])
def unit_classes_kernel(
    z,  # [V, N, D], rows s_row apart, views s_view
    ids,  # [N] int64; None: each image is a class of its own
    temperature,  # 0-dim, or None
    inverse: tl.float64,  # see `factor_of`
    unit,  # [V, N, D]
    divisors,  # [V, N] float64; None: rows stay as they come
    table,  # [2, S]
    factor,  # 0-dim float64: 1 / temperature
    N,
    D,
    V,
    anchor_views,
    S,
    s_view,
    s_row,
    EPS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    image = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    if tl.program_id(0) == 0:
        tl.store(factor, factor_of(temperature, inverse))
        behind = N * V + tl.arange(0, 128)  # of_views.STATE_ROWS: the whole memory, as it is a result
        tl.store(table + behind, tl.full([128], -1, tl.int32), behind < S)
        tl.store(table + S + behind, tl.zeros([128], tl.int32), behind < S)
    first = image
    count = tl.full([ROWS], 1, tl.int32)
    if ids is not None:
        first, count = class_of_images(ids, image, N, BLOCK)
    for v in range(0, V):
        start = launch.row_start(v, N, 1)
        rows = z + launch.row_start(v, s_view, 1)
        if divisors is not None:
            u, divisor = unit_rows_of(rows, image, N, D, s_row, EPS, BLOCK)
            tl.store(divisors + start + image, divisor, image < N)
        else:
            column = tl.arange(0, BLOCK)
            mask = (image < N)[:, None] & (column < D)[None, :]
            u = tl.load(rows + launch.row_start(image, s_row, 1)[:, None] + column[None, :], mask, 0)
        store_rows(unit + start * D, image, N, D, u, BLOCK)
        tl.store(table + start + image, first, image < N)
        tl.store(table + S + start + image, tl.where(v < anchor_views, V * count - 1, 0), image < N)


@triton.jit(do_not_specialize=["N", "R", "row_parts", "column_parts", "met_once", "walks_parts", "rows_per_program"])
def join_classes_kernel(
    row_max,  # [row_parts, N] float32, of N anchors; None unless RUNNING. These four: see rows._join_kernel
    row_sum,  # [row_parts, N] float32
    column_max,  # [column_parts, N] float32; None unless RUNNING
    column_sum,  # [column_parts, N] float32, or None
    before,  # [N] float64, log-sum-exps of earlier walks; or None
    positives,  # [walks_parts, N] float32, the sums of similarities with positives: see sums_kernel
    table,  # [2, S]
    factor,  # 0-dim
    lse,  # [R] float64
    states,  # [3, S] float32: pivots and adjustments, see rows.lse_states, and pulls, see weights.py
    losses,  # [programs] float64: the sum over a program's anchors; or, of one program, 0-dim: the mean
    N,
    R,
    S,
    row_parts,
    column_parts,
    met_once,
    walks_parts,
    rows_per_program,
    pivot,
    RUNNING: tl.constexpr,
    ALONE: tl.constexpr,  # there is one program
    BLOCK: tl.constexpr,
):
    """Programs go on to row S, as the states' whole memory is a result."""
    factor_value = tl.load(factor)
    loss = tl.zeros([BLOCK], tl.float64)
    begin = tl.program_id(0) * rows_per_program
    for at_once in range(begin, tl.minimum(begin + rows_per_program, S), BLOCK):
        i_row = at_once + tl.arange(0, BLOCK)
        inside = i_row < N
        b_lse = joined(
            row_max, row_sum, column_max, column_sum, i_row, N, row_parts, column_parts, met_once, factor_value, pivot,
            RUNNING,
        )  # fmt: skip
        if before is not None:
            earlier = tl.load(before + i_row, inside, 0.0)
            largest = launch.finite(tl.maximum(earlier, b_lse))
            b_lse = largest + tl.log(tl.exp(earlier - largest) + tl.exp(b_lse - largest))
        positive = tl.zeros([BLOCK], tl.float64)
        for part in range(0, walks_parts):
            positive += tl.load(positives + launch.row_start(part, N, 1) + i_row, inside, 0.0).to(tl.float64)
        count = tl.load(table + S + i_row, i_row < S, 0)
        # 1 / count by a step of Newton's: a division in float64 calls a function, round which registers are spilled
        number = tl.maximum(count, 1)
        share = (1 / number.to(tl.float32)).to(tl.float64)
        share = tl.where(count > 0, share * (2 - number.to(tl.float64) * share), 0.0)
        loss += tl.where(count > 0, b_lse - positive * factor_value * share, 0.0)
        b_lse = tl.where(count > 0, b_lse, float("inf"))
        tl.store(lse + i_row, b_lse, i_row < R)
        store_state(states, states + S, i_row, i_row < S, b_lse, factor_value, pivot, RUNNING)
        if not RUNNING:
            tl.store(states + i_row, tl.zeros([BLOCK], tl.float32), i_row < S)
        tl.store(states + 2 * S + i_row, share.to(tl.float32), i_row < S)
    total = tl.sum(loss, 0)
    if ALONE:
        tl.store(losses, total / N)
    else:
        tl.store(losses + tl.program_id(0), total)


@triton.jit(do_not_specialize=["R", "splits"])
def finish_classes_kernel(
    sums,  # [splits, R, D] float32: the gradient for rows as they are multiplied, times temperature and anchors
    unit,  # [R, D]
    divisors,  # [R] float64; None: rows are as they came
    factor,  # 0-dim float64
    upstream,  # 0-dim
    gradient,  # [R, D]
    along,  # [programs] float64: the sums of <gradient for unit rows, unit rows>; or None
    splits,
    R,
    D,
    each: tl.float64,  # 1 / anchors
    EPS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = i_row < R
    g = tl.zeros([ROWS, BLOCK], tl.float32)
    for split in range(0, splits):
        g += load_rows(sums + launch.row_start(split, R, 1) * D, i_row, R, D, 0, BLOCK)
    u = load_rows(unit, i_row, R, D, 0, BLOCK).to(tl.float32)
    along_rows = tl.sum(g * u, 1)
    if divisors is not None:
        divisor = tl.load(divisors + i_row, inside, 1.0)
        radial = tl.where(divisor > EPS, along_rows, 0.0)
        g = (g - radial[:, None] * u) / divisor.to(tl.float32)[:, None]
    scale = tl.load(upstream).to(tl.float64) * tl.load(factor) * tl.full((), each, tl.float64)
    store_rows(gradient, i_row, R, D, g * scale.to(tl.float32), BLOCK)
    if along is not None:
        tl.store(along + tl.program_id(0), tl.sum(tl.where(inside, along_rows, 0.0).to(tl.float64), 0))
