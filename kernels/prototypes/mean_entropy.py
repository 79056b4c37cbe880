"""Mean entropy: each prototype's mean probability by a step of Sinkhorn from potentials of 0, then rows' gradients."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launch, tiling
from ..arithmetic import compute_dtype, dense_rows, no_gradient
from . import reference
from .sinkhorn import sinkhorn_step


@triton.jit
def _softmax_slope_kernel(
    x,  # [N, K], rows s_row * ALIGN apart
    slope,  # [K]
    gradient,  # [N, K] contiguous: p * (slope - <p, slope>), p = softmax(x * per_temperature)
    K,  # / ALIGN
    s_row,  # / ALIGN
    per_temperature: tl.float64,
    COMPUTE: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    i_row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    row = x + launch.row_start(i_row, s_row, ALIGN)
    scale = tl.full((), per_temperature, COMPUTE)
    maximum = tl.full((), -float("inf"), COMPUTE)
    shift = tl.zeros((), COMPUTE)
    b_total = tl.zeros([BLOCK], COMPUTE)
    b_slopes = tl.zeros([BLOCK], COMPUTE)
    for i in tl.range(0, K * ALIGN, BLOCK, num_stages=STAGES):
        mask = column < K * ALIGN - i
        v = tl.load(row + i + column, mask, -float("inf")).to(COMPUTE) * scale
        new = tl.maximum(maximum, tl.max(v, 0))
        shift = launch.finite(new)
        fade = tl.exp(launch.finite(maximum) - shift)
        e = tl.exp(v - shift)
        b_total = b_total * fade + e
        b_slopes = b_slopes * fade + e * tl.load(slope + i + column, mask, 0)
        maximum = new
    inverse = 1 / tl.sum(b_total, 0)
    mean = tl.sum(b_slopes, 0) * inverse
    out = gradient + launch.row_start(i_row, K, ALIGN)
    for i in tl.range(0, K * ALIGN, BLOCK, num_stages=STAGES):
        mask = column < K * ALIGN - i
        v = tl.load(row + i + column, mask, 0).to(COMPUTE) * scale
        p = tl.exp(v - shift) * inverse
        tl.store(out + i + column, p * (tl.load(slope + i + column, mask, 0) - mean), mask)


def softmax_slope(x: Tensor, temperature: float, slope: Tensor, out: Tensor) -> Tensor:
    """out, contiguous, which may be x itself: `p * (slope - <p, slope>)`, p the softmax of a row of x [N, K]."""
    align = launch.alignment(x)
    launch.launch(
        _softmax_slope_kernel,
        (len(x),),
        x,
        slope,
        out,
        x.shape[1] // align,
        x.stride(0) // align,
        per_temperature=1 / temperature,
        COMPUTE=launch.DTYPES[slope.dtype],
        ALIGN=align,
        **tiling.softmax_slope(x.shape[1], slope.dtype),
        device_of=x,
    )
    return out


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
    device = scores[0].device
    prototypes = scores[0].shape[1]
    if total is None or rows is None:
        zeros = torch.zeros(prototypes, dtype=torch.float64, device=device)
        n = torch.full((), sum(map(len, scores)), dtype=torch.float64, device=device)
        log_sums = torch.stack([sinkhorn_step(x, zeros, temperature) for x in scores]).logsumexp(0)
        log_mean = log_sums - math.log(sum(map(len, scores)))
    else:
        n = rows.double()
        log_mean = (total.double() / n).log()
    log_mean = log_mean.clamp_min(-1e4)  # 0 log 0 is 0
    negative_entropy = (log_mean.exp() * log_mean).sum()
    slope = (log_mean - negative_entropy).to(compute)  # a constant changes nothing, and this one leaves small numbers
    gradients = [no_gradient(x) for x in scores]
    for i, x in enumerate(scores):
        if wanted[i]:
            gradients[i] = softmax_slope(x, temperature, slope, torch.empty(x.shape, dtype=x.dtype, device=device))
    loss = (negative_entropy + math.log(prototypes)).to(compute)
    return loss, gradients, (1 / (n * temperature)).to(compute)
