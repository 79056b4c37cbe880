"""The head's cross-entropy and how much prototypes are used: what `head_usage.py` takes of Triton's kernels."""

import torch
from torch import Tensor

from . import head_usage
from .mean_entropy import softmax_slope
from .prototype_cross_entropy import prototype_cross_entropy
from .sinkhorn import sinkhorn_step


def _add_softmax(scores: Tensor, temperature: float, sums: Tensor) -> None:
    """A step of Sinkhorn from potentials of 0 gives logarithms. Where one is NaN all are, as a row's softmax is."""
    added = sinkhorn_step(scores, torch.zeros_like(sums), temperature).exp()
    sums += added + 0 * added.sum()


def _in_place(scores: Tensor, temperature: float, slope: Tensor) -> None:
    softmax_slope(scores, temperature, slope, out=scores)


_KERNELS = head_usage.Kernels(
    cross_entropy=prototype_cross_entropy,
    add_softmax=_add_softmax,
    softmax_slope=_in_place,
    memory=torch.Tensor.new_empty,
)


def prototype_head_usage(*sides) -> tuple[Tensor, Tensor]:
    return head_usage.forward(head_usage.Sides(*sides), _KERNELS)


def prototype_head_usage_backward(*arguments) -> list[Tensor]:
    *sides, upstream, slope, wanted = arguments
    return head_usage.backward(head_usage.Sides(*sides), upstream, slope, wanted, _KERNELS)
