"""Losses on the spectrum of embeddings: total coding rate, MMCR, FroSSL, whitening; by the smaller Gram matrix.

In plain torch: what they cost is products, and a factorisation of a small matrix. Where autograd would make products
again that are there already, the gradient is written down with the loss. Of what isn't finite they are NaN.
"""

import functools
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import normalize

from fastjem.collectives import Agreement, global_loss, sum_of_ranks, sum_over_ranks
from fastjem.functional import checks, quick
from fastjem.functional.compiled import over_ranks
from fastjem.functional.decompositions import cholesky, singular_values
from fastjem.functional.precision import in_float32, loss_dtype, without_autocast
from fastjem.functional.prototypes import list_of_views
from fastjem.kernels.arithmetic import UNIT_EPS, no_gradient, unit_rows
from fastjem.ops import transforms
from fastjem.ops.autograd import found_again, known, needs_gradient
from fastjem.ops.forward_mode import refuse_forward_mode

EXPANSIONS = ("student", "mean")  # whose coding rate SimDINO takes
VIEWS = (Tensor, list, tuple)  # what views may come in


def smaller_gram(z: Tensor) -> Tensor:
    """The smaller of `z @ z.mT` [..., N, N] and `z.mT @ z` [..., D, D]: their nonzero eigenvalues are the same."""
    return z @ z.mT if z.shape[-2] < z.shape[-1] else z.mT @ z


@over_ranks()
def total_coding_rate(z: Tensor, *, eps: float | Tensor = 0.2, group: dist.ProcessGroup | None = None) -> Tensor:
    """`0.5 logdet(I + D / (N eps) Z^T Z)`, the mean over views: the rate of MCR2 and EMP-SSL.

    It grows with the volume that the rows fill, so a loss *subtracts* it (Tong et al. 2023, arXiv 2304.03977).

    Args:
        z: [N, D] or [V, N, D], rows as given (EMP-SSL normalises them before).
        eps: the distortion, not squared (as in the official code).
        group: the process group whose ranks' rows are one Z (batches may be uneven, a rank may have no rows). D x D
            numbers a view are exchanged.

    Returns:
        0-dim float32 (float64 for float64 inputs), the same on every rank of the group.

    Raises:
        ValueError: for other shapes, dtypes or eps.
    """
    op = "total_coding_rate"
    with Agreement(op, group) as ranks:
        dims = 3 if getattr(z, "ndim", 2) == 3 else 2
        may_be_empty = None if group is None else dims - 2
        checks.matrices(op, "z must be [N, D] or [V, N, D]", z, dims=dims, may_be_empty=may_be_empty)
        eps = checks.positive(op, "eps", eps, z)
        ranks.rows_of(z, dims - 2)
    rate = _coding_rate(op, z, eps, z.shape[-2] if group is None else sum(ranks.sizes), group)
    return rate if group is None else global_loss(rate, rate, group)


def _coding_rate(op: str, z: Tensor, eps: float | Tensor, rows: int, group: dist.ProcessGroup | None = None) -> Tensor:
    """The rate of all ranks' rows, differentiable for this rank's."""
    if group is None and (result := quick.coding_rate(z, eps)) is not None:
        return found_again(op, *result, (z,), functools.partial(_long_coding_rate, op, eps=eps, rows=rows))
    return _long_coding_rate(op, z, eps, rows, group)


def _long_coding_rate(
    op: str, z: Tensor, eps: float | Tensor, rows: int, group: dist.ProcessGroup | None = None
) -> Tensor:
    """In plain torch."""
    z = in_float32(z)
    if isinstance(eps, Tensor):
        eps = eps.to(z.dtype)  # before it is divided by: 1 / eps has more digits than eps
    scale = z.shape[-1] / (rows * eps)
    if not isinstance(scale, Tensor):
        scale = torch.full((), scale, dtype=z.dtype, device=z.device)
    others = None
    if group is not None:
        own = z.detach().mT @ z.detach()
        others = sum_over_ranks(own, group) - own
    refuse_forward_mode(op, (z, scale))
    if transforms.active():  # which take plain torch apart by themselves
        with without_autocast(z):
            return _rate_of(_rate_factor(z, scale, others, op))
    return _CodingRate.apply(z, scale, others, op)


def _rate_of(factor: Tensor) -> Tensor:
    """The mean over views of half a log-determinant: `2 sum(log(diagonal of its Cholesky factor))`."""
    return factor.diagonal(dim1=-2, dim2=-1).log().sum(-1).mean()


def _rate_factor(z: Tensor, scale: Tensor, others: Tensor | None, op: str) -> Tensor:
    """The Cholesky factor of `I + scale * (Gram matrix of z and of others)`."""
    gram = smaller_gram(z) if others is None else z.mT @ z + others
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return cholesky(identity + scale * gram, op)


class _CodingRate(torch.autograd.Function):
    """`0.5 logdet(I + scale G)`, G the Gram matrix of z, the mean over views.

    Its gradient is `scale z (I + scale Z^T Z)^-1`: one inverse from the factor that is there and one product, where
    autograd goes back through the factorisation. Differentiable again, by recomputing.
    """

    @staticmethod
    def forward(ctx, z: Tensor, scale: Tensor, others: Tensor | None, op: str) -> Tensor:
        with without_autocast(z):
            factor = _rate_factor(z, scale, others, op)
        ctx.save_for_backward(z, scale, others, factor)
        ctx.op = op
        return _rate_of(factor)

    @staticmethod
    def backward(ctx, upstream: Tensor):
        z, scale, others, factor = ctx.saved_tensors
        with without_autocast(z):
            if torch.is_grad_enabled():
                factor = _rate_factor(z, scale, others, ctx.op)
            inverse = torch.cholesky_inverse(factor)
            views = 1 if z.dim() == 2 else z.shape[0]
            of_z = None
            if ctx.needs_input_grad[0]:
                by_rows = others is None and z.shape[-2] < z.shape[-1]
                of_z = (upstream * scale / views) * (inverse @ z if by_rows else z @ inverse)
            of_scale = None
            if ctx.needs_input_grad[1]:  # tr(M^-1 G), with scale G = M - I
                traces = inverse.diagonal(dim1=-2, dim2=-1).sum(-1)
                of_scale = upstream * ((inverse.shape[-1] - traces) / (2 * scale)).mean()
        return of_z, of_scale, None, None


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
    return (-_coding_rate("emp_ssl", z, eps, z.shape[-2]) - weight * alike).to(wide.dtype)


@over_ranks()
def simdino(
    student: Tensor | Sequence[Tensor],
    teacher: Tensor | Sequence[Tensor],
    *,
    eps: float | Tensor = 0.05,
    coefficient: float | Tensor = 1.0,
    expansion: str = "student",
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """`-coefficient * mean cos(student_s, teacher_t) - (D + N) / (D N) * total_coding_rate(global views)`: SimDINO.

    The mean is over pairs of different views s != t and rows; the rate, of rows at unit length, keeps embeddings apart
    where DINO needs prototypes, centring and a temperature (Wu et al. 2025, arXiv 2502.10385). SimDINOv2's loss on
    class tokens is the same.

    Args:
        student: [S, B, D], or a sequence of S tensors [B, D]; the first T views are the teacher's, crops follow.
        teacher: [T, B, D], or a sequence of T tensors [B, D]; gets no gradient. Rows are normalised here.
        eps: the rate's distortion.
        coefficient: weight of the similarities.
        expansion: whose rate is taken: "student", its first T views; or "mean", of these and the teacher's.
        group: the process group over whose global batch, of N rows, both terms are (batches may be uneven).

    Returns:
        0-dim float32 (float64 for float64 inputs), the same on every rank of the group.

    Raises:
        ValueError: for other shapes, dtypes or options, and where no pair of views is left.
    """
    if group is None and expansion in EXPANSIONS and type(student) in VIEWS and type(teacher) in VIEWS:
        views, of_teacher = list(student), list(teacher)
        result = quick.simdino(views, of_teacher, eps, coefficient, expansion == "mean")
        if result is not None:
            options = (of_teacher, eps, coefficient, expansion, None)
            return found_again("simdino", *result, views, lambda *student: _simdino(student, *options))
    return _simdino(student, teacher, eps, coefficient, expansion, group)


def _simdino(
    student: Tensor | Sequence[Tensor],
    teacher: Tensor | Sequence[Tensor],
    eps: float | Tensor,
    coefficient: float | Tensor,
    expansion: str,
    group: dist.ProcessGroup | None,
) -> Tensor:
    """In plain torch."""
    op = "simdino"
    contract = "student and teacher must be [S, B, D] and [T, B, D], or lists of [B, D], S >= T"
    with Agreement(op, group) as ranks:
        student = list_of_views(op, contract, student)
        teacher = [x.detach() for x in list_of_views(op, contract, teacher)]
        checks.matrices(op, contract, *student, *teacher, may_be_empty=None if group is None else 0)
        if len(student) < max(2, len(teacher)):
            checks.fail(op, contract, f"{len(student)} and {len(teacher)} views")
        if expansion not in EXPANSIONS:
            checks.fail(op, "expansion must be student or mean", repr(expansion))
        eps = checks.positive(op, "eps", eps, student[0])
        weight = checks.number(op, "coefficient", coefficient, student[0])
        student = [normalize(in_float32(x), dim=1) for x in checks.common(*student)]
        teacher = [normalize(x.to(student[0].dtype), dim=1) for x in teacher]
        ranks.rows_of(student[0])
        ranks.alike(len(student), len(teacher), expansion)
    count = len(teacher)
    batch, width = student[0].shape
    rows = batch if group is None else sum(ranks.sizes)
    # The sum over all pairs is one product of sums; the views that meet themselves are taken from it.
    pairs = len(student) * count - count
    similarity = torch.stack(student).sum(0) * torch.stack(teacher).sum(0)
    similarity = similarity - sum(s * t for s, t in zip(student, teacher, strict=False))
    alike = similarity.sum() / (rows * pairs)
    views = student[:count] if expansion == "student" else [(s + t) / 2 for s, t in zip(student, teacher, strict=False)]
    rate = _coding_rate(op, torch.stack(views), eps, rows, group)
    if group is not None:
        rate = global_loss(rate, rate, group)
        alike = sum_of_ranks(alike, group)
    return (-weight * alike - rate * ((width + rows) / (width * rows))).to(student[0].dtype)


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
    identity = torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device)
    return cholesky((1 - eps) * covariance + eps * identity, op)


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
