"""Barlow Twins and VICReg on the CPU: column statistics and gradients in C++, products by torch.mm.

The squared norm of a D x D covariance equals that of the N x N Gram matrix, `||A^T B||^2 = <A A^T, B B^T>`, and the
gradient needs `B (A^T B)^T = (B B^T) A`: whichever is smaller is computed, and its diagonal comes from the column
statistics.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _C, tiling
from ..arithmetic import compute_dtype, dense_rows, no_gradient
from ..native import CODES, Found, address, gradients_for, loss_like, scale_within
from ..plain import plain_matrices
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


def _barlow_twins(
    z0: Tensor, z1: Tensor, lambda_param: float, statistics: int, wanted: Sequence[bool]
) -> tuple[float, list[Tensor | None], float, list[Tensor]]:
    """The loss, the gradients (None where not wanted), their scale, and the statistics."""
    dtype = compute_dtype(z0.dtype)
    n, d = z0.shape
    threads = torch.get_num_threads()
    a, a_std, _ = _standardised(z0, n, 1e-5, True)
    b, b_std, dots = _standardised(z1, n, 1e-5, True, a if n < d else None)
    diagonal, weights, *of_products = torch.empty(4, d, dtype=torch.float64)  # [D] each
    if dots is not None:  # N < D
        squares = [_symmetric(a), _symmetric(b)]
        total = _dot(*squares)
        torch.div(dots, n, out=diagonal)
        dots_of_products = [0, 0]
    else:
        cross = torch.mm(a.T, b)
        squares = [cross]
        # The gradient's product for a is b C^T; its columns' dot products with those of a are (C C^T)_ii.
        dots_of_products = [address(x) for x in of_products]
        total = _C.correlation(CODES[dtype], address(cross), n, d, address(diagonal), dots_of_products[0], threads)
    loss = _C.barlow_twins(n, d, lambda_param, total, address(diagonal), address(weights))
    health = squares if statistics > 1 else []
    if statistics:
        rank = ((diagonal.sum() * n).square() / total).expand(2, 1)
        health = [torch.cat([torch.stack([a_std, b_std]), rank], 1).to(dtype), *health]
    scale = 2 / n
    in_gradient = scale_within(scale, z0.dtype)
    gradients = gradients_for((z0, z1), wanted)
    sides = ((a, a_std, b), (b, b_std, a))
    for i, (gradient, (columns, std, other)) in enumerate(zip(gradients, sides, strict=True)):
        if gradient is None:
            continue
        product = _product_memory(gradient, columns)
        if n < d:
            torch.mm(squares[1 - i], columns, out=product)
        else:
            torch.mm(other, cross if i else cross.T, out=product)
        _C.through_standardise(
            CODES[gradient.dtype],
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
            dots_of_products[i],
            address(gradient),
            threads,
        )
    return loss, gradients, scale / in_gradient, health


def barlow_twins(
    z0: Tensor, z1: Tensor, lambda_param: float, statistics: int, wanted: list[bool]
) -> tuple[Tensor, list[Tensor], Tensor, list[Tensor]]:
    if z0.dtype not in CODES:
        return reference.barlow_twins(z0, z1, lambda_param, statistics, wanted)
    return _as_operator(z0, _barlow_twins(dense_rows(z0), dense_rows(z1), lambda_param, statistics, wanted))


def _as_operator(
    like: Tensor, result: tuple[float, list[Tensor | None], float, list[Tensor]]
) -> tuple[Tensor, list[Tensor], Tensor, list[Tensor]]:
    """What an operator returns."""
    loss, gradients, scale, health = result
    of_operator = [no_gradient(like) if gradient is None else gradient for gradient in gradients]
    return loss_like(like, loss), of_operator, loss_like(like, scale), health


class _View(NamedTuple):
    """What one view adds to VICReg's loss, and what its gradient is made of."""

    loss: float  # its variance and covariance terms
    std: Tensor  # [D] float64
    total: float  # of the square's squares
    diagonal: Tensor  # [D] float64
    square: Tensor  # centred @ centred.T for N < D, else centred.T @ centred
    centred: Tensor  # [N, D]
    product: Tensor | None  # [N, D]; both None where no gradient is wanted
    weights: Tensor | None  # [D] float64: the gradient is centred * weights + product * factor + the distance's part


def _view(
    z: Tensor, gradient: Tensor | None, mu_param: float, nu_param: float, eps: float, factor: float, scale: float
) -> _View:
    n, d = z.shape
    centred, std, _ = _standardised(z, n - 1, eps, False)
    square = _symmetric(centred if n < d else centred.T)
    diagonal = torch.empty_like(std)
    weights = None if gradient is None else torch.empty_like(std)
    loss, total = _C.vicreg_square(
        CODES[square.dtype],
        address(square),
        n,
        d,
        address(std),
        address(diagonal),
        address(weights),
        mu_param,
        nu_param,
        eps,
        factor,
        scale,
        torch.get_num_threads(),
    )
    product = None
    if gradient is not None:
        product = _product_memory(gradient, centred)
        torch.mm(square if n < d else centred, centred if n < d else square, out=product)
    return _View(loss, std, total, diagonal, square, centred, product, weights)


def _health(view: _View) -> Tensor:
    """[D + 1] float64: std, participation ratio. The square gets back its diagonal, 0 for its gradient."""
    if view.square.shape == view.diagonal.shape * 2:
        view.square.diagonal().copy_(view.diagonal)
    return torch.cat([view.std, (view.diagonal.sum().square() / view.total)[None]])


def _vicreg(
    z0: Tensor,
    z1: Tensor,
    lambda_param: float,
    mu_param: float,
    nu_param: float,
    eps: float,
    statistics: int,
    wanted: Sequence[bool],
) -> tuple[float, list[Tensor | None], float, list[Tensor]]:
    """The loss, the gradients (None where not wanted), their scale, and the statistics."""
    n, d = z0.shape
    gradients = gradients_for((z0, z1), wanted)
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
    health = [torch.stack([_health(view) for view in views]).to(compute_dtype(z0.dtype))] if statistics else []
    squares = [view.square for view in views] if statistics > 1 else []
    return loss, gradients, 1 / n / in_gradient, health + squares


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
    numbers = (lambda_param, mu_param, nu_param, eps)
    return _as_operator(z0, _vicreg(dense_rows(z0), dense_rows(z1), *numbers, statistics, wanted))


# The same of plain tensors [N, D] without statistics. None where they aren't, or don't fit one another ----------------


def _few(z: Tensor) -> bool:
    """Whether the products are so little work that they take less time than a call of torch does."""
    n, d = z.shape
    return n * d * min(n, d) <= tiling.CPU_FEW_ROWS


def _plain_pair(z0: Tensor, z1: Tensor) -> bool:
    """Whether C++ and torch.mm may be given both. (Autocast, which the dispatcher ends, makes products bfloat16.)"""
    return (
        plain_matrices((z0, z1), 2, True)
        and z0.dtype == z1.dtype
        and z0.is_contiguous()
        and z1.is_contiguous()
        and z0.shape[0] > 1
        and not torch.is_autocast_enabled("cpu")
    )


def barlow_twins_of_plain(z0: Tensor, z1: Tensor, lambda_param: float, wanted: Sequence[bool]) -> Found | None:
    if _few(z0):
        scale = 2 / z0.shape[0] if len(z0) else math.inf
        within = scale_within(scale, z0.dtype)
        gradients = gradients_for((z0, z1), wanted)
        loss = _C.few_barlow_twins(z0, z1, *gradients, lambda_param, within)
        return None if loss is None else Found(loss_like(z0, loss), gradients, (scale / within,) * 2)
    if not _plain_pair(z0, z1):
        return None
    loss, gradients, scale, _ = _barlow_twins(z0, z1, lambda_param, 0, wanted)
    return Found(loss_like(z0, loss), gradients, (scale,) * 2)


def vicreg_of_plain(
    z0: Tensor,
    z1: Tensor,
    lambda_param: float,
    mu_param: float,
    nu_param: float,
    eps: float,
    wanted: Sequence[bool],
) -> Found | None:
    numbers = (lambda_param, mu_param, nu_param, eps)
    if _few(z0):
        scale = 1 / z0.shape[0] if len(z0) else math.inf
        within = scale_within(scale, z0.dtype)
        gradients = gradients_for((z0, z1), wanted)
        loss = _C.few_vicreg(z0, z1, *gradients, *numbers, within)
        return None if loss is None else Found(loss_like(z0, loss), gradients, (scale / within,) * 2)
    if not _plain_pair(z0, z1):
        return None
    loss, gradients, scale, _ = _vicreg(z0, z1, *numbers, 0, wanted)
    return Found(loss_like(z0, loss), gradients, (scale,) * 2)
