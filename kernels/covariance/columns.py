"""Columns of embeddings: centred and divided by their standard deviation, and a gradient taken back through that.

A program owns a few columns and walks down their rows, up to three times; after the first they come from the L2 cache.
Sums have a fixed order, so the bits are the same at every call.
"""

import contextlib
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launch, tiling
from ..arithmetic import compute_dtype, dense_rows, exact_products


@triton.jit
def _inside(i_row, column, N, D):
    return (i_row < N)[:, None] & (column < D)[None, :]


@triton.jit(do_not_specialize=["N"])
def _standardise_kernel(
    x,  # [N, D], rows s_x apart
    out,  # [N, D] contiguous
    std,  # [D]
    other,  # [N, D] contiguous, or None
    dots,  # [D], of the columns of out and other
    N,
    D,
    s_x,
    COMPUTE: tl.constexpr,
    CORRECTION: tl.constexpr,  # std = sqrt(sum of squares / (N - CORRECTION) + EPS)
    EPS: tl.constexpr,
    DIVIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], COMPUTE)
    for i in range(0, N, ROWS):
        i_row = i + tl.arange(0, ROWS)
        at = launch.row_start(i_row, s_x, 1)[:, None] + column[None, :]
        total += tl.load(x + at, _inside(i_row, column, N, D), 0).to(COMPUTE)
    high = (tl.sum(total, 0) / N)[None, :]

    # The mean is high + low, as the rounding of one number may be as large as what is left of a column without it.
    remainder = tl.zeros([ROWS, COLUMNS], COMPUTE)
    squares = tl.zeros([ROWS, COLUMNS], COMPUTE)
    for i in range(0, N, ROWS):
        i_row = i + tl.arange(0, ROWS)
        at = launch.row_start(i_row, s_x, 1)[:, None] + column[None, :]
        mask = _inside(i_row, column, N, D)
        centred = tl.where(mask, tl.load(x + at, mask, 0).to(COMPUTE) - high, 0.0)
        remainder += centred
        squares += centred * centred
    low = tl.sum(remainder, 0) / N
    eps = tl.full((), EPS, COMPUTE)
    b_squares = tl.sum(squares, 0) - low * low * N
    # NaN stays, or a column with one would have the least deviation there is
    variance = tl.maximum(b_squares, 0.0, propagate_nan=tl.PropagateNan.ALL) / (N - CORRECTION)
    b_std = tl.sqrt(variance + eps)
    tl.store(std + column, b_std, column < D)
    factor = tl.where(DIVIDE, 1 / b_std, 1.0)[None, :].to(COMPUTE)

    products = tl.zeros([ROWS, COLUMNS], COMPUTE)
    for i in range(0, N, ROWS):
        i_row = i + tl.arange(0, ROWS)
        at = launch.row_start(i_row, s_x, 1)[:, None] + column[None, :]
        mask = _inside(i_row, column, N, D)
        b_out = ((tl.load(x + at, mask, 0).to(COMPUTE) - high) - low[None, :]) * factor
        to = launch.row_start(i_row, D, 1)[:, None] + column[None, :]
        tl.store(out + to, b_out, mask)
        if other is not None:
            products += tl.load(other + to, mask, 0) * b_out
    if other is not None:
        tl.store(dots + column, tl.sum(products, 0), column < D)


def standardised(
    x: Tensor,  # [N, D]
    correction: int,
    eps: float,
    divide: bool,
    other: Tensor | None = None,  # [N, D]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The centred columns [N, D] (over std if `divide`), std [D], and the columns' dot products with `other`'s [D]."""
    n, d = x.shape
    x = dense_rows(x)
    compute = compute_dtype(x.dtype)
    out = torch.empty((n, d), dtype=compute, device=x.device)
    std = out.new_empty(d)
    dots = None if other is None else out.new_empty(d)
    tile = tiling.covariance_columns(x.dtype)
    launch.launch(
        _standardise_kernel,
        (triton.cdiv(d, tile["COLUMNS"]),),
        x,
        out,
        std,
        other,
        dots,
        n,
        d,
        x.stride(0),
        COMPUTE=launch.DTYPES[compute],
        CORRECTION=correction,
        EPS=eps,
        DIVIDE=divide,
        **tile,
        device_of=x,
    )
    return out, std, dots


@triton.jit
def _combined(product, other, weight, factor, i_row, column, D, mask):
    """A block of the gradient for the normalised columns: `product * factor + other * weight`."""
    at = launch.row_start(i_row, D, 1)[:, None] + column[None, :]
    b_product = tl.load(product + at, mask, 0)
    return b_product * factor.to(b_product.dtype) + tl.load(other + at, mask, 0) * weight[None, :]


@triton.jit(do_not_specialize=["N"])
def _through_standardise_kernel(
    product,  # [N, D] contiguous
    normalised,  # [N, D] contiguous: what `standardised` returned, divided by std
    other,  # [N, D] contiguous
    weights,  # [D]
    std,  # [D]
    factor,  # 0-dim
    out,  # [N, D] contiguous, may be `product`
    N,
    D,
    COMPUTE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    weight = tl.load(weights + column, column < D, 0)
    b_std = tl.load(std + column, column < D, 1)
    b_factor = tl.load(factor)
    sums = tl.zeros([ROWS, COLUMNS], COMPUTE)
    products = tl.zeros([ROWS, COLUMNS], COMPUTE)
    for i in range(0, N, ROWS):
        i_row = i + tl.arange(0, ROWS)
        mask = _inside(i_row, column, N, D)
        g = _combined(product, other, weight, b_factor, i_row, column, D, mask)
        at = launch.row_start(i_row, D, 1)[:, None] + column[None, :]
        sums += g
        products += g * tl.load(normalised + at, mask, 0)
    mean = (tl.sum(sums, 0) / N)[None, :]
    along = (tl.sum(products, 0) / N)[None, :]
    for i in range(0, N, ROWS):
        i_row = i + tl.arange(0, ROWS)
        mask = _inside(i_row, column, N, D)
        g = _combined(product, other, weight, b_factor, i_row, column, D, mask)
        at = launch.row_start(i_row, D, 1)[:, None] + column[None, :]
        gradient = (g - mean - tl.load(normalised + at, mask, 0) * along) / b_std[None, :]
        tl.store(out + at, gradient, mask)


def through_standardise(
    product: Tensor,  # [N, D]
    normalised: Tensor,  # [N, D]
    other: Tensor,  # [N, D]
    weights: Tensor,  # [D]
    std: Tensor,  # [D]
    factor: Tensor,  # 0-dim
    out: Tensor,  # [N, D]
) -> None:
    """out = the gradient g = product * factor + other * weights, back through `standardised`."""
    n, d = normalised.shape
    tile = tiling.covariance_columns(out.dtype)
    launch.launch(
        _through_standardise_kernel,
        (triton.cdiv(d, tile["COLUMNS"]),),
        product,
        normalised,
        other,
        weights,
        std,
        factor,
        out,
        n,
        d,
        COMPUTE=launch.DTYPES[normalised.dtype],
        **tile,
        device_of=normalised,
    )


@triton.jit
def _dot_kernel(
    x,  # [size] contiguous
    y,  # [size] contiguous
    sums,  # [programs] float64
    size,
    BLOCK: tl.constexpr,
):
    index = tl.cast(tl.program_id(0), tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b_x = tl.load(x + index, index < size, 0).to(tl.float64)
    b_y = tl.load(y + index, index < size, 0).to(tl.float64)
    tl.store(sums + tl.program_id(0), tl.sum(b_x * b_y, 0))


def dot(x: Tensor, y: Tensor) -> Tensor:
    """`(x.double() * y.double()).sum()` of two contiguous tensors."""
    tile = tiling.covariance_dot()
    sums = torch.empty(triton.cdiv(x.numel(), tile["BLOCK"]), dtype=torch.float64, device=x.device)
    launch.launch(_dot_kernel, (len(sums),), x, y, sums, x.numel(), **tile, device_of=x)
    return sums.sum()


@contextlib.contextmanager
def products_of(n: int, d: int) -> Iterator[None]:
    """Full float32 products where N > D / 2: the off-diagonal is what total and diagonal leave of each other.

    With fewer rows the caller's setting holds, which is full float32 unless TF32 was allowed.
    """
    if 2 * n <= d:
        yield
        return
    with exact_products():
        yield
