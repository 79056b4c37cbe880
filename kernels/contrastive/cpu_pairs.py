"""CLIP's loss on the pairs of one batch on the CPU, with the engine: see of_pairs.py."""

import torch
from torch import Tensor

from ..arithmetic import compute_dtype
from . import composed, cpu_engine
from .of_pairs import scaled
from .of_views import state_rows


def clip_loss_of_pairs(x: Tensor, y: Tensor, logit_scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    positives, x_lse, y_lse = composed.clip_loss(cpu_engine, x, y, logit_scale, 0)
    loss = ((x_lse - positives) + (y_lse - positives)).mean() / 2
    # the gradient makes the pairs' similarities again, as it does for pairs in parts
    of_pairs = torch.stack([x_lse, y_lse, torch.zeros_like(x_lse)])
    return loss.to(compute_dtype(x.dtype)), of_pairs, torch.zeros(2, 2, state_rows(len(x)))


def clip_loss_of_pairs_backward(
    upstream: Tensor,
    x: Tensor,
    y: Tensor,
    logit_scale: Tensor,
    of_pairs: Tensor,
    state: Tensor,
    wanted: list[bool],
) -> tuple[list[Tensor], Tensor]:
    x_lse, y_lse, _ = of_pairs
    gradients, of_scale = composed.clip_loss_backward(cpu_engine, x, y, logit_scale, x_lse, y_lse, 0, wanted[:2])
    return scaled(gradients, of_scale, upstream, logit_scale, len(x), wanted)
