"""TiCo, FroSSL, W-MSE, coding rate, SimDINO and MMCR of plain tensors on the CPU: torch's products and factorisations,
and C++ for all between them.

What such a loss of some hundred rows costs beside two products are steps: in plain torch twenty to fifty of them, each
of which takes a few microseconds before it begins. All functions return None for tensors that aren't plain or don't fit
one another, and for what isn't finite: `fastjem.functional` computes that, or says what is wrong.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _C
from ..arithmetic import compute_dtype
from ..native import CODES, Found, address, gradients_for, loss_like, scale_within
from ..plain import plain


def _is_autocast() -> bool:
    """Whether products would be bfloat16 here; the dispatcher ends that for operators."""
    return torch.is_autocast_enabled("cpu")


def _gram(x: Tensor) -> Tensor:
    """The smaller of `x @ x.mT` and `x.mT @ x`, of matrices [V, N, D]."""
    return torch.bmm(x, x.mT) if x.shape[1] < x.shape[2] else torch.bmm(x.mT, x)


def _times_gram(x: Tensor, gram: Tensor) -> Tensor:
    """[V, N, D] times the `_gram` of their shape, from its side."""
    return torch.bmm(gram, x) if x.shape[1] < x.shape[2] else torch.bmm(x, gram)


def tico(
    z0: Tensor, z1: Tensor, covariance: Tensor | None, beta: float, rho: float, wanted: Sequence[bool]
) -> tuple[Found, Tensor] | None:
    """The loss of [N, D] each, and C."""
    if z0.dim() != 2 or _is_autocast():
        return None
    n, d = z0.shape
    unit = torch.empty(n, d, dtype=compute_dtype(z0.dtype))
    if covariance is not None:
        covariance = covariance.detach()
        if covariance.shape != (d, d) or covariance.dtype != unit.dtype or not plain([covariance]):
            return None
    threads = torch.get_num_threads()
    if not _C.tico_units(z0, z1, address(unit), threads):
        return None
    c = torch.empty(d, d, dtype=unit.dtype)
    share = (1 - beta) / n
    if covariance is None:
        symmetric = torch.addmm(c, unit.T, unit, beta=0, alpha=share, out=c)
    else:
        torch.addmm(covariance, unit.T, unit, beta=beta, alpha=share, out=c)
        symmetric = (c + c.T).mul_(0.5)  # what a^T C a and its gradient, 2 C a, see of a C that isn't
    product = torch.mm(unit, symmetric)
    within = scale_within(1 / n, z0.dtype)
    gradients = gradients_for((z0, z1), wanted)
    loss = _C.tico(
        z0, z1, address(unit), address(product), rho, within, *[address(g) for g in gradients], threads
    )  # fmt: skip
    if not math.isfinite(loss):
        return None
    return Found(loss_like(z0, loss), gradients, (1 / n / within,) * 2), c


def frossl(views: list[Tensor], invariance: float, wanted: Sequence[bool]) -> Found | None:
    """The loss of V views [N, D]."""
    first = views[0]
    if first.dim() != 2 or _is_autocast():
        return None
    n, d = first.shape
    columns = torch.empty(len(views), n, d, dtype=compute_dtype(first.dtype))
    divisors = torch.empty(len(views), d, dtype=torch.float64)
    threads = torch.get_num_threads()
    if not _C.frossl_columns(views, address(columns), address(divisors), threads):
        return None
    gram = _gram(columns)
    product = _times_gram(columns, gram) if any(wanted) else None
    gradients = gradients_for(views, wanted)
    loss = _C.frossl(
        views,
        address(columns),
        address(divisors),
        address(gram),
        gram.shape[1],
        address(product),
        invariance,
        1.0,
        [address(g) for g in gradients],
        threads,
    )
    if not math.isfinite(loss):
        return None
    return Found(loss_like(first, loss), gradients, (1.0,) * len(views))


def _factor(gram: Tensor, scale: float, diagonal: float) -> Tensor | None:
    """The Cholesky factors of `gram * scale + diagonal I` [V, M, M], written over; None where one has none."""
    if not _C.shifted_identity(
        CODES[gram.dtype], address(gram), *gram.shape[:2], scale, diagonal, torch.get_num_threads()
    ):
        return None
    factor, info = torch.linalg.cholesky_ex(gram)
    return None if any(info.tolist()) else factor


def w_mse(z0: Tensor, z1: Tensor, eps: float, wanted: Sequence[bool]) -> Found | None:
    """The loss of [N, D] each."""
    if z0.dim() != 2 or z0.shape != z1.shape or z0.dtype not in CODES or z1.dtype != z0.dtype or _is_autocast():
        return None
    if len(z0) < 2 or not plain([z0, z1]) or not (z0.is_contiguous() and z1.is_contiguous()):
        return None
    n, d = z0.shape
    threads = torch.get_num_threads()
    centred = torch.empty(2, n, d, dtype=compute_dtype(z0.dtype))
    code = CODES[centred.dtype]
    std = torch.empty(d, dtype=torch.float64)  # which nobody asks for
    for z, out in zip((z0, z1), centred, strict=True):
        _C.standardise(
            CODES[z.dtype], address(z), d, n, d, 1.0, 0.0, False, address(out), address(std), 0, 0, threads
        )  # fmt: skip
    factor = _factor(torch.bmm(centred.mT, centred), (1 - eps) / (n - 1), eps)
    if factor is None:
        return None
    # LAPACK's matrices are column by column: transposed, nothing is copied and what comes out is row by row.
    whitened = torch.linalg.solve_triangular(factor, centred.mT, upper=False).mT
    within = scale_within(-2 / n, z0.dtype)
    gradient = torch.empty_like(centred) if any(wanted) else None
    cosines = _C.w_mse_rows(code, address(whitened), n, d, within, address(gradient), threads)
    gradients: list[Tensor | None] = [None, None]
    if gradient is not None:
        # Back through the whitening: see `_through_whitening` in fastjem/functional/spectral.py.
        p = torch.bmm(gradient.mT, whitened)
        _C.mirrored(code, address(p), 2, d, (eps - 1) / (n - 1), threads)
        torch.baddbmm(gradient, whitened, p, out=gradient)
        of_rows = torch.linalg.solve_triangular(factor.mT, gradient.mT, upper=True).mT.to(z0.dtype)
        gradients = [g if want else None for g, want in zip(of_rows, wanted, strict=True)]
    return Found(loss_like(z0, 2 - 2 / n * cosines), gradients, (-2 / n / within,) * 2)


def coding_rate(z: Tensor, eps: float, wanted: bool) -> Found | None:
    """`0.5 logdet(I + D / (N eps) Z^T Z)` of [N, D], or the mean over V of [V, N, D]."""
    if z.dim() not in (2, 3) or z.dtype not in CODES or not z.numel() or _is_autocast() or not plain([z]):
        return None
    rows = (z if z.dim() == 3 else z[None]).detach().to(compute_dtype(z.dtype))
    views, n, d = rows.shape
    scale = d / (n * eps)
    factor = _factor(_gram(rows), scale, 1.0)
    if factor is None:
        return None
    rate = _C.log_diagonals(CODES[factor.dtype], address(factor), views, factor.shape[1]) / views
    within = scale_within(scale / views, z.dtype)
    gradient = None
    if wanted:
        product = _times_gram(rows, torch.cholesky_inverse(factor).mul_(within))
        if z.dtype == torch.float16:  # whose numbers end at 6e-8: of long rows the inverse is below that
            largest = product.abs().max().item() or 1.0
            product.div_(largest)
            within = 1 / largest
        gradient = product.to(z.dtype).view(z.shape)
    return Found(loss_like(z, rate), [gradient], (scale / views / within,))


def simdino(
    student: list[Tensor],  # S x [N, D]
    teacher: list[Tensor],  # T x [N, D], constants
    eps: float,
    coefficient: float,
    mean: bool,
    wanted: Sequence[bool],
) -> Found | None:
    """The loss of one rank; `mean`: the rate is of the means of student and teacher."""
    first = student[0]
    if first.dim() != 2 or _is_autocast():
        return None
    n, d = first.shape
    views = len(teacher)
    units = torch.empty(views, n, d, dtype=compute_dtype(first.dtype))
    threads = torch.get_num_threads()
    if not _C.simdino_units(student, teacher, mean, address(units), threads):
        return None
    scale = d / (n * eps)
    factor = _factor(_gram(units), scale, 1.0)
    if factor is None:
        return None
    rate = _C.log_diagonals(CODES[factor.dtype], address(factor), views, factor.shape[1]) / views
    product = _times_gram(units, torch.cholesky_inverse(factor)) if any(wanted) else None
    pairs = len(student) * views - views
    of_rate = -(d + n) / (d * n)
    # Of float16 the gradient is times the rows, as 1/N takes half of its numbers below what it can hold.
    within = scale_within(1 / n, first.dtype)
    gradients = gradients_for(student, wanted)
    cosines = _C.simdino(
        student,
        teacher,
        mean,
        address(product),
        of_rate * scale * n / views * (0.5 if mean else 1.0) * within,
        -coefficient / pairs * within,
        [address(g) for g in gradients],
        threads,
    )
    loss = of_rate * rate - coefficient * cosines / (n * pairs)
    return Found(loss_like(first, loss), gradients, (1 / n / within,) * len(student))


def mmcr(online: Tensor, momentum: Tensor, lmda: float, wanted: Sequence[bool]) -> Found | None:
    """The loss of [B, V, D] each, not of float64: singular values by eigenvalues of Gram matrices, in float64."""
    if online.dim() != 3 or _is_autocast():
        return None
    images, views, d = online.shape
    means = torch.empty(images, d, dtype=torch.float64)
    polar = torch.empty(images, 2 * views, 2 * views, dtype=torch.float32)
    threads = torch.get_num_threads()
    of_images = _C.mmcr_images(online, momentum, address(means), address(polar), threads)
    if of_images is None:
        return None
    squares, vectors = torch.linalg.eigh(torch.mm(means, means.T) if images < d else torch.mm(means.T, means))
    of_means = squares.clamp(min=0).sqrt().sum().item()
    gradients = gradients_for((online, momentum), wanted)
    if any(wanted):
        # Where floats have no direction, the gradient has nothing.
        inverses = squares.rsqrt().where(squares > 1e-14 * squares[-1], 0)
        inverse = torch.mm(vectors * inverses, vectors.T)
        of_mean = torch.mm(inverse, means) if images < d else torch.mm(means, inverse)
        _C.mmcr_gradients(
            online,
            momentum,
            address(polar),
            address(of_mean),
            lmda / images,
            -1 / (2 * views),
            *[address(g) for g in gradients],
            threads,
        )
    return Found(loss_like(online, lmda * of_images / images - of_means), gradients, (1.0, 1.0))
