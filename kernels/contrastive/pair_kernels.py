"""Triton kernels of CLIP's loss on the pairs of one batch, around the walks over tiles: see gpu_pairs.py.

x and y are the sides 0 and 1; row i of each is a pair. `of_pairs` [3, N] float64 are both sides' log-sum-exps and the
pairs' similarities; `states` [2, 2, S] float32 are each side's pivots and adjustments (rows.lse_states).
"""

import triton
import triton.language as tl

from .. import launch
from .products import place, product, store_block
from .rows import joined, store_state
from .tiles import images_of_block, load_rows
from .weights import walk_of_owner


@triton.jit
def with_pair(lse, logit):
    """A row's log-sum-exp, given that over others' columns and the logit of its own."""
    largest = launch.finite(tl.maximum(lse, logit))
    return largest + tl.log(tl.exp(lse - largest) + tl.exp(logit - largest))


@triton.jit(do_not_specialize=["N", "row_parts", "column_parts"])
def join_pairs_kernel(
    x,  # [N, D]
    y,  # [N, D]
    factor,  # 0-dim, or None
    factor_number: tl.float64,  # otherwise
    row_max,  # [row_parts, N] float32; these four: see rows._join_kernel
    row_sum,
    column_max,  # [column_parts, N] float32
    column_sum,
    others,  # [2, N] float64: both log-sum-exps over all but the own pair, in place of the four; or None
    of_pairs,  # [3, N] float64
    states,  # [2, 2, S] float32
    losses,  # [programs] float64: the sum over a program's pairs, of both directions
    N,
    D,
    S,
    row_parts,
    column_parts,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Programs go on to row S, as the states' whole memory is a result."""
    i_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = i_row < N
    product = tl.zeros([ROWS, BLOCK], tl.float64)
    for first in range(0, D, BLOCK):
        b_x = load_rows(x, i_row, N, D, first, BLOCK).to(tl.float32)
        product += (b_x * load_rows(y, i_row, N, D, first, BLOCK).to(tl.float32)).to(tl.float64)
    similarity = tl.sum(product, 1)
    factor_value = launch.number(factor, factor_number)
    logit = similarity * factor_value
    if others is not None:
        x_lse = tl.load(others + i_row, inside, 0.0)
        y_lse = tl.load(others + N + i_row, inside, 0.0)
    else:
        size = tl.abs(factor_value)
        x_lse = joined(row_max, row_sum, None, None, i_row, N, row_parts, 0, 0, size, 0.0, True)
        y_lse = joined(column_max, column_sum, None, None, i_row, N, column_parts, 0, 0, size, 0.0, True)
    x_lse = tl.where(inside, with_pair(x_lse, logit), 0.0)
    y_lse = tl.where(inside, with_pair(y_lse, logit), 0.0)
    tl.store(of_pairs + i_row, x_lse, inside)
    tl.store(of_pairs + N + i_row, y_lse, inside)
    tl.store(of_pairs + 2 * N + i_row, similarity, inside)
    store_state(states, states + S, i_row, i_row < S, x_lse, factor_value, 0.0, True)
    store_state(states + 2 * S, states + 3 * S, i_row, i_row < S, y_lse, factor_value, 0.0, True)
    loss = tl.where(inside, (x_lse - logit) + (y_lse - logit), 0.0)
    tl.store(losses + tl.program_id(0), tl.sum(loss, 0))


@triton.jit(do_not_specialize=["N", "first_side", "tiles_per_program"])
def own_pairs_kernel(
    x,  # [N, D]
    y,  # [N, D]
    factor,  # 0-dim, or None
    factor_number: tl.float64,  # otherwise
    states,  # [2, 2, S] float32
    out,  # [splits, 2, N, D] float32: `G @ y` and `G.T @ x`, without the pairs' own terms
    dots,  # [splits, N] float32, (G * similarities).sum(1), the same without; or None
    N,
    D,
    S,
    first_side,  # 1: the rows of y alone
    tiles_per_program,
    GAIN: tl.constexpr,  # see launch.gain
    EVEN: tl.constexpr,  # D is BLOCK_D
    BLOCK_D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Of a block of rows of either side, the walk over the other one's rows: weights.owner_kernel for both at once."""
    blocks = tl.cdiv(N, BM)
    side = first_side + tl.program_id(0) // blocks
    first = tl.program_id(0) % blocks * BM
    split = tl.program_id(1)
    i_a = first + tl.arange(0, BM)
    b_a = load_rows(launch.chosen((x, y), side), i_a, N, D, 0, BLOCK_D)
    low, high = images_of_block(first, N, 0, BM)
    of_a = states + side * 2 * S
    of_b = states + (1 - side) * 2 * S
    begin = split * tiles_per_program
    acc, dot = walk_of_owner(
        b_a, launch.chosen((y, x), side), i_a, begin, tl.minimum(begin + tiles_per_program, tl.cdiv(N, BN)), low, high,
        of_a, of_a + S, of_b, of_b + S, 0.0, launch.number(factor, factor_number), N, N, D, 0, N, 0, N, True, True,
        dots is not None, GAIN, EVEN, BLOCK_D, BM, BN,
    )  # fmt: skip
    at = launch.row_start(split * 2 + side, N, 1) + i_a
    column = tl.arange(0, BLOCK_D)
    mask = (i_a < N)[:, None] & (column < D)[None, :]
    tl.store(out + (at * D)[:, None] + column[None, :], acc / GAIN, mask)
    if dots is not None:
        tl.store(dots + launch.row_start(split, N, 1) + i_a, dot, (i_a < N) & (side == 0))


@triton.jit
def weight_of_pair(of_pairs, factor_value, i_row, N):
    """(the pair's own term of G, its similarity), both [rows] float64; 0 where there is no pair."""
    inside = i_row < N
    similarity = tl.load(of_pairs + 2 * N + i_row, inside, 0.0)
    logit = similarity * factor_value
    of_x = tl.exp(logit - tl.load(of_pairs + i_row, inside, 0.0)) - 1
    of_y = tl.exp(logit - tl.load(of_pairs + N + i_row, inside, 0.0)) - 1
    return tl.where(inside, of_x + of_y, 0.0), similarity


@triton.jit
def gradient_of_scale(of_pairs, factor_value, dots, N, parts, AT_ONCE: tl.constexpr):
    """The sum of G * similarities in float64, by one program: the pairs' own and, where there are some, the others'."""
    index = tl.arange(0, AT_ONCE)
    total = tl.zeros([AT_ONCE], tl.float64)
    for i in range(0, N, AT_ONCE):
        weight, similarity = weight_of_pair(of_pairs, factor_value, i + index, N)
        total += weight * similarity
    for i in range(0, parts, AT_ONCE):
        total += tl.load(dots + i + index, index < parts - i, 0.0).to(tl.float64)
    return tl.sum(total, 0)


@triton.jit
def finish_pairs(g, others, out, of_pairs, factor_value, scale, i_row, first_column, N, D, BLOCK: tl.constexpr):
    """Some rows and columns of a side's gradient, given what isn't the pairs' own; `others` are their partners."""
    weight, _ = weight_of_pair(of_pairs, factor_value, i_row, N)
    partners = load_rows(others, i_row, N, D, first_column, BLOCK).to(tl.float32)
    g += weight.to(tl.float32)[:, None] * partners
    store_block(out, i_row, first_column, N, D, g * (scale * factor_value).to(tl.float32), BLOCK)


@triton.jit(do_not_specialize=["N", "first_side", "of_rows", "splits", "parts"])
def finish_pairs_kernel(
    sums,  # [splits, 2, N, D] float32, see own_pairs_kernel
    x,  # [N, D]
    y,  # [N, D]
    factor,  # 0-dim, or None
    factor_number: tl.float64,  # otherwise
    upstream,  # 0-dim
    of_pairs,  # [3, N] float64
    x_gradient,  # [N, D]
    y_gradient,  # [N, D]
    dots,  # [parts], sums of G * similarities, without the pairs' own; or None
    of_scale,  # 0-dim, the gradient for the scale; or None
    N,
    D,
    first_side,
    of_rows,  # programs that finish rows; where the scale's gradient is wanted there is one more
    splits,
    parts,
    each: tl.float64,  # 1 / (2 N): a division spills on sm_80
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    factor_value = launch.number(factor, factor_number)
    scale = tl.load(upstream).to(tl.float64) * tl.full((), each, tl.float64)
    program = tl.program_id(0)
    if program < of_rows:
        columns = tl.cdiv(D, BLOCK)
        blocks = tl.cdiv(N, ROWS)
        side = first_side + program // columns // blocks
        i_row = program // columns % blocks * ROWS + tl.arange(0, ROWS)
        first = program % columns * BLOCK
        g = tl.zeros([ROWS, BLOCK], tl.float32)
        for split in range(0, splits):
            g += load_rows(sums + launch.row_start(split * 2 + side, N, 1) * D, i_row, N, D, first, BLOCK)
        finish_pairs(
            g, launch.chosen((y, x), side), launch.chosen((x_gradient, y_gradient), side), of_pairs, factor_value,
            scale, i_row, first, N, D, BLOCK,
        )  # fmt: skip
    elif of_scale is not None:
        tl.store(of_scale, gradient_of_scale(of_pairs, factor_value, dots, N, parts, ROWS * BLOCK) * scale)


@triton.jit(do_not_specialize=["N", "first_side", "of_rows", "parts", "s_weights"])
def product_pairs_kernel(
    weights,  # [N, N] in whole tiles, rows s_weights * 8 apart: G * GAIN, 0 where a pair is
    x,  # [N, D]; from here on see finish_pairs_kernel
    y,
    factor,
    factor_number: tl.float64,
    upstream,
    of_pairs,
    x_gradient,
    y_gradient,
    dots,
    of_scale,
    N,
    D,
    s_weights,
    first_side,
    of_rows,  # programs that make a block of a gradient
    parts,
    each: tl.float64,
    GAIN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """`G @ y` and `G.T @ x` of few rows, finished: see products.py."""
    factor_value = launch.number(factor, factor_number)
    scale = tl.load(upstream).to(tl.float64) * tl.full((), each, tl.float64)
    program = tl.program_id(0)
    if program < of_rows:
        programs = tl.cdiv(N, BM) * tl.cdiv(D, BN)
        side = first_side + program // programs
        first_row, first_column = place(program % programs, D, BM, BN)
        if side == 0:
            g = product(weights, y, first_row, first_column, N, D, s_weights, False, GAIN, BM, BN, BLOCK_K)
        else:
            g = product(weights, x, first_row, first_column, N, D, s_weights, True, GAIN, BM, BN, BLOCK_K)
        finish_pairs(
            g, launch.chosen((y, x), side), launch.chosen((x_gradient, y_gradient), side), of_pairs, factor_value,
            scale, first_row + tl.arange(0, BM), first_column, N, D, BN,
        )  # fmt: skip
    elif of_scale is not None:
        tl.store(of_scale, gradient_of_scale(of_pairs, factor_value, dots, N, parts, 1024) * scale)
