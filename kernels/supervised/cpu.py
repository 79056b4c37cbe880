"""Cross-entropy on the CPU, in C++."""

import math

import torch
from torch import Tensor

from .. import _C
from ..arithmetic import compute_dtype, dense_rows
from ..native import CODES, address, gradient_for
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
