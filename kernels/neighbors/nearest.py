"""The k nearest rows on a GPU, few of them: a program owns a block of queries, and keeps the k best that it has seen.

It walks over tiles of the bank. From a tile, whose products never leave the chip, the best column of each row takes the
place of the worst that is kept, as long as any row's is better. Of M columns in any order the t-th is among the k best
with probability k / t, so after the first tiles that is once or twice a tile, where torch.topk would read products that
were written first. Where there are few queries, the bank is split among programs, and their bests are sorted together.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launch, tiling
from ..contrastive.gpu_engine import splits_of
from ..contrastive.rows import lengths
from ..contrastive.tiles import similarities

MOST = 32  # of which a program keeps a row's in registers
_BEYOND = tl.constexpr(2147483647)


@triton.jit
def _better(s, best):
    """Of each row its best column and the worst that is kept [BM, 1]; and whether a column is better in any row."""
    highest = tl.max(s, 1)[:, None]
    worst = tl.min(best, 1)[:, None]
    found = tl.max((highest > worst).to(tl.int32), 0, keep_dims=True)  # of one dimension, it doesn't compile for sm_100
    return highest, worst, found.item()


@triton.jit(do_not_specialize=["N", "M", "tiles_per_program"])
def nearest_kernel(
    query,  # [N, D]
    bank,  # [M, D]
    query_lengths,  # [N] float32
    bank_lengths,  # [M] float32
    values,  # [splits, N, K] float32, the largest cosines in no order; +inf: NaN, -inf: none
    numbers,  # [splits, N, K] int32, whose they are
    N,
    M,
    D,
    tiles_per_program,
    K: tl.constexpr,
    SLOTS: tl.constexpr,  # a power of 2, >= K
    BLOCK_D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    split = tl.program_id(1)
    i_a = tl.program_id(0) * BM + tl.arange(0, BM)
    over_a = 1 / tl.load(query_lengths + i_a, i_a < N, 1.0)
    slot = tl.arange(0, SLOTS)[None, :]
    # places without a neighbour have numbers of their own; those beyond K are never the worst
    best = tl.where(slot < K, -float("inf"), float("inf")) + tl.zeros([BM, SLOTS], tl.float32)
    whose = -1 - slot + tl.zeros([BM, SLOTS], tl.int32)
    for t in range(split * tiles_per_program, tl.minimum((split + 1) * tiles_per_program, tl.cdiv(M, BN))):
        i_b = t * BN + tl.arange(0, BN)
        over_b = 1 / tl.load(bank_lengths + i_b, i_b < M, 1.0)
        # the first i_a stands in for rows that are loaded already (b_a), which WHOLE = False doesn't read
        s = similarities(query, bank, i_a, i_a, i_b, N, M, D, False, BLOCK_D) * over_a[:, None] * over_b[None, :]
        s = tl.where(s != s, float("inf"), launch.finite(s))
        s = tl.where((i_b < M)[None, :], s, -float("inf"))
        highest, worst, found = _better(s, best)
        while found > 0:
            candidate = tl.min(tl.where(s == highest, i_b[None, :], _BEYOND), 1)[:, None]
            last = tl.max(tl.where(best == worst, whose, -_BEYOND), 1)[:, None]  # of equal ones the first stays
            replaced = (whose == last) & (highest > worst)
            best = tl.where(replaced, highest, best)
            whose = tl.where(replaced, candidate, whose)
            s = tl.where(i_b[None, :] == candidate, -float("inf"), s)
            highest, worst, found = _better(s, best)
    at = (launch.row_start(split, N, 1) + i_a)[:, None] * K + slot
    mask = (i_a < N)[:, None] & (slot < K)
    tl.store(values + at, best, mask)
    tl.store(numbers + at, whose, mask)


def nearest_k(query: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Of rows of one dtype, not float64, and k of at most MOST and len(bank)."""
    a = query.contiguous()
    b = bank.contiguous()
    n, d = a.shape
    m = len(b)
    tile = tiling.nearest_k(a.dtype)
    blocks = triton.cdiv(n, tile["BM"])
    splits, tiles_per_program = splits_of(blocks, triton.cdiv(m, tile["BN"]))
    values = torch.empty(splits, n, k, dtype=torch.float32, device=a.device)
    numbers = torch.empty(splits, n, k, dtype=torch.int32, device=a.device)
    launch.launch(
        nearest_kernel, (blocks, splits), a, b, lengths(a), lengths(b), values, numbers, n, m, d, tiles_per_program,
        K=k, SLOTS=triton.next_power_of_2(k), **tile, device_of=a,
    )  # fmt: skip
    # The best of all programs, and of equal ones the first.
    numbers, order = numbers.movedim(0, 1).reshape(n, -1).long().sort(1)
    values, best = values.movedim(0, 1).reshape(n, -1).gather(1, order).sort(dim=1, descending=True, stable=True)
    values = values[:, :k].masked_fill(values[:, :k] == torch.inf, torch.nan)
    return values, numbers.gather(1, best[:, :k])
