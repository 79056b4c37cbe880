"""The specification of the losses between predictions and targets; conventions are in kernels/__init__.py."""

import torch
from torch import Tensor

from ..arithmetic import no_gradient, scalar_like, through_unit_rows, unit_rows, widen


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
    y = widen(target)
    if normalize:
        y = torch.nn.functional.layer_norm(y, y.shape[1:], eps=eps)
    error = widen(prediction) - y
    if beta == 0:
        losses = error.square()
        gradient = 2 * error
    else:
        size = error.abs()
        losses = torch.where(size < beta, error.square() / (2 * beta), size - beta / 2)
        gradient = torch.where(size >= beta, error.sign(), error / beta)
    gradient = gradient.to(prediction.dtype) if wanted[0] else no_gradient(prediction)
    return losses.mean(), [gradient], scalar_like(prediction, 1 / error.numel())
