"""VICReg: `lambda mse + mu (v0 + v1) / 2 + nu (c0 + c1)` and both gradients.

The covariances' squared norms are those of N x N Gram matrices, for N < D; centred^T centred otherwise.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launch, tiling
from ..arithmetic import compute_dtype, dense_rows, no_gradient
from . import columns, reference


@triton.jit
def _store(out, centred, product, weights, difference, at, column, mask, D, factor):
    """A block of a gradient: `centred * weights + product * factor + difference`."""
    weight = tl.load(weights + column, column < D, 0)[None, :]
    b_centred = tl.load(centred + at, mask, 0)
    tl.store(out + at, b_centred * weight + tl.load(product + at, mask, 0) * factor + difference, mask)


@triton.jit(do_not_specialize=["N"])
def _vicreg_kernel(
    x,  # [N, D], rows s_x apart
    y,  # [N, D], rows s_y apart
    x_centred,  # [N, D] contiguous, as all that follow; None where no gradient is wanted
    x_product,
    x_weights,  # [D]
    x_out,  # may be x_product
    y_centred,
    y_product,
    y_weights,
    y_out,
    factor,  # 0-dim: a number would be compiled in, once for each batch size
    sums,  # [programs], squared distances
    N,
    D,
    s_x,
    s_y,
    COMPUTE: tl.constexpr,
    INVARIANCE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    i_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (i_row < N)[:, None] & (column < D)[None, :]
    b_x = tl.load(x + launch.row_start(i_row, s_x, 1)[:, None] + column[None, :], mask, 0).to(COMPUTE)
    b_y = tl.load(y + launch.row_start(i_row, s_y, 1)[:, None] + column[None, :], mask, 0).to(COMPUTE)
    difference = b_x - b_y
    i_program = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    tl.store(sums + i_program, tl.sum(tl.sum(difference * difference, 1), 0))
    b_factor = tl.load(factor)
    pull = difference * tl.full((), INVARIANCE, COMPUTE)
    at = launch.row_start(i_row, D, 1)[:, None] + column[None, :]
    if x_out is not None:
        _store(x_out, x_centred, x_product, x_weights, pull, at, column, mask, D, b_factor)
    if y_out is not None:
        _store(y_out, y_centred, y_product, y_weights, -pull, at, column, mask, D, b_factor)


class _View(NamedTuple):
    """What one view adds to the loss, and what its gradient is made of."""

    loss: Tensor  # 0-dim float64: its variance and covariance terms
    health: Tensor  # [D + 1] float64: std, participation ratio
    square: Tensor  # centred @ centred.T for N < D, else centred.T @ centred
    gradient: tuple[Tensor | None, ...]  # what `_vicreg_kernel` takes of a view; Nones where no gradient is wanted


def _view(z: Tensor, mu_param: float, nu_param: float, eps: float, factor: float, wanted: bool) -> _View:
    n, d = z.shape
    centred, std, _ = columns.standardised(z, 1, eps, False)
    std = std.double()
    with columns.products_of(n, d):
        square = centred @ centred.T if n < d else centred.T @ centred
        diagonal = (std.square() - eps) * (n - 1) if n < d else square.diagonal().to(torch.float64, copy=True)
        total = columns.dot(square, square)
        off_diagonal = total - diagonal.square().sum()
        loss = mu_param / 2 * (1 - std).relu().mean() + nu_param / (n - 1) ** 2 / d * off_diagonal
        health = torch.cat([std, (diagonal.sum().square() / total)[None]])
        if not wanted:
            return _View(loss, health, square, (None, None, None, None))
        weights = (std < 1) / std * (-mu_param / 2 * n / (n - 1) / d)
        if n < d:
            product = square @ centred
            weights -= factor * diagonal
        else:
            product = centred @ square.fill_diagonal_(0)
            square.diagonal().copy_(diagonal)
    gradient = product if z.dtype == product.dtype else torch.empty((n, d), dtype=z.dtype, device=z.device)
    return _View(loss, health, square, (centred, product, weights.to(centred.dtype), gradient))


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
    compute = compute_dtype(z0.dtype)
    factor = 4 * nu_param * n / (n - 1) ** 2 / d
    views = [_view(z, mu_param, nu_param, eps, factor, w) for z, w in zip((z0, z1), wanted, strict=True)]
    tile = tiling.vicreg()
    grid = (triton.cdiv(n, tile["ROWS"]), triton.cdiv(d, tile["COLUMNS"]))
    distances = torch.empty(grid, dtype=compute, device=z0.device)
    launch.launch(
        _vicreg_kernel,
        grid,
        z0,
        z1,
        *views[0].gradient,
        *views[1].gradient,
        torch.full((), factor, dtype=compute, device=z0.device),
        distances,
        n,
        d,
        z0.stride(0),
        z1.stride(0),
        COMPUTE=launch.DTYPES[compute],
        INVARIANCE=2 * lambda_param / d,
        **tile,
        device_of=z0,
    )
    loss = views[0].loss + views[1].loss + lambda_param / (n * d) * distances.double().sum()
    gradients = [no_gradient(z0) if view.gradient[-1] is None else view.gradient[-1] for view in views]
    scale = torch.full((), 1 / n, dtype=compute, device=z0.device)
    health = [torch.stack([view.health for view in views]).to(compute)] if statistics else []
    squares = [view.square for view in views] if statistics > 1 else []
    return loss.to(compute), gradients, scale, health + squares
