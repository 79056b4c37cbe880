"""`smooth_l1_loss(prediction, layer_norm(target), beta=beta)` and the prediction's gradient, unscaled, in one pass; of
all rows, or of chosen ones with weights, which are gathered and whose gradients are scattered within the same pass.

A row that fits in registers is read once; a longer one three times, as its mean and its variance come first. The mean
is corrected by that of what it leaves: in float32 a large one has lost digits that the differences from it have.
Gradients have their scale already, but in float16.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launch, tiling
from ..arithmetic import compute_dtype, dense_rows, no_gradient
from ..native import scale_within
from . import reference


@triton.jit
def _element(error, beta, SQUARED: tl.constexpr, dtype: tl.constexpr):
    """An element's loss and slope: squared error where beta is 0."""
    if SQUARED:
        loss = error * error
        slope = 2 * error
    else:
        beta = tl.full((), beta, dtype)
        inverse = 1 / beta
        size = tl.abs(error)
        loss = tl.where(size < beta, 0.5 * error * error * inverse, size - 0.5 * beta)
        slope = tl.where(size >= beta, tl.where(error < 0, -1.0, 1.0).to(dtype), error * inverse)  # NaN stays
    return loss, slope


@triton.jit
def _factor(factor, one_over, COMPUTE: tl.constexpr):
    """What gradients are multiplied by."""
    product = tl.full((), factor, COMPUTE)
    if one_over is not None:
        product *= tl.load(one_over)
    return product


@triton.jit
def _chosen(rows, weights, place, is_place, N, COMPUTE: tl.constexpr):
    """Which rows are at these places, their weights, whether they are taken, and whether they are in the tensors."""
    weight = tl.load(weights + place, is_place, 0).to(COMPUTE)
    i_row = tl.load(rows + place, is_place, 0)
    return i_row, weight, weight != 0, (i_row >= 0) & (i_row < N)


@triton.jit(do_not_specialize=["M", "N"])
def _regression_kernel(
    prediction,  # [N, D], rows s_x * ALIGN apart
    target,  # [N, D], rows s_y * ALIGN apart
    gradient,  # [N, D] contiguous, or None
    sums,  # [programs], the losses of a program's elements
    rows,  # [M] int64, which rows count; None: all, and M is N
    weights,  # [M], of these rows, or None
    M,
    N,
    D,  # / ALIGN
    s_x,  # / ALIGN
    s_y,  # / ALIGN
    beta: tl.float64,
    eps: tl.float64,
    factor: tl.float64,  # of the gradient
    one_over,  # 0-dim, another one; or None
    COMPUTE: tl.constexpr,
    SQUARED: tl.constexpr,  # beta is 0
    NORMALIZE: tl.constexpr,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,  # >= D * ALIGN
):
    i_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    taken = i_row < M
    there = taken
    if rows is not None:
        i_row, weight, taken, there = _chosen(rows, weights, i_row, taken, N, COMPUTE)
    column = tl.arange(0, BLOCK)[None, :]
    inside = (taken & there)[:, None] & (column < D * ALIGN)
    y = tl.load(target + launch.row_start(i_row, s_y, ALIGN)[:, None] + column, inside, 0).to(COMPUTE)
    x = tl.load(prediction + launch.row_start(i_row, s_x, ALIGN)[:, None] + column, inside, 0).to(COMPUTE)
    if NORMALIZE:
        per_element = 1 / tl.cast(D * ALIGN, COMPUTE)  # D may be the constant 1, which has no .to
        y = tl.where(inside, y - (tl.sum(y, 1) * per_element)[:, None], 0.0)
        y = tl.where(inside, y - (tl.sum(y, 1) * per_element)[:, None], 0.0)
        variance = tl.sum(y * y, 1) * per_element
        y = y * (1 / tl.sqrt(variance + tl.full((), eps, COMPUTE)))[:, None]
    loss, slope = _element(x - y, beta, SQUARED, COMPUTE)
    loss = tl.where(inside, loss, 0.0)
    if rows is None:
        tl.store(sums + tl.program_id(0), tl.sum(tl.sum(loss, 1), 0))
    else:
        of_rows = tl.where(taken, tl.where(there, tl.sum(loss, 1) * weight, float("nan")), 0.0)
        tl.store(sums + tl.program_id(0), tl.sum(of_rows, 0))
        slope *= weight[:, None]
    if gradient is not None:
        at = gradient + launch.row_start(i_row, D, ALIGN)[:, None] + column
        tl.store(at, slope * _factor(factor, one_over, COMPUTE), inside)


@triton.jit(do_not_specialize=["M", "N"])
def _regression_long_kernel(
    prediction,  # [N, D], rows s_x * ALIGN apart
    target,  # [N, D], rows s_y * ALIGN apart
    gradient,  # [N, D] contiguous, or None
    sums,  # [M]
    rows,  # as above
    weights,
    M,
    N,
    D,  # / ALIGN
    s_x,  # / ALIGN
    s_y,  # / ALIGN
    beta: tl.float64,
    eps: tl.float64,
    factor: tl.float64,
    one_over,
    COMPUTE: tl.constexpr,
    SQUARED: tl.constexpr,
    NORMALIZE: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    i_row = tl.program_id(0)
    width = D * ALIGN
    if rows is not None:
        i_row, weight, taken, there = _chosen(rows, weights, i_row, True, N, COMPUTE)
        width = tl.where(taken & there, width, 0)  # of a row that isn't taken nothing is read
    column = tl.arange(0, BLOCK)
    prediction += launch.row_start(i_row, s_x, ALIGN)
    target += launch.row_start(i_row, s_y, ALIGN)
    of_gradient = _factor(factor, one_over, COMPUTE)
    mean = tl.zeros((), COMPUTE)
    rest = tl.zeros((), COMPUTE)
    factor = tl.full((), 1.0, COMPUTE)
    if NORMALIZE:
        per_element = 1 / tl.cast(D * ALIGN, COMPUTE)  # D may be the constant 1, which has no .to
        total = tl.zeros([BLOCK], COMPUTE)
        for i in tl.range(0, width, BLOCK, num_stages=STAGES):
            total += tl.load(target + i + column, column < width - i, 0).to(COMPUTE)
        mean = tl.sum(total, 0) * per_element
        total = tl.zeros([BLOCK], COMPUTE)
        squares = tl.zeros([BLOCK], COMPUTE)
        for i in tl.range(0, width, BLOCK, num_stages=STAGES):
            inside = column < width - i
            y = tl.where(inside, tl.load(target + i + column, inside, 0).to(COMPUTE) - mean, 0.0)
            total += y
            squares += y * y
        rest = tl.sum(total, 0) * per_element
        variance = tl.sum(squares, 0) * per_element - rest * rest
        factor = 1 / tl.sqrt(variance + tl.full((), eps, COMPUTE))
    total = tl.zeros([BLOCK], COMPUTE)
    for i in tl.range(0, width, BLOCK, num_stages=STAGES):
        inside = column < width - i
        y = tl.load(target + i + column, inside, 0).to(COMPUTE)
        if NORMALIZE:
            y = ((y - mean) - rest) * factor
        x = tl.load(prediction + i + column, inside, 0).to(COMPUTE)
        loss, slope = _element(x - y, beta, SQUARED, COMPUTE)
        total += tl.where(inside, loss, 0.0)
        if gradient is not None:
            if rows is not None:
                slope *= weight
            slope *= of_gradient
            tl.store(gradient + launch.row_start(i_row, D, ALIGN) + i + column, slope, inside)
    of_row = tl.sum(total, 0)
    if rows is not None:
        of_row = tl.where(taken, tl.where(there, of_row * weight, float("nan")), 0.0)
    tl.store(sums + tl.program_id(0), of_row)


def _sums(
    prediction: Tensor,  # [N, D]
    target: Tensor,  # [N, D]
    gradient: Tensor | None,  # [N, D] contiguous, written where rows count
    rows: Tensor | None,  # [M] int64; None: all
    weights: Tensor | None,  # [M]
    beta: float,
    normalize: bool,
    eps: float,
    factor: float,  # of the gradient
    one_over: Tensor | None,  # 0-dim, another one
) -> Tensor:
    """[programs], sums of the elements' losses, each times its row's weight."""
    n, d = prediction.shape
    count = n if rows is None else len(rows)
    prediction = dense_rows(prediction)
    target = dense_rows(target)
    compute = compute_dtype(prediction.dtype, target.dtype)
    align = launch.alignment(prediction, target)
    tile = tiling.regression(d, compute)
    programs = count if tile is None else triton.cdiv(count, tile["ROWS"])
    sums = torch.empty(programs, dtype=compute, device=prediction.device)
    if programs:
        launch.launch(
            _regression_long_kernel if tile is None else _regression_kernel,
            (programs,),
            prediction,
            target,
            gradient,
            sums,
            rows,
            weights,
            count,
            n,
            d // align,
            prediction.stride(0) // align,
            target.stride(0) // align,
            float(beta),
            float(eps),
            float(factor),
            one_over,
            COMPUTE=launch.DTYPES[compute],
            SQUARED=beta == 0,
            NORMALIZE=normalize,
            ALIGN=align,
            **(tile or tiling.regression_long(compute)),
            device_of=prediction,
        )
    return sums


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
    gradient = torch.empty((n, d), dtype=prediction.dtype, device=prediction.device) if wanted[0] else None
    scale = 1 / (n * d)
    in_kernel = scale_within(scale, prediction.dtype)
    sums = _sums(prediction, target, gradient, None, None, beta, normalize, eps, in_kernel, None)
    loss, left = launch.total(sums, scale, scale / in_kernel)
    return loss, [no_gradient(prediction) if gradient is None else gradient], left


def regression_rows(
    prediction: Tensor,  # [N, D]
    target: Tensor,  # [N, D]
    rows: Tensor,  # [M] int64
    weights: Tensor,  # [M]
    beta: float,
    normalize: bool,
    eps: float,
    wanted: list[bool],
) -> tuple[Tensor, list[Tensor], Tensor]:
    if prediction.dtype not in launch.DTYPES or target.dtype not in launch.DTYPES:
        return reference.regression_rows(prediction, target, rows, weights, beta, normalize, eps, wanted)
    n, d = prediction.shape
    gradient = torch.zeros((n, d), dtype=prediction.dtype, device=prediction.device) if wanted[0] else None
    weights = weights.to(compute_dtype(prediction.dtype, target.dtype)).contiguous()
    one_over = launch.one_over(weights, d)
    is_half = prediction.dtype == torch.float16
    options = (beta, normalize, eps, 1.0, None if is_half else one_over)
    sums = _sums(prediction, target, gradient, rows.contiguous(), weights, *options)
    loss, left = launch.total(sums, 1.0, 1.0, over=one_over)
    return loss, [no_gradient(prediction) if gradient is None else gradient], one_over if is_half else left
