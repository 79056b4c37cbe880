"""SIGReg's sums on the CPU."""

import torch
from fastjem.kernels import _C, reference
from fastjem.kernels.cpu_tensors import DTYPES, _address
from torch import Tensor

WIDE = (torch.float32, torch.float64)


def characteristic(theta: Tensor, frequencies: int) -> Tensor:
    if theta.dtype not in WIDE:
        return reference.characteristic(theta, frequencies)
    theta, (views, _, slices) = theta.contiguous(), theta.shape
    out = theta.new_empty(2, frequencies, views, slices)
    _C.characteristic(
        DTYPES[theta.dtype], _address(theta), *theta.shape, frequencies, _address(out), torch.get_num_threads()
    )
    return out


def characteristic_backward(theta: Tensor, weights: Tensor) -> Tensor:
    if theta.dtype not in WIDE or weights.dtype != theta.dtype:
        return reference.characteristic_backward(theta, weights)
    theta, weights = theta.contiguous(), weights.contiguous()
    out = torch.empty_like(theta)
    _C.characteristic_backward(
        DTYPES[theta.dtype],
        _address(theta),
        _address(weights),
        *theta.shape,
        weights.shape[1],
        _address(out),
        torch.get_num_threads(),
    )
    return out
