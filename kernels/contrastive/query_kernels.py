"""Triton kernels of InfoNCE, around the walks over tiles: see gpu_queries.py.

Queries and positives are [2, N, D]. `of_rows` [5, N] float64 are, of each query, both divisors, the log-sum-exp of its
logits, its cosine with its positive and with the sum of the negatives times their probabilities.
"""

import triton
import triton.language as tl

from .. import launch
from .pair_kernels import with_pair
from .rows import joined, store_state
from .tiles import load_rows
from .views import dot_of_rows, factor_of, store_rows, unit_rows_of


@triton.jit(do_not_specialize=["N", "M"])
def unit_queries_kernel(
    query,  # [N, D], rows s_query apart
    positive,  # [N, D], rows s_positive apart
    negatives,  # [M, D], rows s_negatives apart
    temperature,  # 0-dim, or None
    inverse: tl.float64,  # see `factor_of`
    unit,  # [2, N, D]
    of_rows,  # [5, N] float64: the first two and the fourth are written
    unit_negatives,  # [M, D]
    divisors,  # [M] float64
    factor,  # 0-dim float64: 1 / temperature
    N,
    M,
    D,
    s_query,
    s_positive,
    s_negatives,
    EPS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    of_queries = tl.cdiv(N, ROWS)
    if program == 0:
        tl.store(factor, factor_of(temperature, inverse))
    if program < of_queries:
        i_row = program * ROWS + tl.arange(0, ROWS)
        q, divisor = unit_rows_of(query, i_row, N, D, s_query, EPS, BLOCK)
        store_rows(unit, i_row, N, D, q, BLOCK)
        tl.store(of_rows + i_row, divisor, i_row < N)
        p, divisor = unit_rows_of(positive, i_row, N, D, s_positive, EPS, BLOCK)
        store_rows(unit + launch.row_start(N, D, 1), i_row, N, D, p, BLOCK)
        tl.store(of_rows + N + i_row, divisor, i_row < N)
        tl.store(of_rows + 3 * N + i_row, dot_of_rows(q, p), i_row < N)
    else:
        i_row = (program - of_queries) * ROWS + tl.arange(0, ROWS)
        k, divisor = unit_rows_of(negatives, i_row, M, D, s_negatives, EPS, BLOCK)
        store_rows(unit_negatives, i_row, M, D, k, BLOCK)
        tl.store(divisors + i_row, divisor, i_row < M)


@triton.jit
def log_sum_exps(row_max, row_sum, of_rows, factor_value, i_row, N, parts, pivot):
    """(the log-sum-exp of each row's logits, its positive's logit), of the parts that walks over negatives left."""
    logit = tl.load(of_rows + 3 * N + i_row, i_row < N, 0.0) * factor_value
    of_negatives = joined(
        row_max, row_sum, None, None, i_row, N, parts, 0, 0, tl.abs(factor_value), pivot, row_max is not None
    )
    return with_pair(of_negatives, logit), logit


@triton.jit(do_not_specialize=["N", "parts", "heads", "rows_per_head"])
def join_queries_kernel(
    row_max,  # [parts, N] float32, in units of similarities; None: `pivot` is in the place of all. See rows._join_kernel
    row_sum,  # [parts, N] float32
    products,  # [parts, N, D] float32, the sums of the negatives times their exponentials; None: zeros
    unit,  # [2, N, D]
    factor,  # 0-dim
    of_rows,  # [5, N] float64: the fourth is read, the third and the last are written
    state,  # [2, S] float32: pivots (zeros unless RUNNING) and adjustments
    attended,  # [N, D] float32, of each row the sum of the negatives times their probabilities; or None
    losses,  # [heads] float64: the sum over a program's rows; or, of one program, 0-dim: the mean
    N,
    D,
    S,
    parts,
    heads,  # so many programs make log-sum-exps and losses; the others make `attended`
    rows_per_head,
    pivot,
    RUNNING: tl.constexpr,
    ALONE: tl.constexpr,  # there is one head
    AT_ONCE: tl.constexpr,  # rows of a head
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Heads go on to row S, as the state's whole memory is a result."""
    factor_value = tl.load(factor)
    program = tl.program_id(0)
    if program < heads:
        loss = tl.zeros([AT_ONCE], tl.float64)
        begin = program * rows_per_head
        for first in range(begin, tl.minimum(begin + rows_per_head, S), AT_ONCE):
            i_row = first + tl.arange(0, AT_ONCE)
            inside = i_row < N
            b_lse, logit = log_sum_exps(row_max, row_sum, of_rows, factor_value, i_row, N, parts, pivot)
            b_lse = tl.where(inside, b_lse, 0.0)
            tl.store(of_rows + 2 * N + i_row, b_lse, inside)
            store_state(state, state + S, i_row, i_row < S, b_lse, factor_value, pivot, RUNNING)
            if not RUNNING:
                tl.store(state + i_row, tl.zeros([AT_ONCE], tl.float32), i_row < S)
            loss += tl.where(inside, b_lse - logit, 0.0)
        total = tl.sum(loss, 0)
        if ALONE:
            tl.store(losses, total / N)
        else:
            tl.store(losses + program, total)
    elif attended is not None:
        i_row = (program - heads) * ROWS + tl.arange(0, ROWS)
        sum_of_products = tl.zeros([ROWS, BLOCK], tl.float32)
        if products is not None:
            b_lse, _ = log_sum_exps(row_max, row_sum, of_rows, factor_value, i_row, N, parts, pivot)
            for part in range(0, parts):
                at = launch.row_start(part, N, 1) + i_row
                pivot_of_part = tl.zeros(i_row.shape, tl.float32) + pivot
                if row_max is not None:
                    # a part that has seen nothing has the maximum -inf and the sum 0
                    pivot_of_part = launch.finite(tl.load(row_max + at, i_row < N, 0.0))
                share = tl.exp(pivot_of_part.to(tl.float64) * tl.abs(factor_value) - b_lse).to(tl.float32)
                product = load_rows(products + launch.row_start(part, N, 1) * D, i_row, N, D, 0, BLOCK)
                sum_of_products += share[:, None] * product
        store_rows(attended, i_row, N, D, sum_of_products, BLOCK)
        q = load_rows(unit, i_row, N, D, 0, BLOCK)
        tl.store(of_rows + 4 * N + i_row, dot_of_rows(q, sum_of_products), i_row < N)


@triton.jit
def weight_of_positive(of_rows, factor_value, i_row, N):
    """(the positive's probability less 1, its cosine), float64; 0 where there is no row."""
    inside = i_row < N
    cosine = tl.load(of_rows + 3 * N + i_row, inside, 0.0)
    probability = tl.exp(cosine * factor_value - tl.load(of_rows + 2 * N + i_row, inside, 0.0))
    return tl.where(inside, probability - 1, 0.0), cosine


@triton.jit
def store_gradient(out, g, u, divisor, scale, i_row, N, D, EPS: tl.constexpr, BLOCK: tl.constexpr):
    """The gradient for rows as they came, of that for unit rows u."""
    radial = tl.where(divisor > EPS, tl.sum(g * u, 1), 0.0)
    store_rows(out, i_row, N, D, (g - radial[:, None] * u) / divisor.to(tl.float32)[:, None] * scale, BLOCK)


@triton.jit(do_not_specialize=["N", "M", "of_queries", "of_negatives", "splits", "lines"])
def finish_queries_kernel(
    attended,  # [N, D] float32; or None
    sums,  # [splits, M, D] float32, the gradient for negatives of unit length; or None
    unit,  # [2, N, D]
    negatives,  # [M, D]; or None
    of_rows,  # [5, N] float64
    divisors,  # [M] float64; or None
    along,  # [lines, N] float: their sum is what the last of `of_rows` is; or None
    factor,  # 0-dim float64
    upstream,  # 0-dim
    query_gradient,  # [N, D]; or None, as the next three
    positive_gradient,  # [N, D]
    negatives_gradient,  # [M, D]
    temperature_gradient,  # 0-dim
    N,
    M,
    D,
    of_queries,  # programs that finish queries and positives
    of_negatives,  # programs that finish negatives; one more makes the gradient of the temperature
    splits,
    lines,
    EPS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    factor_value = tl.load(factor)
    scale = tl.load(upstream).to(tl.float64) * factor_value / N
    program = tl.program_id(0)
    if program < of_queries:
        i_row = program * ROWS + tl.arange(0, ROWS)
        weight, _ = weight_of_positive(of_rows, factor_value, i_row, N)
        pull = weight.to(tl.float32)[:, None]
        q = load_rows(unit, i_row, N, D, 0, BLOCK).to(tl.float32)
        p = load_rows(unit + launch.row_start(N, D, 1), i_row, N, D, 0, BLOCK).to(tl.float32)
        if query_gradient is not None:
            g = pull * p + load_rows(attended, i_row, N, D, 0, BLOCK)
            divisor = tl.load(of_rows + i_row, i_row < N, 1.0)
            store_gradient(query_gradient, g, q, divisor, scale.to(tl.float32), i_row, N, D, EPS, BLOCK)
        if positive_gradient is not None:
            divisor = tl.load(of_rows + N + i_row, i_row < N, 1.0)
            store_gradient(positive_gradient, pull * q, p, divisor, scale.to(tl.float32), i_row, N, D, EPS, BLOCK)
    elif program < of_queries + of_negatives:
        if negatives_gradient is not None:
            i_row = (program - of_queries) * ROWS + tl.arange(0, ROWS)
            g = tl.zeros([ROWS, BLOCK], tl.float32)
            for split in range(0, splits):
                g += load_rows(sums + launch.row_start(split, M, 1) * D, i_row, M, D, 0, BLOCK)
            k = load_rows(negatives, i_row, M, D, 0, BLOCK).to(tl.float32)
            divisor = tl.load(divisors + i_row, i_row < M, 1.0)
            store_gradient(negatives_gradient, g, k, divisor, scale.to(tl.float32), i_row, M, D, EPS, BLOCK)
    elif temperature_gradient is not None:
        index = tl.arange(0, ROWS * BLOCK)
        total = tl.zeros([ROWS * BLOCK], tl.float64)
        for i in range(0, N, ROWS * BLOCK):
            weight, cosine = weight_of_positive(of_rows, factor_value, i + index, N)
            total += weight * cosine
            for line in range(0, lines):
                total += tl.load(along + launch.row_start(line, N, 1) + i + index, index < N - i, 0.0).to(tl.float64)
        tl.store(temperature_gradient, -tl.sum(total, 0) * scale * factor_value)
