"""The way from a loss to its C++ without PyTorch's dispatcher.

For a loss of a few rows the call is all that costs: the dispatcher takes 4 us to find a Python implementation and come
back, and the looks that such an implementation takes at its arguments (kernels/guard.py) as much again. Neither is
needed where the dispatcher would do nothing but call C++ with plain tensors. Two questions tell:

* `nothing_watches`: nobody wants to see operators. There is no torch.compile or tracer, no dispatch or function mode,
  no transform of torch.func, no forward-mode differentiation, no profiler.
* `plain` (kernels/plain.py): all tensors are torch.Tensor or Parameter itself, in the host's memory, which is there.

Otherwise the call goes to `torch.ops.fastjem`, as it does on every other device. There is no registry: LAUNCHERS are
the functions that `fastjem.ops` has given the dispatcher for its CPU key. Shapes aren't looked at again here: what
calls is `fastjem.functional`, which has checked them.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastjem.kernels import plain as tensors

# Operator -> its C++ launcher, without autograd and autocast; filled by fastjem.ops.
LAUNCHERS: dict[str, Callable] = {}

_ops = torch.ops.fastjem
_is_off = False
_compiling = torch.compiler.is_compiling
_transforms = torch._C._are_functorch_transforms_active
_function_modes = torch._C._is_torch_function_mode_enabled
_dispatch_modes = torch._C._len_torch_dispatch_stack
_tracing = torch._C._is_tracing
_profiler = torch._C._autograd._profiler_enabled  # pyright: ignore[reportAttributeAccessIssue]
keeps_graph = torch._C._autograd._get_current_graph_task_keep_graph  # pyright: ignore[reportAttributeAccessIssue]


def nothing_watches() -> bool:
    """Whether a call with plain tensors may go past the dispatcher, as nobody would see it there. 0.5 us."""
    return not (
        _compiling()
        or _is_off
        or _dispatch_modes()
        or _function_modes()
        or _transforms()
        or forward_ad._current_level >= 0
        or _profiler()
        or _tracing()
    )


@contextmanager
def off() -> Iterator[None]:
    """Within it every operator is called through the dispatcher: for tests, which give it other implementations."""
    global _is_off
    before = _is_off
    _is_off = True
    try:
        yield
    finally:
        _is_off = before


def call(name: str, *arguments: object):
    """`torch.ops.fastjem.name(*arguments)`"""
    if not _compiling() and name in LAUNCHERS and nothing_watches() and tensors.plain(arguments):
        return LAUNCHERS[name](*arguments)
    return getattr(_ops, name)(*arguments)


def rescale_(gradients: Sequence[Tensor | None], upstream: Tensor, factors: Tensor | Sequence[float]) -> bool:
    """Whether all gradients were multiplied by `upstream * factor`, in one call: nobody watches, and no graph is kept.

    Args:
        factors: one 0-dim tensor for all gradients, or a number for each.
    """
    if _compiling() or not LAUNCHERS or keeps_graph() or not nothing_watches():
        return False
    return tensors.rescale(gradients, upstream, factors, torch.get_num_threads())
