"""`(x * scale + bias).logsumexp(1)`: what Sinkhorn and the prototype losses know of a row before they read it again."""

import ctypes

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launch, tiling


@triton.jit
def biased(x, bias, SCALE: tl.constexpr, LOW: tl.constexpr, COMPUTE: tl.constexpr):
    """`x * (SCALE + LOW) + bias`, rounded once: a float64 bias of thousands nearly cancels with what it is added to."""
    v = x.to(COMPUTE) * tl.full((), SCALE, COMPUTE)
    if bias.dtype == COMPUTE:
        v += bias
    else:
        high = bias.to(COMPUTE)
        low = tl.where(tl.abs(high) == float("inf"), 0.0, (bias - high).to(COMPUTE))
        v = (v + high) + tl.where(tl.abs(v) == float("inf"), 0.0, x.to(COMPUTE) * LOW + low)
    return v


@triton.jit(do_not_specialize=["N", "s_problem"])
def _row_logsumexp_kernel(
    x,  # [P, N, K], rows s_row * ALIGN apart
    bias,  # [P, K], or None
    out,  # [P, N]
    N,
    K,  # / ALIGN
    s_problem,  # / ALIGN
    s_row,  # / ALIGN
    SOFTMAX: tl.constexpr,  # for a softmax: an infinite logsumexp becomes NaN
    SCALE: tl.constexpr,  # a float argument would be float32
    LOW: tl.constexpr,
    COMPUTE: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    i_row = tl.program_id(0)
    problem = i_row // N
    column = tl.arange(0, BLOCK)
    row = x + launch.row_start(problem, s_problem, ALIGN) + launch.row_start(i_row % N, s_row, ALIGN)
    if bias is not None:
        bias += launch.row_start(problem, K, ALIGN)
    scale = tl.full((), SCALE, COMPUTE)
    maximum = tl.full((), -float("inf"), COMPUTE)  # of the block: one of each element costs a second exponential
    shift = tl.zeros((), COMPUTE)
    b_total = tl.zeros([BLOCK], COMPUTE)
    for i in tl.range(0, K * ALIGN, BLOCK, num_stages=STAGES):
        mask = column < K * ALIGN - i
        b_x = tl.load(row + i + column, mask, -float("inf"))
        if bias is not None:
            v = biased(b_x, tl.load(bias + i + column, mask, 0), SCALE, LOW, COMPUTE)
        else:
            v = b_x.to(COMPUTE) * scale
        new = tl.maximum(maximum, tl.max(v, 0))
        shift = launch.finite(new)
        b_total = b_total * tl.exp(launch.finite(maximum) - shift) + tl.exp(v - shift)
        maximum = new
    logsumexp = shift + tl.log(tl.sum(b_total, 0))
    tl.store(out + i_row, launch.no_softmax(logsumexp) if SOFTMAX else logsumexp)


def row_logsumexp(
    x: Tensor,  # [N, K] or [P, N, K], with dense rows
    bias: Tensor | None,  # [K] or [P, K], dense, in the dtype to compute in or float64
    scale: float,
    out: Tensor,  # [N] or [P, N]
    softmax: bool,
) -> None:
    """`softmax`: out is what a softmax subtracts, NaN where the logsumexp is infinite."""
    align = launch.alignment(x)
    problems = x if x.dim() == 3 else x[None]
    p, n, k = problems.shape
    launch.launch(
        _row_logsumexp_kernel,
        (p * n,),
        x,
        bias,
        out,
        n,
        k // align,
        problems.stride(0) // align,
        problems.stride(1) // align,
        SOFTMAX=softmax,
        **two_parts(scale, out.dtype),
        COMPUTE=launch.DTYPES[out.dtype],
        ALIGN=align,
        **tiling.row_logsumexp(k, out.dtype),
        device_of=x,
    )


def dense(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Contiguous, in the dtype."""
    return None if x is None else x.to(dtype).contiguous()


def two_parts(scale: float, compute: torch.dtype) -> dict[str, float]:
    """SCALE as the kernels' arithmetic knows it, and LOW, what that leaves of it."""
    high = scale if compute == torch.float64 else ctypes.c_float(scale).value
    return {"SCALE": high, "LOW": scale - high}
