"""Decompositions of matrices that may hold NaN or infinities: then NaN comes out, and NaN is the gradient.

LAPACK raises instead, on the CPU and for some of them. A GradScaler, and an alarm, know what to do with a loss that
isn't finite; an exception ends the training.
"""

import torch
from torch import Tensor

from fastjem.functional import checks
from fastjem.ops import transforms


def finite_or_nan(x: Tensor) -> tuple[Tensor, Tensor]:
    """[..., M, N] -> the matrices, those that aren't finite as zeros; and [..., 1], 0 or for those NaN.

    What is computed of the first is to be added to the second, whose gradient for such a matrix is NaN everywhere.
    """
    constant = x.detach()
    finite = (constant - constant).sum((-2, -1), keepdim=True) == 0  # else NaN; fewer passes than isfinite().all()
    return torch.where(finite, x, 0), (x * x.new_zeros(()).where(finite, torch.nan)).sum((-2, -1))[..., None]


def smaller_gram(z: Tensor) -> Tensor:
    """The smaller of `z @ z.mT` [..., N, N] and `z.mT @ z` [..., D, D]: their nonzero eigenvalues are the same."""
    return z @ z.mT if z.shape[-2] < z.shape[-1] else z.mT @ z


def singular_values(x: Tensor) -> Tensor:
    """[..., min(M, N)], descending; NaN for a matrix that isn't finite."""
    matrices, nothing = finite_or_nan(x)
    return torch.linalg.svdvals(matrices) + nothing


def eigenvalues(x: Tensor) -> Tensor:
    """[..., N], ascending, of symmetric matrices; NaN for one that isn't finite."""
    matrices, nothing = finite_or_nan(x)
    return torch.linalg.eigvalsh(matrices) + nothing


def eigenvectors(x: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues [..., N], ascending, and eigenvectors [..., N, N] of symmetric matrices; NaN for one not finite."""
    matrices, nothing = finite_or_nan(x)
    values, vectors = torch.linalg.eigh(matrices)
    return values + nothing, vectors + nothing[..., None]


def cholesky(x: Tensor, op: str) -> Tensor:
    """The lower factor [..., N, N]; NaN for a matrix that isn't finite.

    A finite one without a factor raises on the CPU and gives NaN on CUDA, where looking would wait, and within
    transforms of torch.func, where a matrix may be many.
    """
    factor, info = torch.linalg.cholesky_ex(x)  # raises for no matrix, and for one that isn't finite gives anything
    constant = x.detach()
    nothing = (constant - constant).sum((-2, -1), keepdim=True)  # 0, or for those NaN
    has_none = (info != 0)[..., None, None]
    if x.device.type == "cpu" and not torch.compiler.is_compiling() and not transforms.active():
        if (has_none & (nothing == 0)).any():
            checks.fail(op, "the covariance must be positive definite", "a singular one (add eps, or use more rows)")
    else:
        nothing.masked_fill_(has_none, torch.nan)
    return factor + nothing
