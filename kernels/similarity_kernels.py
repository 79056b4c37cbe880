"""The Triton kernels of similarity.py, which says how they divide the work."""

import triton
import triton.language as tl
from fastjem.kernels import launch


@triton.jit
def _load(x, i_row, N, D, start, BLOCK: tl.constexpr):
    """Rows i_row, columns start .. start + BLOCK of a dense [N, D]; zeros outside."""
    column = start + tl.arange(0, BLOCK)
    mask = (i_row < N)[:, None] & (column < D)[None, :]
    return tl.load(x + launch.row_start(i_row, D, 1)[:, None] + column[None, :], mask, 0)


@triton.jit
def _product(
    a, b, b_a, i_a, i_b, N, M, D, BLOCK_D: tl.constexpr, CHUNKS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):
    """[BM, BN] float32: similarities; and the candidates' rows, if they are one chunk (so are the rows b_a then)."""
    b_b = _load(b, i_b, M, D, 0, BLOCK_D)
    s = tl.dot(b_a, tl.trans(b_b), input_precision="tf32x3")
    for c in tl.static_range(1, CHUNKS):
        b_rest = _load(b, i_b, M, D, c * BLOCK_D, BLOCK_D)
        s += tl.dot(_load(a, i_a, N, D, c * BLOCK_D, BLOCK_D), tl.trans(b_rest), input_precision="tf32x3")
    return s, b_b


@triton.jit
def _seen(i_a, i_b, M, rows_period, offset, columns_period, PERIODIC: tl.constexpr):
    """[BM, BN]: the columns that exist and don't show the row's own image."""
    seen = (i_b < M)[None, :]
    if PERIODIC:
        seen = seen & ((i_b % columns_period)[None, :] != (i_a % rows_period + offset)[:, None])
    return seen


@triton.jit(do_not_specialize=["N", "M", "rows_period", "offset", "columns_period", "per_split"])
def log_sum_exp_kernel(
    a,  # [N, D]
    b,  # [M, D]
    factor,  # 0-dim
    maxima,  # [splits, N]
    totals,  # [splits, N]
    out,  # [splits, N, D] float32: sum_j exp(logit - maximum) b_j, or None
    N,
    M,
    D,
    rows_period,
    offset,
    columns_period,
    per_split,  # blocks of columns
    shift,
    PERIODIC: tl.constexpr,
    RUNNING: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNKS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    i_split = tl.program_id(1)
    i_a = tl.program_id(0) * BM + tl.arange(0, BM)
    scale = tl.load(factor).to(tl.float32)
    b_a = _load(a, i_a, N, D, 0, BLOCK_D)
    maximum = tl.full([BM], -float("inf"), tl.float32)
    if not RUNNING:
        maximum = tl.zeros([BM], tl.float32) + shift
    total = tl.zeros([BM], tl.float32)
    if out is not None:
        acc = tl.zeros([BM, BLOCK_D], tl.float32)
    for block in range(i_split * per_split, min((i_split + 1) * per_split, tl.cdiv(M, BN))):
        i_b = block * BN + tl.arange(0, BN)
        s, b_b = _product(a, b, b_a, i_a, i_b, N, M, D, BLOCK_D, CHUNKS, BM, BN)
        x = tl.where(_seen(i_a, i_b, M, rows_period, offset, columns_period, PERIODIC), s * scale, -float("inf"))
        if RUNNING:
            now = tl.maximum(maximum, tl.max(x, 1))
            base = tl.where(now == -float("inf"), 0.0, now)
            rescale = tl.exp(maximum - base)
            e = tl.exp(x - base[:, None])
            total = total * rescale + tl.sum(e, 1)
            maximum = now
            if out is not None:
                acc = acc * rescale[:, None]
        else:
            e = tl.exp(x - shift)
            total += tl.sum(e, 1)
        if out is not None:
            acc += tl.dot(e.to(b_b.dtype), b_b, input_precision="tf32x3")
    at = i_split.to(tl.int64) * N + i_a
    tl.store(maxima + at, maximum, i_a < N)
    tl.store(totals + at, total, i_a < N)
    if out is not None:
        column = tl.arange(0, BLOCK_D)
        mask = (i_a < N)[:, None] & (column < D)[None, :]
        tl.store(out + (at * D)[:, None] + column[None, :], acc, mask)


@triton.jit(do_not_specialize=["N", "M", "rows_period", "offset", "columns_period"])
def weighted_kernel(
    a,  # [N, D]
    b,  # [M, D]
    factor,  # 0-dim
    a_lse,  # [N] float64, or None
    b_lse,  # [M] float64, or None
    out,  # [N, D] float32: G @ b
    dots,  # [N] float32: the sum of G * similarities by row
    N,
    M,
    D,
    rows_period,
    offset,
    columns_period,
    PERIODIC: tl.constexpr,
    GAIN: tl.constexpr,  # float16 weights would be subnormal numbers without
    BLOCK_D: tl.constexpr,
    CHUNKS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    i_chunk = tl.program_id(1)
    i_a = tl.program_id(0) * BM + tl.arange(0, BM)
    scale = tl.load(factor).to(tl.float32)
    b_a = _load(a, i_a, N, D, 0, BLOCK_D)
    if a_lse is not None:
        row = tl.load(a_lse + i_a, i_a < N, float("inf")).to(tl.float32)
    acc = tl.zeros([BM, BLOCK_D], tl.float32)
    dot = tl.zeros([BM], tl.float32)
    for start in range(0, M, BN):
        i_b = start + tl.arange(0, BN)
        s, b_b = _product(a, b, b_a, i_a, i_b, N, M, D, BLOCK_D, CHUNKS, BM, BN)
        seen = _seen(i_a, i_b, M, rows_period, offset, columns_period, PERIODIC)
        x = s * scale
        g = tl.zeros([BM, BN], tl.float32)
        if a_lse is not None:
            g += tl.exp(x - row[:, None])
        if b_lse is not None:
            column_lse = tl.load(b_lse + i_b, i_b < M, float("inf")).to(tl.float32)
            g += tl.exp(x - column_lse[None, :])
        g = tl.where(seen, g, 0.0)
        dot += tl.sum(g * s, 1)
        if CHUNKS > 1:
            b_b = _load(b, i_b, M, D, i_chunk * BLOCK_D, BLOCK_D)
        acc += tl.dot((g * GAIN).to(b_b.dtype), b_b, input_precision="tf32x3")
    column = i_chunk * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = (i_a < N)[:, None] & (column < D)[None, :]
    tl.store(out + launch.row_start(i_a, D, 1)[:, None] + column[None, :], acc / GAIN, mask)
    if i_chunk == 0:
        tl.store(dots + i_a, dot, i_a < N)


@triton.jit(do_not_specialize=["N", "M", "offset"])
def sigmoid_kernel(
    a,  # [N, D]
    b,  # [M, D]
    factor,  # 0-dim
    bias,  # 0-dim
    out,  # [N, D] float32: G @ b, or None
    sums,  # [3, N] float32: loss, G, G * similarity of each row
    N,
    M,
    D,
    offset,
    BLOCK_D: tl.constexpr,
    CHUNKS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    i_chunk = tl.program_id(1)
    i_a = tl.program_id(0) * BM + tl.arange(0, BM)
    scale, shift = tl.load(factor).to(tl.float32), tl.load(bias).to(tl.float32)
    b_a = _load(a, i_a, N, D, 0, BLOCK_D)
    acc = tl.zeros([BM, BLOCK_D], tl.float32)
    loss = tl.zeros([BM], tl.float32)
    weight = tl.zeros([BM], tl.float32)
    dot = tl.zeros([BM], tl.float32)
    for start in range(0, M, BN):
        i_b = start + tl.arange(0, BN)
        s, b_b = _product(a, b, b_a, i_a, i_b, N, M, D, BLOCK_D, CHUNKS, BM, BN)
        label = tl.where(i_b[None, :] == (i_a + offset)[:, None], -1.0, 1.0)
        x = label * (s * scale + shift)  # the loss is softplus(x)
        e = tl.exp(-tl.abs(x))
        one_more = 1 + e
        # log(1 + e) loses e below 1e-7; Kahan's correction gives log1p
        log1p = tl.where(one_more == 1, e, tl.log(one_more) * (e / tl.where(one_more == 1, 1.0, one_more - 1)))
        seen = (i_b < M)[None, :]
        loss += tl.sum(tl.where(seen, tl.maximum(x, 0.0) + log1p, 0.0), 1)
        g = tl.where(seen, label * tl.where(x > 0, 1.0, e) / one_more, 0.0)
        weight += tl.sum(g, 1)
        dot += tl.sum(g * s, 1)
        if out is not None:
            if CHUNKS > 1:
                b_b = _load(b, i_b, M, D, i_chunk * BLOCK_D, BLOCK_D)
            acc += tl.dot(g.to(b_b.dtype), b_b, input_precision="tf32x3")
    if out is not None:
        column = i_chunk * BLOCK_D + tl.arange(0, BLOCK_D)
        mask = (i_a < N)[:, None] & (column < D)[None, :]
        tl.store(out + launch.row_start(i_a, D, 1)[:, None] + column[None, :], acc, mask)
    if i_chunk == 0:
        tl.store(sums + i_a, loss, i_a < N)
        tl.store(sums + N + i_a, weight, i_a < N)
        tl.store(sums + 2 * N + i_a, dot, i_a < N)


@triton.jit(do_not_specialize=["N", "M", "per_split"])
def best_kernel(
    a,  # [N, D]
    b,  # [M, D]
    values,  # [splits, N]
    columns,  # [splits, N] int64
    N,
    M,
    D,
    per_split,
    BLOCK_D: tl.constexpr,
    CHUNKS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    i_split = tl.program_id(1)
    i_a = tl.program_id(0) * BM + tl.arange(0, BM)
    b_a = _load(a, i_a, N, D, 0, BLOCK_D)
    best = tl.full([BM], -float("inf"), tl.float32)
    where = tl.zeros([BM], tl.int32)
    for block in range(i_split * per_split, min((i_split + 1) * per_split, tl.cdiv(M, BN))):
        i_b = block * BN + tl.arange(0, BN)
        s, _ = _product(a, b, b_a, i_a, i_b, N, M, D, BLOCK_D, CHUNKS, BM, BN)
        s = tl.where((i_b < M)[None, :], s, -float("inf"))
        now = tl.max(s, 1)
        first = tl.min(tl.where(s == now[:, None], i_b[None, :], 2147483647), 1)
        better = now > best
        where = tl.where(better, first, where)
        best = tl.where(better, now, best)
    at = i_split.to(tl.int64) * N + i_a
    tl.store(values + at, best, i_a < N)
    tl.store(columns + at, where.to(tl.int64), i_a < N)


@triton.jit(do_not_specialize=["N"])
def unit_kernel(
    x,  # [N, D], rows s_x apart
    out,  # [N, D]
    divisors,  # [N] float32
    N,
    D,
    s_x,
    EPS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    mask = (i_row < N)[:, None] & (column < D)[None, :]
    b_x = tl.load(x + launch.row_start(i_row, s_x, 1)[:, None] + column[None, :], mask, 0).to(tl.float32)
    # the largest element taken out first: squares of large or small ones leave float32's range
    largest = tl.max(tl.abs(b_x), 1)
    largest = tl.where(largest > 0, largest, 1.0)
    b_y = b_x / largest[:, None]
    divisor = tl.maximum(tl.sqrt(tl.sum(b_y * b_y, 1)) * largest, EPS)
    tl.store(out + launch.row_start(i_row, D, 1)[:, None] + column[None, :], b_x / divisor[:, None], mask)
    tl.store(divisors + i_row, divisor, i_row < N)
