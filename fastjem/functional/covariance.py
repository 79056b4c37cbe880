"""Losses on the covariance of embeddings: Barlow Twins, VICReg, TiCo."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from fastjem.collectives import (
    Agreement,
    gather_rows,
    gradient_factor,
    of_global_batch,
    sum_over_ranks,
)
from fastjem.functional import checks, quick, summed_squares
from fastjem.functional.compiled import over_ranks
from fastjem.functional.decompositions import eigenvalues, eigenvectors, singular_values
from fastjem.functional.precision import in_float32, without_autocast
from fastjem.kernels.arithmetic import UNIT_EPS, no_gradient, solvable, unit_rows, widest
from fastjem.ops.autograd import known, needs_gradient, one_pass, one_pass_with_statistics


@dataclass
class Health:
    """What a covariance loss saw of its two views: made by the user, filled by the loss from what it computes anyway.

    Tensors stay on their device and nothing waits for them. For VICReg the figures are of each view's covariance, for
    Barlow Twins the rank and the spectrum are of the cross-correlation C, the same in both rows.

    Args:
        keep_spectrum: also keep the small squares, [min(N, D), min(N, D)] each, that `spectrum` is computed from.
    """

    keep_spectrum: bool = False
    # [2, D]: the standard deviation of every dimension; all near 0 is collapse.
    std: Tensor | None = field(default=None, init=False)
    # [2]: (sum of eigenvalues)^2 / sum of their squares; D when nothing is redundant, 1 when all is.
    effective_rank: Tensor | None = field(default=None, init=False)
    _spectrum: Callable[[], Tensor] | None = field(default=None, init=False, repr=False)

    @torch.no_grad()
    def spectrum(self) -> Tensor:
        """[2, min(N, D)], descending: the covariances' eigenvalues (VICReg), C's singular values (Barlow Twins).

        The eigensolver runs here, in float64, and waits for a GPU's result: call it on the steps that are logged.
        On MPS it is the host's, and so is the result.

        Raises:
            ValueError: without `keep_spectrum`, or before a loss has filled it.
        """
        if self._spectrum is None:
            checks.fail("health", "spectrum needs Health(keep_spectrum=True) that a loss has filled", "none")
        return self._spectrum()

    def fill(self, figures: Tensor, squares: list[Tensor], spectrum: Callable[..., Tensor], n: int) -> None:
        """By a loss: figures [2, D + 1], the standard deviations and the rank."""
        self.std = figures[:, :-1]
        self.effective_rank = figures[:, -1]
        self._spectrum = partial(_spectrum_of, spectrum, squares, n) if squares else None


def _spectrum_of(spectrum: Callable[..., Tensor], squares: list[Tensor], n: int) -> Tensor:
    return spectrum([widest(solvable(x)) for x in squares], n)


def _covariance_spectra(squares: list[Tensor], n: int) -> Tensor:
    """[2, min(N, D)]: eigenvalues of a^T a / (N - 1) of both centred views, from a^T a or a a^T."""
    return eigenvalues(torch.stack(squares)).clamp(min=0).flip(1) / (n - 1)


def _correlation_spectrum(squares: list[Tensor], n: int) -> Tensor:
    """[2, min(N, D)], in both rows the singular values of C = a^T b / N; from a^T b, or from a a^T and b b^T.

    With a a^T = R R^T, C's squared singular values (times N^2) are the eigenvalues of R^T b b^T R.
    """
    if len(squares) == 1:
        values = singular_values(squares[0])
    else:
        of_first, vectors = eigenvectors(squares[0])
        root = vectors * of_first.clamp(min=0).sqrt()
        values = eigenvalues(root.T @ squares[1] @ root).clamp(min=0).flip(0).sqrt()
    return (values / n).expand(2, -1)


@over_ranks()
def barlow_twins(
    z0: Tensor,
    z1: Tensor,
    *,
    lambda_param: float | Tensor = 5e-3,
    group: dist.ProcessGroup | None = None,
    health: Health | None = None,
) -> Tensor:
    """Barlow Twins' redundancy reduction (Zbontar et al. 2021, arXiv 2103.03230, equation 1).

    `sum_i (C_ii - 1)^2 + lambda sum_{i != j} C_ij^2`, where C = a^T b / N is the correlation of the batch-normalised
    views (biased variance, eps = 1e-5, no affine part).

    Args:
        z0, z1: [N, D] each, two views of N images, N >= 2.
        lambda_param: weight of the off-diagonal: a number, or a 0-dim tensor, which gets its gradient.
        group: the process group over whose global batch the statistics are taken (batches may be uneven, even empty).
            Rows are gathered, or D x D squares added, whichever is fewer bytes.
        health: filled on the way.

    Returns:
        0-dim float32 (float64 for float64 inputs); the same on every rank of the group.

    Raises:
        ValueError: for other shapes or dtypes, and for N = 1.
    """
    if group is None and health is None and (loss := quick.barlow_twins(z0, z1, lambda_param)) is not None:
        return loss
    weight = checks.number("barlow_twins", "lambda_param", lambda_param, _first(z0))
    if not isinstance(weight, Tensor):
        return _covariance_loss("barlow_twins", z0, z1, group, health, weight)
    diagonal = _covariance_loss("barlow_twins", z0, z1, group, health, 0.0)
    everything = _covariance_loss("barlow_twins", z0, z1, group, None, 1.0)
    return diagonal + weight.to(diagonal.dtype) * (everything - diagonal)


@over_ranks()
def vicreg(
    z0: Tensor,
    z1: Tensor,
    *,
    lambda_param: float | Tensor = 25.0,
    mu_param: float | Tensor = 25.0,
    nu_param: float | Tensor = 1.0,
    eps: float = 1e-4,
    variance_factor: float | Tensor = 0.5,
    group: dist.ProcessGroup | None = None,
    health: Health | None = None,
) -> Tensor:
    """VICReg: invariance, variance, covariance (Bardes et al. 2022, arXiv 2105.04906, equation 6).

    `lambda mse(z0, z1) + mu factor (v(z0) + v(z1)) + nu (c(z0) + c(z1))` with v the mean over dimensions of
    `relu(1 - sqrt(var + eps))` and c = `sum_{i != j} cov_ij^2 / D`.

    Args:
        z0, z1: [N, D] each, two views of N images, N >= 2.
        lambda_param, mu_param, nu_param: weights of invariance, variance and covariance: numbers, or 0-dim tensors,
            which get their gradients and cost a pass each.
        eps: added to the variance.
        variance_factor: 0.5 as in the official code (and lightly's), 1 as in the paper (and solo-learn's).
        group: the process group over whose global batch the statistics are taken (batches may be uneven, even empty).
            Rows are gathered, or D x D squares added, whichever is fewer bytes.
        health: filled on the way; its std is with eps.

    Returns:
        0-dim float32 (float64 for float64 inputs); the same on every rank of the group.

    Raises:
        ValueError: for other shapes or dtypes, and for N = 1.
    """
    if group is None and health is None:
        loss = quick.vicreg(z0, z1, lambda_param, mu_param, nu_param, eps, variance_factor)
        if loss is not None:
            return loss
    like = _first(z0)
    factor = checks.number("vicreg", "variance_factor", variance_factor, like)
    mu = checks.number("vicreg", "mu_param", mu_param, like)
    weights = (
        checks.number("vicreg", "lambda_param", lambda_param, like),
        2.0 * factor * mu,  # the operator halves it
        checks.number("vicreg", "nu_param", nu_param, like),
    )
    eps = checks.host_number("vicreg", "eps", eps, low=0, inclusive=True)
    return _weighted(weights, lambda w, watched: _covariance_loss("vicreg", z0, z1, group, watched, *w, eps), health)


def _first(z: object) -> Tensor | None:
    """On whose device a weight has to be; anything but a tensor is refused later, by its own check."""
    return z if isinstance(z, Tensor) else None


def _weighted(
    weights: tuple[float | Tensor, ...],
    loss_of: Callable[[tuple[float, ...], Health | None], Tensor],
    health: Health | None,
) -> Tensor:
    """A loss that is linear in its weights, of which tensors have gradients: a call of the operator for each of them.

    One more is for all that are numbers, and where all are there is no other.
    """
    numbers = tuple(0.0 if isinstance(w, Tensor) else w for w in weights)
    loss = loss_of(numbers, health)
    for i, weight in enumerate(weights):
        if isinstance(weight, Tensor):
            part = loss_of(tuple(float(i == j) for j in range(len(weights))), None)
            loss = loss + weight.to(part.dtype) * part
    return loss


@over_ranks(lambda z0, *_, **__: [(), (z0.shape[1], z0.shape[1])], packed=tuple)
def tico(
    z0: Tensor,
    z1: Tensor,
    covariance: Tensor | None = None,
    *,
    beta: float | Tensor = 0.9,
    rho: float | Tensor = 8.0,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """`1 - mean <a, b> + rho mean a^T C a`, C = beta covariance + (1 - beta) a^T a / N: TiCo.

    a and b are the normalised rows of the views; C is a constant, as far as gradients go (Zhu et al. 2022, arXiv
    2206.10698).

    Args:
        z0, z1: [N, D] each, two views of N images.
        covariance: [D, D], the C of the step before; None: zeros.
        beta: how much of it stays.
        rho: weight of the covariance.
        group: the process group whose ranks' rows are one global batch (batches may be uneven, even empty).

    Returns:
        The loss, 0-dim float32 (float64 for float64 inputs), the same on every rank of the group; and C, [D, D].

    Raises:
        ValueError: for other shapes or dtypes.
    """
    if group is None and (result := quick.tico(z0, z1, covariance, beta, rho)) is not None:
        return result
    with Agreement("tico", group) as ranks:
        may_be_empty = None if group is None else 0
        checks.matrices("tico", "z0 and z1 must be [N, D] both", z0, z1, may_be_empty=may_be_empty)
        z0, z1 = checks.common(z0, z1)
        d = z0.shape[1]
        if covariance is not None:
            checks.matrices("tico", f"covariance must be [{d}, {d}]", covariance)
            if covariance.shape != (d, d):
                checks.fail("tico", f"covariance must be [{d}, {d}]", tuple(covariance.shape))
            checks.one_device("tico", [z0, covariance])
        beta = checks.number("tico", "beta", beta, z0, low=0, high=1, inclusive=True)
        rho = checks.number("tico", "rho", rho, z0)
        if isinstance(beta, Tensor):
            beta = widest(beta)
        ranks.rows_of(z0)
    numbers = [x if isinstance(x, Tensor) else None for x in (beta, rho)]
    wanted = [x is not None and needs_gradient(x) for x in (z0, z1, *numbers)]
    with torch.no_grad(), without_autocast(z0):
        loss, gradients, c = _tico(z0, z1, covariance, beta, rho, wanted, ranks.sizes, group)
    tensors = [(x, g) for x, g in zip((z0, z1, *numbers), gradients, strict=True) if x is not None]
    factor = gradient_factor(group) / sum(ranks.sizes)
    inputs, gradients = zip(*tensors, strict=True)
    return known("tico", loss, inputs, gradients, [factor] * len(inputs)), c


def _tico(
    z0: Tensor,
    z1: Tensor,
    covariance: Tensor | None,
    beta: float | Tensor,
    rho: float | Tensor,
    wanted: list[bool],  # for z0, z1, beta, rho
    sizes: list[int],
    group: dist.ProcessGroup | None,
) -> tuple[Tensor, list[Tensor], Tensor]:
    """The loss of all ranks' rows, N times its gradients of this rank's part (empty where not wanted), and C."""
    n = sum(sizes)
    d = z0.shape[1]
    a, a_norm = unit_rows(in_float32(z0))
    b, b_norm = unit_rows(in_float32(z1))
    if group is None or n >= d:
        squares = sum_over_ranks(a.T @ a, group)
    else:  # the rows of all ranks are fewer numbers than a D x D square
        rows, _ = gather_rows(a, group, sizes)
        squares = rows.T @ rows
    c = squares * ((1 - beta) / n)
    symmetric = c
    if covariance is not None:
        covariance = covariance.to(c.dtype)
        c = c + beta * covariance
        symmetric = (c + c.T) / 2  # what a^T C a and its gradient, 2 C a, see of a C that isn't
    product = a @ symmetric
    squared = (product * a).sum(1, keepdim=True)  # [N, 1], a^T C a
    cosine = (a * b).sum(1, keepdim=True)
    loss = 1 + sum_over_ranks((rho * squared - cosine).sum(), group) / n

    gradients = [no_gradient(z0), no_gradient(z1), *[squared.sum()] * 2]
    if wanted[0]:
        radial = (cosine - 2 * rho * squared) * (a_norm > UNIT_EPS)
        gradients[0] = product.mul_(2 * rho).sub_(b).addcmul_(a, radial).div_(a_norm)
    if wanted[1]:
        gradients[1] = (b * (cosine * (b_norm > UNIT_EPS))).sub_(a).div_(b_norm)
    if wanted[2]:  # C is a constant of z0, but not of beta
        slope = squares / -n if covariance is None else covariance - squares / n
        gradients[2] = rho * ((a @ slope) * a).sum()
    return loss, gradients, c


@dataclass(frozen=True)
class _Kind:
    """What a covariance loss does where D x D squares travel instead of rows, and with the squares it has computed."""

    squares: int  # that an all-reduce would carry
    of_summed_squares: Callable[..., summed_squares.Result]
    spectrum: Callable[[list[Tensor], int], Tensor]  # from the squares that `keep_spectrum` keeps


_KINDS = {
    "barlow_twins": _Kind(1, summed_squares.barlow_twins, _correlation_spectrum),
    "vicreg": _Kind(2, summed_squares.vicreg, _covariance_spectra),
}


def _covariance_loss(
    op: str, z0: Tensor, z1: Tensor, group: dist.ProcessGroup | None, health: Health | None, *arguments: float
) -> Tensor:
    """The loss of the operator `op` with its further arguments, over all ranks' rows."""
    with Agreement(op, group) as ranks:
        may_be_empty = None if group is None else 0
        checks.matrices(op, "z0 and z1 must be [N, D] both", z0, z1, may_be_empty=may_be_empty)
        z0, z1 = checks.common(z0, z1)
        ranks.rows_of(z0)
    kind = _KINDS[op]
    statistics = 0 if health is None else 1 + health.keep_spectrum
    n = sum(ranks.sizes)
    if n < 2:
        checks.fail(op, "z0 and z1 must have N >= 2 rows, as their variance is needed", f"N = {n}")

    def loss_of(a: Tensor, b: Tensor) -> Tensor:
        if health is None:
            return one_pass(op, (a, b), *arguments, 0)
        loss, figures, *kept = one_pass_with_statistics(op, (a, b), *arguments, statistics)
        health.fill(figures, kept, kind.spectrum, n)
        return loss

    if group is None or not summed_squares.fewer_bytes(kind.squares, n, z0):
        return of_global_batch(loss_of, group, ranks.sizes, z0, z1)
    with torch.no_grad(), without_autocast(z0):
        loss, gradients, scale, seen = kind.of_summed_squares(z0, z1, *arguments, statistics, n, group)
    if health is not None:
        health.fill(seen[0], seen[1:], kind.spectrum, n)
    factor = scale * gradient_factor(group)
    return known(op, loss, (z0, z1), [g.to(z0.dtype) for g in gradients], [factor, factor])
