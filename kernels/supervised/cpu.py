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
    mean = logits.dtype != torch.float16  # which can't hold the gradient over N; see native.scale_within
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
    scale = torch.full((), math.inf if not counted else 1.0 if mean else 1 / counted, dtype=dtype)
    return loss, [gradient], scale


def cross_entropy_of_plain(logits: Tensor, labels: Tensor, ignore_index: int, wanted: Sequence[bool]) -> Found | None:
    """None where C++ says that they aren't plain tensors, or don't fit one another."""
    gradients = gradients_for((logits,), wanted)
    mean = logits.dtype != torch.float16
    numbers = _C.cross_entropy_of_plain(logits, labels, *gradients, ignore_index, mean, torch.get_num_threads())
    if numbers is None:
        return None
    total, counted = numbers
    scale = math.inf if not counted else 1.0 if mean else 1 / counted
    return Found(loss_like(logits, total / counted if counted else math.nan), gradients, (scale,))
