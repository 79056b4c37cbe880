"""The operators, in a namespace that this build of the kernel has for itself.

`CompositeExplicitAutograd` is the reference (plain torch, any device, and the fake kernel that torch.compile traces),
`CUDA` the Triton kernels. Operators never differentiate: functions.py makes losses of them.
"""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._ops import add_op_namespace_prefix, ops
from .contrastive import OPERATORS as CONTRASTIVE
from .contrastive import reference as contrastive_reference
from .prototypes import OPERATORS as PROTOTYPES
from .prototypes import reference as prototypes_reference

SCHEMAS = {name: operator.schema for name, operator in {**CONTRASTIVE, **PROTOTYPES}.items()}
REFERENCES = {
    "nt_xent": contrastive_reference.nt_xent,
    "nt_xent_backward": contrastive_reference.nt_xent_backward,
    "sinkhorn": prototypes_reference.sinkhorn,
    "prototype_cross_entropy": prototypes_reference.prototype_cross_entropy,
}


# What runs on CUDA: imported at the first call, as Triton isn't everywhere --------------------------------------------


def _nt_xent(rows: Tensor, *arguments: Any) -> Any:
    from .contrastive import composed, gpu_engine

    if rows.dtype == torch.float64:
        return contrastive_reference.nt_xent(rows, *arguments)
    return composed.nt_xent(gpu_engine, rows, *arguments)


def _nt_xent_backward(rows: Tensor, *arguments: Any) -> Any:
    from .contrastive import composed, gpu_engine

    if rows.dtype == torch.float64:
        return contrastive_reference.nt_xent_backward(rows, *arguments)
    return composed.nt_xent_backward(gpu_engine, rows, *arguments)


def _sinkhorn(*arguments: Any) -> Any:
    from .prototypes.sinkhorn import sinkhorn

    return sinkhorn(*arguments)


def _prototype_cross_entropy(*arguments: Any) -> Any:
    from .prototypes.prototype_cross_entropy import prototype_cross_entropy

    return prototype_cross_entropy(*arguments)


ON_CUDA = {
    "nt_xent": _nt_xent,
    "nt_xent_backward": _nt_xent_backward,
    "sinkhorn": _sinkhorn,
    "prototype_cross_entropy": _prototype_cross_entropy,
}


def _plain(implementation: Callable) -> Callable:
    """Without autograd and autocast: inside an operator both still act (autocast makes `@` bfloat16)."""

    @functools.wraps(implementation)
    def run(*arguments: Any) -> Any:
        with torch.no_grad(), torch._C._DisableAutocast():
            return implementation(*arguments)

    return run


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None and torch.version.hip is None


def _register() -> None:
    for name, reference in REFERENCES.items():
        torch.library.define(add_op_namespace_prefix(name), SCHEMAS[name])
        torch.library.impl(add_op_namespace_prefix(name), "CompositeExplicitAutograd", _plain(reference))
        torch.library.register_fake(add_op_namespace_prefix(name), _plain(reference))
        if _has_triton():
            torch.library.impl(add_op_namespace_prefix(name), "CUDA", _plain(ON_CUDA[name]))


_register()

__all__ = ["ops"]
