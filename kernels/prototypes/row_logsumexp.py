"""`(x * scale + bias).logsumexp(1)`: what Sinkhorn and the prototype losses know of a row before they read it again.

Rows of several tensors, which needn't lie together, are one launch: 64 images are too few programs for a GPU, and all
views of them aren't.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launch, tiling


@triton.jit
def two_parts(scale, COMPUTE: tl.constexpr):
    """A factor as the kernels' arithmetic knows it, and what that leaves of it."""
    whole = tl.full((), scale, tl.float64)
    high = whole.to(COMPUTE)
    return high, (whole - high.to(tl.float64)).to(COMPUTE)


@triton.jit
def biased(x, bias, scale, low, COMPUTE: tl.constexpr):
    """`x * (scale + low) + bias`, rounded once: a float64 bias of thousands nearly cancels with what it is added to."""
    v = x.to(COMPUTE) * scale
    if bias.dtype == COMPUTE:
        v += bias
    else:
        high = bias.to(COMPUTE)
        rest = tl.where(tl.abs(high) == float("inf"), 0.0, (bias - high).to(COMPUTE))
        v = (v + high) + tl.where(tl.abs(v) == float("inf"), 0.0, x.to(COMPUTE) * low + rest)
    return v


@triton.jit(do_not_specialize=["P", "N", "s_problem"])
def _row_logsumexp_kernel(
    views,  # tuple of V x [P, N, K], rows s_rows[v] * ALIGN apart
    s_rows,  # tuple of V / ALIGN
    biases,  # tuple of [P, K], of the views after the first UNBIASED ones; or None
    out,  # [V, P, N]
    P,
    N,
    K,  # / ALIGN
    s_problem,  # / ALIGN
    unbiased_scale: tl.float64,  # of the first UNBIASED views
    scale: tl.float64,  # of the others
    UNBIASED: tl.constexpr,
    SOFTMAX: tl.constexpr,  # for a softmax: an infinite logsumexp becomes NaN
    COMPUTE: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    # all views of a row in turn: what reads them once more begins with the rows that are still in the L2 cache
    view = tl.program_id(0) % len(views)
    i_row = tl.program_id(0) // len(views) % N
    problem = tl.program_id(0) // len(views) // N
    column = tl.arange(0, BLOCK)
    row = launch.chosen(views, view) + launch.row_start(problem, s_problem, ALIGN)
    row += launch.row_start(i_row, launch.chosen(s_rows, view), ALIGN)
    high, low = two_parts(scale, COMPUTE)
    if UNBIASED > 0:
        high = tl.where(view < UNBIASED, tl.full((), unbiased_scale, COMPUTE), high)
    if biases is not None:
        bias = launch.chosen(biases, view - UNBIASED) + launch.row_start(problem, K, ALIGN)
    maximum = tl.full((), -float("inf"), COMPUTE)  # of the block: one of each element costs a second exponential
    shift = tl.zeros((), COMPUTE)
    b_total = tl.zeros([BLOCK], COMPUTE)
    for i in tl.range(0, K * ALIGN, BLOCK, num_stages=STAGES):
        mask = column < K * ALIGN - i
        b_x = tl.load(row + i + column, mask, -float("inf"))
        if biases is not None:
            v = biased(b_x, tl.load(bias + i + column, mask & (view >= UNBIASED), 0), high, low, COMPUTE)
        else:
            v = b_x.to(COMPUTE) * high
        new = tl.maximum(maximum, tl.max(v, 0))
        shift = launch.finite(new)
        b_total = b_total * tl.exp(launch.finite(maximum) - shift) + tl.exp(v - shift)
        maximum = new
    logsumexp = shift + tl.log(tl.sum(b_total, 0))
    tl.store(out + (view * P + problem) * N + i_row, launch.no_softmax(logsumexp) if SOFTMAX else logsumexp)


def row_logsumexp(
    x: Tensor,  # [N, K] or [P, N, K], with dense rows
    bias: Tensor | None,  # [K] or [P, K], dense, in the dtype to compute in or float64
    scale: float,
    out: Tensor,  # [N] or [P, N]
    softmax: bool,
) -> None:
    """`softmax`: out is what a softmax subtracts, NaN where the logsumexp is infinite."""
    _row_logsumexps((x if x.dim() == 3 else x[None],), 0, None if bias is None else (bias,), 1.0, scale, out, softmax)


def row_logsumexps(
    views: tuple[Tensor, ...],  # V x [N, K], with dense rows
    scale: float,
    other_views: tuple[Tensor, ...],
    other_biases: tuple[Tensor, ...] | None,  # [K] for each of these views, dense, in the dtype to compute in
    other_scale: float,
    out: Tensor,  # [views of both, N]
) -> None:
    """What a softmax of every row subtracts: those of `views * scale`, and of the others, which have biases.

    One launch; two, where views and others are of different dtypes.
    """
    first, second = ([x[None] for x in some] for some in (views, other_views))
    options = other_biases, scale, other_scale
    if not views or views[0].dtype == other_views[0].dtype:
        _row_logsumexps((*first, *second), len(views), *options, out, softmax=True)
        return
    _row_logsumexps(tuple(first), len(views), None, scale, other_scale, out[: len(views)], softmax=True)
    _row_logsumexps(tuple(second), 0, *options, out[len(views) :], softmax=True)


def unbiased_logsumexps(views: tuple[Tensor, ...], scale: float, out: Tensor) -> None:
    """[V, N]: what a softmax of every row of `views * scale` subtracts; V x [N, K], with dense rows."""
    _row_logsumexps(tuple(x[None] for x in views), len(views), None, scale, 1.0, out, softmax=True)


def _row_logsumexps(
    views: tuple[Tensor, ...],  # V x [P, N, K] of one dtype
    unbiased: int,
    biases: tuple[Tensor, ...] | None,
    unbiased_scale: float,
    scale: float,
    out: Tensor,
    softmax: bool,
) -> None:
    align = launch.alignment(*views)
    p, n, k = views[0].shape
    launch.launch(
        _row_logsumexp_kernel,
        (len(views) * p * n,),
        views,
        tuple(x.stride(1) // align for x in views),
        biases,
        out,
        p,
        n,
        k // align,
        views[0].stride(0) // align if p > 1 else 0,
        float(unbiased_scale),
        float(scale),
        UNBIASED=unbiased,
        SOFTMAX=softmax,
        COMPUTE=launch.DTYPES[out.dtype],
        ALIGN=align,
        **tiling.row_logsumexp(k, out.dtype),
        device_of=out,
    )


def dense(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Contiguous, in the dtype."""
    return None if x is None else x.to(dtype).contiguous()
