"""The losses between predictions and targets on the CPU, in C++."""

import torch
from torch import Tensor

from .. import _C
from ..arithmetic import compute_dtype, dense_rows
from ..native import CODES, address, gradient_for, scale_within
from . import reference


def negative_cosine(p: Tensor, z: Tensor, eps: float, wanted: list[bool]) -> tuple[Tensor, list[Tensor], Tensor]:
    if p.dtype not in CODES:
        return reference.negative_cosine(p, z, eps, wanted)
    p = dense_rows(p)
    z = dense_rows(z)
    dtype = compute_dtype(p.dtype)
    gradients = [gradient_for(p, wanted[0]), gradient_for(z, wanted[1])]
    scale = 1 / len(p)
    within = scale_within(scale, p.dtype)
    total = _C.negative_cosine(
        CODES[p.dtype],
        address(p),
        p.stride(0),
        address(z),
        z.stride(0),
        *p.shape,
        eps,
        address(gradients[0]),
        address(gradients[1]),
        within,
        torch.get_num_threads(),
    )
    loss = torch.full((), total * scale, dtype=dtype)
    return loss, gradients, torch.full((), scale / within, dtype=dtype)


def regression(
    prediction: Tensor, target: Tensor, beta: float, normalize: bool, eps: float, wanted: list[bool]
) -> tuple[Tensor, list[Tensor], Tensor]:
    if prediction.dtype not in CODES:
        return reference.regression(prediction, target, beta, normalize, eps, wanted)
    prediction = dense_rows(prediction)
    target = dense_rows(target)
    dtype = compute_dtype(prediction.dtype)
    gradient = gradient_for(prediction, wanted[0])
    scale = 1 / prediction.numel()
    within = scale_within(scale, prediction.dtype)
    total = _C.regression(
        CODES[prediction.dtype],
        address(prediction),
        prediction.stride(0),
        address(target),
        target.stride(0),
        *prediction.shape,
        beta,
        normalize,
        eps,
        address(gradient),
        within,
        torch.get_num_threads(),
    )
    return torch.full((), total * scale, dtype=dtype), [gradient], torch.full((), scale / within, dtype=dtype)
