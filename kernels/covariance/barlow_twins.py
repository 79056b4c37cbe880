"""Barlow Twins: `sum_i (C_ii - 1)^2 + lambda sum_{i != j} C_ij^2` and both gradients.

C = a^T b / N, of normalised columns a and b.

`||a^T b||^2 = <a a^T, b b^T>` and `b (a^T b)^T = (b b^T) a`: for N < D the two N x N products take the place of C.
"""

import torch
from torch import Tensor

from .. import launch
from ..arithmetic import no_gradient
from . import columns, reference


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
    a, a_std, _ = columns.standardised(z0, 0, 1e-5, True)
    b, b_std, dots = columns.standardised(z1, 0, 1e-5, True, a)
    diagonal = dots.double() / n
    with columns.products_of(n, d):
        if n < d:
            squares = [a @ a.T, b @ b.T]
            total = columns.dot(*squares)
        else:
            cross = a.T @ b
            squares = [cross]
            total = columns.dot(cross, cross)
            diagonal = cross.diagonal().double() / n  # of the total's own numbers, as it is subtracted from the total
        loss = (diagonal - 1).square().sum() + lambda_param * (total / n**2 - diagonal.square().sum())
        rank = ((diagonal.sum() * n).square() / total).expand(2, 1)
        health = [torch.cat([torch.stack([a_std, b_std]), rank], 1).to(a.dtype)] if statistics else []
        health += squares if statistics > 1 else []
        weights = ((1 - lambda_param) * diagonal - 1).to(a.dtype)
        factor = torch.full((), lambda_param / n, dtype=a.dtype, device=a.device)
        gradients = [no_gradient(z0), no_gradient(z1)]
        for i, (z, normalised, std, other) in enumerate(((z0, a, a_std, b), (z1, b, b_std, a))):
            if not wanted[i]:
                continue
            product = squares[1 - i] @ normalised if n < d else other @ (cross if i else cross.T)
            gradients[i] = product if z.dtype == product.dtype else torch.empty((n, d), dtype=z.dtype, device=z.device)
            columns.through_standardise(product, normalised, other, weights, std, factor, gradients[i])
    scale = torch.full((), 2 / n, dtype=a.dtype, device=a.device)
    return loss.to(a.dtype), gradients, scale, health
