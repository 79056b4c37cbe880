"""Cross-entropy on the CPU, in C++."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _C
from ..arithmetic import compute_dtype, dense_rows
from ..native import CODES, Found, address, gradient_for, gradients_for, loss_like
from . import reference


def cross_entropy(
    logits: Tensor, labels: Tensor, ignore_index: int, wanted: list[bool]
) -> tuple[Tensor, list[Tensor], Tensor]:
    if logits.dtype not in CODES:
        return reference.cross_entropy(logits, labels, ignore_index, wanted)
    logits = dense_rows(logits)
    labels = labels.contiguous()
    dtype = compute_dtype(logits.dtype)
    gradient = gradient_for(logits, wanted[0])
    mean = _of_mean(logits)
    total, counted = _C.cross_entropy(
        CODES[logits.dtype],
        address(logits),
        *logits.shape,
        logits.stride(0),
        address(labels),
        ignore_index,
        address(gradient),
        mean,
        torch.get_num_threads(),
    )
    loss = torch.full((), total / counted if counted else math.nan, dtype=dtype)
    return loss, [gradient], torch.full((), _scale(counted, mean), dtype=dtype)


def cross_entropy_rows(
    logits: Tensor,
    labels: Tensor,
    weights: Tensor,
    label_smoothing: Tensor,
    ignore_index: int,
    wanted: list[bool],
) -> tuple[Tensor, list[Tensor]]:
    if logits.dtype not in CODES:
        return reference.cross_entropy_rows(logits, labels, weights, label_smoothing, ignore_index, wanted)
    logits = dense_rows(logits)
    labels = labels.contiguous()
    weights = weights.double().contiguous()
    gradient = gradient_for(logits, wanted[0])
    losses = torch.empty(len(logits), dtype=torch.float64)
    _C.cross_entropy_rows(
        CODES[logits.dtype],
        address(logits),
        *logits.shape,
        logits.stride(0),
        address(labels),
        address(weights),
        label_smoothing.item(),
        ignore_index,
        address(gradient),
        address(losses),
        torch.get_num_threads(),
    )
    return losses.to(compute_dtype(logits.dtype)), [gradient]


def _of_mean(logits: Tensor) -> bool:
    """Whether C++ gives the gradient of the mean, not of the sum: float16 can't hold it (`native.scale_within`)."""
    return logits.dtype != torch.float16


def _scale(counted: int, mean: bool) -> float:
    """What is left for backward to multiply by."""
    if not counted:
        return math.inf
    return 1.0 if mean else 1 / counted


def cross_entropy_of_plain(logits: Tensor, labels: Tensor, ignore_index: int, wanted: Sequence[bool]) -> Found | None:
    """None where C++ says that they aren't plain tensors, or don't fit one another."""
    gradients = gradients_for((logits,), wanted)
    mean = _of_mean(logits)
    numbers = _C.cross_entropy_of_plain(logits, labels, *gradients, ignore_index, mean, torch.get_num_threads())
    if numbers is None:
        return None
    total, counted = numbers
    return Found(loss_like(logits, total / counted if counted else math.nan), gradients, (_scale(counted, mean),))
