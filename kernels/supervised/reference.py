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
