"""The C++ kernels as operators: every check is here, before an address leaves Python.

Tensors of any layout are taken; rows that aren't dense are copied. Without a native dtype the reference computes.
"""

import torch
from fastjem.kernels import _C, reference
from fastjem.kernels.cpu_covariance import barlow_twins, vicreg  # noqa: F401
from fastjem.kernels.cpu_gaussian import characteristic, characteristic_backward  # noqa: F401
from fastjem.kernels.cpu_tensors import DTYPES, _address, _flat, _gradient, _loss_dtype, _rows
from torch import Tensor


def rescale_(gradient: Tensor, factor: Tensor) -> None:
    if gradient.dtype not in DTYPES or not _flat(gradient):
        return reference.rescale_(gradient, factor)
    if (by := factor.item()) != 1:
        _C.rescale(DTYPES[gradient.dtype], _address(gradient), gradient.numel(), by, torch.get_num_threads())


def ema_update_(teacher: list[Tensor], student: list[Tensor], momentum: Tensor) -> None:
    table, others = [], []
    for t, s in zip(teacher, student, strict=True):
        if s.dtype in DTYPES and _flat(t, s):
            table.append((_address(t), _address(s), t.numel(), DTYPES[t.dtype], DTYPES[s.dtype]))
        else:
            others.append((t, s))
    if len({row[0] for row in table if row[2]}) < sum(row[2] > 0 for row in table):
        raise ValueError("ema_update_: teacher tensors must be memory of their own, got the same address twice")
    _C.ema_update(table, momentum.item(), torch.get_num_threads())
    for t, s in others:
        reference.ema_update_([t], [s], momentum)


def cross_entropy(
    logits: Tensor, labels: Tensor, ignore_index: int, wanted: list[bool]
) -> tuple[Tensor, list[Tensor], Tensor]:
    if logits.dtype not in DTYPES:
        return reference.cross_entropy(logits, labels, ignore_index, wanted)
    logits, labels, dtype = _rows(logits), labels.contiguous(), _loss_dtype(logits)
    gradient = _gradient(logits, wanted[0])
    total, counted = _C.cross_entropy(
        DTYPES[logits.dtype],
        _address(logits),
        *logits.shape,
        logits.stride(0),
        _address(labels),
        ignore_index,
        _address(gradient),
        torch.get_num_threads(),
    )
    scale = 1 / counted if counted else float("inf")
    return (
        torch.full((), total / counted if counted else float("nan"), dtype=dtype),
        [gradient],
        torch.full((), scale, dtype=dtype),
    )


def negative_cosine(p: Tensor, z: Tensor, eps: float, wanted: list[bool]) -> tuple[Tensor, list[Tensor], Tensor]:
    if p.dtype not in DTYPES:
        return reference.negative_cosine(p, z, eps, wanted)
    p, z, dtype = _rows(p), _rows(z), _loss_dtype(p)
    gradients = [_gradient(p, wanted[0]), _gradient(z, wanted[1])]
    total = _C.negative_cosine(
        DTYPES[p.dtype],
        _address(p),
        p.stride(0),
        _address(z),
        z.stride(0),
        *p.shape,
        eps,
        *map(_address, gradients),
        torch.get_num_threads(),
    )
    return torch.full((), total / len(p), dtype=dtype), gradients, torch.full((), 1 / len(p), dtype=dtype)


def regression(
    prediction: Tensor, target: Tensor, beta: float, normalize: bool, eps: float, wanted: list[bool]
) -> tuple[Tensor, list[Tensor], Tensor]:
    if prediction.dtype not in DTYPES:
        return reference.regression(prediction, target, beta, normalize, eps, wanted)
    prediction, target, dtype = _rows(prediction), _rows(target), _loss_dtype(prediction)
    gradient, scale = _gradient(prediction, wanted[0]), 1 / prediction.numel()
    total = _C.regression(
        DTYPES[prediction.dtype],
        _address(prediction),
        prediction.stride(0),
        _address(target),
        target.stride(0),
        *prediction.shape,
        beta,
        normalize,
        eps,
        _address(gradient),
        torch.get_num_threads(),
    )
    return torch.full((), total * scale, dtype=dtype), [gradient], torch.full((), scale, dtype=dtype)


from fastjem.kernels.cpu_augment import augment, crop_resize  # noqa: E402, F401
from fastjem.kernels.cpu_contrastive import (  # noqa: E402, F401
    clip_loss,
    clip_loss_backward,
    info_nce,
    nearest_neighbors,
    nt_xent,
    nt_xent_backward,
    siglip_loss,
)
from fastjem.kernels.cpu_prototypes import (  # noqa: E402, F401
    mean_entropy,
    prototype_cross_entropy,
    prototype_head_cross_entropy,
    sinkhorn,
    sinkhorn_bias,
    sinkhorn_codes,
    sinkhorn_step,
)
