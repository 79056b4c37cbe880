"""Triton kernels of InfoNCE, around the walks over tiles: see gpu_queries.py.

Of each query, `of_queries` [2, N] float64 are what it was divided by and the log-sum-exp of its logits, `of_positives`
[2, N] float64 what its positive was divided by and the cosine of the two. Gradients [N, D] float32 are those of
of_queries.py, still to be scaled.
"""

import triton
import triton.language as tl

from .. import launch
from .rows import joined_sums, store_state
from .tiles import load_rows
from .views import dot_of_rows, factor_of, store_rows, unit_rows_of


@triton.jit(do_not_specialize=["N", "M"])
def unit_queries_kernel(
    query,  # [N, D], rows s_query apart
    positive,  # [N, D], rows s_positive apart
    negatives,  # [M, D], rows s_negatives apart
    temperature,  # 0-dim, or None
    inverse: tl.float64,  # see `factor_of`
    unit_query,  # [N, D]
    unit_positive,  # [N, D]
    unit_negatives,  # [M, D]
    of_queries,  # [2, N] float64: the divisors are written
    of_positives,  # [2, N] float64
    divisors,  # [M] float64
    factor,  # 0-dim float64: 1 / temperature, NaN where that is negative
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
    blocks = tl.cdiv(N, ROWS)
    if program == 0:
        factor_value = factor_of(temperature, inverse)
        tl.store(factor, tl.where(factor_value >= 0, factor_value, float("nan")))
    if program < blocks:
        i_row = program * ROWS + tl.arange(0, ROWS)
        q, divisor = unit_rows_of(query, i_row, N, D, s_query, EPS, BLOCK)
        store_rows(unit_query, i_row, N, D, q, BLOCK)
        tl.store(of_queries + i_row, divisor, i_row < N)
        p, divisor = unit_rows_of(positive, i_row, N, D, s_positive, EPS, BLOCK)
        store_rows(unit_positive, i_row, N, D, p, BLOCK)
        tl.store(of_positives + i_row, divisor, i_row < N)
        tl.store(of_positives + N + i_row, dot_of_rows(q, p), i_row < N)
    else:
        i_row = (program - blocks) * ROWS + tl.arange(0, ROWS)
        k, divisor = unit_rows_of(negatives, i_row, M, D, s_negatives, EPS, BLOCK)
        store_rows(unit_negatives, i_row, M, D, k, BLOCK)
        tl.store(divisors + i_row, divisor, i_row < M)


@triton.jit
def log_sum_exps(row_max, row_sum, of_positives, factor_value, i_row, N, parts, pivot):
    """(the log-sum-exp of each query's logits, its cosine with its positive), of what walks over negatives left."""
    cosine = tl.load(of_positives + N + i_row, i_row < N, 0.0)
    logit = cosine * factor_value
    base, total = joined_sums(
        row_max, row_sum, None, None, i_row, N, parts, 0, 0, factor_value, pivot, row_max is not None
    )
    largest = launch.finite(tl.maximum(base, logit))
    return largest + tl.log(total * tl.exp(base - largest) + tl.exp(logit - largest)), cosine


@triton.jit
def through_unit(g, u, divisor, EPS: tl.constexpr):
    """The gradient for rows as they came, given that for the unit rows u."""
    radial = tl.where(divisor > EPS, tl.sum(g * u, 1), 0.0)
    return (g - radial[:, None] * u) / divisor.to(tl.float32)[:, None]


@triton.jit(do_not_specialize=["N", "parts", "heads", "rows_per_head"])
def join_queries_kernel(
    row_max,  # [parts, N] float32, in units of similarities; None: `pivot` is in the place of all; see rows.py
    row_sum,  # [parts, N] float32
    products,  # [parts, N, D] float32, the sums of the negatives times their exponentials; None: not here
    unit_query,  # [N, D]
    unit_positive,  # [N, D]
    factor,  # 0-dim
    of_queries,  # [2, N] float64: the log-sum-exps are written
    of_positives,  # [2, N] float64
    state,  # [2, S] float32: pivots (zeros unless RUNNING) and adjustments
    query_gradient,  # [N, D] float32; or None, as the next two. Without `products` both are the positives' part
    slopes,  # [N] float64
    positive_gradient,  # [N, D] float32
    losses,  # [heads] float64: the sum over a program's rows; or, of one program, 0-dim: the mean
    N,
    D,
    S,
    parts,
    heads,  # so many programs make log-sum-exps and losses; the others make gradients
    rows_per_head,
    pivot,
    RUNNING: tl.constexpr,
    ALONE: tl.constexpr,  # there is one head
    AT_ONCE: tl.constexpr,  # rows of a head
    EPS: tl.constexpr,
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
            b_lse, cosine = log_sum_exps(row_max, row_sum, of_positives, factor_value, i_row, N, parts, pivot)
            b_lse = tl.where(inside, b_lse, 0.0)
            tl.store(of_queries + N + i_row, b_lse, inside)
            store_state(state, state + S, i_row, i_row < S, b_lse, factor_value, pivot, RUNNING)
            if not RUNNING:
                tl.store(state + i_row, tl.zeros([AT_ONCE], tl.float32), i_row < S)
            loss += tl.where(inside, b_lse - cosine * factor_value, 0.0)
        total = tl.sum(loss, 0)
        if ALONE:
            tl.store(losses, total / N)
        else:
            tl.store(losses + program, total)
    else:
        i_row = (program - heads) * ROWS + tl.arange(0, ROWS)
        inside = i_row < N
        b_lse, cosine = log_sum_exps(row_max, row_sum, of_positives, factor_value, i_row, N, parts, pivot)
        weight = tl.exp(cosine * factor_value - b_lse) - 1  # the positive's probability, less 1
        pull = weight.to(tl.float32)[:, None]
        q = load_rows(unit_query, i_row, N, D, 0, BLOCK).to(tl.float32)
        p = load_rows(unit_positive, i_row, N, D, 0, BLOCK).to(tl.float32)
        if query_gradient is not None or slopes is not None:
            g = tl.zeros([ROWS, BLOCK], tl.float32)
            if products is not None:
                for part in range(0, parts):
                    base = tl.zeros([ROWS], tl.float32) + pivot
                    if row_max is not None:
                        # a part that has seen nothing has the maximum -inf and the sum 0
                        base = launch.finite(tl.load(row_max + launch.row_start(part, N, 1) + i_row, inside, 0.0))
                    share = tl.exp(base.to(tl.float64) * factor_value - b_lse).to(tl.float32)
                    product = load_rows(products + launch.row_start(part, N, 1) * D, i_row, N, D, 0, BLOCK)
                    g += share[:, None] * product
            if slopes is not None:
                tl.store(slopes + i_row, dot_of_rows(g, q) + weight * cosine, inside)
            if query_gradient is not None:
                divisor = tl.load(of_queries + i_row, inside, 1.0)
                store_rows(query_gradient, i_row, N, D, through_unit(g + pull * p, q, divisor, EPS), BLOCK)
        if positive_gradient is not None:
            divisor = tl.load(of_positives + i_row, inside, 1.0)
            store_rows(positive_gradient, i_row, N, D, through_unit(pull * q, p, divisor, EPS), BLOCK)


@triton.jit(do_not_specialize=["N"])
def add_attended_kernel(
    attended,  # [N, D] float32, the sum of the negatives times their probabilities
    unit_query,  # [N, D]
    of_queries,  # [2, N] float64
    query_gradient,  # [N, D] float32, to which its part is added; or None, as the next
    slopes,  # [N] float64
    N,
    D,
    EPS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = i_row < N
    g = load_rows(attended, i_row, N, D, 0, BLOCK)
    q = load_rows(unit_query, i_row, N, D, 0, BLOCK).to(tl.float32)
    if slopes is not None:
        tl.store(slopes + i_row, tl.load(slopes + i_row, inside, 0.0) + dot_of_rows(g, q), inside)
    if query_gradient is not None:
        before = load_rows(query_gradient, i_row, N, D, 0, BLOCK)
        divisor = tl.load(of_queries + i_row, inside, 1.0)
        store_rows(query_gradient, i_row, N, D, before + through_unit(g, q, divisor, EPS), BLOCK)


@triton.jit(do_not_specialize=["N", "M", "programs", "of_negatives", "splits", "parts"])
def finish_queries_kernel(
    of_query,  # [N, D] float32; or None
    of_positive,  # [N, D] float32; or None
    slopes,  # [N] float64; or None
    attended,  # [N, D] float32, what isn't in `of_query` yet; or None
    along,  # [parts] float64, whose sum isn't in `slopes` yet; or None
    sums,  # [splits, M, D] float32, the gradient for negatives of unit length; or None
    unit,  # [N, D], with `attended`
    of_queries,  # [2, N] float64, with `attended`
    unit_negatives,  # [M, D]; or None
    divisors,  # [M] float64; or None
    factor,  # 0-dim float64
    upstream,  # 0-dim
    query_gradient,  # [N, D]; or None, as the next three
    positive_gradient,  # [N, D]
    negatives_gradient,  # [M, D]
    temperature_gradient,  # 0-dim
    N,
    M,
    D,
    programs,  # that finish queries and positives
    of_negatives,  # programs that finish negatives; one more makes the gradient of the temperature
    splits,
    parts,
    EPS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    factor_value = tl.load(factor)
    exact_scale = tl.load(upstream).to(tl.float64) * factor_value / N
    scale = exact_scale.to(tl.float32)
    program = tl.program_id(0)
    if program < programs:
        i_row = program * ROWS + tl.arange(0, ROWS)
        if query_gradient is not None:
            g = load_rows(of_query, i_row, N, D, 0, BLOCK)
            if attended is not None:
                q = load_rows(unit, i_row, N, D, 0, BLOCK).to(tl.float32)
                divisor = tl.load(of_queries + i_row, i_row < N, 1.0)
                g += through_unit(load_rows(attended, i_row, N, D, 0, BLOCK), q, divisor, EPS)
            store_rows(query_gradient, i_row, N, D, g * scale, BLOCK)
        if positive_gradient is not None:
            g = load_rows(of_positive, i_row, N, D, 0, BLOCK)
            store_rows(positive_gradient, i_row, N, D, g * scale, BLOCK)
    elif program < programs + of_negatives:
        if negatives_gradient is not None:
            i_row = (program - programs) * ROWS + tl.arange(0, ROWS)
            g = tl.zeros([ROWS, BLOCK], tl.float32)
            for split in range(0, splits):
                g += load_rows(sums + launch.row_start(split, M, 1) * D, i_row, M, D, 0, BLOCK)
            k = load_rows(unit_negatives, i_row, M, D, 0, BLOCK).to(tl.float32)
            divisor = tl.load(divisors + i_row, i_row < M, 1.0)
            store_rows(negatives_gradient, i_row, M, D, through_unit(g, k, divisor, EPS) * scale, BLOCK)
    elif temperature_gradient is not None:
        index = tl.arange(0, ROWS * BLOCK)
        total = tl.zeros([ROWS * BLOCK], tl.float64)
        for i in range(0, N, ROWS * BLOCK):
            total += tl.load(slopes + i + index, index < N - i, 0.0)
        if along is not None:
            for i in range(0, parts, ROWS * BLOCK):
                total += tl.load(along + i + index, index < parts - i, 0.0)
        tl.store(temperature_gradient, -tl.sum(total, 0) * exact_scale * factor_value)
