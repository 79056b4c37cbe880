"""The specification of the losses on labels; conventions are in kernels/__init__.py."""

import math

import torch
from torch import Tensor

from ..arithmetic import no_gradient, widen


def cross_entropy(
    logits: Tensor,  # [N, K]
    labels: Tensor,  # [N] int64
    ignore_index: int,
    wanted: list[bool],
) -> tuple[Tensor, list[Tensor], Tensor]:
    """`torch.nn.functional.cross_entropy(logits, labels, ignore_index=ignore_index)`; NaN for labels out of range."""
    counted = (labels != ignore_index)[:, None]  # [N, 1]
    valid = ((labels >= 0) & (labels < logits.shape[1]))[:, None]
    index = labels[:, None].where(valid, 0)
    log_p = widen(logits).log_softmax(1)
    rows = -log_p.gather(1, index).where(valid, math.nan).where(counted, 0)
    scale = 1 / counted.sum().to(log_p.dtype)
    loss = rows.sum() * scale
    if not wanted[0]:
        return loss, [no_gradient(logits)], scale
    gradient = log_p.exp().scatter_add(1, index, -torch.ones_like(rows))
    return loss, [gradient.where(valid, math.nan).where(counted, 0).to(logits.dtype)], scale


def cross_entropy_rows(
    logits: Tensor,  # [N, K]
    labels: Tensor,  # [N] int64
    weights: Tensor,  # [N], of the rows' losses in the sum whose gradient is wanted
    label_smoothing: Tensor,  # 0-dim: so much of the target is uniform over all classes
    ignore_index: int,
    wanted: list[bool],
) -> tuple[Tensor, list[Tensor]]:
    """The losses of rows [N], unweighted, and the gradient of their weighted sum.

    Rows with a weight of 0 are ignored, too: their loss is 0, and nothing in them, nor their label, is looked at.
    """
    counted = ((labels != ignore_index) & (weights != 0))[:, None]  # [N, 1]
    valid = ((labels >= 0) & (labels < logits.shape[1]))[:, None]
    index = labels[:, None].where(valid, 0)
    log_p = widen(logits).log_softmax(1)
    smoothing = label_smoothing.to(log_p.dtype)
    # no smoothing, and a logit of -inf: 0 times infinity would be NaN
    uniform = torch.where(smoothing == 0, 0, -smoothing * log_p.mean(1, keepdim=True))
    rows = (1 - smoothing) * -log_p.gather(1, index) + uniform
    losses = rows.where(valid, math.nan).where(counted, 0)[:, 0]
    if not wanted[0]:
        return losses, [no_gradient(logits)]
    of_all = smoothing / logits.shape[1]
    gradient = (log_p.exp() - of_all).scatter_add(1, index, (smoothing - 1).expand_as(rows))
    gradient = gradient * weights.to(log_p.dtype)[:, None]
    return losses, [gradient.where(valid, math.nan).where(counted, 0).to(logits.dtype)]
