"""What a kernel trusts, looked at before each launch: that tensors' memory is there, and as large as the kernel reads.

Kernels are given addresses. `fastjem.functional` checks what users pass, but an operator can be called directly, and a
tensor may outlive its memory, with which torch's own `x + 1` crashes too. So `guarded` is around every implementation,
and SHAPES (shapes.py) says of each operator what its arguments must be.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator

from torch import Tensor

from .shapes import SHAPES, fail, told

_checked_already = False


@contextlib.contextmanager
def checked_already() -> Iterator[None]:
    """Within it nothing is looked at, as the caller has looked at all of it: twice would take as long as an update of
    hundreds of small tensors does.
    """
    global _checked_already
    _checked_already = True
    try:
        yield
    finally:
        _checked_already = False


def guarded(name: str, launcher: Callable, on_cpu: bool) -> Callable:
    """An implementation of operator `name`, refusing arguments that a kernel would read or write beyond."""
    check_shapes = SHAPES.get(name, _nothing)

    def check_memory(x: Tensor) -> None:
        if on_cpu and not x.is_cpu:
            fail(name, "every tensor must be on the CPU where one is", x.device)
        if not holds_its_memory(x):
            refuse_freed(name, x)

    @functools.wraps(launcher)
    def launch(*args):
        if _checked_already:
            return launcher(*args)
        for argument in args:
            if isinstance(argument, Tensor):
                check_memory(argument)
            elif isinstance(argument, list) and argument and isinstance(argument[0], Tensor):
                for x in argument:
                    check_memory(x)
        check_shapes(*args)
        return launcher(*args)

    return launch


def _nothing(*_: object) -> None:
    """For an operator in plain torch, which looks by itself."""


def holds_its_memory(x: Tensor) -> bool:
    """Whether the storage of x is as large as its shape and strides ask.

    `x.untyped_storage().resize_(0)` frees the memory of a tensor that is still there, as FSDP does with parameters
    outside of forward. About 0.5 us, in the order in which most tensors are done soonest.
    """
    try:
        held = x.untyped_storage().nbytes()
    except NotImplementedError:  # a tensor around another one, within torch.func.grad or vmap
        return True
    if x.is_contiguous():
        size = x.nbytes
        begin = x.storage_offset()
        if not begin or not size:  # an empty view may begin anywhere
            return not size or size <= held
        return size + begin * x.itemsize <= held
    last = x.storage_offset() + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
    return not x.numel() or (last + 1) * x.itemsize <= held


def refuse_freed(op: str, x: Tensor) -> None:
    """ValueError for a tensor that doesn't hold its memory."""
    if not holds_its_memory(x):
        held = x.untyped_storage().nbytes()
        came = f"{told(x)} and {held} bytes (freed, as FSDP frees parameters outside of forward?)"
        fail(op, "a tensor's storage must hold its elements", came)
