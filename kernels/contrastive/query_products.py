"""InfoNCE's gradients where rows are few and don't stay in registers, with products of ours: see products.py.

Of negatives that are constants, nothing is kept for backward. Their walk leaves its exponentials in memory beside the
sums of them (1), and a product multiplies those with the negatives (2). Both are in parts, as they are of rows that
stay in registers, and the same kernel joins them. Of negatives that need a gradient backward makes the weights (1), and
a product of both sides finishes all gradients (2).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import chips, launch, tiling
from ..arithmetic import UNIT_EPS
from . import gpu_engine, products
from .composed import OwnImage
from .gpu_engine import Parts, Scaling, Side
from .products import place, product, store_block, sum_of_all, sum_of_lines, through_unit
from .sums import rate_of
from .tiles import add_product, images_of_block, load_rows, may_hide, seen_columns, similarities, with_remainders
from .weights import store_tile

PARTS_BYTES = 1 << 23  # of sums of products; or an eighth of what the exponentials have


@triton.jit(
    do_not_specialize=["N", "M", "first_row", "row_period", "offset", "column_period", "tiles_per_program", "s_out"]
)
def exponentials_kernel(
    a,  # [N, D]
    b,  # [M, D]
    factor,  # 0-dim, positive
    maxima,  # [splits, N] float32, in units of similarities; None unless RUNNING
    sums,  # [splits, N] float32, the sum of exp(logit - maximum * factor)
    out,  # [N, M] in whole tiles, rows s_out * 8 apart: exp(logit - base * factor) * GAIN
    bases,  # [tiles, N] float32, the base of a tile: the program's maximum up to there; None unless RUNNING
    N,
    M,
    D,
    first_row,  # the number of a's first row, and what composed.OwnImage says:
    row_period,
    offset,
    column_period,
    tiles_per_program,
    s_out,
    pivot,  # in the place of every maximum and base, unless RUNNING
    HAS_OWN_IMAGE: tl.constexpr,
    RUNNING: tl.constexpr,
    GAIN: tl.constexpr,  # see launch.gain
    BLOCK_D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    split = tl.program_id(1)
    i_a = tl.program_id(0) * BM + tl.arange(0, BM)
    rate = rate_of(tl.load(factor).to(tl.float64))
    shift = pivot * rate
    low, high = images_of_block(first_row + tl.program_id(0) * BM, row_period, offset, BM)
    maximum = tl.full([BM], -float("inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    for t in range(split * tiles_per_program, tl.minimum((split + 1) * tiles_per_program, tl.cdiv(M, BN))):
        i_b = t * BN + tl.arange(0, BN)
        # the first i_a stands in for rows that are loaded already, which WHOLE = False doesn't read
        s = similarities(a, b, i_a, i_a, i_b, N, M, D, False, BLOCK_D)
        if may_hide(t * BN, M, low, high, column_period, HAS_OWN_IMAGE, BN):
            seen = seen_columns(i_a, i_b, N, M, first_row, row_period, offset, column_period, HAS_OWN_IMAGE)
            s = tl.where(seen, s, -float("inf"))
        if RUNNING:
            new = tl.maximum(maximum, tl.max(s, 1))
            base = launch.finite(new)
            e = tl.exp2((s - base[:, None]) * rate)
            total = total * tl.exp2((launch.finite(maximum) - base) * rate)
            maximum = new
            tl.store(bases + launch.row_start(t, N, 1) + i_a, base, i_a < N)
        else:
            e = tl.exp2(s * rate - shift)
        total += tl.sum(e, 1)
        store_tile(out, i_a, i_b, s_out, e * GAIN)
    at = launch.row_start(split, N, 1) + i_a
    tl.store(sums + at, total, i_a < N)
    if RUNNING:
        tl.store(maxima + at, maximum, i_a < N)


@triton.jit(do_not_specialize=["N", "M", "tiles_per_program", "s_weights"])
def attended_kernel(
    exponentials,  # [N, M], rows s_weights * 8 apart; these three: see exponentials_kernel
    bases,
    maxima,
    negatives,  # [M, D]
    factor,  # 0-dim, positive
    out,  # [splits, N, D] float32: sum_j exp(logit_j - maximum * factor) negatives_j
    N,
    M,
    D,
    tiles_per_program,
    s_weights,
    GAIN: tl.constexpr,
    TILE: tl.constexpr,  # columns of a tile of exponentials
    BM: tl.constexpr,
    BN: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    split = tl.program_id(1)
    first_row, first_column = place(tl.program_id(0), D, BM, BN)
    i_row = first_row + tl.arange(0, BM)
    inside = i_row < N
    acc = tl.zeros([BM, BN], tl.float32)
    acc_right = tl.zeros([BM, BN], tl.float32)
    acc_left = tl.zeros([BM, BN], tl.float32)
    rate = rate_of(tl.load(factor).to(tl.float64))
    largest = tl.zeros([BM], tl.float32)
    if maxima is not None:
        largest = launch.finite(tl.load(maxima + launch.row_start(split, N, 1) + i_row, inside, 0.0))
    begin = split * tiles_per_program * TILE
    for first in range(begin, tl.minimum(begin + tiles_per_program * TILE, M), BLOCK_K):
        i_k = first + tl.arange(0, BLOCK_K)
        e = tl.load(exponentials + launch.row_start(i_row, s_weights, 8)[:, None] + i_k[None, :])
        k = load_rows(negatives, i_k, M, D, first_column, BN)
        if maxima is None:
            acc, acc_right, acc_left = add_product(acc, acc_right, acc_left, e, k)
        else:
            none = tl.zeros([BM, BN], tl.float32)
            step, step_right, step_left = add_product(none, none, none, e, k)
            if k.dtype == tl.float32:
                step = with_remainders(step, step_right, step_left)
            base = tl.load(bases + launch.row_start(first // TILE, N, 1) + i_row, inside, 0.0)
            acc += step * tl.exp2((base - largest) * rate)[:, None]
    if maxima is None and negatives.dtype.element_ty == tl.float32:
        acc = with_remainders(acc, acc_right, acc_left)
    store_block(out + launch.row_start(split, N, 1) * D, i_row, first_column, N, D, acc / GAIN, BN)


class Walk(NamedTuple):
    """How the walk of a block of rows over a bank is shared, and how its exponentials are multiplied."""

    tile: dict  # exponentials_tile
    splits: int
    tiles_per_program: int


def exponentials_tile(width: int, dtype: torch.dtype, running: bool) -> dict:
    """That of the sums; on sm_80 to sm_89 64 columns of float32 spill with maxima, and 32 without them."""
    tile = tiling.similarity_sums(width, dtype)
    if running and dtype.itemsize == 4 and chips.current().capability < 90:
        tile["BN"] = 32
    return {name: value for name, value in tile.items() if name not in ("WHOLE", "EVEN")}


def shared_walk(n: int, m: int, d: int, dtype: torch.dtype, tile: dict, splits: int) -> Walk | None:
    """At most so many splits, as many as there is memory for; None: torch's product, or programs would be too few."""
    most = max(1, max(PARTS_BYTES, products.bytes_of(n, m, dtype) // 8) // (n * d * 4))
    slow = 2 * most < splits and n * m * d > products.MOST_MULTIPLICATIONS
    if slow or not products.in_one_piece(n, m, d, dtype):
        return None
    tiles = triton.cdiv(m, tile["BN"])
    tiles_per_program = triton.cdiv(tiles, min(splits, most))
    return Walk(tile, triton.cdiv(tiles, tiles_per_program), tiles_per_program)


def walk_attending(
    a: Tensor, b: Tensor, scaling: Scaling, own_image: OwnImage, walk: Walk, running: bool
) -> tuple[Parts, Tensor]:
    """As gpu_queries.walk_attending, in two launches."""
    n, d = a.shape
    m = len(b)
    tile = walk.tile
    sums = torch.empty(walk.splits, n, dtype=torch.float32, device=a.device)
    parts = Parts(torch.empty_like(sums) if running else None, sums)
    bases = None
    if running:
        bases = torch.empty(triton.cdiv(m, tile["BN"]), n, dtype=torch.float32, device=a.device)
    exponentials = products.memory(n, m, a)
    launch.launch(
        exponentials_kernel, (triton.cdiv(n, tile["BM"]), walk.splits), a, b, scaling.factor, *parts, exponentials,
        bases, n, m, d, *gpu_engine.own_image_arguments(own_image), walk.tiles_per_program, exponentials.stride(0) // 8,
        scaling.pivot, HAS_OWN_IMAGE=own_image.column_period > 0, RUNNING=running, GAIN=launch.gain(a.dtype), **tile,
        device_of=a,
    )  # fmt: skip
    out = torch.empty(walk.splits, n, d, dtype=torch.float32, device=a.device)
    product_tile = products.tile(a.dtype)
    launch.launch(
        attended_kernel, (products.blocks_of(n, d, product_tile), walk.splits), exponentials, bases, parts.maxima, b,
        scaling.factor, out, n, m, d, walk.tiles_per_program, exponentials.stride(0) // 8, GAIN=launch.gain(a.dtype),
        TILE=tile["BN"], **product_tile, device_of=a,
    )  # fmt: skip
    return parts, out


@triton.jit(do_not_specialize=["N", "M", "s_weights", "of_queries", "of_negatives", "row_lines", "column_lines"])
def product_queries_kernel(
    weights,  # [N, M] in whole tiles, rows s_weights * 8 apart: the negatives' probabilities * GAIN
    row_dots,  # [row_lines, N] float32, parts of <query, sum of the negatives times their probabilities>
    column_dots,  # [column_lines, M] float32, parts of <negative, its gradient>
    unit,  # [N, D]
    unit_negatives,  # [M, D]
    query_divisors,  # [N] float64
    divisors,  # [M] float64
    of_query,  # [N, D] float32, what a query's gradient has without the negatives
    of_positive,  # [N, D] float32; or None
    slopes,  # [N] float64; or None
    factor,  # 0-dim float64
    upstream,  # 0-dim
    query_gradient,  # [N, D]; or None, as the next three
    positive_gradient,  # [N, D]
    negatives_gradient,  # [M, D]
    temperature_gradient,  # 0-dim, by the first program
    N,
    M,
    D,
    s_weights,
    of_queries,  # programs for queries; those for negatives and then those for positives come after them
    of_negatives,
    row_lines,
    column_lines,
    GAIN: tl.constexpr,
    EPS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    factor_value = tl.load(factor)
    exact_scale = tl.load(upstream).to(tl.float64) * factor_value / N
    scale = exact_scale.to(tl.float32)
    program = tl.program_id(0)
    if temperature_gradient is not None:
        program -= 1
    if program >= of_queries + of_negatives:
        if positive_gradient is not None:
            first_row, first_column = place(program - of_queries - of_negatives, D, BM, BN)
            i_row = first_row + tl.arange(0, BM)
            g = load_rows(of_positive, i_row, N, D, first_column, BN)
            store_block(positive_gradient, i_row, first_column, N, D, g * scale, BN)
    elif program >= of_queries:
        if negatives_gradient is not None:
            first_row, first_column = place(program - of_queries, D, BM, BN)
            i_row = first_row + tl.arange(0, BM)
            g = product(weights, unit, first_row, first_column, N, D, s_weights, True, GAIN, BM, BN, BLOCK_K)
            along = sum_of_lines(column_dots, i_row, M, column_lines)
            g = through_unit(g, along, unit_negatives, divisors, i_row, first_column, M, D, EPS, BN)
            store_block(negatives_gradient, i_row, first_column, M, D, g * scale, BN)
    elif program >= 0:
        if query_gradient is not None:
            first_row, first_column = place(program, D, BM, BN)
            i_row = first_row + tl.arange(0, BM)
            g = product(weights, unit_negatives, first_row, first_column, M, D, s_weights, False, GAIN, BM, BN, BLOCK_K)
            along = sum_of_lines(row_dots, i_row, N, row_lines)
            g = through_unit(g, along, unit, query_divisors, i_row, first_column, N, D, EPS, BN)
            g += load_rows(of_query, i_row, N, D, first_column, BN)
            store_block(query_gradient, i_row, first_column, N, D, g * scale, BN)
    elif temperature_gradient is not None:
        total = sum_of_all(slopes, N) + sum_of_all(row_dots, row_lines * N)
        tl.store(temperature_gradient, -total * exact_scale * factor_value)


def gradients(
    upstream: Tensor,
    of_query: Tensor,
    of_positive: Tensor,
    slopes: Tensor,
    unit: Tensor,
    of_rows: Tensor,
    others: Tensor,
    divisors: Tensor,
    state: Tensor,
    factor: Tensor,
    scaling: Scaling,
    own: OwnImage,
    asked: list[Tensor | None],  # memory for the gradients of queries, positives, negatives and the temperature
) -> None:
    """Those of negatives that need one, and all others with them."""
    n, d = unit.shape
    m = len(others)
    for_query, for_positive, for_negatives, for_temperature = asked
    weights = products.memory(n, m, unit)
    tile = tiling.similarity_weights(d, unit.dtype)
    row_dots = column_dots = None
    if for_query is not None or for_temperature is not None:
        row_dots = torch.empty(triton.cdiv(m, tile["BN"]), n, dtype=torch.float32, device=unit.device)
    if for_negatives is not None:
        column_dots = torch.empty(triton.cdiv(n, tile["BM"]), m, dtype=torch.float32, device=unit.device)
    queries = Side(unit, state[0] if scaling.running else None, state[1])
    gpu_engine.weigh(
        queries, Side(others, None, None), scaling, own, weights, False, row_dots=row_dots, column_dots=column_dots
    )
    tile = products.tile(unit.dtype)
    of_queries, of_positives = (0 if x is None else products.blocks_of(n, d, tile) for x in (for_query, for_positive))
    of_negatives = 0 if for_negatives is None else products.blocks_of(m, d, tile)
    launch.launch(
        product_queries_kernel, (of_queries + of_negatives + of_positives + (for_temperature is not None),), weights,
        row_dots, column_dots, unit, others, of_rows, divisors, of_query, of_positive, slopes, factor, upstream, *asked,
        n, m, d, weights.stride(0) // 8, of_queries, of_negatives, 0 if row_dots is None else len(row_dots),
        0 if column_dots is None else len(column_dots), GAIN=launch.gain(unit.dtype), EPS=UNIT_EPS, **tile,
        device_of=unit,
    )  # fmt: skip
