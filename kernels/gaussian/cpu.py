"""SIGReg's sums on the CPU, in C++."""

import torch
from torch import Tensor

from .. import _C
from ..native import CODES, address
from . import reference

WIDE = (torch.float32, torch.float64)


def characteristic(theta: Tensor, frequencies: int) -> Tensor:
    if theta.dtype not in WIDE:
        return reference.characteristic(theta, frequencies)
    theta = theta.contiguous()
    views, _, slices = theta.shape
    out = theta.new_empty(2, frequencies, views, slices)
    _C.characteristic(
        CODES[theta.dtype], address(theta), *theta.shape, frequencies, address(out), torch.get_num_threads()
    )
    return out


def characteristic_backward(theta: Tensor, weights: Tensor) -> Tensor:
    if theta.dtype not in WIDE or weights.dtype != theta.dtype:
        return reference.characteristic_backward(theta, weights)
    theta = theta.contiguous()
    weights = weights.contiguous()
    out = torch.empty_like(theta)
    _C.characteristic_backward(
        CODES[theta.dtype],
        address(theta),
        address(weights),
        *theta.shape,
        weights.shape[1],
        address(out),
        torch.get_num_threads(),
    )
    return out
