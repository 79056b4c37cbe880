"""The coding rate, and the losses of it: EMP-SSL, SimDINO.

In plain torch, but for what `quick` takes: products, and a factorisation of a small matrix. Of what isn't finite they
are NaN.
"""

import functools
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from fastjem.collectives import Agreement, global_loss, sum_of_ranks, sum_over_ranks
from fastjem.functional import checks, quick
from fastjem.functional.compiled import over_ranks
from fastjem.functional.decompositions import cholesky, smaller_gram
from fastjem.functional.precision import in_float32, without_autocast
from fastjem.functional.prototypes import list_of_views
from fastjem.functional.unit import unit_rows
from fastjem.ops import transforms
from fastjem.ops.autograd import found_again
from fastjem.ops.forward_mode import refuse_forward_mode

COSINE_EPS = 1e-8  # of torch.nn.functional.cosine_similarity
EXPANSIONS = ("student", "mean")  # whose coding rate SimDINO takes
VIEWS = (Tensor, list, tuple)  # what views may come in


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
    others = None
    if group is not None:
        own = z.detach().mT @ z.detach()
        others = sum_over_ranks(own, group) - own
    refuse_forward_mode(op, (z, scale) if isinstance(scale, Tensor) else (z,))
    if transforms.active():  # which take plain torch apart by themselves
        with without_autocast(z):
            return _rate_of(_rate_factor(z, scale, others, op))
    return _CodingRate.apply(z, scale, others, op)


def _rate_of(factor: Tensor) -> Tensor:
    """The mean over views of half a log-determinant: `2 sum(log(diagonal of its Cholesky factor))`."""
    return factor.diagonal(dim1=-2, dim2=-1).log().sum() / (factor.shape[0] if factor.dim() == 3 else 1)


def _rate_factor(z: Tensor, scale: float | Tensor, others: Tensor | None, op: str) -> Tensor:
    """The Cholesky factor of `I + scale * (Gram matrix of z and of others)`."""
    gram = smaller_gram(z) if others is None else z.mT @ z + others
    scaled = scale * gram
    scaled.diagonal(dim1=-2, dim2=-1).add_(1)
    return cholesky(scaled, op)


class _CodingRate(torch.autograd.Function):
    """`0.5 logdet(I + scale G)`, G the Gram matrix of z, the mean over views.

    Its gradient is `scale z (I + scale Z^T Z)^-1`: one inverse from the factor that is there and one product, where
    autograd goes back through the factorisation. Differentiable again, by recomputing.
    """

    @staticmethod
    def forward(ctx, z: Tensor, scale: float | Tensor, others: Tensor | None, op: str) -> Tensor:
        with without_autocast(z):
            factor = _rate_factor(z, scale, others, op)
        ctx.save_for_backward(z, scale if isinstance(scale, Tensor) else None, others, factor)
        ctx.scale = scale
        ctx.op = op
        return _rate_of(factor)

    @staticmethod
    def backward(ctx, upstream: Tensor):
        z, learned, others, factor = ctx.saved_tensors
        scale = ctx.scale if learned is None else learned
        with without_autocast(z):
            if torch.is_grad_enabled():
                factor = _rate_factor(z, scale, others, ctx.op)
            inverse = torch.cholesky_inverse(factor)
            views = 1 if z.dim() == 2 else z.shape[0]
            of_z = None
            if ctx.needs_input_grad[0]:
                by_rows = others is None and z.shape[-2] < z.shape[-1]
                of_z = (upstream * (scale / views)) * (inverse @ z if by_rows else z @ inverse)
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
    with without_autocast(z):
        rows, of_mean = (unit_rows(x, COSINE_EPS) for x in (wide, wide.mean(0)))
        alike = (rows * of_mean).sum() / (z.shape[0] * z.shape[1])
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
        student = checks.common(*student)
        ranks.rows_of(student[0])
        ranks.alike(len(student), len(teacher), expansion)
    with without_autocast(student[0]):
        of_student = unit_rows(torch.stack(student))  # [S, B, D]
        of_teacher = unit_rows(torch.stack([x.to(of_student.dtype) for x in teacher]))  # [T, B, D]
    count, batch, width = of_teacher.shape
    rows = batch if group is None else sum(ranks.sizes)
    # The sum over all pairs is one product of sums; the views that meet themselves are taken from it.
    pairs = len(student) * count - count
    own = of_student[:count]
    similarity = of_student.sum(0) * of_teacher.sum(0) - (own * of_teacher).sum(0)
    alike = similarity.sum() / (rows * pairs)
    rate = _coding_rate(op, own if expansion == "student" else (own + of_teacher) / 2, eps, rows, group)
    if group is not None:
        rate = global_loss(rate, rate, group)
        alike = sum_of_ranks(alike, group)
    return (-weight * alike - rate * ((width + rows) / (width * rows))).to(of_student.dtype)
