"""The specification of the losses on the covariance of columns; conventions are in kernels/__init__.py."""

import torch
from torch import Tensor

from ..arithmetic import no_gradient, scalar_like, widen


def barlow_twins(
    z0: Tensor,  # [N, D]
    z1: Tensor,  # [N, D]
    lambda_param: float,
    statistics: int,
    wanted: list[bool],
) -> tuple[Tensor, list[Tensor], Tensor, list[Tensor]]:
    """`sum_i (C_ii - 1)^2 + lambda sum_{i != j} C_ij^2`, C = a^T b / N of batch-normalised a, b.

    Barlow Twins, arXiv 2103.03230, equation 1. Batch norm without affine part: biased variance, eps = 1e-5.
    The `statistics` (from 1 on) are [2, D + 1]: the columns' standard deviations (with eps) of each view, then the
    participation ratio of C, `(sum_i C_ii)^2 / ||C||^2`. From 2 on the squares follow that it is computed from: a a^T
    and b b^T for N < D, else a^T b.
    """
    n, d = z0.shape

    def batch_norm(x: Tensor) -> tuple[Tensor, Tensor]:
        std = (x.var(0, correction=0) + 1e-5).sqrt()
        return (x - x.mean(0)) / std, std

    def through_batch_norm(gradient: Tensor, normalised: Tensor, std: Tensor) -> Tensor:
        return (gradient - gradient.mean(0) - normalised * (gradient * normalised).mean(0)) / std

    a, a_std = batch_norm(widen(z0))
    b, b_std = batch_norm(widen(z1))
    identity = torch.eye(d, dtype=a.dtype, device=a.device)
    difference = a.T @ b / n - identity
    weighted = difference * (identity + lambda_param * (1 - identity))
    gradients = [
        through_batch_norm(b @ weighted.T, a, a_std).to(z0.dtype) if wanted[0] else no_gradient(z0),
        through_batch_norm(a @ weighted, b, b_std).to(z1.dtype) if wanted[1] else no_gradient(z1),
    ]
    correlation = difference + identity
    rank = correlation.trace().square() / correlation.square().sum()
    health = [torch.cat([torch.stack([a_std, b_std]), rank.expand(2, 1)], 1)] if statistics else []
    if statistics > 1:
        health += [a @ a.T, b @ b.T] if n < d else [a.T @ b]
    return (difference * weighted).sum(), gradients, scalar_like(z0, 2 / n), health


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
    """`lambda mse(z0, z1) + mu (v(z0) + v(z1)) / 2 + nu (c(z0) + c(z1))`.

    VICReg, arXiv 2105.04906, with the official code's factor 1/2 on v.
    v = mean_d relu(1 - sqrt(var + eps)), c = sum_{i != j} cov_ij^2 / D, both with N - 1 in the denominator.
    The `statistics` (from 1 on) are [2, D + 1]: the columns' standard deviations (with eps) of each view, then the
    participation ratio of its covariance's spectrum, `(sum_i cov_ii)^2 / ||cov||^2`; from 2 on followed by each view's
    smaller square, c c^T for N < D, else c^T c (c: centred).
    Gradients carry 1 / D, without which a covariance of thousands of columns overflows float16.
    """
    n, d = z0.shape
    a = widen(z0)
    b = widen(z1)
    squares = []

    def regularise(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        centred = x - x.mean(0)
        if statistics > 1:
            squares.append(centred @ centred.T if n < d else centred.T @ centred)
        std = (x.var(0) + eps).sqrt()  # [D]
        covariance = centred.T @ centred / (n - 1)
        rank = covariance.trace().square() / covariance.square().sum()
        covariance = covariance - covariance.diag().diag()
        loss = mu_param * (1 - std).relu().mean() / 2 + nu_param * covariance.square().sum() / d
        variance_part = (std < 1) / std * (-mu_param / 2) * centred
        return loss, (variance_part + 4 * nu_param * centred @ covariance) * (n / (n - 1)), torch.cat([std, rank[None]])

    a_loss, a_gradient, a_health = regularise(a)
    b_loss, b_gradient, b_health = regularise(b)
    health = [torch.stack([a_health, b_health])] if statistics else []
    difference = 2 * lambda_param * (a - b)
    loss = lambda_param * (a - b).square().mean() + a_loss + b_loss
    gradients = [
        ((a_gradient + difference) / d).to(z0.dtype) if wanted[0] else no_gradient(z0),
        ((b_gradient - difference) / d).to(z1.dtype) if wanted[1] else no_gradient(z1),
    ]
    return loss, gradients, scalar_like(z0, 1 / n), health + squares
