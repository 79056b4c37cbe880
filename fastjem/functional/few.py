"""Contrastive losses of a few rows, whose call is all that costs: one call of C++ for the loss and all gradients.

Only where nothing but a plain loss is asked for, of plain tensors that fit one another, and no one watches operators
(`fastjem.ops.direct`). Everything else, mistakes too, goes the long way, which is right for all: these functions then
return None. None of them checks anything that C++ doesn't.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastjem.ops.autograd import found
from fastjem.ops.direct import nothing_watches

try:
    from fastjem.kernels.contrastive import small
except ImportError:  # without the C++ extension
    small = None

_NUMBERS = (torch.float32, torch.float64)


def _asked(*inputs: Tensor) -> list[bool]:
    recording = torch.is_grad_enabled()
    return [recording and x.requires_grad for x in inputs]


def of_views(
    name: str,
    z0: object,  # [N, D], or [V, N, D] alone
    z1: object,
    temperature: object,
    group: object,
    *,
    labels: Tensor | None = None,
    normalize: bool = True,
    decoupled: bool = False,
    one_anchor: bool = False,
) -> Tensor | None:
    """NT-Xent, DCL, SupCon."""
    if group is not None or small is None or not nothing_watches():
        return None
    if type(temperature) is not float or not 0 < temperature < torch.inf or not isinstance(z0, Tensor):
        return None
    if z1 is None:
        # SupCon's single view has classes for its positives
        if z0.dim() != 3 or (len(z0) < 2 and labels is None):
            return None
        views = (z0,)
    else:
        if not isinstance(z1, Tensor) or z0.dim() != 2 or z1.dim() != 2:
            return None
        views = (z0, z1)
    wanted = _asked(*views)
    options = {"labels": labels, "normalize": normalize, "decoupled": decoupled, "one_anchor": one_anchor}
    return _found(name, small.of_views(views, temperature, wanted, **options), views)


def info_nce(query: object, positive: object, negatives: object, temperature: object, offset: object) -> Tensor | None:
    if small is None or not nothing_watches() or type(temperature) is not float or not 0 < temperature < torch.inf:
        return None
    if not (isinstance(query, Tensor) and isinstance(positive, Tensor) and isinstance(negatives, Tensor)):
        return None
    if query.dim() != 2 or negatives.dim() != 2 or not (offset is None or type(offset) is int):
        return None
    inputs = (query, positive, negatives)
    at = -query.shape[0] if offset is None else offset
    return _found("info_nce", small.info_nce(*inputs, at, temperature, _asked(*inputs)), inputs)


def of_pairs(
    name: str, x: object, y: object, scale: object, bias: object, group: object, *, has_bias: bool
) -> Tensor | None:
    """CLIP; SigLIP, if it has a bias."""
    if group is not None or small is None or not nothing_watches():
        return None
    numbers = (scale, bias) if has_bias else (scale,)
    for number in numbers:
        if type(number) is not Tensor and type(number) is not torch.nn.Parameter:
            return None
        if number.dim() or number.dtype not in _NUMBERS or not number.is_cpu:
            return None
    if not (isinstance(x, Tensor) and isinstance(y, Tensor)) or x.dim() != 2 or y.dim() != 2:
        return None
    inputs = (x, y, *numbers)
    return _found(name, small.of_pairs(x, y, *numbers, *[None] * (not has_bias), _asked(*inputs)), inputs)


def _found(name: str, result: "small.Found | None", inputs: Sequence[Tensor]) -> Tensor | None:
    return None if result is None else found(name, result.loss, inputs, result.gradients, result.factors)
