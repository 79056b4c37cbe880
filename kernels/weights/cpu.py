"""The operators on weights and gradients on the CPU, in C++."""

import torch
from torch import Tensor

from .. import _C
from ..native import CODES, address, same_layout
from . import reference


def rescale_(gradient: Tensor, factor: Tensor) -> None:
    if gradient.dtype not in CODES or not same_layout(gradient):
        return reference.rescale_(gradient, factor)
    if (by := factor.item()) != 1:
        _C.rescale(CODES[gradient.dtype], address(gradient), gradient.numel(), by, torch.get_num_threads())


def rescale_all_(gradients: list[Tensor], upstream: Tensor, scale: Tensor) -> None:
    factor = upstream * scale
    for gradient in gradients:
        rescale_(gradient, factor)


def ema_update_(teacher: list[Tensor], student: list[Tensor], momentum: Tensor) -> None:
    table = []  # of the pairs that C++ takes: both addresses, elements, both dtypes
    others = []
    for t, s in zip(teacher, student, strict=True):
        if s.dtype in CODES and same_layout(t, s):
            table.append((address(t), address(s), t.numel(), CODES[t.dtype], CODES[s.dtype]))
        else:
            others.append((t, s))
    teachers = [teacher_address for teacher_address, _, elements, _, _ in table if elements]
    if len(set(teachers)) < len(teachers):
        raise ValueError("ema_update_: teacher tensors must be memory of their own, got the same address twice")
    _C.ema_update(table, momentum.item(), torch.get_num_threads())
    for t, s in others:
        reference.ema_update_([t], [s], momentum)
