"""A step of k-means on a GPU: each row's nearest centroid, and then the sums of the rows of each centroid.

Assignment: a program owns a block of rows and walks over tiles of centroids; products never leave the chip. Sums: rows
sorted by centroid (a stable sort of N small numbers) are gathered by the program that owns the centroid, in their
order. Without atomics, which add in an order of their own, that is a second read of the features; at K = 512 the
assignment's products take ten times as long as it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launch, tiling
from ..arithmetic import UNIT_EPS
from ..contrastive.tiles import load_rows, similarities
from . import reference


@triton.jit(do_not_specialize=["N", "K"])
def assign_kernel(
    x,  # [N, D]
    high,  # [K, D] centroids in the dtype of x
    low,  # [K, D] what they lost by that, times GAIN; None for float32
    bias,  # [K] float32, added to the products; None where rows are taken at unit length
    assignments,  # [N] int32
    inverse_norms,  # [N] float32; None with a bias
    N,
    K,
    D,
    EPS: tl.constexpr,
    GAIN: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    i_x = tl.program_id(0) * BM + tl.arange(0, BM)
    b_x = tl.zeros([1], tl.float32)
    if WHOLE:
        b_x = load_rows(x, i_x, N, D, 0, BLOCK_D)
    inverse = tl.full([BM], 1.0, tl.float32)
    if inverse_norms is not None:
        squares = tl.zeros([BM], tl.float32)
        for column in range(0, D, BLOCK_D):
            part = load_rows(x, i_x, N, D, column, BLOCK_D).to(tl.float32)
            squares += tl.sum(part * part, 1)
        inverse = 1 / tl.maximum(tl.sqrt(squares), EPS, propagate_nan=tl.PropagateNan.ALL)
        tl.store(inverse_norms + i_x, inverse, i_x < N)
    best = tl.full([BM], -float("inf"), tl.float32)
    where = tl.zeros([BM], tl.int32)
    for first in range(0, K, BN):
        i_c = first + tl.arange(0, BN)
        s = similarities(x, high, b_x, i_x, i_c, N, K, D, WHOLE, BLOCK_D)
        if low is not None:
            s += similarities(x, low, b_x, i_x, i_c, N, K, D, WHOLE, BLOCK_D) * (1 / GAIN)
        if bias is not None:
            s += tl.load(bias + i_c, i_c < K, 0)[None, :]
        s *= inverse[:, None]
        # NaN counts as the best, as in torch.argmax, and is above the infinity that a number may be
        s = tl.where(s != s, float("inf"), tl.minimum(s, 3.4028234663852886e38))
        s = tl.where((i_c < K)[None, :], s, -float("inf"))
        highest = tl.max(s, 1)
        nearest = tl.min(tl.where(s == highest[:, None], i_c[None, :], 2147483647), 1)
        better = highest > best
        where = tl.where(better, nearest, where)
        best = tl.where(better, highest, best)
    tl.store(assignments + i_x, where, i_x < N)


@triton.jit
def cluster_sums_kernel(
    x,  # [N, D]
    order,  # [N] int64, rows by centroid
    starts,  # [K + 1] int64, where each centroid's rows begin in `order`
    inverse_norms,  # [N] float32, or None
    centroids,  # [K, D] float32
    sums,  # [K, D] float32, or None
    distances,  # [K, blocks] float32, the squared distances of a centroid's rows in a block of columns
    D,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    blocks = tl.cdiv(D, BLOCK)
    k = tl.program_id(0) // blocks
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    begin = tl.load(starts + k)
    end = tl.load(starts + k + 1)
    at = launch.row_start(k, D, 1) + column
    centroid = tl.load(centroids + at, column < D, 0)[None, :]
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    squares = tl.zeros([ROWS, BLOCK], tl.float32)
    for i in range(begin, end, ROWS):
        place = i + tl.arange(0, ROWS)
        i_row = tl.load(order + place, place < end, 0)
        mask = (place < end)[:, None] & (column < D)[None, :]
        b_x = tl.load(x + launch.row_start(i_row, D, 1)[:, None] + column[None, :], mask, 0).to(tl.float32)
        if inverse_norms is not None:
            b_x *= tl.load(inverse_norms + i_row, place < end, 0)[:, None]
        total += b_x
        difference = tl.where(mask, b_x - centroid, 0.0)
        squares += difference * difference
    if sums is not None:
        tl.store(sums + at, tl.sum(total, 0), column < D)
    tl.store(distances + tl.program_id(0), tl.sum(tl.sum(squares, 1), 0))


def kmeans_step(
    features: Tensor,  # [N, D]
    centroids: Tensor,  # [K, D]
    spherical: bool,
    update: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if features.dtype not in launch.DTYPES or torch.float64 in (features.dtype, centroids.dtype):
        return reference.kmeans_step(features, centroids, spherical, update)
    x = features.contiguous()
    centroids = centroids.float().contiguous()
    n, d = x.shape
    clusters = len(centroids)
    compared, bias = (centroids, None) if spherical else reference.about_their_mean(centroids)
    high = compared.to(x.dtype)
    # Half precision alone would move the borders between centroids by 2^-9 (bfloat16): two products are as good as one
    # of float32. What float16 loses is below its normal numbers, hence the gain.
    gain = 2048
    low = None if x.dtype == torch.float32 else ((compared - high.float()) * gain).to(x.dtype)
    assignments = torch.empty(n, dtype=torch.int32, device=x.device)
    norms = torch.empty(n, dtype=torch.float32, device=x.device) if spherical else None
    tile = tiling.kmeans_assign(d, x.dtype)
    grid = (triton.cdiv(n, tile["BM"]),)
    launch.launch(
        assign_kernel, grid, x, high, low, bias, assignments, norms, n, clusters, d,
        EPS=UNIT_EPS, GAIN=gain, **tile, device_of=x,
    )  # fmt: skip
    in_order, order = assignments.sort(stable=True)
    starts = torch.searchsorted(in_order, torch.arange(clusters + 1, dtype=torch.int32, device=x.device))
    tile = tiling.kmeans_sums(d)
    blocks = triton.cdiv(d, tile["BLOCK"])
    sums = torch.empty(clusters, d, dtype=torch.float32, device=x.device) if update else None
    distances = torch.empty(clusters * blocks, dtype=torch.float32, device=x.device)
    launch.launch(
        cluster_sums_kernel, (clusters * blocks,), x, order, starts, norms, centroids, sums, distances, d,
        **tile, device_of=x,
    )  # fmt: skip
    inertia = distances.double().sum().float()
    assignments = assignments.long()
    if sums is None:
        return assignments, centroids.new_empty(0), assignments.new_empty(0), inertia
    return assignments, sums, starts.diff(), inertia
