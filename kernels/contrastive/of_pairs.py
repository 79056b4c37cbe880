"""The specification of CLIP's and SigLIP's losses as one, whose pairs are those of one batch.

`in_parts.clip_loss`, `in_parts.clip_loss_backward` and `in_parts.siglip_loss` are for pairs that come in parts, from
other ranks say. These operators are the whole loss, the mean, the upstream gradient, the scale and the bias among them:
see of_views.py. A scale or bias that is a tensor is called learned; otherwise it is the number beside it.
"""

import torch
from torch import Tensor

from ..arithmetic import compute_dtype, no_gradient, widen, widest, widest_dtype
from . import in_parts
from .of_views import state_rows


def parameter(learned: Tensor | None, number: float, like: Tensor) -> Tensor:
    """0-dim: a scale or a bias as a tensor, whichever it came as."""
    if learned is not None:
        return learned
    return torch.full((), number, dtype=widest_dtype(like.device), device=like.device)


def clip_loss_of_pairs(
    x: Tensor,  # [N, D]
    y: Tensor,  # [N, D]
    learned: Tensor | None,  # 0-dim: the scale, instead of the number
    logit_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`((x_lse - positives) + (y_lse - positives)).mean() / 2` of `in_parts.clip_loss`, and what its gradient takes.

    That is both log-sum-exps and the pairs' similarities [3, N] float64, and a state that only a GPU's kernels fill,
    [2, 2, >= N] float32.
    """
    positives, x_lse, y_lse = in_parts.clip_loss(x, y, parameter(learned, logit_scale, x), 0)
    loss = ((x_lse - positives) + (y_lse - positives)).mean() / 2
    similarities = widest((x.to(compute_dtype(x.dtype)) * y.to(compute_dtype(y.dtype))).sum(1))
    state = torch.zeros(2, 2, state_rows(x.shape[0]), dtype=torch.float32, device=x.device)
    return loss.to(compute_dtype(x.dtype)), torch.stack([x_lse, y_lse, similarities]), state


def clip_loss_of_pairs_backward(
    upstream: Tensor,  # 0-dim
    x: Tensor,
    y: Tensor,
    learned: Tensor | None,
    logit_scale: float,
    of_pairs: Tensor,
    state: Tensor,
    wanted: list[bool],  # for x, y and the scale
) -> tuple[list[Tensor], Tensor]:
    """The gradients for x and y, empty where none is wanted, and that for a learned scale, 0-dim, or empty."""
    scale = parameter(learned, logit_scale, x)
    gradients, of_scale = in_parts.clip_loss_backward(x, y, scale, of_pairs[0], of_pairs[1], 0, wanted[:2])
    factor = widest(upstream) / (2 * x.shape[0])
    return scaled(gradients, factor * widest(scale), x.dtype), of_number(of_scale * factor, learned, wanted[2], x)


def siglip_loss_of_pairs(
    x: Tensor,  # [N, D]
    y: Tensor,  # [N, D]
    learned_scale: Tensor | None,  # 0-dim: the scale, instead of the number
    learned_bias: Tensor | None,  # 0-dim: the bias, instead of the number
    logit_scale: float,
    logit_bias: float,
    wanted: list[bool],  # for x and y
) -> tuple[Tensor, list[Tensor], Tensor]:
    """`in_parts.siglip_loss` over N, and what its gradients are, as each pair is a decision of its own.

    That is, in the dtype to compute in, `G @ y` and `G.T @ x`, empty where none is wanted: G is the derivative of the
    sum over pairs by their logits. And the loss's derivatives by the scale and by the bias, [2] float64.
    """
    scale = parameter(learned_scale, logit_scale, x)
    bias = parameter(learned_bias, logit_bias, x)
    total, sums, of_scale, of_bias = in_parts.siglip_loss(widen(x), widen(y), scale, bias, 0, wanted)
    n = x.shape[0]
    return (total / n).to(compute_dtype(x.dtype)), sums, torch.stack([of_scale, of_bias]) / n


def siglip_loss_of_pairs_backward(
    upstream: Tensor,  # 0-dim
    sums: list[Tensor],
    derivatives: Tensor,
    learned_scale: Tensor | None,
    learned_bias: Tensor | None,
    logit_scale: float,
    dtype: torch.dtype,  # of x and y
    wanted: list[bool],  # for x, y, the scale and the bias
) -> tuple[list[Tensor], Tensor, Tensor]:
    """The gradients for x, y, and a learned scale and bias, 0-dim; each empty where it isn't wanted."""
    n = next((s.shape[0] for s, want in zip(sums, wanted, strict=False) if want), 1)
    scale = widest(upstream) * widest(parameter(learned_scale, logit_scale, derivatives)) / n
    of_numbers = derivatives * widest(upstream)
    return (
        scaled([s if want else s.new_empty(0) for s, want in zip(sums, wanted[:2], strict=True)], scale, dtype),
        of_number(of_numbers[0], learned_scale, wanted[2], derivatives),
        of_number(of_numbers[1], learned_bias, wanted[3], derivatives),
    )


def scaled(gradients: list[Tensor], factor: Tensor, dtype: torch.dtype) -> list[Tensor]:
    return [(g * factor.to(compute_dtype(g.dtype))).to(dtype) for g in gradients]


def of_number(gradient: Tensor, learned: Tensor | None, wanted: bool, like: Tensor) -> Tensor:
    """The gradient of a scale or bias, in its dtype; empty where there is none."""
    return no_gradient(like) if learned is None or not wanted else gradient.to(learned.dtype, copy=True)
