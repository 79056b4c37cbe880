"""KoLeo on a GPU. Rows are float32 whatever comes, as another row would be the nearest of rounded ones.

* The nearest: unit rows (1), then programs that share a block of rows walk over the candidates of their groups and keep
  each row's best (2), of which another kernel takes the best of all (3).
* The loss: unit rows (1), distances, a program some pairs of a row and a neighbour (2), and their mean (3).
* The gradient: the pairs by whom they name (1), and then a program owns a row, and walks over its neighbours and over
  the pairs that name it, in their order (2).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launch, tiling
from . import gpu_engine, reference
from .composed import same_memory
from .rows import unit_rows
from .tiles import similarities

MOST_NEIGHBORS = 16  # a program looks for each of them in every tile
COUNTED = 1 << 15  # pairs that are put in order by counting: 1e9 comparisons are done sooner than five launches
_BEST = {"ROWS": 64, "num_warps": 2}
_ORDER = {"BLOCK": 64, "num_warps": 4}
_BEYOND = tl.constexpr(2147483647)


@triton.jit(do_not_specialize=["N", "M", "offset", "group_size", "tiles_per_program"])
def _neighbors_kernel(
    a,  # [N, D]: the rows offset .. offset + N of b
    b,  # [M, D]
    values,  # [splits, N, TOPK] float32, the largest similarities in no order; -inf: none
    numbers,  # [splits, N, TOPK] int64, whose they are
    N,
    M,
    D,
    offset,
    group_size,
    tiles_per_program,
    TOPK: tl.constexpr,
    SLOTS: tl.constexpr,  # a power of 2, >= TOPK
    BLOCK_D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    block = tl.program_id(0)
    split = tl.program_id(1)
    i_a = block * BM + tl.arange(0, BM)
    number = (i_a + offset)[:, None]
    slot = tl.arange(0, SLOTS)[None, :]
    # places without a neighbour have numbers of their own; those beyond TOPK are never the worst
    best = tl.where(slot < TOPK, -float("inf"), float("inf")) + tl.zeros([BM, SLOTS], tl.float32)
    whose = -1 - slot + tl.zeros([BM, SLOTS], tl.int32)
    first = (block * BM + offset) // group_size * group_size
    stop = (tl.minimum(block * BM + BM, N) - 1 + offset) // group_size * group_size + group_size
    tiles = tl.cdiv(stop - first, BN)
    for t in range(split * tiles_per_program, tl.minimum((split + 1) * tiles_per_program, tiles)):
        i_b = first + t * BN + tl.arange(0, BN)
        s = similarities(a, b, i_a, i_a, i_b, N, M, D, False, BLOCK_D)
        seen = (i_b < stop)[None, :] & (i_b[None, :] // group_size == number // group_size)
        # NaN counts as the best, as in torch.argmax; a row itself is worse than any cosine
        s = tl.where(i_b[None, :] == number, -2.0, tl.where(s != s, float("inf"), s))
        s = tl.where(seen, s, -float("inf"))
        for _ in tl.static_range(TOPK):
            highest = tl.max(s, 1)[:, None]
            candidate = tl.min(tl.where(s == highest, i_b[None, :], _BEYOND), 1)[:, None]
            worst = tl.min(best, 1)[:, None]
            last = tl.max(tl.where(best == worst, whose, -_BEYOND), 1)[:, None]  # of equal ones the first stays
            replaced = (best == worst) & (whose == last) & (highest > worst)
            best = tl.where(replaced, highest, best)
            whose = tl.where(replaced, candidate, whose)
            s = tl.where(i_b[None, :] == candidate, -float("inf"), s)
    at = (launch.row_start(split, N, 1) + i_a)[:, None] * TOPK + slot
    mask = (i_a < N)[:, None] & (slot < TOPK)
    tl.store(values + at, best, mask)
    tl.store(numbers + at, whose, mask)


@triton.jit(do_not_specialize=["N", "splits"])
def _best_of_splits_kernel(
    values,  # [splits, N, TOPK] float32
    numbers,  # [splits, N, TOPK] int64
    best,  # [N, TOPK] int64: the numbers of the largest values, best first, and of equal ones the lowest
    N,
    splits,
    TOPK: tl.constexpr,
    SLOTS: tl.constexpr,  # a power of 2, >= TOPK
    ROWS: tl.constexpr,
):
    i_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    slot = tl.arange(0, SLOTS)[None, :]
    mask = (i_row < N)[:, None] & (slot < TOPK)
    last = tl.full([ROWS], float("inf"), tl.float32)  # what was found last: the next comes behind it
    whose = tl.full([ROWS], -1, tl.int64)
    for place in tl.static_range(TOPK):
        highest = tl.full([ROWS], -float("inf"), tl.float32)
        number = tl.full([ROWS], _BEYOND, tl.int64)
        for split in range(0, splits):
            at = (launch.row_start(split, N, 1) + i_row)[:, None] * TOPK + slot
            b_value = tl.load(values + at, mask, -float("inf"))
            b_number = tl.load(numbers + at, mask, _BEYOND)
            behind = (b_value < last[:, None]) | ((b_value == last[:, None]) & (b_number > whose[:, None]))
            value = tl.max(tl.where(behind, b_value, -float("inf")), 1)
            first = tl.min(tl.where(behind & (b_value == value[:, None]), b_number, _BEYOND), 1)
            better = (value > highest) | ((value == highest) & (first < number))
            highest = tl.where(better, value, highest)
            number = tl.where(better, first, number)
        tl.store(best + launch.row_start(i_row, TOPK, 1) + place, number, i_row < N)
        last = highest
        whose = number


def koleo_neighbors(rows: Tensor, candidates: Tensor, offset: int, topk: int, group_size: int, eps: float) -> Tensor:
    if rows.dtype == torch.float64 or candidates.dtype == torch.float64 or topk > MOST_NEIGHBORS:
        return reference.koleo_neighbors(rows, candidates, offset, topk, group_size, eps)
    a, _ = unit_rows(rows, True, eps, torch.float32)
    b = a if same_memory(rows, candidates) else unit_rows(candidates, True, eps, torch.float32)[0]
    n, d = a.shape
    m = len(b)
    tile = tiling.koleo_neighbors(topk)
    blocks = triton.cdiv(n, tile["BM"])
    most = min(m, (triton.cdiv(tile["BM"], group_size) + 1) * group_size)  # candidates of a block of rows
    splits, tiles_per_program = gpu_engine.splits_of(blocks, triton.cdiv(most, tile["BN"]))
    values = torch.empty(splits, n, topk, dtype=torch.float32, device=a.device)
    numbers = torch.empty(splits, n, topk, dtype=torch.int64, device=a.device)
    slots = {"TOPK": topk, "SLOTS": triton.next_power_of_2(topk)}
    launch.launch(
        _neighbors_kernel, (blocks, splits), a, b, values, numbers, n, m, d, offset, group_size, tiles_per_program,
        **slots, **tile, device_of=a,
    )  # fmt: skip
    if splits == topk == 1:
        return numbers[0]
    best = torch.empty(n, topk, dtype=torch.int64, device=a.device)
    grid = (triton.cdiv(n, _BEST["ROWS"]),)
    launch.launch(_best_of_splits_kernel, grid, values, numbers, best, n, splits, **slots, **_BEST, device_of=a)
    return best


@triton.jit
def _difference(unit, i, j, valid, D, EPS: tl.constexpr, BLOCK: tl.constexpr):
    """`u_i - u_j + eps` [rows, BLOCK]; NaN where j is no row, 0 beyond the width."""
    column = tl.arange(0, BLOCK)[None, :]
    mask = valid[:, None] & (column < D)
    left = tl.load(unit + launch.row_start(i, D, 1)[:, None] + column, mask, float("nan"))
    right = tl.load(unit + launch.row_start(j, D, 1)[:, None] + column, mask, float("nan"))
    return tl.where(column < D, left - right + EPS, 0.0)


@triton.jit(do_not_specialize=["N", "pairs"])
def _distance_kernel(
    unit,  # [N, D] float32
    neighbors,  # [N, K] int64
    distances,  # [N, K] float32
    losses,  # [N K] float32
    N,
    D,
    pairs,  # N K
    K,
    P: tl.constexpr,
    EPS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pair = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = pair < pairs
    j = tl.load(neighbors + pair, inside, 0)
    valid = inside & (j >= 0) & (j < N)
    difference = _difference(unit, pair // K, j, valid, D, EPS, BLOCK)
    if P == 2:
        distance = tl.sqrt(tl.sum(difference * difference, 1))
    else:
        distance = tl.exp2(tl.log2(tl.sum(tl.exp2(tl.log2(tl.abs(difference)) * P), 1)) * (1 / P))
    tl.store(distances + pair, distance, inside)
    tl.store(losses + pair, -tl.log(distance + EPS), inside)


@triton.jit
def _slope(difference, distance, P: tl.constexpr, EPS: tl.constexpr):
    """Of `log(distance + eps)` by the difference. In float64, so that it is rounded before it is added (koleo.h)."""
    inverse = 1 / distance
    if P == 2:
        direction = difference * inverse
    else:
        sign = tl.where(difference > 0, 1.0, tl.where(difference < 0, -1.0, difference))  # 0 and NaN stay
        direction = sign * tl.exp2(tl.log2(tl.abs(difference) * inverse) * (P - 1))
        direction = tl.where(difference == 0, 0.0, direction)
    return (direction * (1 / (distance + EPS))).to(tl.float64)


@triton.jit(do_not_specialize=["N", "pairs"])
def _order_kernel(
    neighbors,  # [pairs] int64
    begins,  # [N + 1] int64: how many pairs name a row before that one
    order,  # [pairs] int64: their stable order by whom they name
    N,
    pairs,
    BLOCK: tl.constexpr,
):
    """By counting: of as few pairs as that takes no longer, this is one launch in place of a sort and a search."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    own = tl.load(neighbors + index, index < pairs, 0)[:, None]
    place = tl.zeros([BLOCK], tl.int32)
    below = tl.zeros([BLOCK], tl.int32)
    for i in range(0, pairs, BLOCK):
        j = i + tl.arange(0, BLOCK)
        other = tl.load(neighbors + j, j < pairs, 1 << 62)[None, :]
        place += tl.sum(((other < own) | ((other == own) & (j[None, :] < index[:, None]))).to(tl.int32), 1)
        below += tl.sum((other < index[:, None]).to(tl.int32), 1)
    tl.store(order + place, index, index < pairs)
    tl.store(begins + index, below, index <= N)


def _pairs_by_name(neighbors: Tensor) -> tuple[Tensor, Tensor]:
    """(begins [N + 1], order [N K]) of `_order_kernel`, for neighbors [N, K]."""
    flat = neighbors.flatten()
    n = len(neighbors)
    if len(flat) > COUNTED:
        named, order = flat.sort(stable=True)
        return torch.searchsorted(named, torch.arange(n + 1, device=flat.device)), order
    begins, order = flat.new_empty(n + 1), torch.empty_like(flat)
    grid = (triton.cdiv(max(len(flat), n + 1), _ORDER["BLOCK"]),)
    launch.launch(_order_kernel, grid, flat, begins, order, n, len(flat), **_ORDER, device_of=flat)
    return begins, order


@triton.jit(do_not_specialize=["N"])
def _gradient_kernel(
    unit,  # [N, D] float32
    neighbors,  # [N, K] int64
    distances,  # [N, K] float32
    begins,  # [N + 1] int64, of each row's part of `order`
    order,  # [N K] int64, pairs by whom they name
    divisors,  # [N] float32, see rows._unit_kernel
    gradient,  # [N, D]
    N,
    D,
    K,
    largest,  # number of the gradient's dtype: what duplicates give, 1 / eps and more, is beyond float16
    P: tl.constexpr,
    EPS: tl.constexpr,
    ROWS: tl.constexpr,  # 1
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) + tl.arange(0, ROWS)
    total = tl.zeros([ROWS, BLOCK], tl.float64)
    for k in range(0, K):
        pair = row.to(tl.int64) * K + k
        j = tl.load(neighbors + pair)
        difference = _difference(unit, row, j, (j >= 0) & (j < N), D, EPS, BLOCK)
        total -= _slope(difference, tl.load(distances + pair)[:, None], P, EPS)
    for place in range(tl.load(begins + tl.program_id(0)), tl.load(begins + tl.program_id(0) + 1)):
        pair = tl.load(order + place + tl.arange(0, ROWS))
        difference = _difference(unit, pair // K, row, row < N, D, EPS, BLOCK)
        total += _slope(difference, tl.load(distances + pair)[:, None], P, EPS)
    column = tl.arange(0, BLOCK)[None, :]
    at = launch.row_start(row, D, 1)[:, None] + column
    b_g = total.to(tl.float32)
    b_u = tl.load(unit + at, column < D, 0)
    divisor = tl.load(divisors + row)
    radial = tl.where(divisor > EPS, tl.sum(b_g * b_u, 1), 0.0)
    b_g = (b_g - radial[:, None] * b_u) / divisor[:, None]
    b_g = tl.where(b_g > largest, largest, tl.where(b_g < -largest, -largest, b_g))  # NaN stays
    tl.store(gradient + at, b_g, column < D)


def koleo(
    x: Tensor, neighbors: Tensor, p: float, eps: float, wanted: list[bool]
) -> tuple[Tensor, list[Tensor], Tensor]:
    if x.dtype == torch.float64:
        return reference.koleo(x, neighbors, p, eps, wanted)
    unit, divisors = unit_rows(x, True, eps, torch.float32)
    neighbors = neighbors.contiguous()
    n, d = unit.shape
    k = neighbors.shape[1]
    distances = torch.empty(n, k, dtype=torch.float32, device=x.device)
    losses = torch.empty(n * k, dtype=torch.float32, device=x.device)
    tile = tiling.similarity_rows(d)
    grid = (triton.cdiv(n * k, tile["ROWS"]),)
    options = {"P": p, "EPS": eps, **tile}
    launch.launch(_distance_kernel, grid, unit, neighbors, distances, losses, n, d, n * k, k, **options, device_of=x)
    loss, scale = launch.total(losses, 1 / (n * k), 1 / (n * k))
    if not wanted[0]:
        return loss, [x.new_empty(0)], scale
    begins, order = _pairs_by_name(neighbors)
    gradient = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    options["ROWS"] = 1
    launch.launch(
        _gradient_kernel, (n,), unit, neighbors, distances, begins, order, divisors, gradient, n, d, k,
        torch.finfo(x.dtype).max, **options, device_of=x,
    )  # fmt: skip
    return loss, [gradient], scale
