"""What the arguments of the optimisers must be, looked at before addresses are handed over (kernels/guard.py)."""

from typing import NoReturn

import torch
from torch import Tensor

from ..arithmetic import widest_dtype
from . import columns


def _fail(op: str, contract: str, came: object) -> NoReturn:
    raise ValueError(f"{op}: {contract}, got {came}")


def _told(x: Tensor) -> str:
    return f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}"


def lars_norms(parameters, gradients, settings, groups, *factors):
    _updates("lars_norms", parameters, gradients)
    _settings("lars_norms", settings, groups, len(parameters), len(columns.LARS), factors)


def lars(parameters, gradients, buffers, teachers, settings, groups, norms, *factors):
    op = "lars_"
    if buffers and len(buffers) != len(parameters):
        _fail(op, "there must be a buffer for each parameter, or none", f"{len(buffers)} and {len(parameters)}")
    _updates(op, parameters, gradients, buffers, teachers)
    _settings(op, settings, groups, len(parameters), len(columns.LARS), factors)
    if norms is not None and (norms.shape != (len(parameters), 2) or norms.dtype != torch.float64):
        _fail(op, f"norms must be [{len(parameters)}, 2] float64", _told(norms))


def adamw(parameters, gradients, averages, squares, steps, teachers, settings, groups, *factors):
    op = "adamw_"
    if not len(averages) == len(squares) == len(steps) == len(parameters):
        came = f"{len(averages)}, {len(squares)}, {len(steps)} and {len(parameters)}"
        _fail(op, "there must be an average, a square and a step for each parameter", came)
    for x in steps:
        if x.dim() or x.dtype != torch.float32:
            _fail(op, "steps must be 0-dim float32", _told(x))
    _updates(op, parameters, gradients, averages, squares, teachers)
    _settings(op, settings, groups, len(parameters), len(columns.ADAMW), factors)


def _updates(op: str, parameters: list[Tensor], gradients: list[Tensor], *others: list[Tensor]) -> None:
    """Refuse anything but tensors of the parameters' shapes, all but the gradients of their dtypes too."""
    if not parameters or len(gradients) != len(parameters) or max(map(len, others), default=0) > len(parameters):
        came = ", ".join(str(len(tensors)) for tensors in (parameters, gradients, *others))
        _fail(op, "there must be parameters, as many gradients, and no more of what goes with them", came)
    for i, (p, g) in enumerate(zip(parameters, gradients, strict=True)):
        if p.dtype not in (torch.float32, torch.float64) or not g.is_floating_point() or p.shape != g.shape:
            contract = "parameters must be float32 or float64, gradients of their shapes and floating-point"
            _fail(op, contract, f"{_told(p)} and {_told(g)} at {i}")
        for tensors in others:
            if i < len(tensors) and (tensors[i].shape != p.shape or tensors[i].dtype != p.dtype):
                contract = "averages and teachers must be of their parameters' shapes and dtypes"
                _fail(op, contract, f"{_told(tensors[i])} for {_told(p)} at {i}")


def _settings(op: str, settings: Tensor, groups: list[int], count: int, width: int, factors: tuple) -> None:
    if settings.dim() != 2 or settings.shape[1] != width or settings.dtype != widest_dtype(settings.device):
        _fail(op, f"settings must be [G, {width}] float64", _told(settings))
    if len(groups) != count or min(groups) < 0 or max(groups) >= len(settings):
        _fail(op, f"groups must be {count} rows of settings {_told(settings)}", groups)
    for x in factors:
        if x is not None and x.numel() != 1:
            _fail(op, "grad_scale and found_inf must be one number each", _told(x))
