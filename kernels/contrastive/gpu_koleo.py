"""KoLeo on a GPU. Rows are float32 whatever comes, as another row would be the nearest of rounded ones.

* The nearest: a program owns a block of rows, walks over the candidates of their groups and keeps each row's best.
* Distances: a program some pairs of a row and a neighbour.
* The gradient: a program owns a row, and walks over its neighbours and over the pairs that name it, in their order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launch, tiling
from ..arithmetic import scalar_like
from . import gpu_engine, reference
from .rows import through_unit_rows, unit_rows
from .tiles import similarities

MOST_NEIGHBORS = 16  # a program looks for each of them in every tile
_BEYOND = tl.constexpr(2147483647)


@triton.jit(do_not_specialize=["N", "M", "offset", "group_size", "tiles_per_program"])
def _neighbors_kernel(
    a,  # [N, D]: the rows offset .. offset + N of b
    b,  # [M, D]
    values,  # [splits, N, TOPK] float32, the largest similarities in no order; -inf: none
    numbers,  # [splits, N, TOPK] int32, whose they are
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


def koleo_neighbors(rows: Tensor, candidates: Tensor, offset: int, topk: int, group_size: int, eps: float) -> Tensor:
    if rows.dtype == torch.float64 or candidates.dtype == torch.float64 or topk > MOST_NEIGHBORS:
        return reference.koleo_neighbors(rows, candidates, offset, topk, group_size, eps)
    a, _ = unit_rows(rows.float(), True, eps)
    b, _ = unit_rows(candidates.float(), True, eps)
    n, d = a.shape
    m = len(b)
    tile = tiling.koleo_neighbors(topk)
    blocks = triton.cdiv(n, tile["BM"])
    most = min(m, (triton.cdiv(tile["BM"], group_size) + 1) * group_size)  # candidates of a block of rows
    splits, tiles_per_program = gpu_engine.splits_of(blocks, triton.cdiv(most, tile["BN"]))
    values = torch.empty(splits, n, topk, dtype=torch.float32, device=a.device)
    numbers = torch.empty(splits, n, topk, dtype=torch.int32, device=a.device)
    launch.launch(
        _neighbors_kernel, (blocks, splits), a, b, values, numbers, n, m, d, offset, group_size, tiles_per_program,
        TOPK=topk, SLOTS=triton.next_power_of_2(topk), **tile, device_of=a,
    )  # fmt: skip
    # The best of all programs, and of equal ones the first.
    numbers, order = numbers.movedim(0, 1).reshape(n, -1).long().sort(1)
    order = values.movedim(0, 1).reshape(n, -1).gather(1, order).sort(dim=1, descending=True, stable=True).indices
    return numbers.gather(1, order[:, :topk])


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
    losses,  # [N, K] float32
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


@triton.jit(do_not_specialize=["N"])
def _gradient_kernel(
    unit,  # [N, D] float32
    neighbors,  # [N, K] int64
    distances,  # [N, K] float32
    begins,  # [N + 1] int64, of each row's part of `order`
    order,  # [N K] int64, pairs by whom they name
    gradient,  # [N, D] float32, for the unit rows
    N,
    D,
    K,
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
    tl.store(gradient + launch.row_start(row, D, 1)[:, None] + column, total.to(tl.float32), column < D)


def koleo(
    x: Tensor, neighbors: Tensor, p: float, eps: float, wanted: list[bool]
) -> tuple[Tensor, list[Tensor], Tensor]:
    if x.dtype == torch.float64:
        return reference.koleo(x, neighbors, p, eps, wanted)
    unit, divisors = unit_rows(x.float(), True, eps)
    neighbors = neighbors.contiguous()
    n, d = unit.shape
    k = neighbors.shape[1]
    distances, losses = torch.empty(2, n, k, dtype=torch.float32, device=x.device)
    tile = tiling.similarity_rows(d)
    grid = (triton.cdiv(n * k, tile["ROWS"]),)
    options = {"P": p, "EPS": eps, **tile}
    launch.launch(_distance_kernel, grid, unit, neighbors, distances, losses, n, d, n * k, k, **options, device_of=x)
    loss = losses.mean()
    scale = scalar_like(x, 1 / (n * k))
    if not wanted[0]:
        return loss, [x.new_empty(0)], scale
    flat, order = neighbors.flatten().sort(stable=True)
    begins = torch.searchsorted(flat, torch.arange(n + 1, device=x.device))
    gradient = torch.empty_like(unit)
    options["ROWS"] = 1
    launch.launch(
        _gradient_kernel, (n,), unit, neighbors, distances, begins, order, gradient, n, d, k, **options, device_of=x
    )  # fmt: skip
    gradient = through_unit_rows(gradient, unit, divisors, torch.float32, eps)
    largest = torch.finfo(x.dtype).max  # what duplicates give, 1 / eps and more, is beyond float16
    return loss, [gradient.clamp_(-largest, largest).to(x.dtype)], scale
