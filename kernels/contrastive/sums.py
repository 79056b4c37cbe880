"""Triton kernels that walk over tiles of similarities and keep something by row: log-sum-exps, attention, the best.

A program owns a block of rows. Where rows are few, `splits` programs share the walk of a block; each writes a line of
its own, [splits, N], and lines are joined later in their order (`rows.join`).
"""

import triton
import triton.language as tl

from .. import launch
from .tiles import LOG2_E, images_of_block, in_class, load_rows, load_tile, may_hide, seen_columns, similarities


@triton.jit
def rate_of(factor_value):
    """What similarities are multiplied by before exp2, for a factor in float64.

    Never 0: what isn't seen is a similarity of -inf, whose exponential is 0, and -inf times 0 is NaN.
    """
    return tl.maximum((tl.abs(factor_value) * LOG2_E).to(tl.float32), 1e-36, propagate_nan=tl.PropagateNan.ALL)


@triton.jit(
    do_not_specialize=[
        "N",
        "M",
        "first_row",
        "row_period",
        "offset",
        "column_period",
        "first_tile",
        "stop_tile",
        "tiles_per_program",
    ]
)
def sums_kernel(
    a,  # [N, D]
    b,  # [M, D]; if SYMMETRIC, a itself
    factor,  # 0-dim, or None
    factor_number: tl.float64,  # otherwise
    classes,  # [>= N and M, whole tiles] int32, of the rows of a and of b; or None
    positives,  # [splits, N] float32, see below; or None
    row_max,  # [splits, N] float32, in units of similarities; None unless RUNNING
    row_sum,  # [splits, N] float32, the sum of exp(logit - row_max * |factor|)
    column_max,  # [lines, M] float32; None unless RUNNING, and where columns aren't wanted
    column_sum,  # [lines, M] float32, or None. A line is a block of rows; if SYMMETRIC, a distance from the diagonal
    N,
    M,
    D,
    first_row,  # the number of a's first row, and what composed.OwnImage says:
    row_period,
    offset,
    column_period,
    first_tile,  # the first tile in the walk of a block of rows
    stop_tile,  # the tile after the walk's last
    tiles_per_program,  # how many of the walk's tiles each of the block's programs takes
    pivot,  # in the place of every maximum, unless RUNNING
    HAS_OWN_IMAGE: tl.constexpr,
    RUNNING: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    WHOLE: tl.constexpr,
    EVEN: tl.constexpr,  # D is BLOCK_D
    BLOCK_D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """`positives`: the sums of similarities with columns of a row's class.

    If SYMMETRIC, a pair is in one of its two rows' sums, twice: what is added up of all rows is the same.
    """
    block = tl.program_id(0)
    split = tl.program_id(1)
    i_a = block * BM + tl.arange(0, BM)
    factor_value = launch.number(factor, factor_number)
    # RUNNING: of a negative factor the largest logit is that of the smallest similarity. Otherwise it is positive.
    sign = tl.where(factor_value < 0, -1.0, 1.0)
    rate = rate_of(factor_value)
    shift = pivot * rate
    maximum = tl.full([BM], -float("inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    positive = tl.zeros([BM], tl.float32)
    b_a = tl.zeros([1], tl.float32)
    if WHOLE:
        b_a = load_rows(a, i_a, N, D, 0, BLOCK_D)
    low, high = images_of_block(first_row + block * BM, row_period, offset, BM)
    rows_end = column_sum is not None and (block + 1) * BM > N  # rows beyond the last are in the columns' sums, too
    blocks = tl.cdiv(N, BM)
    begin = first_tile + split * tiles_per_program
    # Not `begin + tiles_per_program`: with that the kernel of 256 columns in bfloat16 spills 4 registers on sm_100.
    end = tl.minimum(first_tile + (split + 1) * tiles_per_program, stop_tile)
    if SYMMETRIC:
        # Row block i meets blocks i, i + 1, ..., i + blocks / 2 (mod blocks), so every two blocks meet once. At the
        # largest distance two of an even number of blocks would meet twice: the first half of them walks there.
        walk = blocks // 2 + 1
        if blocks % 2 == 0 and block >= blocks // 2:
            walk -= 1
        end = tl.minimum(end, walk * (BM // BN))
    for t in range(begin, end):
        if SYMMETRIC:
            distance = t // (BM // BN)
            met = block + distance
            first_b = tl.where(met < blocks, met, met - blocks) * BM + t % (BM // BN) * BN
            line = distance - tl.maximum(first_tile // (BM // BN), 1)  # -1: the diagonal; its rows see both halves
        else:
            first_b = t * BN
            line = block
        i_b = first_b + tl.arange(0, BN)
        if WHOLE:
            s = tl.dot(b_a, load_tile(b, first_b, M, D, BLOCK_D, BN, EVEN))
        else:
            s = similarities(a, b, b_a, i_a, i_b, N, M, D, WHOLE, BLOCK_D)
        if RUNNING:
            s *= sign
        of_class = tl.zeros([BM], tl.float32)
        if rows_end | may_hide(first_b, M, low, high, column_period, HAS_OWN_IMAGE, BN):
            seen = seen_columns(i_a, i_b, N, M, first_row, row_period, offset, column_period, HAS_OWN_IMAGE)
            if classes is not None:
                of_class = tl.sum(tl.where(seen & in_class(classes, i_a, classes, i_b), s, 0.0), 1)
            s = tl.where(seen, s, -float("inf"))
        else:
            if classes is not None:
                of_class = tl.sum(tl.where(in_class(classes, i_a, classes, i_b), s, 0.0), 1)
        if classes is not None:
            if SYMMETRIC:
                of_class *= tl.where(line >= 0, 2.0, 1.0)
            positive += of_class
        at = launch.row_start(line, M, 1) + i_b
        written = (i_b < M) & (line >= 0)
        if RUNNING:
            new = tl.maximum(maximum, tl.max(s, 1))
            base = launch.finite(new)
            fade = tl.exp2((launch.finite(maximum) - base) * rate)
            total = total * fade + tl.sum(tl.exp2((s - base[:, None]) * rate), 1)
            maximum = new
            if column_sum is not None:
                highest = tl.max(s, 0)
                tl.store(column_max + at, highest, written)
                tl.store(column_sum + at, tl.sum(tl.exp2((s - launch.finite(highest)[None, :]) * rate), 0), written)
        else:
            e = tl.exp2(s * rate - shift)
            total += tl.sum(e, 1)
            if column_sum is not None:
                tl.store(column_sum + at, tl.sum(e, 0), written)
    at = launch.row_start(split, N, 1) + i_a
    tl.store(row_sum + at, total, i_a < N)
    if RUNNING:
        tl.store(row_max + at, maximum, i_a < N)
    if positives is not None:
        tl.store(positives + at, positive, i_a < N)


@triton.jit(do_not_specialize=["N", "M", "first_row", "row_period", "offset", "column_period", "tiles_per_program"])
def attend_kernel(
    a,  # [N, D]
    b,  # [M, D]
    factor,  # 0-dim, positive
    maxima,  # [splits, N] float32, in units of similarities; None unless RUNNING
    sums,  # [splits, N] float32, the sum of exp(logit - maximum * factor)
    out,  # [splits, N, D] float32: sum_j exp(logit_j - maximum * factor) b_j
    N,
    M,
    D,
    first_row,  # the number of a's first row, and what composed.OwnImage says:
    row_period,
    offset,
    column_period,
    tiles_per_program,
    pivot,  # in the place of every maximum, unless RUNNING
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
    rate = rate_of(tl.load(factor).to(tl.float64))
    shift = pivot * rate
    b_a = load_rows(a, i_a, N, D, 0, BLOCK_D)
    low, high = images_of_block(first_row + tl.program_id(0) * BM, row_period, offset, BM)
    maximum = tl.full([BM], -float("inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BLOCK_D], tl.float32)
    for t in range(split * tiles_per_program, tl.minimum((split + 1) * tiles_per_program, tl.cdiv(M, BN))):
        b_b = load_tile(b, t * BN, M, D, BLOCK_D, BN, EVEN)
        s = tl.dot(b_a, b_b)
        if may_hide(t * BN, M, low, high, column_period, HAS_OWN_IMAGE, BN):
            i_b = t * BN + tl.arange(0, BN)
            seen = seen_columns(i_a, i_b, N, M, first_row, row_period, offset, column_period, HAS_OWN_IMAGE)
            s = tl.where(seen, s, -float("inf"))
        if RUNNING:
            new = tl.maximum(maximum, tl.max(s, 1))
            base = launch.finite(new)
            fade = tl.exp2((launch.finite(maximum) - base) * rate)
            e = tl.exp2((s - base[:, None]) * rate)
            total = total * fade
            acc = acc * fade[:, None]
            maximum = new
        else:
            e = tl.exp2(s * rate - shift)
        total += tl.sum(e, 1)
        acc = tl.dot((e * GAIN).to(b_b.dtype), tl.trans(b_b), acc)
    at = launch.row_start(split, N, 1) + i_a
    if RUNNING:
        tl.store(maxima + at, maximum, i_a < N)
    tl.store(sums + at, total, i_a < N)
    column = tl.arange(0, BLOCK_D)
    mask = (i_a < N)[:, None] & (column < D)[None, :]
    tl.store(out + (at * D)[:, None] + column[None, :], acc / GAIN, mask)


@triton.jit(do_not_specialize=["N", "M", "tiles_per_program"])
def best_kernel(
    a,  # [N, D]
    b,  # [M, D]
    values,  # [splits, N] float32, the largest similarity
    columns,  # [splits, N] int64, the first column that has it
    N,
    M,
    D,
    tiles_per_program,
    WHOLE: tl.constexpr,
    EVEN: tl.constexpr,  # D is BLOCK_D
    BLOCK_D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    split = tl.program_id(1)
    i_a = tl.program_id(0) * BM + tl.arange(0, BM)
    b_a = tl.zeros([1], tl.float32)
    if WHOLE:
        b_a = load_rows(a, i_a, N, D, 0, BLOCK_D)
    best = tl.full([BM], -float("inf"), tl.float32)
    where = tl.zeros([BM], tl.int32)
    for t in range(split * tiles_per_program, tl.minimum((split + 1) * tiles_per_program, tl.cdiv(M, BN))):
        i_b = t * BN + tl.arange(0, BN)
        if WHOLE:
            s = tl.dot(b_a, load_tile(b, t * BN, M, D, BLOCK_D, BN, EVEN))
        else:
            s = similarities(a, b, b_a, i_a, i_b, N, M, D, WHOLE, BLOCK_D)
        # NaN counts as the best, as in torch.argmax; nothing else is infinite among cosines
        s = tl.where((i_b < M)[None, :], tl.where(s != s, float("inf"), s), -float("inf"))
        highest = tl.max(s, 1)
        first = tl.min(tl.where(s == highest[:, None], i_b[None, :], 2147483647), 1)
        better = highest > best
        where = tl.where(better, first, where)
        best = tl.where(better, highest, best)
    at = launch.row_start(split, N, 1) + i_a
    tl.store(values + at, best, i_a < N)
    tl.store(columns + at, where.to(tl.int64), i_a < N)
