"""The specification of CLIP's loss as one, whose pairs are those of one batch.

`in_parts.clip_loss` and `in_parts.clip_loss_backward` are for pairs that come in parts, from other ranks say. These two
operators are the whole loss, the mean, the upstream gradient and the scale among them: see of_views.py.
"""

import torch
from torch import Tensor

from ..arithmetic import compute_dtype, widest
from . import in_parts
from .of_views import state_rows


def clip_loss_of_pairs(
    x: Tensor,  # [N, D]
    y: Tensor,  # [N, D]
    logit_scale: Tensor,  # 0-dim
) -> tuple[Tensor, Tensor, Tensor]:
    """`((x_lse - positives) + (y_lse - positives)).mean() / 2` of `in_parts.clip_loss`, and what its gradient takes.

    That is both log-sum-exps and the pairs' similarities [3, N] float64, and a state that only a GPU's kernels fill,
    [2, 2, >= N] float32.
    """
    positives, x_lse, y_lse = in_parts.clip_loss(x, y, logit_scale, 0)
    loss = ((x_lse - positives) + (y_lse - positives)).mean() / 2
    similarities = widest((x.to(compute_dtype(x.dtype)) * y.to(compute_dtype(y.dtype))).sum(1))
    state = torch.zeros(2, 2, state_rows(x.shape[0]), dtype=torch.float32, device=x.device)
    return loss.to(compute_dtype(x.dtype)), torch.stack([x_lse, y_lse, similarities]), state


def clip_loss_of_pairs_backward(
    upstream: Tensor,  # 0-dim
    x: Tensor,
    y: Tensor,
    logit_scale: Tensor,
    of_pairs: Tensor,
    state: Tensor,
    wanted: list[bool],  # for x, y and the scale
) -> tuple[list[Tensor], Tensor]:
    """The gradients for x and y, empty where none is wanted, and that for the scale, 0-dim, or empty."""
    gradients, of_scale = in_parts.clip_loss_backward(x, y, logit_scale, of_pairs[0], of_pairs[1], 0, wanted[:2])
    return scaled(gradients, of_scale, upstream, logit_scale, x.shape[0], wanted)


def scaled(
    gradients: list[Tensor], of_scale: Tensor, upstream: Tensor, logit_scale: Tensor, n: int, wanted: list[bool]
) -> tuple[list[Tensor], Tensor]:
    """Of the loss, given those of its sum over both directions, for x and y over the scale."""
    factor = widest(upstream) / (2 * n)
    of_rows = factor * widest(logit_scale)
    gradients = [(g * of_rows.to(compute_dtype(g.dtype))).to(g.dtype) for g in gradients]
    return gradients, (of_scale * factor).to(logit_scale.dtype) if wanted[2] else logit_scale.new_empty(0)
