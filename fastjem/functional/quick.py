"""Losses whose call is all that costs, of a few rows above all: one call of C++ for the loss and its gradients.

Only where nothing but a plain loss is asked for, of plain tensors that fit one another (C++ looks), and nobody watches
operators (`fastjem.ops.direct`). Everything else, mistakes too, goes the long way, which is right for all: these
functions then return None.
"""
# pyright: reportPossiblyUnboundVariable=false

import math
from collections.abc import Sequence
from typing import TypeGuard

import torch
from torch import Tensor

from fastjem.functional.checks import PLAIN
from fastjem.kernels.native import Found
from fastjem.kernels.plain import few_alike, few_with_labels
from fastjem.ops.autograd import found
from fastjem.ops.direct import nothing_watches

try:
    from fastjem.kernels.contrastive import small
    from fastjem.kernels.covariance import cpu_spectral as spectral
    from fastjem.kernels.covariance.cpu import barlow_twins_of_plain, vicreg_of_plain
    from fastjem.kernels.predictive.cpu import negative_cosine_of_plain, regression_of_plain
    from fastjem.kernels.supervised.cpu import cross_entropy_of_plain
except ImportError:
    _is_built = False
else:
    _is_built = True

# Of so few elements torch's own kernels, of which one or two are called, are done before ours would have been given
# memory for a gradient and for the loss: the call is all that costs, and theirs is made in C++.
FEW = 4096
MEAN = 1  # of torch's enumeration of reductions
# what torch.nn.functional calls, after a look at its arguments that takes as long
_torch = torch._C._nn  # pyright: ignore[reportAttributeAccessIssue]

_NUMBERS = (torch.float32, torch.float64)


def _may_be(*tensors: object) -> bool:
    """Whether all are tensors and nobody watches."""
    return _is_built and nothing_watches() and all(isinstance(x, Tensor) for x in tensors)


def _is_positive(number: object) -> TypeGuard[float]:
    return type(number) is float and 0 < number < math.inf


def _asked(*inputs: Tensor) -> list[bool]:
    recording = torch.is_grad_enabled()
    return [recording and x.requires_grad for x in inputs]


def _loss(name: str, result: Found | None, *inputs: Tensor) -> Tensor | None:
    return None if result is None else found(name, result.loss, inputs, result.gradients, result.factors)


def of_views(
    name: str,
    z0: Tensor,  # [N, D], or [V, N, D] alone
    z1: Tensor | None,
    temperature: float | Tensor,
    *,
    labels: Tensor | None = None,
    normalize: bool = True,
    decoupled: bool = False,
    one_anchor: bool = False,
) -> Tensor | None:
    """NT-Xent, DCL, SupCon."""
    views = (z0,) if z1 is None else (z0, z1)
    if not _is_positive(temperature) or not _may_be(*views) or any(z.dim() != 4 - len(views) for z in views):
        return None
    if z1 is None and len(z0) < 2 and name != "supcon":  # whose only view has classes for its positives
        return None
    options = {"labels": labels, "normalize": normalize, "decoupled": decoupled, "one_anchor": one_anchor}
    return _loss(name, small.of_views(views, temperature, _asked(*views), **options), *views)


def info_nce(
    query: Tensor, positive: Tensor, negatives: Tensor, temperature: float | Tensor, offset: int | None
) -> Tensor | None:
    if not _is_positive(temperature) or not _may_be(query, positive, negatives):
        return None
    if query.dim() != 2 or negatives.dim() != 2 or not (offset is None or type(offset) is int):
        return None
    inputs = (query, positive, negatives)
    at = -query.shape[0] if offset is None else offset
    return _loss("info_nce", small.info_nce(*inputs, at, temperature, _asked(*inputs)), *inputs)


def _is_number(x: object) -> TypeGuard[Tensor]:
    """A 0-dim tensor that can be read without waiting for a device."""
    return isinstance(x, Tensor) and x.dim() == 0 and x.dtype in _NUMBERS and x.is_cpu and type(x) in PLAIN


def clip_loss(x: Tensor, y: Tensor, scale: float | Tensor) -> Tensor | None:
    if not _is_number(scale) or not _may_be(x, y) or x.dim() != 2:
        return None
    return _loss("clip_loss", small.of_pairs(x, y, scale, None, _asked(x, y, scale)), x, y, scale)


def siglip_loss(x: Tensor, y: Tensor, scale: float | Tensor, bias: float | Tensor) -> Tensor | None:
    if not (_is_number(scale) and _is_number(bias)) or not _may_be(x, y) or x.dim() != 2:
        return None
    return _loss("siglip_loss", small.of_pairs(x, y, scale, bias, _asked(x, y, scale, bias)), x, y, scale, bias)


def _covariance_fits(z0: Tensor, z1: Tensor, *numbers: object) -> bool:
    if not _may_be(z0, z1) or z0.dim() != 2 or not z0.is_cpu:
        return False
    return _are_finite(*numbers)


def _are_finite(*numbers: object) -> bool:
    """Asked after `_may_be`: torch.compile, for which nothing is quick, may know numbers as symbols and fix them."""
    return all(type(x) is float and math.isfinite(x) for x in numbers)


def barlow_twins(z0: Tensor, z1: Tensor, lambda_param: float | Tensor) -> Tensor | None:
    if not _covariance_fits(z0, z1, lambda_param):
        return None
    weight = float(lambda_param)  # which it is
    return _loss("barlow_twins", barlow_twins_of_plain(z0, z1, weight, _asked(z0, z1)), z0, z1)


def vicreg(
    z0: Tensor,
    z1: Tensor,
    lambda_param: float | Tensor,
    mu_param: float | Tensor,
    nu_param: float | Tensor,
    eps: float,
    variance_factor: float | Tensor,
) -> Tensor | None:
    if not _covariance_fits(z0, z1, lambda_param, mu_param, nu_param, eps, variance_factor) or eps < 0:
        return None
    # floats they are; the kernel halves the second
    numbers = (float(lambda_param), float(2.0 * variance_factor * mu_param), float(nu_param), eps)
    return _loss("vicreg", vicreg_of_plain(z0, z1, *numbers, _asked(z0, z1)), z0, z1)


def tico(
    z0: Tensor, z1: Tensor, covariance: Tensor | None, beta: float | Tensor, rho: float | Tensor
) -> tuple[Tensor, Tensor] | None:
    tensors = (z0, z1) if covariance is None else (z0, z1, covariance)
    if not _may_be(*tensors) or not _are_finite(beta, rho) or not 0 <= beta <= 1 or not z0.is_cpu:
        return None
    result = spectral.tico(z0, z1, covariance, float(beta), float(rho), _asked(z0, z1))
    if result is None:
        return None
    of_loss, c = result
    return found("tico", of_loss.loss, (z0, z1), of_loss.gradients, of_loss.factors), c


def frossl(views: Sequence[Tensor], invariance: float | Tensor) -> Tensor | None:
    views = list(views)
    if not _may_be(*views) or not _are_finite(invariance) or len(views) < 2 or not views[0].is_cpu:
        return None
    return _loss("frossl", spectral.frossl(views, float(invariance), _asked(*views)), *views)


def w_mse(z0: Tensor, z1: Tensor, eps: float | Tensor) -> Tensor | None:
    if not _covariance_fits(z0, z1, eps) or not 0 <= eps <= 1:
        return None
    return _loss("w_mse", spectral.w_mse(z0, z1, float(eps), _asked(z0, z1)), z0, z1)


def coding_rate(z: Tensor, eps: float | Tensor) -> Found | None:
    """Rate and gradient; as of `simdino`."""
    if not _is_positive(eps) or not _may_be(z) or not z.is_cpu:
        return None
    return spectral.coding_rate(z, eps, *_asked(z))


def simdino(
    student: list[Tensor], teacher: list[Tensor], eps: float | Tensor, coefficient: float | Tensor, mean: bool
) -> Found | None:
    """Loss and gradients of views that fit one another in number: it is differentiable twice, which `_loss` isn't."""
    if not _is_positive(eps) or not _may_be(*student, *teacher) or not _are_finite(coefficient):
        return None
    if not student[0].is_cpu or len(student) < max(2, len(teacher)):
        return None
    return spectral.simdino(student, teacher, eps, float(coefficient), mean, _asked(*student))


def mmcr(online: Tensor, momentum: Tensor, lmda: float | Tensor) -> Found | None:
    """Loss and gradients; as of `simdino`."""
    if not _may_be(online, momentum) or not _are_finite(lmda) or not online.is_cpu:
        return None
    return spectral.mmcr(online, momentum, float(lmda), _asked(online, momentum))


def cross_entropy(logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor | None:
    if type(ignore_index) is not int or not nothing_watches():
        return None
    if few_with_labels(logits, labels, ignore_index, FEW):
        return _torch.cross_entropy_loss(logits, labels, None, MEAN, ignore_index, 0.0)
    if not _may_be(logits, labels):
        return None
    return _loss("cross_entropy", cross_entropy_of_plain(logits, labels, ignore_index, _asked(logits)), logits)


def negative_cosine(p: Tensor, z: Tensor, eps: float) -> Tensor | None:
    if not _is_positive(eps) or not _may_be(p, z):
        return None
    return _loss("negative_cosine", negative_cosine_of_plain(p, z, eps, _asked(p, z)), p, z)


def regression(prediction: Tensor, target: Tensor, beta: float, normalize: bool, eps: float) -> Tensor | None:
    if type(beta) is not float or not 0 <= beta < math.inf or not _is_positive(eps) or type(normalize) is not bool:
        return None
    if not nothing_watches():
        return None
    if few_alike(prediction, target, FEW):
        if target.requires_grad:
            target = target.detach()
        if normalize:
            target = torch.layer_norm(target, target.shape[-1:], None, None, eps, False)
        if beta == 0:
            return _torch.mse_loss(prediction, target, MEAN)
        return _torch.smooth_l1_loss(prediction, target, MEAN, beta)
    if not _may_be(prediction, target):
        return None
    options = (beta, normalize, eps)
    return _loss("regression", regression_of_plain(prediction, target, *options, _asked(prediction)), prediction)
