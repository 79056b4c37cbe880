import torch
from torch import Tensor

from .. import _C
from ..arithmetic import compute_dtype, dense_rows
from ..native import CODES, address, gradient_for
from . import reference


def negative_cosine(p: Tensor, z: Tensor, eps: float, wanted: list[bool]) -> tuple[Tensor, list[Tensor], Tensor]:
    if p.dtype not in CODES:
        return reference.negative_cosine(p, z, eps, wanted)
    p, z, dtype = dense_rows(p), dense_rows(z), compute_dtype(p.dtype)
    gradients = [gradient_for(p, wanted[0]), gradient_for(z, wanted[1])]
    total = _C.negative_cosine(
        CODES[p.dtype],
        address(p),
        p.stride(0),
        address(z),
        z.stride(0),
        *p.shape,
        eps,
        *map(address, gradients),
        torch.get_num_threads(),
    )
    return torch.full((), total / len(p), dtype=dtype), gradients, torch.full((), 1 / len(p), dtype=dtype)


def regression(
    prediction: Tensor, target: Tensor, beta: float, normalize: bool, eps: float, wanted: list[bool]
) -> tuple[Tensor, list[Tensor], Tensor]:
    if prediction.dtype not in CODES:
        return reference.regression(prediction, target, beta, normalize, eps, wanted)
    prediction, target, dtype = dense_rows(prediction), dense_rows(target), compute_dtype(prediction.dtype)
    gradient, scale = gradient_for(prediction, wanted[0]), 1 / prediction.numel()
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
        torch.get_num_threads(),
    )
    return torch.full((), total * scale, dtype=dtype), [gradient], torch.full((), scale, dtype=dtype)
