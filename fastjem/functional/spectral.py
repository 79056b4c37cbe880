"""Losses on the spectrum of embeddings: total coding rate, MMCR, FroSSL, whitening; by the smaller Gram matrix.

In plain torch: what they cost is a factorisation of a small matrix. Of what isn't finite they are NaN.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fastjem.functional import checks
from fastjem.functional.decompositions import cholesky, singular_values
from fastjem.functional.precision import in_float32, without_autocast


def smaller_gram(z: Tensor) -> Tensor:
    """The smaller of `z @ z.mT` [..., N, N] and `z.mT @ z` [..., D, D]: their nonzero eigenvalues are the same."""
    return z @ z.mT if z.shape[-2] < z.shape[-1] else z.mT @ z


def total_coding_rate(z: Tensor, *, eps: float | Tensor = 0.2) -> Tensor:
    """`0.5 logdet(I + D / (N eps) Z^T Z)`, the mean over views: the rate of MCR2 and EMP-SSL.

    It grows with the volume that the rows fill, so a loss *subtracts* it (Tong et al. 2023, arXiv 2304.03977).

    Args:
        z: [N, D] or [V, N, D], rows as given (EMP-SSL normalises them before).
        eps: the distortion, not squared (as in the official code).

    Returns:
        0-dim float32 (float64 for float64 inputs).

    Raises:
        ValueError: for other shapes, dtypes or eps.
    """
    dims = 3 if getattr(z, "ndim", 2) == 3 else 2
    checks.matrices("total_coding_rate", "z must be [N, D] or [V, N, D]", z, dims=dims)
    return _coding_rate("total_coding_rate", z, checks.positive("total_coding_rate", "eps", eps, z))


def _coding_rate(op: str, z: Tensor, eps: float | Tensor) -> Tensor:
    n, d = z.shape[-2:]
    z = in_float32(z)
    with without_autocast(z):
        distortion = eps.to(z.dtype) if isinstance(eps, Tensor) else eps
        gram = smaller_gram(z) * (d / (n * distortion))
        identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        factor = cholesky(identity + gram, op)
        # logdet = 2 sum(log(diagonal of the factor)), and half of that is wanted.
        return factor.diagonal(dim1=-2, dim2=-1).log().sum(-1).mean()


def emp_ssl(z: Tensor, *, eps: float | Tensor = 0.2, invariance: float | Tensor = 200.0) -> Tensor:
    """`-total_coding_rate(z) - invariance * mean cos(z, mean over views of z)`: EMP-SSL's loss.

    Tong et al. 2023, arXiv 2304.03977, equation 4, with the sign of a loss.

    Args:
        z: [V, N, D].
        eps: the rate's distortion.
        invariance: weight of the invariance.

    Returns:
        0-dim float32 (float64 for float64 inputs).

    Raises:
        ValueError: for other shapes, dtypes or eps.
    """
    checks.matrices("emp_ssl", "z must be [V, N, D]", z, dims=3)
    eps = checks.positive("emp_ssl", "eps", eps, z)
    weight = checks.number("emp_ssl", "invariance", invariance, z)
    wide = in_float32(z)
    alike = torch.nn.functional.cosine_similarity(wide, wide.mean(0, keepdim=True), dim=-1).mean()
    return (-_coding_rate("emp_ssl", z, eps) - weight * alike).to(wide.dtype)


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
    checks.matrices("mmcr", "online and momentum must be [B, V, D] both", online, momentum, dims=3)
    online, momentum = checks.common(online, momentum)
    weight = checks.number("mmcr", "lmda", lmda, online)
    with without_autocast(online):
        z = torch.cat([in_float32(online), in_float32(momentum)], 1)  # [B, 2 V, D]
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
    views = list(views)
    if len(views) < 2:
        checks.fail("frossl", "views must be at least two", len(views))
    checks.matrices("frossl", "views must be [N, D] each", *views)
    weight = checks.number("frossl", "invariance", invariance, views[0])
    z = in_float32(torch.stack(checks.common(*views)))  # [V, N, D]
    with without_autocast(z):
        z = normalize(z, dim=1)
        gram = smaller_gram(z)
        # The trace is D (columns have length 1) but for columns of zeros: a constant, as far as gradients go.
        trace = gram.diagonal(dim1=1, dim2=2).sum(1).detach()
        entropy = gram.square().sum((1, 2)).log() - 2 * trace.log()
        apart = (z - z.mean(0)).square().sum((1, 2)).sum() / z.shape[1]
        return (entropy.sum() + weight * z.shape[0] * apart).to(z.dtype)


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
    return _whiten("whiten", "x", x, eps)


def _whiten(op: str, name: str, x: Tensor, eps: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if x.shape[0] < 2:
        checks.fail(op, f"{name} must have N >= 2 rows, as their covariance is needed", f"N = {x.shape[0]}")
    eps = checks.number(op, "eps", eps, x, low=0, high=1, inclusive=True)
    x = in_float32(x)
    if isinstance(eps, Tensor):
        eps = eps.to(x.dtype)
    with without_autocast(x):
        mean = x.mean(0)
        centred = x - mean
        covariance = centred.T @ centred / (x.shape[0] - 1)
        identity = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
        factor = cholesky((1 - eps) * covariance + eps * identity, op)
        whitened = torch.linalg.solve_triangular(factor, centred.T, upper=False).T
    return whitened, mean.detach(), covariance.detach()


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
    checks.matrices("w_mse", "z0 and z1 must be [N, D] both", z0, z1)
    a, b = (_whiten("w_mse", "z0 and z1", z, eps)[0] for z in checks.common(z0, z1))
    return 2 - 2 * (normalize(a, dim=1) * normalize(b, dim=1)).sum(1).mean()
