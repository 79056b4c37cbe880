"""Losses on the covariance of embeddings: Barlow Twins and VICReg."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from fastjem.functional import _checks as check
from fastjem.functional._collectives import gather_rows, world_size
from fastjem.ops.autograd import one_pass


def barlow_twins(
    z0: Tensor, z1: Tensor, *, lambda_param: float = 5e-3, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Barlow Twins' redundancy reduction (Zbontar et al. 2021, arXiv 2103.03230, equation 1).

    `sum_i (C_ii - 1)^2 + lambda sum_{i != j} C_ij^2`, where C = a^T b / N is the correlation of the batch-normalised
    views (biased variance, eps = 1e-5, no affine part).

    Args:
        z0, z1: [N, D] each, two views of N images, N >= 2.
        lambda_param: weight of the off-diagonal.
        group: the process group over whose global batch the statistics are taken (batches may be uneven).

    Returns:
        0-dim float32 (float64 for float64 inputs); the same on every rank of the group.

    Raises:
        ValueError: for other shapes or dtypes, and for N = 1.
    """
    return _of_global_batch("barlow_twins", z0, z1, group, float(lambda_param))


def vicreg(
    z0: Tensor,
    z1: Tensor,
    *,
    lambda_param: float = 25.0,
    mu_param: float = 25.0,
    nu_param: float = 1.0,
    eps: float = 1e-4,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """VICReg: invariance, variance, covariance (Bardes et al. 2022, arXiv 2105.04906, equation 6).

    `lambda mse(z0, z1) + mu (v(z0) + v(z1)) / 2 + nu (c(z0) + c(z1))` with v the mean over dimensions of
    `relu(1 - sqrt(var + eps))` and c = `sum_{i != j} cov_ij^2 / D`. The 1/2 on v is the official code's; the paper has
    none.

    Args:
        z0, z1: [N, D] each, two views of N images, N >= 2.
        lambda_param, mu_param, nu_param: weights of invariance, variance and covariance.
        eps: added to the variance.
        group: the process group over whose global batch the statistics are taken (batches may be uneven).

    Returns:
        0-dim float32 (float64 for float64 inputs); the same on every rank of the group.

    Raises:
        ValueError: for other shapes or dtypes, and for N = 1.
    """
    return _of_global_batch("vicreg", z0, z1, group, float(lambda_param), float(mu_param), float(nu_param), float(eps))


def _of_global_batch(op: str, z0: Tensor, z1: Tensor, group: dist.ProcessGroup | None, *arguments: float) -> Tensor:
    check.matrices(op, "z0 and z1 must be [N, D] both", z0, z1)
    z0, z1 = check.common(z0, z1)
    if group is None:
        _check_rows(op, z0)
        return one_pass(op, (z0, z1), *arguments)
    return _ThisRanksPart.apply(lambda a, b: one_pass(op, (a, b), *arguments), op, group, z0, z1)


def _check_rows(op: str, z: Tensor) -> None:
    if len(z) < 2:
        check.fail(op, "z0 and z1 must have N >= 2 rows, as their variance is needed", f"N = {len(z)}")


class _ThisRanksPart(torch.autograd.Function):
    """The loss of all ranks' rows; its gradient for this rank's rows, times the ranks (which DDP divides by)."""

    @staticmethod
    def forward(ctx, loss_of: Callable, op: str, group: dist.ProcessGroup, *inputs: Tensor) -> Tensor:
        gathered = [gather_rows(x, group) for x in inputs]
        whole = [x.requires_grad_() for x, _ in gathered]
        _check_rows(op, whole[0])
        with torch.enable_grad():
            loss = loss_of(*whole)
        wanted = [x for x, needed in zip(whole, ctx.needs_input_grad[3:], strict=True) if needed]
        gradients = iter(torch.autograd.grad(loss, wanted) if wanted else ())
        offset, length = gathered[0][1], len(inputs[0])
        mine = [next(gradients)[offset : offset + length] if needed else None for needed in ctx.needs_input_grad[3:]]
        ctx.save_for_backward(*(None if g is None else g * world_size(group) for g in mine))
        return loss.detach()

    @staticmethod
    def backward(ctx, upstream: Tensor):
        return None, None, None, *(None if g is None else g * upstream for g in ctx.saved_tensors)
