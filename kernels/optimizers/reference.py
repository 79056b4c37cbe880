"""The specification of the optimisers; conventions are in `__init__.py`."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ..arithmetic import widest
from . import columns


def lars_norms(
    parameters: list[Tensor], gradients: list[Tensor], settings: Tensor, groups: list[int], grad_scale: Tensor | None
) -> Tensor:
    """[P, 2]: the sum of the squares of each parameter, and of its gradient (decay_in_norm: of g + weight_decay * p).

    Of parameters in shards these are added over ranks.
    """
    squares = []
    for p, g, group in zip(parameters, gradients, groups, strict=True):
        of = dict(zip(columns.LARS, settings[group].unbind(), strict=True))
        g = _unscaled(widest(g), widest(p), grad_scale)
        decayed = torch.where(of["decay_in_norm"] != 0, g + of["weight_decay"] * widest(p), g)
        squares += [widest(p).square().sum(), decayed.square().sum()]
    return torch.stack(squares).reshape(-1, 2)


def lars_(
    parameters: list[Tensor],
    gradients: list[Tensor],
    buffers: list[Tensor],
    teachers: list[Tensor],
    settings: Tensor,  # [G, len(columns.LARS)]
    groups: list[int],
    norms: Tensor | None,  # of `lars_norms`; None: those of these tensors
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """SGD with momentum, at a rate that each tensor has for itself (You et al. 2017, arXiv 1708.03888, equation 6).

    With p, g, b the parameter, its gradient and its buffer, and the ratio 1 where the rate isn't adapted, or where
    either norm is 0:

        ratio = trust_coeff * |p| / (|g| + weight_decay * |p| + eps)
            (decay_in_norm: trust_coeff * |p| / (|g + weight_decay * p| + eps), as SimCLR's and BYOL's code has it)
        b = momentum * b + ratio * (g + weight_decay * p)
        p = p - lr * b          (nesterov: p - lr * (ratio * (g + weight_decay * p) + momentum * b))
    """
    norms = lars_norms(parameters, gradients, settings, groups, grad_scale) if norms is None else norms
    for i, (p, g) in enumerate(zip(parameters, gradients, strict=True)):
        of = dict(zip(columns.LARS, settings[groups[i]].unbind(), strict=True))
        step = (_unscaled(g, p, grad_scale) + of["weight_decay"] * p) * _ratio(of, norms[i])
        if buffers:
            buffer = of["momentum"] * buffers[i] + step
            step = torch.where(of["nesterov"] != 0, step + of["momentum"] * buffer, buffer)
            _write(buffers[i], buffer, found_inf)
        _write(p, p - of["lr"] * step, found_inf)
        if i < len(teachers):
            _follow(teachers[i], p, of["teacher_momentum"])


def _ratio(of: Mapping[str, Tensor], norms: Tensor) -> Tensor:
    """Of a tensor's rate to its group's, 0-dim."""
    parameter, gradient = norms.sqrt().unbind()
    decay = torch.where(of["decay_in_norm"] != 0, 0, of["weight_decay"])  # what the norm lacks of it
    ratio = of["trust_coeff"] * parameter / (gradient + decay * parameter + of["eps"])
    ratio = torch.where((parameter > 0) & (gradient > 0), ratio, 1)
    ratio = torch.where(of["trust_clip"] != 0, (ratio / of["lr"]).clamp(max=1), ratio)
    adapts = (of["adapts"] == 2) | ((of["adapts"] == 1) & (of["weight_decay"] != 0))
    return torch.where(adapts, ratio, 1)


def adamw_(
    parameters: list[Tensor],
    gradients: list[Tensor],
    averages: list[Tensor],
    squares: list[Tensor],
    steps: list[Tensor],  # 0-dim float32, how many each parameter has taken
    teachers: list[Tensor],
    settings: Tensor,  # [G, len(columns.ADAMW)]
    groups: list[int],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019, arXiv 1711.05101, algorithm 2), as torch has it.

    m = beta1 * m + (1 - beta1) * g;  v = beta2 * v + (1 - beta2) * g^2
    p = (1 - lr * weight_decay) * p - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)
    """
    for i, (p, g) in enumerate(zip(parameters, gradients, strict=True)):
        of = dict(zip(columns.ADAMW, settings[groups[i]].unbind(), strict=True))
        g = _unscaled(g, p, grad_scale)
        _write(steps[i], steps[i] + 1, found_inf)
        average = averages[i] + (1 - of["beta1"]) * (g - averages[i])
        square = of["beta2"] * squares[i] + (1 - of["beta2"]) * g.square()
        rate = of["lr"] / (1 - of["beta1"] ** widest(steps[i]))
        root = (1 - of["beta2"] ** widest(steps[i])).rsqrt()
        step = average / (square.sqrt() * root + of["eps"])
        _write(averages[i], average, found_inf)
        _write(squares[i], square, found_inf)
        _write(p, (1 - of["lr"] * of["weight_decay"]) * p - rate * step, found_inf)
        if i < len(teachers):
            _follow(teachers[i], p, of["teacher_momentum"])


def _unscaled(gradient: Tensor, parameter: Tensor, grad_scale: Tensor | None) -> Tensor:
    gradient = gradient.to(parameter.dtype)
    return gradient if grad_scale is None else gradient * (1 / widest(grad_scale))


def _write(target: Tensor, value: Tensor, found_inf: Tensor | None) -> None:
    target.copy_(value if found_inf is None else torch.where(found_inf == 0, value, target))


def _follow(teacher: Tensor, parameter: Tensor, momentum: Tensor) -> None:
    """As `ema_update_` does."""
    teacher.lerp_(parameter, (1 - momentum).to(teacher.dtype))
