"""VICReg: `lambda mse + mu (v0 + v1) / 2 + nu (c0 + c1)` and both gradients, in four launches.

The covariances' squared norms are those of N x N Gram matrices, for N < D; centred^T centred otherwise. The columns'
statistics come first, then the squares, then the product of squares and rows, which becomes the gradient where it is
made; and one program adds up the loss. Gradients have their 1 / N already, but in float16.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launch, tiling
from ..arithmetic import dense_rows, no_gradient
from ..native import scale_within
from . import columns, products, reference


@triton.jit
def _covariances(std, eps, N):
    """The covariance's diagonal, times N - 1."""
    return (std * std - tl.full((), eps, std.dtype)) * (N - 1)


@triton.jit(do_not_specialize=["N", "s_square"])
def _gradient_kernel(
    x,  # [N, D], rows s_x apart
    y,  # [N, D], rows s_y apart
    centred,  # [2, N, D] contiguous
    squares,  # tuple of [R, R], of the views from FIRST on, as all that follow
    gradients,  # tuple of [N, D] contiguous
    figures,  # [2, D + 1]: standard deviations
    N,
    D,
    s_x,
    s_y,
    s_square,  # / products.PAD, of rows of squares
    invariance: tl.float64,  # 2 lambda / D
    variance: tl.float64,  # -mu N / (2 (N - 1) D)
    covariance: tl.float64,  # 4 nu N / ((N - 1)^2 D)
    eps: tl.float64,
    scale: tl.float64,  # what all of it is multiplied by
    FIRST: tl.constexpr,
    TALL: tl.constexpr,
    COMPUTE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    place, i_row, column = products.tile_of(tl.program_id(0), N, D, BM, BN)
    view = place + FIRST
    centred += view * launch.row_start(N, D, 1)
    square = launch.chosen(squares, place)
    product = products.product_tile(centred, square, i_row, column, N, D, s_square, TALL, COMPUTE, BLOCK_K)
    factor = tl.full((), covariance, COMPUTE)
    std = tl.load(figures + view * (D + 1) + column, column < D, 1)
    weight = tl.where(std < 1, tl.full((), variance, COMPUTE) / std, 0.0)
    weight = tl.where(std == std, weight, std)  # NaN stays
    if not TALL:
        weight -= factor * _covariances(std, eps, N)
    mask = (i_row < N)[:, None] & (column < D)[None, :]
    at = launch.row_start(i_row, D, 1)[:, None] + column[None, :]
    b_x = tl.load(x + launch.row_start(i_row, s_x, 1)[:, None] + column[None, :], mask, 0).to(COMPUTE)
    b_y = tl.load(y + launch.row_start(i_row, s_y, 1)[:, None] + column[None, :], mask, 0).to(COMPUTE)
    pull = (b_x - b_y) * tl.where(view == 0, tl.full((), invariance, COMPUTE), -tl.full((), invariance, COMPUTE))
    gradient = tl.load(centred + at, mask, 0) * weight[None, :] + product * factor + pull
    tl.store(launch.chosen(gradients, place) + at, gradient * tl.full((), scale, COMPUTE), mask)


@triton.jit(do_not_specialize=["N", "parts"])
def _loss_kernel(
    figures,  # [2, D + 1]: standard deviations, and behind them the rank, which is written
    distances,  # [D]: squared differences of the views
    sums,  # [2, parts]: of squares over N, whole ones, or if TALL without their diagonal
    loss,  # 0-dim
    scale,  # 0-dim
    N,
    D,
    parts,
    lambda_over: tl.float64,  # lambda / (N D)
    mu_over: tl.float64,  # mu / (2 D)
    nu_over: tl.float64,  # nu N^2 / ((N - 1)^2 D)
    eps: tl.float64,
    scale_value: tl.float64,
    TALL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index = tl.arange(0, BLOCK)
    total = columns.summed(distances, D, BLOCK) * tl.full((), lambda_over, tl.float64)
    over = 1 / tl.full((), N, tl.float64)
    for view in tl.static_range(2):
        of_view = figures + view * (D + 1)
        hinges = tl.zeros([BLOCK], tl.float64)
        trace = tl.zeros([BLOCK], tl.float64)
        diagonal = tl.zeros([BLOCK], tl.float64)
        for i in range(0, D, BLOCK):
            inside = index < D - i
            std = tl.load(of_view + i + index, inside, 1).to(tl.float64)
            hinges += tl.where(std < 1, 1 - std, tl.where(std == std, 0.0, std))
            own = tl.where(inside, _covariances(std, eps, N) * over, 0.0)
            trace += own
            diagonal += own * own
        of_squares = columns.summed(sums + launch.row_start(view, parts, 1), parts, BLOCK)
        of_diagonal = tl.sum(diagonal, 0)
        off_diagonal = of_squares if TALL else of_squares - of_diagonal
        of_all = of_squares + of_diagonal if TALL else of_squares
        total += tl.sum(hinges, 0) * tl.full((), mu_over, tl.float64)
        total += off_diagonal * tl.full((), nu_over, tl.float64)
        own_trace = tl.sum(trace, 0)
        tl.store(of_view + D, own_trace * own_trace / of_all)
    tl.store(loss, total)
    tl.store(scale, tl.full((), scale_value, tl.float64))


def vicreg(
    z0: Tensor,  # [N, D]
    z1: Tensor,  # [N, D]
    lambda_param: float,
    mu_param: float,
    nu_param: float,
    eps: float,
    statistics: int,
    wanted: list[bool],
) -> tuple[Tensor, list[Tensor], Tensor, list[Tensor]]:
    if z0.dtype not in launch.DTYPES:
        return reference.vicreg(z0, z1, lambda_param, mu_param, nu_param, eps, statistics, wanted)
    n, d = z0.shape
    z0 = dense_rows(z0)
    z1 = dense_rows(z1)
    centred, figures, distances = columns.standardised(z0, z1, 1, eps, False)
    squares, sums = products.squares(centred, cross=False)
    gradients = [
        torch.empty((n, d), dtype=z.dtype, device=z.device) if want else no_gradient(z)
        for z, want in zip((z0, z1), wanted, strict=True)
    ]
    scale = scale_within(1 / n, z0.dtype)
    if any(wanted):
        first = wanted.index(True)
        last = 1 + wanted[1]
        tile = tiling.covariance_gradient(centred.dtype)
        launch.launch(
            _gradient_kernel,
            ((last - first) * products.tiles_of(n, d, tile),),
            z0,
            z1,
            centred,
            tuple(squares[first:last]),
            tuple(gradients[first:last]),
            figures,
            n,
            d,
            z0.stride(0),
            z1.stride(0),
            squares[0].stride(0) // products.PAD.value,
            2 * lambda_param / d,
            -mu_param / 2 * n / (n - 1) / d,
            4 * nu_param * n / (n - 1) ** 2 / d,
            float(eps),
            scale,
            FIRST=first,
            TALL=n >= d,
            COMPUTE=launch.DTYPES[centred.dtype],
            **tile,
            device_of=z0,
        )
    loss, left = figures.new_empty(()), figures.new_empty(())
    launch.launch(
        _loss_kernel,
        (1,),
        figures,
        distances,
        sums,
        loss,
        left,
        n,
        d,
        sums.shape[1],
        lambda_param / (n * d),
        mu_param / (2 * d),
        nu_param * n**2 / (n - 1) ** 2 / d,
        float(eps),
        1 / n / scale,
        TALL=n >= d,
        **tiling.mean_of_rows(),
        device_of=z0,
    )
    health = [figures] if statistics else []
    if statistics > 1:
        health += products.kept(squares, (figures[:, :-1].square() - eps) * (n - 1) if n >= d else None)
    return loss, gradients, left, health
