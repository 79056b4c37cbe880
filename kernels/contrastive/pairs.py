"""SigLIP's loss with options, in Triton: several positives, pairs that don't count, weights, smoothed targets.

A kernel beside `weights.sigmoid_kernel`, which a plain call takes: masks are N x M bytes, and a target that isn't 0 or
1 needs both terms of the loss.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launch, tiling
from .gpu_engine import add_product, bands
from .tiles import log1p_of_unit, similarities
from .weights import blocks_of_tile, store_tile


@triton.jit(do_not_specialize=["N", "M", "offset", "s_mask", "s_out"])
def siglip_pairs_kernel(
    a,  # [N, D]
    b,  # [M, D]
    factor,  # 0-dim
    bias,  # 0-dim
    weights,  # [N] float32; or None
    row_ids,  # [N] int64; or None
    column_ids,  # [M] int64; or None
    positives,  # [N, M] bytes, rows s_mask apart, instead of ids and offset; or None
    exclude,  # [N, M] bytes, rows s_mask apart; or None
    smoothing,  # 0-dim float32: the target of pairs that don't belong together, and 1 less that of those that do
    out,  # [N, M], rows s_out * 8 apart: G * GAIN; or None
    sums,  # [3, blocks of columns, N] float32: the sums of loss, G = weight * d loss / d logit, and G * similarity
    N,
    M,
    D,
    offset,
    s_mask,
    s_out,
    GAIN: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    block_a, block_b = blocks_of_tile(N, BM)
    i_a = block_a * BM + tl.arange(0, BM)
    i_b = block_b * BN + tl.arange(0, BN)
    s = similarities(a, b, i_a, i_a, i_b, N, M, D, False, BLOCK_D)
    inside = (i_a < N)[:, None] & (i_b < M)[None, :]
    in_mask = launch.row_start(i_a, s_mask, 1)[:, None] + i_b[None, :]
    if positives is not None:
        together = tl.load(positives + in_mask, inside, 0) != 0
    else:
        together = i_b[None, :] == (i_a + offset)[:, None]
        if row_ids is not None:
            b_row_id = tl.load(row_ids + i_a, i_a < N, 0)
            b_column_id = tl.load(column_ids + i_b, i_b < M, 0)
            together = together | (b_column_id[None, :] == b_row_id[:, None])
    counts = inside
    if exclude is not None:
        counts = counts & (tl.load(exclude + in_mask, inside, 0) == 0)
    b_low = tl.load(smoothing)
    x = s * tl.load(factor).to(tl.float32) + tl.load(bias).to(tl.float32)
    target = tl.where(together, 1 - b_low, b_low)
    e = tl.exp(-tl.abs(x))
    loss = log1p_of_unit(e)
    wrong = tl.where(x > 0, 1 - target, target)
    loss += tl.where(wrong != 0, wrong * tl.abs(x), 0.0)
    g = ((1 - target) * tl.where(x > 0, 1.0, e) - target * tl.where(x > 0, e, 1.0)) / (1 + e)
    if weights is not None:
        g *= tl.load(weights + i_a, i_a < N, 0.0)[:, None]
    g = tl.where(counts, g, 0.0)
    at = launch.row_start(block_b, N, 1) + i_a
    one_sum = launch.row_start(tl.cdiv(M, BN), N, 1)
    tl.store(sums + at, tl.sum(tl.where(counts, loss, 0.0), 1), i_a < N)
    tl.store(sums + one_sum + at, tl.sum(g, 1), i_a < N)
    tl.store(sums + 2 * one_sum + at, tl.sum(tl.where(counts, g * s, 0.0), 1), i_a < N)
    if out is not None:
        store_tile(out, i_a, i_b, s_out, g * GAIN)


def siglip_pairs(
    a: Tensor,  # [N, D]
    b: Tensor,  # [M, D]
    factor: Tensor,
    bias: Tensor,
    label_smoothing: Tensor,
    weights: Tensor | None,
    row_ids: Tensor | None,
    column_ids: Tensor | None,
    positives: Tensor | None,
    exclude: Tensor | None,
    offset: int,
    a_sum: Tensor | None,
    b_sum: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The rows' losses [N], and the sums of G * similarity and of G, float64; `a_sum += G @ b`, `b_sum += G.T @ a`."""
    tile = tiling.siglip_pairs(a.dtype)
    m, d = b.shape
    column_blocks = triton.cdiv(m, tile["BN"])
    low = label_smoothing.float() / 2
    weights = None if weights is None else weights.float().contiguous()
    bytes_of = [None if mask is None else mask.contiguous().view(torch.uint8) for mask in (positives, exclude)]
    ids = [None if of is None else of.contiguous() for of in (row_ids, column_ids)]
    losses = torch.empty(a.shape[0], dtype=torch.float64, device=a.device)
    slopes: list[Tensor] = []
    dots: list[Tensor] = []
    for rows, memory in bands(a, b, a_sum is not None or b_sum is not None):
        part = a[rows]
        n = part.shape[0]
        sums = torch.empty(3, column_blocks, n, dtype=torch.float32, device=a.device)
        launch.launch(
            siglip_pairs_kernel, (triton.cdiv(n, tile["BM"]) * column_blocks,), part, b, factor, bias,
            None if weights is None else weights[rows], None if ids[0] is None else ids[0][rows], ids[1],
            *(None if mask is None else mask[rows] for mask in bytes_of), low, memory, sums, n, m, d,
            offset + rows.start, m, 0 if memory is None else memory.stride(0) // 8, GAIN=launch.gain(a.dtype), **tile,
            device_of=a,
        )  # fmt: skip
        torch.sum(sums[0], 0, dtype=torch.float64, out=losses[rows])
        slopes.append(sums[1].sum(dtype=torch.float64))
        dots.append(sums[2].sum(dtype=torch.float64))
        if memory is not None and a_sum is not None:
            add_product(a_sum[rows], memory, b)
        if memory is not None and b_sum is not None:
            add_product(b_sum, memory.T, part)
    return losses, functools.reduce(torch.add, dots), functools.reduce(torch.add, slopes)
