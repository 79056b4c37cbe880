"""Barlow Twins and VICReg on the CPU: column statistics and gradients in C++, products by torch.mm.

The squared norm of a D x D covariance equals that of the N x N Gram matrix, `||A^T B||^2 = <A A^T, B B^T>`, and the
gradient needs `B (A^T B)^T = (B B^T) A`: whichever is smaller is computed, and its diagonal comes from the column
statistics.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .. import _C, tiling
from ..arithmetic import compute_dtype, dense_rows
from ..native import CODES, address, gradient_for, scale_within
from . import reference


def _symmetric(x: Tensor) -> Tensor:
    """`x @ x.T`"""
    n = len(x)
    if n * n * x.shape[1] < tiling.CPU_SYMMETRIC_WORK:
        return torch.mm(x, x.T)
    step = max(64, -(-n // tiling.CPU_SYMMETRIC_PARTS))
    out = x.new_empty(n, n)
    for i in range(0, n, step):
        torch.mm(x[i : i + step], x[i:].T, out=out[i : i + step, i:])
        out[i + step :, i : i + step] = out[i : i + step, i + step :].T
    return out


def _dot(x: Tensor, y: Tensor) -> float:
    return _C.dot(CODES[x.dtype], address(x), address(y), x.numel(), torch.get_num_threads())


def _standardised(
    x: Tensor,  # [N, D]
    divisor: float,
    eps: float,
    divide: bool,
    other: Tensor | None = None,  # [N, D]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The centred columns [N, D] (over std if `divide`), std [D], and the columns' dot products with `other`'s [D].

    std is sqrt(sum of squares / divisor + eps), float64.
    """
    out = torch.empty(x.shape, dtype=compute_dtype(x.dtype))
    std = torch.empty(x.shape[1], dtype=torch.float64)
    dots = None if other is None else torch.empty_like(std)
    _C.standardise(
        CODES[x.dtype],
        address(x),
        x.stride(0),
        *x.shape,
        divisor,
        eps,
        divide,
        address(out),
        address(std),
        address(other),
        address(dots),
        torch.get_num_threads(),
    )
    return out, std, dots


def _product_memory(gradient: Tensor, like: Tensor) -> Tensor:
    """Where a product waits to become the gradient: in the gradient itself, if that is wide enough."""
    return gradient if gradient.dtype == like.dtype else torch.empty_like(like)


def barlow_twins(
    z0: Tensor, z1: Tensor, lambda_param: float, statistics: int, wanted: list[bool]
) -> tuple[Tensor, list[Tensor], Tensor, list[Tensor]]:
    if z0.dtype not in CODES:
        return reference.barlow_twins(z0, z1, lambda_param, statistics, wanted)
    z0 = dense_rows(z0)
    z1 = dense_rows(z1)
    dtype = compute_dtype(z0.dtype)
    n, d = z0.shape
    a, a_std, _ = _standardised(z0, n, 1e-5, True)
    b, b_std, dots = _standardised(z1, n, 1e-5, True, a if n < d else None)
    if n < d:
        squares = [_symmetric(a), _symmetric(b)]
        total = _dot(*squares)
        diagonal = dots / n
        dots_of_products = [None, None]
    else:
        cross = torch.mm(a.T, b)
        squares = [cross]
        total = _dot(cross, cross)
        diagonal = cross.diagonal().double() / n  # of the total's own numbers, as it is subtracted from the total
        # The gradient's product for a is b C^T; its columns' dot products with those of a are (C C^T)_ii.
        squared = cross.square()
        dots_of_products = [squared.sum(1).double(), squared.sum(0).double()]
        del squared
    off_diagonal = total / n**2 - diagonal.square().sum()
    loss = (diagonal - 1).square().sum() + lambda_param * off_diagonal

    rank = ((diagonal.sum() * n).square() / total).expand(2, 1)
    health = [torch.cat([torch.stack([a_std, b_std]), rank], 1).to(dtype)] if statistics else []
    weights = (1 - lambda_param) * diagonal - 1
    scale = 2 / n
    in_gradient = scale_within(scale, z0.dtype)
    gradients = [gradient_for(z0, wanted[0]), gradient_for(z1, wanted[1])]
    sides = ((z0, a, a_std, b), (z1, b, b_std, a))
    for i, (z, columns, std, other) in enumerate(sides):
        if not wanted[i]:
            continue
        product = _product_memory(gradients[i], columns)
        if n < d:
            torch.mm(squares[1 - i], columns, out=product)
        else:
            torch.mm(other, cross if i else cross.T, out=product)
        _C.through_standardise(
            CODES[z.dtype],
            address(product),
            address(columns),
            address(other),
            n,
            d,
            lambda_param / n,
            in_gradient,
            address(weights),
            address(std),
            address(diagonal),
            address(dots_of_products[i]),
            address(gradients[i]),
            torch.get_num_threads(),
        )
    health += squares if statistics > 1 else []
    return loss.to(dtype), gradients, torch.full((), scale / in_gradient, dtype=dtype), health


class _View(NamedTuple):
    """What one view adds to VICReg's loss, and what its gradient is made of."""

    loss: Tensor  # 0-dim float64: its variance and covariance terms
    health: Tensor  # [D + 1] float64: std, participation ratio
    square: Tensor  # centred @ centred.T for N < D, else centred.T @ centred
    centred: Tensor | None  # [N, D]; all three None where no gradient is wanted
    product: Tensor | None  # [N, D]
    weights: Tensor | None  # [D] float64: the gradient is centred * weights + product * factor + the distance's part


def _view(
    z: Tensor, gradient: Tensor, mu_param: float, nu_param: float, eps: float, factor: float, scale: float
) -> _View:
    n, d = z.shape
    centred, std, _ = _standardised(z, n - 1, eps, False)
    square = _symmetric(centred if n < d else centred.T)
    diagonal = (std.square() - eps) * (n - 1) if n < d else square.diagonal().to(torch.float64, copy=True)
    total = _dot(square, square)
    off_diagonal = total - diagonal.square().sum()
    loss = mu_param / 2 * (1 - std).relu().mean() + nu_param / (n - 1) ** 2 / d * off_diagonal
    health = torch.cat([std, (diagonal.sum().square() / total)[None]])
    if not gradient.numel():
        return _View(loss, health, square, None, None, None)
    weights = (std < 1) / std * (-mu_param / 2 * n / (n - 1) / d)
    product = _product_memory(gradient, centred)
    if n < d:
        torch.mm(square, centred, out=product)
        weights -= factor * diagonal
    else:
        torch.mm(centred, square.fill_diagonal_(0), out=product)
        square.diagonal().copy_(diagonal)
    return _View(loss, health, square, centred, product, weights.mul_(scale))


def vicreg(
    z0: Tensor,
    z1: Tensor,
    lambda_param: float,
    mu_param: float,
    nu_param: float,
    eps: float,
    statistics: int,
    wanted: list[bool],
) -> tuple[Tensor, list[Tensor], Tensor, list[Tensor]]:
    if z0.dtype not in CODES:
        return reference.vicreg(z0, z1, lambda_param, mu_param, nu_param, eps, statistics, wanted)
    n, d = z0.shape
    z0 = dense_rows(z0)
    z1 = dense_rows(z1)
    dtype = compute_dtype(z0.dtype)
    gradients = [gradient_for(z0, wanted[0]), gradient_for(z1, wanted[1])]
    factor = 4 * nu_param * n / (n - 1) ** 2 / d
    in_gradient = scale_within(1 / n, z0.dtype)
    views = [
        _view(z, gradient, mu_param, nu_param, eps, factor, in_gradient)
        for z, gradient in zip((z0, z1), gradients, strict=True)
    ]
    distances = _C.vicreg(
        CODES[z0.dtype],
        address(z0),
        z0.stride(0),
        address(z1),
        z1.stride(0),
        n,
        d,
        [
            (address(view.centred), address(view.product), address(view.weights), address(gradient))
            for view, gradient in zip(views, gradients, strict=True)
        ],
        factor * in_gradient,
        2 * lambda_param / d * in_gradient,
        torch.get_num_threads(),
    )
    loss = views[0].loss + views[1].loss + lambda_param * distances / (n * d)
    health = [torch.stack([view.health for view in views]).to(dtype)] if statistics else []
    squares = [view.square for view in views] if statistics > 1 else []
    return loss.to(dtype), gradients, torch.full((), 1 / n / in_gradient, dtype=dtype), health + squares
