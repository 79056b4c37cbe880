"""Losses on the covariance of embeddings: Barlow Twins, VICReg, TiCo."""

import torch
import torch.distributed as dist
from torch import Tensor

from fastjem.functional import _checks as check
from fastjem.functional._global_batch import of_global_batch
from fastjem.functional.spectral import in_float32, without_autocast
from fastjem.ops.autograd import one_pass


def barlow_twins(
    z0: Tensor,
    z1: Tensor,
    *,
    lambda_param: float = 5e-3,
    group: dist.ProcessGroup | None = None,
    statistics: Tensor | None = None,
) -> Tensor:
    """Barlow Twins' redundancy reduction (Zbontar et al. 2021, arXiv 2103.03230, equation 1).

    `sum_i (C_ii - 1)^2 + lambda sum_{i != j} C_ij^2`, where C = a^T b / N is the correlation of the batch-normalised
    views (biased variance, eps = 1e-5, no affine part).

    Args:
        z0, z1: [N, D] each, two views of N images, N >= 2.
        lambda_param: weight of the off-diagonal.
        group: the process group over whose global batch the statistics are taken (batches may be uneven).
        statistics: [2, D + 1], filled on the way: of each view the standard deviation of every dimension, then the
            effective rank of the correlation C, `(sum_i C_ii)^2 / ||C||^2` (D when nothing is redundant, 1 at collapse).

    Returns:
        0-dim float32 (float64 for float64 inputs); the same on every rank of the group.

    Raises:
        ValueError: for other shapes or dtypes, and for N = 1.
    """
    return _covariance_loss("barlow_twins", z0, z1, group, statistics, float(lambda_param))


def vicreg(
    z0: Tensor,
    z1: Tensor,
    *,
    lambda_param: float = 25.0,
    mu_param: float = 25.0,
    nu_param: float = 1.0,
    eps: float = 1e-4,
    variance_factor: float = 0.5,
    group: dist.ProcessGroup | None = None,
    statistics: Tensor | None = None,
) -> Tensor:
    """VICReg: invariance, variance, covariance (Bardes et al. 2022, arXiv 2105.04906, equation 6).

    `lambda mse(z0, z1) + mu factor (v(z0) + v(z1)) + nu (c(z0) + c(z1))` with v the mean over dimensions of
    `relu(1 - sqrt(var + eps))` and c = `sum_{i != j} cov_ij^2 / D`.

    Args:
        z0, z1: [N, D] each, two views of N images, N >= 2.
        lambda_param, mu_param, nu_param: weights of invariance, variance and covariance.
        eps: added to the variance.
        variance_factor: 0.5 as in the official code (and lightly's), 1 as in the paper (and solo-learn's).
        group: the process group over whose global batch the statistics are taken (batches may be uneven).
        statistics: [2, D + 1], filled on the way: of each view the standard deviation of every dimension (with
            eps), then the effective rank of its covariance, `(sum_i cov_ii)^2 / ||cov||^2` (D when nothing is
            redundant, 1 at collapse).

    Returns:
        0-dim float32 (float64 for float64 inputs); the same on every rank of the group.

    Raises:
        ValueError: for other shapes or dtypes, and for N = 1.
    """
    mu = 2.0 * variance_factor * mu_param  # the operator halves it
    return _covariance_loss("vicreg", z0, z1, group, statistics, float(lambda_param), mu, float(nu_param), float(eps))


def tico(
    z0: Tensor,
    z1: Tensor,
    covariance: Tensor | None = None,
    *,
    beta: float = 0.9,
    rho: float = 8.0,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """`1 - mean <a, b> + rho mean a^T C a`, C = beta covariance + (1 - beta) a^T a / N (Zhu et al. 2022, arXiv
    2206.10698).

    a and b are the normalised rows of the views; C is a constant, as far as gradients go.

    Args:
        z0, z1: [N, D] each, two views of N images.
        covariance: [D, D], the C of the step before; None: zeros.
        beta: how much of it stays.
        rho: weight of the covariance.
        group: the process group whose ranks' rows are one global batch (batches may be uneven).

    Returns:
        The loss, 0-dim float32 (float64 for float64 inputs), the same on every rank of the group; and C, [D, D].

    Raises:
        ValueError: for other shapes or dtypes.
    """
    check.matrices("tico", "z0 and z1 must be [N, D] both", z0, z1)
    z0, z1 = check.common(z0, z1)
    d = z0.shape[1]
    if covariance is not None and covariance.shape != (d, d):
        check.fail("tico", f"covariance must be [{d}, {d}]", tuple(covariance.shape))
    updated = []

    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        x, y = in_float32(x, y)
        with without_autocast(x):
            a, b = (torch.nn.functional.normalize(z, dim=1) for z in (x, y))
            own = a.detach()
            c = own.T @ own * ((1 - beta) / len(a))
            if covariance is not None:
                c = c + beta * covariance.detach().to(c.dtype)
            updated.append(c)
            return 1 - (a * b).sum(1).mean() + rho * (a @ c * a).sum(1).mean()

    return of_global_batch(loss_of, group, z0, z1), updated[0]


def _covariance_loss(
    op: str, z0: Tensor, z1: Tensor, group: dist.ProcessGroup | None, statistics: Tensor | None, *arguments: float
) -> Tensor:
    check.matrices(op, "z0 and z1 must be [N, D] both", z0, z1)
    if statistics is not None:
        wanted = (2, z0.shape[1] + 1)
        if statistics.shape != wanted or not statistics.is_floating_point() or statistics.requires_grad:
            came = f"{tuple(statistics.shape)} {statistics.dtype}"
            check.fail(op, f"statistics must be [2, {wanted[1]}], floating-point, without gradient", came)
        check.one_device(op, (z0, statistics))

    def loss_of(a: Tensor, b: Tensor) -> Tensor:
        if len(a) < 2:
            check.fail(op, "z0 and z1 must have N >= 2 rows, as their variance is needed", f"N = {len(a)}")
        return one_pass(op, (a, b), *arguments, statistics is not None, statistics=statistics)

    return of_global_batch(loss_of, group, *check.common(z0, z1))
