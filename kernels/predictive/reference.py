"""The specification of the losses between predictions and targets; conventions are in kernels/__init__.py."""

import torch
from torch import Tensor

from ..arithmetic import add_at, no_gradient, scalar_like, through_unit_rows, unit_rows, widen


def negative_cosine(
    p: Tensor,  # [N, D]
    z: Tensor,  # [N, D]
    eps: float,
    wanted: list[bool],
) -> tuple[Tensor, list[Tensor], Tensor]:
    """`-torch.nn.functional.cosine_similarity(p, z, dim=1, eps=eps).mean()`"""
    p_unit, p_norm = unit_rows(widen(p), eps)
    z_unit, z_norm = unit_rows(widen(z), eps)
    loss = -(p_unit * z_unit).sum(1).mean()
    p_gradient = through_unit_rows(-z_unit, p_unit, p_norm, eps).to(p.dtype) if wanted[0] else no_gradient(p)
    z_gradient = through_unit_rows(-p_unit, z_unit, z_norm, eps).to(z.dtype) if wanted[1] else no_gradient(z)
    return loss, [p_gradient, z_gradient], scalar_like(p, 1 / p.shape[0])


def regression(
    prediction: Tensor,  # [N, D]
    target: Tensor,  # [N, D]
    beta: float,
    normalize: bool,
    eps: float,
    wanted: list[bool],
) -> tuple[Tensor, list[Tensor], Tensor]:
    """`smooth_l1_loss(prediction, layer_norm(target, [D], eps=eps), beta=beta)`; beta = 0: `mse_loss`."""
    losses, gradient = _smooth_l1(widen(prediction), widen(target), beta, normalize, eps)
    gradient = gradient.to(prediction.dtype) if wanted[0] else no_gradient(prediction)
    return losses.mean(), [gradient], scalar_like(prediction, 1 / losses.numel())


def regression_rows(
    prediction: Tensor,  # [N, D]
    target: Tensor,  # [N, D]
    rows: Tensor,  # [M] int64, which of them count
    weights: Tensor,  # [M], of those in the mean
    beta: float,
    normalize: bool,
    eps: float,
    wanted: list[bool],
) -> tuple[Tensor, list[Tensor], Tensor]:
    """`regression` of `prediction[rows]` and `target[rows]`, the mean over rows weighted.

    Rows with a weight of 0 aren't looked at, and may be any; all others are different ones. NaN for one out of range.
    """
    inside = ((rows >= 0) & (rows < prediction.shape[0]))[:, None]
    at = rows.clamp(0, prediction.shape[0] - 1)
    x = widen(prediction)[at].masked_fill(~inside, torch.nan)
    losses, gradient = _smooth_l1(x, widen(target)[at], beta, normalize, eps)
    weight = weights.to(losses.dtype)[:, None]
    total = weight.sum()
    loss = (losses * weight).masked_fill(weight == 0, 0).sum() / (total * losses.shape[1])
    gradient = (gradient * weight).masked_fill(weight == 0, 0)
    of_all = add_at(torch.zeros_like(prediction, dtype=gradient.dtype), (at,), gradient)
    of_all = of_all.to(prediction.dtype) if wanted[0] else no_gradient(prediction)
    return loss, [of_all], 1 / (total * losses.shape[1])


def _smooth_l1(x: Tensor, y: Tensor, beta: float, normalize: bool, eps: float) -> tuple[Tensor, Tensor]:
    """Each element's loss, and its derivative by x."""
    if normalize:
        y = torch.nn.functional.layer_norm(y, y.shape[1:], eps=eps)
    error = x - y
    if beta == 0:
        return error.square(), 2 * error
    size = error.abs()
    losses = torch.where(size < beta, error.square() / (2 * beta), size - beta / 2)
    return losses, torch.where(size >= beta, error.sign(), error / beta)
