"""CLIP's and SigLIP's losses on the pairs of one batch on the CPU, with the engine: see of_pairs.py."""

import torch
from torch import Tensor

from ..arithmetic import compute_dtype, widest
from . import composed, cpu_engine, cpu_sigmoid
from .of_pairs import of_number, parameter, scaled, siglip_loss_of_pairs_backward
from .of_views import state_rows

__all__ = [
    "clip_loss_of_pairs",
    "clip_loss_of_pairs_backward",
    "siglip_loss_of_pairs",
    "siglip_loss_of_pairs_backward",  # few steps on [N, D], which the specification's are
]


def clip_loss_of_pairs(
    x: Tensor, y: Tensor, learned: Tensor | None, logit_scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    positives, x_lse, y_lse = composed.clip_loss(cpu_engine, x, y, parameter(learned, logit_scale, x), 0)
    loss = ((x_lse - positives) + (y_lse - positives)).mean() / 2
    # the gradient makes the pairs' similarities again, as it does for pairs in parts
    of_pairs = torch.stack([x_lse, y_lse, torch.zeros_like(x_lse)])
    return loss.to(compute_dtype(x.dtype)), of_pairs, torch.zeros(2, 2, state_rows(len(x)))


def clip_loss_of_pairs_backward(
    upstream: Tensor,
    x: Tensor,
    y: Tensor,
    learned: Tensor | None,
    logit_scale: float,
    of_pairs: Tensor,
    state: Tensor,
    wanted: list[bool],
) -> tuple[list[Tensor], Tensor]:
    x_lse, y_lse, _ = of_pairs
    scale = parameter(learned, logit_scale, x)
    gradients, of_scale = composed.clip_loss_backward(cpu_engine, x, y, scale, x_lse, y_lse, 0, wanted[:2])
    factor = widest(upstream) / (2 * len(x))
    return scaled(gradients, factor * widest(scale), x.dtype), of_number(of_scale * factor, learned, wanted[2], x)


def siglip_loss_of_pairs(
    x: Tensor,
    y: Tensor,
    learned_scale: Tensor | None,
    learned_bias: Tensor | None,
    logit_scale: float,
    logit_bias: float,
    wanted: list[bool],
) -> tuple[Tensor, list[Tensor], Tensor]:
    factor = logit_scale if learned_scale is None else learned_scale.item()
    bias = logit_bias if learned_bias is None else learned_bias.item()
    totals, of_x, of_y = cpu_sigmoid.sums(x, y, factor, bias, 0, wanted)
    totals /= len(x)
    sums = [totals.new_empty(0, dtype=compute_dtype(x.dtype)) if of is None else of for of in (of_x, of_y)]
    return totals[0].to(compute_dtype(x.dtype), copy=True), sums, totals[1:].clone()
