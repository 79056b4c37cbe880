"""Sinkhorn in the log domain: an iteration is the rows' logsumexp with the bias, then the columns' of what is left.

Both keep running maxima, so that any finite score is right. The scores are only read: once for the first iteration,
twice for
each further one, and once for the codes beside their own logsumexp: 7 passes for 3 iterations. Columns are summed by
blocks of rows into partial (maximum, sum), which one program a column block adds in a fixed order.
"""

import torch
import triton
import triton.language as tl
from fastjem.kernels import launch, reference, tiling
from fastjem.kernels.row_logsumexp import dense, row_logsumexp
from torch import Tensor


@triton.jit(do_not_specialize=["N"])
def _column_logsumexp_kernel(
    x,  # [N, K], rows s_row * ALIGN apart
    offsets,  # [N], subtracted from rows, or None
    maxima,  # [parts, K]
    sums,  # [parts, K]
    N,
    K,  # / ALIGN
    s_row,  # / ALIGN
    SCALE: tl.constexpr,
    COMPUTE: tl.constexpr,
    ALIGN: tl.constexpr,
    PART: tl.constexpr,  # rows of a program
    ROWS: tl.constexpr,  # rows at a time
    BLOCK: tl.constexpr,
):
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < K * ALIGN
    scale = tl.full((), SCALE, COMPUTE)
    maximum = tl.full([BLOCK], -float("inf"), COMPUTE)
    total = tl.zeros([BLOCK], COMPUTE)
    for i in range(0, PART, ROWS):
        i_row = tl.program_id(1) * PART + i + tl.arange(0, ROWS)
        mask = (i_row < N)[:, None] & inside[None, :]
        start = launch.row_start(i_row, s_row, ALIGN)
        v = tl.load(x + start[:, None] + column[None, :], mask, -float("inf")).to(COMPUTE) * scale  # [ROWS, BLOCK]
        if offsets is not None:
            v -= tl.load(offsets + i_row, i_row < N, 0)[:, None]
        new = tl.maximum(maximum, tl.max(v, 0))
        shift = tl.where(new == -float("inf"), 0.0, new)
        total = total * tl.exp(maximum - shift) + tl.sum(tl.exp(v - shift[None, :]), 0)
        maximum = new
    out = launch.row_start(tl.program_id(1), K, ALIGN) + column
    tl.store(maxima + out, maximum, inside)
    tl.store(sums + out, total, inside)


@triton.jit(do_not_specialize=["parts"])
def _join_kernel(
    maxima,  # [parts, K]
    sums,  # [parts, K]
    out,  # [K]
    parts,
    K,
    BLOCK: tl.constexpr,
):
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < K
    maximum = tl.full([BLOCK], -float("inf"), maxima.dtype.element_ty)
    shift = tl.zeros([BLOCK], maxima.dtype.element_ty)
    total = tl.zeros([BLOCK], maxima.dtype.element_ty)
    for i in range(0, parts):
        start = launch.row_start(i, K, 1)
        b_maximum = tl.load(maxima + start + column, inside, -float("inf"))
        b_sum = tl.load(sums + start + column, inside, 0)
        new = tl.maximum(maximum, b_maximum)
        shift = tl.where(new == -float("inf"), 0.0, new)
        total = total * tl.exp(maximum - shift) + b_sum * tl.exp(b_maximum - shift)
        maximum = new
    tl.store(out + column, shift + tl.log(total), inside)


@triton.jit
def _codes_kernel(
    x,  # [N, K], rows s_row * ALIGN apart
    bias,  # [K]
    row_lse,  # [N]
    codes,  # [N, K] contiguous
    K,  # / ALIGN
    s_row,  # / ALIGN
    SCALE: tl.constexpr,
    COMPUTE: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_row = tl.program_id(1)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < K * ALIGN
    v = tl.load(x + launch.row_start(i_row, s_row, ALIGN) + column, inside, 0).to(COMPUTE)
    v = v * tl.full((), SCALE, COMPUTE) + tl.load(bias + column, inside, 0) - tl.load(row_lse + i_row)
    tl.store(codes + launch.row_start(i_row, K, ALIGN) + column, tl.exp(v), inside)


def sinkhorn_step(scores: Tensor, bias: Tensor | None, epsilon: float) -> Tensor:
    if scores.dtype not in launch.DTYPES:
        return reference.sinkhorn_step(scores, bias, epsilon)
    (n, k), scores, compute = scores.shape, launch.rows(scores), launch.compute_dtype(scores.dtype)
    row_lse = None
    if bias is not None:
        row_lse = torch.empty(n, dtype=compute, device=scores.device)
        row_logsumexp(scores, dense(bias, compute), 1 / epsilon, row_lse)
    tile, align = tiling.column_logsumexp(compute), launch.alignment(scores)
    parts = triton.cdiv(n, tile["PART"])
    maxima, sums = (torch.empty((parts, k), dtype=compute, device=scores.device) for _ in range(2))
    launch.launch(
        _column_logsumexp_kernel,
        (triton.cdiv(k, tile["BLOCK"]), parts),
        scores,
        row_lse,
        maxima,
        sums,
        n,
        k // align,
        scores.stride(0) // align,
        SCALE=1 / epsilon,
        COMPUTE=launch.DTYPES[compute],
        ALIGN=align,
        **tile,
        device_of=scores,
    )
    out = torch.empty(k, dtype=compute, device=scores.device)
    join = tiling.join()
    launch.launch(_join_kernel, (triton.cdiv(k, join["BLOCK"]),), maxima, sums, out, parts, k, **join, device_of=scores)
    return out


def sinkhorn_bias(scores: Tensor, epsilon: float, iterations: int, normalize_samples_first: bool) -> Tensor:
    scores = launch.rows(scores)
    compute = launch.compute_dtype(scores.dtype)
    bias = torch.zeros(scores.shape[1], dtype=compute, device=scores.device) if normalize_samples_first else None
    for _ in range(iterations):
        bias = sinkhorn_step(scores, bias, epsilon).neg_()
    return bias


def sinkhorn_codes(scores: Tensor, bias: Tensor, epsilon: float, dtype: torch.dtype) -> Tensor:
    if scores.dtype not in launch.DTYPES or dtype not in launch.DTYPES:
        return reference.sinkhorn_codes(scores, bias, epsilon, dtype)
    (n, k), scores, compute = scores.shape, launch.rows(scores), launch.compute_dtype(scores.dtype)
    bias, row_lse = dense(bias, compute), torch.empty(n, dtype=compute, device=scores.device)
    row_logsumexp(scores, bias, 1 / epsilon, row_lse)
    codes, align, tile = (
        torch.empty((n, k), dtype=dtype, device=scores.device),
        launch.alignment(scores),
        tiling.codes(),
    )
    launch.launch(
        _codes_kernel,
        (triton.cdiv(k, tile["BLOCK"]), n),
        scores,
        bias,
        row_lse,
        codes,
        k // align,
        scores.stride(0) // align,
        SCALE=1 / epsilon,
        COMPUTE=launch.DTYPES[compute],
        ALIGN=align,
        **tile,
        device_of=scores,
    )
    return codes


def sinkhorn(
    scores: Tensor, epsilon: float, iterations: int, normalize_samples_first: bool, dtype: torch.dtype
) -> Tensor:
    scores = launch.rows(scores)
    return sinkhorn_codes(scores, sinkhorn_bias(scores, epsilon, iterations, normalize_samples_first), epsilon, dtype)
