"""The losses between predictions and targets on the CPU, in C++."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _C
from ..arithmetic import compute_dtype, dense_rows, no_gradient
from ..native import CODES, Found, address, gradient_for, gradients_for, loss_like, scale_within
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


def regression_rows(
    prediction: Tensor,
    target: Tensor,
    rows: Tensor,
    weights: Tensor,
    beta: float,
    normalize: bool,
    eps: float,
    wanted: list[bool],
) -> tuple[Tensor, list[Tensor], Tensor]:
    if prediction.dtype not in CODES:
        return reference.regression_rows(prediction, target, rows, weights, beta, normalize, eps, wanted)
    prediction = dense_rows(prediction)
    target = dense_rows(target)
    dtype = compute_dtype(prediction.dtype)
    width = prediction.shape[1]
    gradient = torch.zeros(prediction.shape, dtype=prediction.dtype) if wanted[0] else no_gradient(prediction)
    rows = rows.contiguous()
    weights = weights.double().contiguous()
    total = _C.regression_rows(
        CODES[prediction.dtype],
        address(prediction),
        prediction.stride(0),
        address(target),
        target.stride(0),
        len(rows),
        width,
        beta,
        normalize,
        eps,
        address(gradient),
        address(rows),
        len(prediction),
        address(weights),
        1.0,
        torch.get_num_threads(),
    )
    weight = weights.sum().item()
    loss = torch.full((), total / (weight * width) if weight else math.nan, dtype=dtype)
    return loss, [gradient], torch.full((), 1 / (weight * width) if weight else math.inf, dtype=dtype)


# The same of plain tensors. None where C++ says that they aren't, or don't fit one another ----------------------------


def negative_cosine_of_plain(p: Tensor, z: Tensor, eps: float, wanted: Sequence[bool]) -> Found | None:
    gradients = gradients_for((p, z), wanted)
    scale = 1 / max(len(p), 1)
    within = scale_within(scale, p.dtype)
    total = _C.negative_cosine_of_plain(p, z, *gradients, eps, within, torch.get_num_threads())
    if total is None:
        return None
    return Found(loss_like(p, total * scale), gradients, (scale / within, scale / within))


def regression_of_plain(
    prediction: Tensor, target: Tensor, beta: float, normalize: bool, eps: float, wanted: Sequence[bool]
) -> Found | None:
    gradients = gradients_for((prediction,), wanted)
    scale = 1 / max(prediction.numel(), 1)
    within = scale_within(scale, prediction.dtype)
    options = (beta, normalize, eps, within, torch.get_num_threads())
    total = _C.regression_of_plain(prediction, target, *gradients, *options)
    if total is None:
        return None
    return Found(loss_like(prediction, total * scale), gradients, (scale / within,))
