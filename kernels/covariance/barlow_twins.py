"""Barlow Twins: `sum_i (C_ii - 1)^2 + lambda sum_{i != j} C_ij^2` and both gradients, in four launches.

C = a^T b / N, of normalised columns a and b.

`||a^T b||^2 = <a a^T, b b^T>` and `b (a^T b)^T = (b b^T) a`: for N < D the two N x N products take the place of C.
The columns come first, then the squares, then the product of squares and rows; a program of the last launch, which
takes gradients back through the normalisation, adds up the loss. Gradients have their 2 / N already, but in float16.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launch, tiling
from ..arithmetic import dense_rows, no_gradient
from ..native import scale_within
from . import columns, products, reference


@triton.jit(do_not_specialize=["N", "s_square"])
def _product_kernel(
    normalised,  # [2, N, D] contiguous
    squares,  # tuple of two [R, R]
    out,  # tuple of [N, D], of the views from FIRST on
    N,
    D,
    s_square,  # / products.PAD, of rows of squares
    FIRST: tl.constexpr,
    TALL: tl.constexpr,
    COMPUTE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    place, i_row, column = products.tile_of(tl.program_id(0), N, D, BM, BN)
    view = place + FIRST
    # (b b^T) a and (a a^T) b; or b C^T and a C, of C and its transpose
    rows = normalised + (1 - view if TALL else view) * launch.row_start(N, D, 1)
    square = launch.chosen(squares, view if TALL else 1 - view)
    product = products.product_tile(rows, square, i_row, column, N, D, s_square, TALL, COMPUTE, BLOCK_K)
    at = launch.row_start(i_row, D, 1)[:, None] + column[None, :]
    tl.store(launch.chosen(out, place) + at, product, (i_row < N)[:, None] & (column < D)[None, :])


@triton.jit
def _loss(figures, dots, sums, loss, scale, N, D, parts, weight, scale_value, TALL: tl.constexpr, BLOCK: tl.constexpr):
    """By one program, also the rank behind the standard deviations."""
    index = tl.arange(0, BLOCK)
    over = 1 / tl.full((), N, tl.float64)
    apart = tl.zeros([BLOCK], tl.float64)
    trace = tl.zeros([BLOCK], tl.float64)
    diagonal = tl.zeros([BLOCK], tl.float64)
    for i in range(0, D, BLOCK):
        inside = index < D - i
        own = tl.load(dots + i + index, inside, 0).to(tl.float64) * over
        apart += tl.where(inside, (own - 1) * (own - 1), 0.0)
        trace += own
        diagonal += own * own
    of_squares = columns.summed(sums, parts, BLOCK)
    of_diagonal = tl.sum(diagonal, 0)
    off_diagonal = of_squares if TALL else of_squares - of_diagonal
    of_all = of_squares + of_diagonal if TALL else of_squares
    tl.store(loss, tl.sum(apart, 0) + tl.full((), weight, tl.float64) * off_diagonal)
    tl.store(scale, tl.full((), scale_value, tl.float64))
    rank = tl.sum(trace, 0) * tl.sum(trace, 0) / of_all
    tl.store(figures + D, rank)
    tl.store(figures + 2 * D + 1, rank)


@triton.jit
def _combined(product, other, weight, factor, at, mask):
    """A block of the gradient for the normalised columns: `product * factor + other * weight`."""
    return tl.load(product + at, mask, 0) * factor + tl.load(other + at, mask, 0) * weight[None, :]


@triton.jit(do_not_specialize=["N", "parts"])
def _gradient_kernel(
    product,  # tuple of [N, D], of the views from FIRST on; or None, for the loss alone
    normalised,  # [2, N, D] contiguous
    out,  # tuple of [N, D] contiguous, may be `product`
    figures,  # [2, D + 1]
    dots,  # [D], N times C's diagonal
    sums,  # [parts]
    loss,  # 0-dim
    scale,  # 0-dim
    N,
    D,
    parts,
    weight: tl.float64,  # lambda
    gradient_scale: tl.float64,  # what gradients are multiplied by
    scale_value: tl.float64,
    FIRST: tl.constexpr,
    TALL: tl.constexpr,
    COMPUTE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if tl.program_id(0) == 0:
        _loss(figures, dots, sums, loss, scale, N, D, parts, weight, scale_value, TALL, BLOCK)
    elif product is not None:
        blocks = tl.cdiv(D, COLUMNS)
        place = (tl.program_id(0) - 1) // blocks
        view = place + FIRST
        column = (tl.program_id(0) - 1) % blocks * COLUMNS + tl.arange(0, COLUMNS)
        inside = column < D
        own = normalised + view * launch.row_start(N, D, 1)
        other = normalised + (1 - view) * launch.row_start(N, D, 1)
        from_product = launch.chosen(product, place)
        off = tl.full((), weight, COMPUTE)
        factor = off / N
        diagonal = tl.load(dots + column, inside, 0) / N
        of_other = diagonal - 1 if TALL else (1 - off) * diagonal - 1
        std = tl.load(figures + view * (D + 1) + column, inside, 1)
        g_sums = tl.zeros([ROWS, COLUMNS], COMPUTE)
        along_sums = tl.zeros([ROWS, COLUMNS], COMPUTE)
        for i in range(0, N, ROWS):
            i_row = i + tl.arange(0, ROWS)
            mask = (i_row < N)[:, None] & inside[None, :]
            at = launch.row_start(i_row, D, 1)[:, None] + column[None, :]
            g = _combined(from_product, other, of_other, factor, at, mask)
            g_sums += g
            along_sums += g * tl.load(own + at, mask, 0)
        mean = (tl.sum(g_sums, 0) / N)[None, :]
        along = (tl.sum(along_sums, 0) / N)[None, :]
        over_std = (tl.full((), gradient_scale, COMPUTE) / std)[None, :]
        for i in range(0, N, ROWS):
            i_row = i + tl.arange(0, ROWS)
            mask = (i_row < N)[:, None] & inside[None, :]
            at = launch.row_start(i_row, D, 1)[:, None] + column[None, :]
            g = _combined(from_product, other, of_other, factor, at, mask)
            gradient = (g - mean - tl.load(own + at, mask, 0) * along) * over_std
            tl.store(launch.chosen(out, place) + at, gradient, mask)


def barlow_twins(
    z0: Tensor,  # [N, D]
    z1: Tensor,  # [N, D]
    lambda_param: float,
    statistics: int,
    wanted: list[bool],
) -> tuple[Tensor, list[Tensor], Tensor, list[Tensor]]:
    if z0.dtype not in launch.DTYPES:
        return reference.barlow_twins(z0, z1, lambda_param, statistics, wanted)
    n, d = z0.shape
    normalised, figures, dots = columns.standardised(dense_rows(z0), dense_rows(z1), 0, 1e-5, True)
    squares, sums = products.squares(normalised, cross=True)
    first, last = (wanted.index(True), 1 + wanted[1]) if any(wanted) else (0, 0)
    compute = launch.DTYPES[normalised.dtype]
    product = [normalised.new_empty(n, d) for _ in range(first, last)]
    if product:
        tile = tiling.covariance_gradient(normalised.dtype)
        launch.launch(
            _product_kernel,
            (len(product) * products.tiles_of(n, d, tile),),
            normalised,
            tuple(squares),
            tuple(product),
            n,
            d,
            squares[0].stride(0) // products.PAD.value,
            FIRST=first,
            TALL=n >= d,
            COMPUTE=compute,
            **tile,
            device_of=z0,
        )
    gradients = [
        no_gradient(z) if not want else product[i - first] if z.dtype == normalised.dtype else torch.empty_like(z)
        for i, (z, want) in enumerate(zip((z0.contiguous(), z1.contiguous()), wanted, strict=True))
    ]
    loss, left = figures.new_empty(()), figures.new_empty(())
    scale = scale_within(2 / n, z0.dtype)
    tile = tiling.covariance_columns(normalised.dtype)
    launch.launch(
        _gradient_kernel,
        (1 + len(product) * triton.cdiv(d, tile["COLUMNS"]),),
        tuple(product) or None,
        normalised,
        tuple(gradients[first:last]) or None,
        figures,
        dots,
        sums,
        loss,
        left,
        n,
        d,
        sums.numel(),
        float(lambda_param),
        scale,
        2 / n / scale,
        FIRST=first,
        TALL=n >= d,
        COMPUTE=compute,
        BLOCK=1024,
        **tile,
        device_of=z0,
    )
    health = [figures] if statistics else []
    if statistics > 1:
        # C is there twice, for N >= D, without its diagonal
        health += products.kept(squares, None) if n < d else products.kept(squares[:1], dots[None])
    return loss, gradients, left, health
