"""Losses on the spectrum of embeddings: MMCR, FroSSL, whitening; by the smaller Gram matrix.

In plain torch, but for what `quick` takes: what they cost is products, and a factorisation of a small matrix. Where
autograd would make products again that are there already, the gradient is written down with the loss. Of what isn't
finite they are NaN.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from fastjem.functional import checks, quick
from fastjem.functional.decompositions import cholesky, singular_values, smaller_gram
from fastjem.functional.precision import in_float32, loss_dtype, without_autocast
from fastjem.kernels.arithmetic import UNIT_EPS, no_gradient, unit_rows
from fastjem.ops import transforms
from fastjem.ops.autograd import found_again, known, needs_gradient


def mmcr(online: Tensor, momentum: Tensor, *, lmda: float | Tensor = 5e-3) -> Tensor:
    """`-||mean over views||_* + lmda mean_b ||views of b||_*`, nuclear norms (Yerxa et al. 2023, arXiv 2303.03307).

    Args:
        online, momentum: [B, V, D] each, the views of B images by the two encoders; 2 V views altogether. Rows as
            given.
        lmda: weight of the images' own manifolds.

    Returns:
        0-dim float32 (float64 for float64 inputs).

    Raises:
        ValueError: for other shapes or dtypes.
    """
    if (result := quick.mmcr(online, momentum, lmda)) is not None:
        return found_again("mmcr", *result, (online, momentum), functools.partial(_mmcr, lmda=lmda))
    return _mmcr(online, momentum, lmda)


def _mmcr(online: Tensor, momentum: Tensor, lmda: float | Tensor) -> Tensor:
    """In plain torch."""
    checks.matrices("mmcr", "online and momentum must be [B, V, D] both", online, momentum, dims=3)
    online, momentum = checks.common(online, momentum)
    weight = checks.number("mmcr", "lmda", lmda, online)
    with without_autocast(online):
        z = torch.cat([in_float32(online), in_float32(momentum)], 1)  # [B, 2 V, D]
        if transforms.takes_apart() or isinstance(weight, Tensor) or not needs_gradient(z):
            return _mmcr_by_autograd(z, weight)
        with torch.no_grad():
            loss, gradient = _mmcr_and_gradient(z, weight)
    return found_again("mmcr", loss, [gradient], [1.0], [z], functools.partial(_mmcr_by_autograd, weight=weight))


def _mmcr_and_gradient(z: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """The loss of [B, 2 V, D] and its gradient: that of a nuclear norm is U V^T."""
    images, views, _ = z.shape
    means = z.mean(1)
    nothing = (means - means).sum()  # 0, or NaN where an element isn't finite, of which there is no decomposition
    is_broken = nothing != 0
    z = z.masked_fill(is_broken, 0)
    u, s, v = torch.linalg.svd(z, full_matrices=False)
    of_means = torch.linalg.svd(z.mean(1), full_matrices=False)
    loss = (nothing - of_means[1].sum()).add_(s.sum(), alpha=weight / images)
    pull = (of_means[0] @ of_means[2])[:, None].expand(z.shape)
    return loss, torch.baddbmm(pull, u, v, beta=-1 / views, alpha=weight / images).add_(nothing)


def _mmcr_by_autograd(z: Tensor, weight: float | Tensor) -> Tensor:
    with without_autocast(z):
        of_images = singular_values(z).sum() / z.shape[0]
        of_means = singular_values(z.mean(1)).sum()
        return (weight * of_images - of_means).to(z.dtype)


def frossl(views: Sequence[Tensor], *, invariance: float | Tensor = 1.0) -> Tensor:
    """`log ||G / tr G||_F^2 + invariance V D mse(z, mean over views)`, summed over views: FroSSL.

    z is a view with normalised columns, G its smaller Gram matrix (Skean et al. 2023, arXiv 2310.02903).

    Args:
        views: V >= 2 tensors [N, D], or one [V, N, D].
        invariance: weight of the second term.

    Returns:
        0-dim float32 (float64 for float64 inputs).

    Raises:
        ValueError: for other shapes or dtypes.
    """
    if not isinstance(views, (Tensor, list, tuple)):
        checks.fail("frossl", "views must be [N, D] each", type(views).__name__)
    views = list(views)
    if (loss := quick.frossl(views, invariance)) is not None:
        return loss
    if len(views) < 2:
        checks.fail("frossl", "views must be at least two", len(views))
    checks.matrices("frossl", "views must be [N, D] each", *views)
    weight = checks.number("frossl", "invariance", invariance, views[0])
    views = checks.common(*views)
    wanted = any(needs_gradient(z) for z in views)
    with torch.no_grad(), without_autocast(views[0]):
        loss, apart, gradient = _frossl(in_float32(torch.stack(views)), weight, wanted)
    if isinstance(weight, Tensor):
        return known("frossl", loss, [*views, weight], [*gradient, apart], [1.0] * (len(views) + 1))
    return known("frossl", loss, views, list(gradient), [1.0] * len(views))


def _frossl(z: Tensor, weight: float | Tensor, wanted: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of [V, N, D], its gradients for `weight` and, if wanted, for z (else V empty ones)."""
    length = z.square().sum(1, keepdim=True).sqrt()  # [V, 1, D]; vector_norm takes four times as long along columns
    divisor = length.clamp_min(UNIT_EPS)
    x = z / divisor
    gram = smaller_gram(x)
    squares = gram.square().sum((1, 2), keepdim=True)
    # The trace is D (columns have length 1) but for columns of zeros: a constant, as far as gradients go.
    trace = gram.diagonal(dim1=1, dim2=2).sum(1)
    centred = x - x.mean(0)
    views, rows, _ = z.shape
    apart = views * centred.square().sum() / rows
    loss = (squares.log().sum() - 2 * trace.log().sum() + weight * apart).to(z.dtype)
    if not wanted:
        return loss, apart, z.new_empty(views, 0)
    product = gram @ x if z.shape[1] < z.shape[2] else x @ gram
    gradient = centred.mul_(2 * views / rows * weight).addcmul_(product, 4 / squares)
    radial = torch.linalg.vecdot(gradient, x, dim=1)[:, None] * (length > UNIT_EPS)
    return loss, apart, gradient.addcmul_(x, radial, value=-1).div_(divisor)


def whiten(x: Tensor, *, eps: float | Tensor = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Rows with covariance I: `(x - mean) L^-T` with `L L^T = (1 - eps) cov + eps I`, by Cholesky.

    Ermolov et al. 2021, arXiv 2007.06346 (W-MSE).

    Args:
        x: [N, D], N > D unless eps > 0.
        eps: shrinks the covariance to the identity.

    Returns:
        The whitened rows [N, D], and the mean [D] and covariance [D, D] they had (detached).

    Raises:
        ValueError: for other shapes or dtypes; on the CPU, for a singular covariance.
    """
    checks.matrices("whiten", "x must be [N, D]", x)
    eps = _shrinkage("whiten", "x", x, eps)
    x = in_float32(x)
    with without_autocast(x):
        mean = x.mean(0)
        centred = x - mean
        covariance = centred.T @ centred / (x.shape[0] - 1)
        factor = _factor("whiten", covariance, eps)
        whitened = torch.linalg.solve_triangular(factor, centred.T, upper=False).T
    return whitened, mean.detach(), covariance.detach()


def _shrinkage(op: str, name: str, x: Tensor, eps: float | Tensor) -> float | Tensor:
    """Check N, and eps, which comes in the dtype of the covariance if it is a tensor."""
    if x.shape[0] < 2:
        checks.fail(op, f"{name} must have N >= 2 rows, as their covariance is needed", f"N = {x.shape[0]}")
    eps = checks.number(op, "eps", eps, x, low=0, high=1, inclusive=True)
    return eps.to(loss_dtype(x)) if isinstance(eps, Tensor) else eps


def _factor(op: str, covariance: Tensor, eps: float | Tensor) -> Tensor:
    """L [..., D, D] of the covariance, shrunk by eps."""
    if not isinstance(eps, Tensor) and eps == 0:
        return cholesky(covariance, op)
    identity = torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device)
    return cholesky(torch.lerp(covariance, identity, eps), op)


def w_mse(z0: Tensor, z1: Tensor, *, eps: float | Tensor = 0.0) -> Tensor:
    """`2 - 2 mean cos(whiten(z0), whiten(z1))`: W-MSE of two views of one batch.

    Ermolov et al. 2021, arXiv 2007.06346, equation 5. The paper whitens sub-batches of random composition:
    see `fastjem.nn.WMSELoss`.

    Args:
        z0, z1: [N, D] each, N > D unless eps > 0.
        eps: shrinks the covariances to the identity.

    Returns:
        0-dim float32 (float64 for float64 inputs).

    Raises:
        ValueError: for other shapes or dtypes; on the CPU, for a singular covariance.
    """
    if (loss := quick.w_mse(z0, z1, eps)) is not None:
        return loss
    checks.matrices("w_mse", "z0 and z1 must be [N, D] both", z0, z1)
    eps = _shrinkage("w_mse", "z0 and z1", z0, eps)
    z0, z1 = checks.common(z0, z1)
    wanted = [needs_gradient(x) for x in (z0, z1)]
    of_eps = isinstance(eps, Tensor) and needs_gradient(eps)
    with torch.no_grad(), without_autocast(z0):
        z = in_float32(torch.stack([z0, z1]))
        centred = z - z.mean(1, keepdim=True)
        factor = _factor("w_mse", centred.mT @ centred / (z0.shape[0] - 1), eps)
        # LAPACK's matrices are column by column: transposed, nothing is copied and what comes out is row by row.
        whitened = torch.linalg.solve_triangular(factor, centred.mT, upper=False).mT
        unit, length = unit_rows(whitened)
        cosine = (unit[0] * unit[1]).sum(1, keepdim=True)
        loss = 2 - 2 * cosine.mean()
        gradients, eps_gradient = [no_gradient(z0), no_gradient(z1)], no_gradient(z0)
        if any(wanted) or of_eps:
            # for the whitened rows, and -N / 2 of it
            gradient = (unit.flip(0) - unit * (cosine * (length > UNIT_EPS))).div_(length)
            gradients, eps_gradient = _through_whitening(gradient, centred, factor, whitened, eps, of_eps)
    factors = [-2 / z0.shape[0]] * 2
    if isinstance(eps, Tensor):
        return known("w_mse", loss, [z0, z1, eps], [*gradients, eps_gradient], [*factors, factors[0]])
    return known("w_mse", loss, [z0, z1], list(gradients), factors)


def _through_whitening(
    gradient: Tensor,  # [2, N, D], for the whitened rows
    centred: Tensor,  # [2, N, D]
    factor: Tensor,  # [2, D, D]
    whitened: Tensor,  # [2, N, D]
    eps: float | Tensor,
    of_eps: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients for the rows [2, N, D], and for eps if wanted.

    With W = X L^-T and G for W, the gradient for X alone is G L^-1, and that for the covariance L L^T is -L^-T S L^-1,
    S = (P + P^T) / 2, P the lower triangle of G^T W with half of its diagonal (Giles 2008, section 2.2).
    """
    n = centred.shape[1]
    p = (gradient.mT @ whitened).tril()
    p.diagonal(dim1=1, dim2=2).mul_(0.5)
    s = p + p.mT  # 2 S
    within = gradient - (whitened @ s) * ((1 - eps) / (n - 1))  # times L^-1: X and the covariance share it
    of_rows = torch.linalg.solve_triangular(factor.mT, within.mT, upper=True).mT
    of_rows -= of_rows.mean(1, keepdim=True)
    if not of_eps:
        return of_rows, no_gradient(centred)
    half = torch.linalg.solve_triangular(factor.mT, s / -2, upper=True).mT
    of_covariance = torch.linalg.solve_triangular(factor.mT, half, upper=True)
    covariance = centred.mT @ centred / (n - 1)
    identity = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    return of_rows, (of_covariance * (identity - covariance)).sum()
