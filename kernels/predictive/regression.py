"""`smooth_l1_loss(prediction, layer_norm(target), beta=beta)` and the prediction's gradient, unscaled, in one pass.

A row that fits in registers is read once; a longer one three times, as its mean and its variance come first. The mean
is corrected by that of what it leaves: in float32 a large one has lost digits that the differences from it have.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launch, tiling
from ..arithmetic import compute_dtype, dense_rows
from . import reference


@triton.jit
def _element(error, BETA: tl.constexpr, dtype: tl.constexpr):
    """An element's loss and slope: squared error where beta is 0."""
    if BETA == 0:
        loss = error * error
        slope = 2 * error
    else:
        beta = tl.full((), BETA, dtype)
        inverse = 1 / beta
        size = tl.abs(error)
        loss = tl.where(size < beta, 0.5 * error * error * inverse, size - 0.5 * beta)
        slope = tl.where(size >= beta, tl.where(error < 0, -1.0, 1.0).to(dtype), error * inverse)  # NaN stays
    return loss, slope


@triton.jit(do_not_specialize=["N"])
def _regression_kernel(
    prediction,  # [N, D], rows s_x * ALIGN apart
    target,  # [N, D], rows s_y * ALIGN apart
    gradient,  # [N, D] contiguous, or None
    sums,  # [programs], the losses of a program's elements
    N,
    D,  # / ALIGN
    s_x,  # / ALIGN
    s_y,  # / ALIGN
    COMPUTE: tl.constexpr,
    BETA: tl.constexpr,  # a float argument would be float32
    NORMALIZE: tl.constexpr,
    EPS: tl.constexpr,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,  # >= D * ALIGN
):
    i_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (i_row < N)[:, None] & (column < D * ALIGN)
    y = tl.load(target + launch.row_start(i_row, s_y, ALIGN)[:, None] + column, inside, 0).to(COMPUTE)
    x = tl.load(prediction + launch.row_start(i_row, s_x, ALIGN)[:, None] + column, inside, 0).to(COMPUTE)
    if NORMALIZE:
        per_element = 1 / (D * ALIGN).to(COMPUTE)
        y = tl.where(inside, y - (tl.sum(y, 1) * per_element)[:, None], 0.0)
        y = tl.where(inside, y - (tl.sum(y, 1) * per_element)[:, None], 0.0)
        variance = tl.sum(y * y, 1) * per_element
        y = y * (1 / tl.sqrt(variance + tl.full((), EPS, COMPUTE)))[:, None]
    loss, slope = _element(x - y, BETA, COMPUTE)
    tl.store(sums + tl.program_id(0), tl.sum(tl.sum(tl.where(inside, loss, 0.0), 1), 0))
    if gradient is not None:
        tl.store(gradient + launch.row_start(i_row, D, ALIGN)[:, None] + column, slope, inside)


@triton.jit
def _regression_long_kernel(
    prediction,  # [N, D], rows s_x * ALIGN apart
    target,  # [N, D], rows s_y * ALIGN apart
    gradient,  # [N, D] contiguous, or None
    sums,  # [N]
    D,  # / ALIGN
    s_x,  # / ALIGN
    s_y,  # / ALIGN
    COMPUTE: tl.constexpr,
    BETA: tl.constexpr,
    NORMALIZE: tl.constexpr,
    EPS: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    i_row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    prediction += launch.row_start(i_row, s_x, ALIGN)
    target += launch.row_start(i_row, s_y, ALIGN)
    mean = tl.zeros((), COMPUTE)
    rest = tl.zeros((), COMPUTE)
    factor = tl.full((), 1.0, COMPUTE)
    if NORMALIZE:
        per_element = 1 / (D * ALIGN).to(COMPUTE)
        total = tl.zeros([BLOCK], COMPUTE)
        for i in tl.range(0, D * ALIGN, BLOCK, num_stages=STAGES):
            total += tl.load(target + i + column, column < D * ALIGN - i, 0).to(COMPUTE)
        mean = tl.sum(total, 0) * per_element
        total = tl.zeros([BLOCK], COMPUTE)
        squares = tl.zeros([BLOCK], COMPUTE)
        for i in tl.range(0, D * ALIGN, BLOCK, num_stages=STAGES):
            inside = column < D * ALIGN - i
            y = tl.where(inside, tl.load(target + i + column, inside, 0).to(COMPUTE) - mean, 0.0)
            total += y
            squares += y * y
        rest = tl.sum(total, 0) * per_element
        variance = tl.sum(squares, 0) * per_element - rest * rest
        factor = 1 / tl.sqrt(variance + tl.full((), EPS, COMPUTE))
    total = tl.zeros([BLOCK], COMPUTE)
    for i in tl.range(0, D * ALIGN, BLOCK, num_stages=STAGES):
        inside = column < D * ALIGN - i
        y = tl.load(target + i + column, inside, 0).to(COMPUTE)
        if NORMALIZE:
            y = ((y - mean) - rest) * factor
        x = tl.load(prediction + i + column, inside, 0).to(COMPUTE)
        loss, slope = _element(x - y, BETA, COMPUTE)
        total += tl.where(inside, loss, 0.0)
        if gradient is not None:
            tl.store(gradient + launch.row_start(i_row, D, ALIGN) + i + column, slope, inside)
    tl.store(sums + i_row, tl.sum(total, 0))


def regression(
    prediction: Tensor,  # [N, D]
    target: Tensor,  # [N, D]
    beta: float,
    normalize: bool,
    eps: float,
    wanted: list[bool],
) -> tuple[Tensor, list[Tensor], Tensor]:
    if prediction.dtype not in launch.DTYPES or target.dtype not in launch.DTYPES:
        return reference.regression(prediction, target, beta, normalize, eps, wanted)
    n, d = prediction.shape
    prediction = dense_rows(prediction)
    target = dense_rows(target)
    compute = compute_dtype(prediction.dtype, target.dtype)
    gradient = torch.empty((n, d), dtype=prediction.dtype, device=prediction.device) if wanted[0] else None
    align = launch.alignment(prediction, target)
    tile = tiling.regression(d, compute)
    programs = n if tile is None else triton.cdiv(n, tile["ROWS"])
    sums = torch.empty(programs, dtype=compute, device=prediction.device)
    launch.launch(
        _regression_long_kernel if tile is None else _regression_kernel,
        (programs,),
        prediction,
        target,
        gradient,
        sums,
        *([] if tile is None else [n]),
        d // align,
        prediction.stride(0) // align,
        target.stride(0) // align,
        COMPUTE=launch.DTYPES[compute],
        BETA=beta,
        NORMALIZE=normalize,
        EPS=eps,
        ALIGN=align,
        **(tile or tiling.regression_long(compute)),
        device_of=prediction,
    )
    scale = torch.full((), 1 / (n * d), dtype=compute, device=prediction.device)
    return sums.sum() * scale, [prediction.new_empty(0) if gradient is None else gradient], scale
