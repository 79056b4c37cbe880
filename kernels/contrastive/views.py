"""Triton kernels of NT-Xent on the views of one batch, around the walks over tiles: see gpu_views.py.

Views are [V, N, D]; two tensors are such a one as well, whose views are as far apart as the tensors are in memory. Rows
are numbered r = v N + n.
"""

import triton
import triton.language as tl

from .. import launch
from .rows import joined, store_state
from .tiles import images_of_block, load_rows
from .weights import walk_of_owner


@triton.jit
def unit_rows_of(x, i_row, N, D, s_row, EPS: tl.constexpr, BLOCK: tl.constexpr):
    """(rows of unit length in the dtype of x, their divisors in float64), 0 and EPS where there is no row.

    float64: at temperature 0.01 the digits that a float32 norm loses are a hundred times as many in the logits.
    """
    column = tl.arange(0, BLOCK)
    mask = (i_row < N)[:, None] & (column < D)[None, :]
    b_x = tl.load(x + launch.row_start(i_row, s_row, 1)[:, None] + column[None, :], mask, 0).to(tl.float64)
    divisor = tl.maximum(tl.sqrt(tl.sum(b_x * b_x, 1)), EPS, propagate_nan=tl.PropagateNan.ALL)
    return (b_x * (1 / divisor)[:, None]).to(tl.float32).to(x.dtype.element_ty), divisor


@triton.jit
def store_rows(out, i_row, N, D, value, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    mask = (i_row < N)[:, None] & (column < D)[None, :]
    tl.store(out + launch.row_start(i_row, D, 1)[:, None] + column[None, :], value.to(out.dtype.element_ty), mask)


@triton.jit
def dot_of_rows(a, b):
    """[ROWS] float64: of the rows of a and b [ROWS, BLOCK]."""
    return tl.sum((a.to(tl.float32) * b.to(tl.float32)).to(tl.float64), 1)


@triton.jit
def factor_of(temperature, inverse):
    """1 / temperature in float64, of a 0-dim tensor, NaN if that isn't positive; without one, the number `inverse`."""
    if temperature is not None:
        divisor = tl.load(temperature).to(tl.float64)
        return 1 / tl.where(divisor > 0, divisor, float("nan"))
    return tl.full((), inverse, tl.float64)


@triton.jit(do_not_specialize=["N", "V"])
def unit_views_kernel(
    views,  # [V, N, D], rows s_row apart, views s_view
    temperature,  # 0-dim, or None
    inverse: tl.float64,  # see `factor_of`
    unit,  # [V, N, D]
    divisors,  # [V, N] float64
    logits,  # [V, V, N] float64, between the views of an image; the diagonal isn't written
    factor,  # 0-dim float64: 1 / temperature
    N,
    D,
    V,
    s_view: tl.int64,  # between two tensors it may be anything, and of either size
    s_row,
    EPS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    factor_value = factor_of(temperature, inverse)
    if tl.program_id(0) == 0:
        tl.store(factor, factor_value)
    for v in range(0, V):
        u, divisor = unit_rows_of(views + tl.cast(v, tl.int64) * s_view, i_row, N, D, s_row, EPS, BLOCK)
        start = launch.row_start(v, N, 1)
        store_rows(unit + start * D, i_row, N, D, u, BLOCK)
        tl.store(divisors + start + i_row, divisor, i_row < N)
        for w in range(v + 1, V):
            other, _ = unit_rows_of(views + tl.cast(w, tl.int64) * s_view, i_row, N, D, s_row, EPS, BLOCK)
            logit = dot_of_rows(u, other) * factor_value
            tl.store(logits + launch.row_start(v * V + w, N, 1) + i_row, logit, i_row < N)
            tl.store(logits + launch.row_start(w * V + v, N, 1) + i_row, logit, i_row < N)


@triton.jit
def with_own_image(logits, lse, v, n, inside, N, V, DECOUPLED: tl.constexpr):
    """(a row's log-sum-exp, the mean of its positives' logits), given that over other images.

    Decoupled, positives have no part in the former.
    """
    positives = tl.zeros(lse.shape, tl.float64)
    largest = lse
    for j in range(0, V):
        positive = inside & (v != j)
        at = logits + launch.row_start(v * V + j, N, 1) + n
        positives += tl.load(at, positive, 0.0)
        largest = tl.maximum(largest, tl.load(at, positive, -float("inf")))
    if not DECOUPLED:
        largest = launch.finite(largest)
        total = tl.exp(lse - largest)
        for j in range(0, V):
            at = logits + launch.row_start(v * V + j, N, 1) + n
            total += tl.exp(tl.load(at, inside & (v != j), -float("inf")) - largest)
        lse = largest + tl.log(total)
    return lse, positives / (V - 1)


@triton.jit(do_not_specialize=["N", "V", "row_parts", "column_parts", "met_once", "rows_per_program"])
def join_views_kernel(
    row_max,  # [row_parts, V N] float32; None unless RUNNING. These four: see rows._join_kernel
    row_sum,  # [row_parts, V N] float32
    column_max,  # [column_parts, V N] float32; None unless RUNNING
    column_sum,  # [column_parts, V N] float32, or None
    before,  # [V N] float64, log-sum-exps of earlier walks; or None
    logits,  # [V, V, N] float64, between the views of an image
    weights,  # [V, N] of the positives; or None
    factor,  # 0-dim
    lse,  # [V, N] float64
    pivots,  # [V N] float32 and more, see rows.lse_states; not written unless RUNNING
    adjustments,  # [V N] float32 and more
    losses,  # [programs] float64: the sum over a program's rows; or, of one program, 0-dim: the mean
    N,
    V,
    row_parts,
    column_parts,
    met_once,
    rows_per_program,
    pivot,
    DECOUPLED: tl.constexpr,
    RUNNING: tl.constexpr,
    ALONE: tl.constexpr,  # there is one program
    BLOCK: tl.constexpr,
):
    factor_value = tl.load(factor)
    rows = N * V
    loss = tl.zeros([BLOCK], tl.float64)
    begin = tl.program_id(0) * rows_per_program
    for first in range(begin, tl.minimum(begin + rows_per_program, rows), BLOCK):
        i_row = first + tl.arange(0, BLOCK)
        inside = i_row < rows
        b_lse = joined(
            row_max, row_sum, column_max, column_sum, i_row, rows, row_parts, column_parts, met_once, factor_value,
            pivot, RUNNING,
        )  # fmt: skip
        if before is not None:
            earlier = tl.load(before + i_row, inside, 0.0)
            largest = launch.finite(tl.maximum(earlier, b_lse))
            b_lse = largest + tl.log(tl.exp(earlier - largest) + tl.exp(b_lse - largest))
        b_lse, positives = with_own_image(logits, b_lse, i_row // N, i_row % N, inside, N, V, DECOUPLED)
        tl.store(lse + i_row, b_lse, inside)
        written = i_row < tl.cdiv(rows, 128) * 128  # of_views.STATE_ROWS: the whole memory, as it is a result
        b_lse = tl.where(inside, b_lse, 0.0)
        store_state(pivots, adjustments, i_row, written, b_lse, factor_value, pivot, RUNNING)
        if not RUNNING:
            tl.store(pivots + i_row, tl.zeros([BLOCK], tl.float32), written)
        if weights is not None:
            positives *= tl.load(weights + i_row, inside, 0.0).to(tl.float64)
        loss += tl.where(inside, b_lse - positives, 0.0)
    total = tl.sum(loss, 0)
    if ALONE:
        tl.store(losses, total / rows)
    else:
        tl.store(losses + tl.program_id(0), total)


@triton.jit(do_not_specialize=["parts"])
def total_kernel(
    sums,  # [parts] float64
    factor,  # 0-dim float64, or None
    upstream,  # 0-dim, or None
    out,  # 0-dim: the sum times `times`, the factor's square and the upstream gradient
    parts,
    times,
    BLOCK: tl.constexpr,
):
    """By one program, in one order."""
    index = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    for i in range(0, parts, BLOCK):
        total += tl.load(sums + i + index, index < parts - i, 0)
    result = tl.sum(total, 0) * times
    if factor is not None:
        result *= tl.load(factor) * tl.load(factor)
    if upstream is not None:
        result *= tl.load(upstream).to(tl.float64)
    tl.store(out, result)


@triton.jit
def pull_of_view(logit, b_lse, lse, weights, i_row, other, inside, V, DECOUPLED: tl.constexpr):
    """[rows] float64: what draws a row towards the row `other` of its image, whose logit with it is given."""
    pull = tl.full(i_row.shape, 2.0, tl.float64)
    if weights is not None:
        pull = tl.load(weights + i_row, inside, 0.0).to(tl.float64) + tl.load(weights + other).to(tl.float64)
    pull = pull / (V - 1)
    if not DECOUPLED:
        pull -= tl.exp(logit - b_lse) + tl.exp(logit - tl.load(lse + other))
    return pull


@triton.jit
def finish_rows(
    sums, unit, divisors, lse, weights, factor_value, scale, gradient, i_row, splits, N, V, D, EPS: tl.constexpr,
    DECOUPLED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of rows, of the sums over other images; returns each row's product with the gradient for it at unit
    length, of which a temperature's gradient is made. See `finish_views_kernel`.
    """
    rows = N * V
    inside = i_row < rows
    v = i_row // N
    n = i_row % N
    g = tl.zeros([i_row.shape[0], BLOCK], tl.float32)
    for split in range(0, splits):
        g += load_rows(sums + launch.row_start(split, rows, 1) * D, i_row, rows, D, 0, BLOCK)
    u = load_rows(unit, i_row, rows, D, 0, BLOCK).to(tl.float32)
    b_lse = tl.load(lse + i_row, inside, 0.0)
    for j in range(0, V):
        other = j * N + n
        w = load_rows(unit, other, rows, D, 0, BLOCK).to(tl.float32)
        logit = dot_of_rows(u, w) * factor_value
        pull = pull_of_view(logit, b_lse, lse, weights, i_row, other, inside, V, DECOUPLED)
        g -= tl.where(v != j, pull, 0.0).to(tl.float32)[:, None] * w
    divisor = tl.load(divisors + i_row, inside, 1.0)
    along = tl.sum(g * u, 1)
    radial = tl.where(divisor > EPS, along, 0.0)
    out = (g - radial[:, None] * u) / divisor.to(tl.float32)[:, None] * scale
    store_rows(gradient, i_row, rows, D, out, BLOCK)
    return tl.where(inside, along, 0.0).to(tl.float64)


@triton.jit(do_not_specialize=["N", "V", "splits"])
def finish_views_kernel(
    sums,  # [splits, V N, D] float32: the gradient for rows of unit length, less its terms between views of an image
    unit,  # [V, N, D]
    divisors,  # [V, N] float64
    lse,  # [V, N] float64
    weights,  # [V, N], or None
    factor,  # 0-dim float64
    upstream,  # 0-dim
    gradient,  # [V, N, D]
    along,  # [programs] float64: the sums of <gradient for unit rows, unit rows>; or None
    splits,
    N,
    V,
    D,
    EPS: tl.constexpr,
    DECOUPLED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    factor_value = tl.load(factor)
    scale = (tl.load(upstream).to(tl.float64) * factor_value / (N * V)).to(tl.float32)
    b_along = finish_rows(
        sums, unit, divisors, lse, weights, factor_value, scale, gradient, i_row, splits, N, V, D, EPS, DECOUPLED, BLOCK
    )
    if along is not None:
        tl.store(along + tl.program_id(0), tl.sum(b_along, 0))


@triton.jit(do_not_specialize=["N", "V"])
def own_views_kernel(
    unit,  # these: see finish_views_kernel
    divisors,
    lse,
    weights,
    factor,
    upstream,
    sums,  # [V N, D] float32
    gradient,
    along,
    pivots,  # [V N] float32 and more; None unless RUNNING
    adjustments,  # [V N] float32 and more
    N,
    V,
    D,
    pivot,
    RUNNING: tl.constexpr,
    DECOUPLED: tl.constexpr,
    GAIN: tl.constexpr,
    EPS: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    ROWS: tl.constexpr,  # of BM at a time are finished
):
    """The whole gradient of a block of rows: the walk over all rows, and then what finish_views_kernel does."""
    rows = N * V
    first = tl.program_id(0) * BM
    i_a = first + tl.arange(0, BM)
    low, high = images_of_block(first, N, 0, BM)
    factor_value = tl.load(factor)
    b_a = load_rows(unit, i_a, rows, D, 0, BLOCK_D)
    acc, _ = walk_of_owner(
        b_a, unit, i_a, 0, tl.cdiv(rows, BN), low, high, pivots, adjustments, pivots, adjustments, pivot, factor_value,
        rows, rows, D, 0, N, 0, N, True, RUNNING, False, GAIN, EVEN, BLOCK_D, BM, BN,
    )  # fmt: skip
    store_rows(sums, i_a, rows, D, acc / GAIN, BLOCK_D)
    tl.debug_barrier()  # the rows come back in another layout, to other threads
    scale = (tl.load(upstream).to(tl.float64) * factor_value / rows).to(tl.float32)
    b_along = tl.zeros([ROWS], tl.float64)
    for k in range(0, BM, ROWS):
        b_along += finish_rows(
            sums, unit, divisors, lse, weights, factor_value, scale, gradient, first + k + tl.arange(0, ROWS), 1, N, V,
            D, EPS, DECOUPLED, BLOCK_D,
        )  # fmt: skip
    if along is not None:
        tl.store(along + tl.program_id(0), tl.sum(b_along, 0))
