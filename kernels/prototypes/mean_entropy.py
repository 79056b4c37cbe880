"""Mean entropy: each row's log-sum-exp, each prototype's mean probability by that, then rows' gradients.

What rows' gradients are made of is the logarithm of the mean probabilities times their number: a constant changes
nothing, and where prototypes are used alike, those are small numbers. The loss is added up by a program of the last
launch. Gradients have their scale already, but in float16.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launch, tiling
from ..arithmetic import compute_dtype, dense_rows, no_gradient
from . import reference
from .row_logsumexp import unbiased_logsumexps


@triton.jit(do_not_specialize=["N", "parts"])
def _probabilities_kernel(
    views,  # tuple of V x [N, K], rows s_rows[v] apart
    s_rows,  # tuple of V
    lse,  # [V, N]
    sums,  # [V, parts, K], of probabilities over a part of the rows
    N,
    K,
    parts,
    per_temperature: tl.float64,
    COMPUTE: tl.constexpr,
    PART: tl.constexpr,  # rows of a program
    ROWS: tl.constexpr,  # rows at a time
    BLOCK: tl.constexpr,
):
    blocks = tl.cdiv(K, BLOCK)
    part = tl.program_id(0) // blocks % parts
    view = tl.program_id(0) // blocks // parts
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    x = launch.chosen(views, view)
    stride = launch.chosen(s_rows, view)
    scale = tl.full((), per_temperature, COMPUTE)
    total = tl.zeros([BLOCK], COMPUTE)
    for i in range(0, PART, ROWS):
        i_row = part * PART + i + tl.arange(0, ROWS)
        mask = (i_row < N)[:, None] & (column < K)[None, :]
        v = tl.load(x + launch.row_start(i_row, stride, 1)[:, None] + column[None, :], mask, -float("inf"))
        offset = tl.load(lse + view * N + i_row, i_row < N, 0)
        total += tl.sum(tl.exp(v.to(COMPUTE) * scale - offset[:, None]), 0)
    tl.store(sums + launch.row_start(view * parts + part, K, 1) + column, total, column < K)


@triton.jit(do_not_specialize=["parts"])
def _mean_kernel(
    sums,  # [parts, K]
    rows,  # 0-dim, of how many rows; or None
    slope,  # [K]: log(mean * K)
    entropies,  # [programs] float64: of a block, the sum of mean * log(mean)
    parts,
    K,
    count: tl.float64,  # of how many rows, without `rows`
    BLOCK: tl.constexpr,
):
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    for i in range(0, parts):
        total += tl.load(sums + launch.row_start(i, K, 1) + column, column < K, 0).to(tl.float64)
    n = tl.full((), count, tl.float64)
    if rows is not None:
        n = tl.load(rows).to(tl.float64)
    mean = total / n
    log_mean = tl.where(mean == 0, -1e4, tl.log(mean))  # 0 log 0 is 0
    tl.store(entropies + tl.program_id(0), tl.sum(tl.where(column < K, mean * log_mean, 0.0), 0))
    tl.store(slope + column, log_mean + tl.log(tl.full((), K, tl.float64)), column < K)


@triton.jit
def _loss(entropies, blocks, rows, loss, scale, K, factor, IN_KERNEL: tl.constexpr):
    """By one program; `factor` is the scale, or the number that is divided by `rows` for it."""
    tl.store(loss, launch.summed(entropies, blocks, 1024) + tl.log(tl.full((), K, tl.float64)))
    of_gradients = tl.full((), 1.0, tl.float64)
    if not IN_KERNEL:
        of_gradients = tl.full((), factor, tl.float64)
        if rows is not None:
            of_gradients /= tl.load(rows).to(tl.float64)
    tl.store(scale, of_gradients)


@triton.jit(do_not_specialize=["N", "blocks"])
def _softmax_slope_kernel(
    views,  # tuple of V x [N, K], rows s_rows[v] * ALIGN apart; None: the loss alone
    s_rows,  # tuple of V / ALIGN
    slope,  # [K]
    gradients,  # tuple of V x [N, K] contiguous: p * (slope - <p, slope>), p = softmax(x * per_temperature)
    entropies,  # [blocks] float64, for the first program; None, as `loss` and `scale`: no loss is wanted
    rows,  # 0-dim, what gradients are divided by; or None
    loss,  # 0-dim
    scale,  # 0-dim
    N,
    K,  # / ALIGN
    blocks,
    per_temperature: tl.float64,
    factor: tl.float64,  # of the gradients
    IN_KERNEL: tl.constexpr,  # gradients are multiplied by `factor` here
    COMPUTE: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    program = tl.program_id(0)
    if entropies is not None:
        program -= 1
        if program < 0:
            _loss(entropies, blocks, rows, loss, scale, K * ALIGN, factor, IN_KERNEL)
    if views is not None:
        view = tl.maximum(program, 0) // N
        i_row = tl.maximum(program, 0) % N
        width = tl.where(program < 0, 0, K * ALIGN)  # the program of the loss has no row
        column = tl.arange(0, BLOCK)
        row = launch.chosen(views, view) + launch.row_start(i_row, launch.chosen(s_rows, view), ALIGN)
        per_unit = tl.full((), per_temperature, COMPUTE)
        maximum = tl.full((), -float("inf"), COMPUTE)
        shift = tl.zeros((), COMPUTE)
        b_total = tl.zeros([BLOCK], COMPUTE)
        b_slopes = tl.zeros([BLOCK], COMPUTE)
        for i in tl.range(0, width, BLOCK, num_stages=STAGES):
            mask = column < K * ALIGN - i
            v = tl.load(row + i + column, mask, -float("inf")).to(COMPUTE) * per_unit
            new = tl.maximum(maximum, tl.max(v, 0))
            shift = launch.finite(new)
            fade = tl.exp(launch.finite(maximum) - shift)
            e = tl.exp(v - shift)
            b_total = b_total * fade + e
            b_slopes = b_slopes * fade + e * tl.load(slope + i + column, mask, 0)
            maximum = new
        inverse = 1 / tl.sum(b_total, 0)
        mean = tl.sum(b_slopes, 0) * inverse
        if IN_KERNEL:
            of_row = inverse * tl.full((), factor, COMPUTE)
            if rows is not None:
                of_row /= tl.load(rows).to(COMPUTE)
        else:
            of_row = inverse
        out = launch.chosen(gradients, view) + launch.row_start(i_row, K, ALIGN)
        for i in tl.range(0, width, BLOCK, num_stages=STAGES):
            mask = column < K * ALIGN - i
            v = tl.load(row + i + column, mask, 0).to(COMPUTE) * per_unit
            p = tl.exp(v - shift) * of_row
            tl.store(out + i + column, p * (tl.load(slope + i + column, mask, 0) - mean), mask)


def softmax_slope(x: Tensor, temperature: float, slope: Tensor, out: Tensor) -> Tensor:
    """out, contiguous, which may be x itself: `p * (slope - <p, slope>)`, p the softmax of a row of x [N, K]."""
    _launch_slopes((x,), (out,), slope, temperature, 1.0, False)
    return out


def _launch_slopes(
    views: tuple[Tensor, ...],
    gradients: tuple[Tensor, ...],
    slope: Tensor,
    temperature: float,
    factor: float,
    in_kernel: bool,
    of_loss: tuple = (None, None, None, None),  # entropies, rows, loss, scale
) -> None:
    entropies = of_loss[0]
    n = len(views[0]) if views else 1
    align = launch.alignment(*views, slope) if views else 1
    k = len(slope)
    launch.launch(
        _softmax_slope_kernel,
        (len(views) * n + (entropies is not None),),
        views or None,
        tuple(x.stride(0) // align for x in views) or None,
        slope,
        gradients or None,
        *of_loss,
        n,
        k // align,
        0 if entropies is None else len(entropies),
        1 / temperature,
        float(factor),
        IN_KERNEL=in_kernel,
        COMPUTE=launch.DTYPES[slope.dtype],
        ALIGN=align,
        **tiling.row_logsumexp(k, slope.dtype),
        device_of=slope,
    )


def mean_entropy(
    scores: list[Tensor],  # V x [B, K]
    temperature: float,
    total: Tensor | None,  # [K]
    rows: Tensor | None,  # 0-dim
    wanted: list[bool],
) -> tuple[Tensor, list[Tensor], Tensor]:
    compute = compute_dtype(scores[0].dtype)
    if scores[0].dtype not in launch.DTYPES:
        return reference.mean_entropy(scores, temperature, total, rows, wanted)
    scores = [dense_rows(x) for x in scores]
    n = sum(map(len, scores))
    if total is None or rows is None:
        sums = _sums_of_probabilities(scores, temperature, compute)
        rows = None
        factor = 1 / (n * temperature)
    else:
        sums = total.contiguous()[None]
        factor = 1 / temperature
    k = scores[0].shape[1]
    tile = tiling.sinkhorn_join()
    blocks = triton.cdiv(k, tile["BLOCK"])
    slope = torch.empty(k, dtype=compute, device=scores[0].device)
    entropies = torch.empty(blocks, dtype=torch.float64, device=slope.device)
    launch.launch(
        _mean_kernel, (blocks,), sums, rows, slope, entropies, len(sums), k, float(n), **tile, device_of=slope
    )
    gradients = [
        torch.empty(x.shape, dtype=x.dtype, device=x.device) if want else no_gradient(x)
        for x, want in zip(scores, wanted, strict=True)
    ]
    views = tuple(x for x, want in zip(scores, wanted, strict=True) if want)
    of_views = tuple(x for x, want in zip(gradients, wanted, strict=True) if want)
    loss, scale = slope.new_empty(()), slope.new_empty(())
    in_kernel = scores[0].dtype != torch.float16 and 0 < factor < math.inf
    _launch_slopes(views, of_views, slope, temperature, factor, in_kernel, (entropies, rows, loss, scale))
    return loss, gradients, scale


def _sums_of_probabilities(scores: list[Tensor], temperature: float, compute: torch.dtype) -> Tensor:
    """[parts, K]: sums over parts of all views' rows."""
    b, k = scores[0].shape
    views = tuple(scores)
    lse = torch.empty(len(views), b, dtype=compute, device=scores[0].device)
    unbiased_logsumexps(views, 1 / temperature, lse)
    tile = tiling.column_logsumexp(k, compute)
    parts = triton.cdiv(b, tile["PART"])
    sums = lse.new_empty(len(views) * parts, k)
    launch.launch(
        _probabilities_kernel,
        (triton.cdiv(k, tile["BLOCK"]) * len(sums),),
        views,
        tuple(x.stride(0) for x in views),
        lse,
        sums,
        b,
        k,
        parts,
        1 / temperature,
        COMPUTE=launch.DTYPES[compute],
        **tile,
        device_of=lse,
    )
    return sums
