"""Errors that say which function was called (`op`), its contract, and what came."""

import math
import numbers
import operator
from collections.abc import Sequence
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor

from fastjem.kernels import guard
from fastjem.kernels.arithmetic import widest_dtype
from fastjem.kernels.plain import plain_matrices

NO_ADDRESS = 2**40  # programs' memory begins far above
PLAIN = {Tensor, torch.nn.Parameter}  # what has an address; others are made of such, or of nothing (fake tensors)


def fail(op: str, contract: str, came: object) -> NoReturn:
    raise ValueError(f"{op}: {contract}, got {came}")


def shape(x: object) -> object:
    """For a message: the shape of a tensor, the type of anything else."""
    return tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__


def matrices(
    op: str, contract: str, *tensors: Tensor, dims: int = 2, same: bool = True, may_be_empty: int | None = None
) -> None:
    """Floating-point tensors of `dims` dimensions on one device, and of one shape if `same`.

    Not empty, but for the dimension `may_be_empty`, where a rank among others may have no rows.
    """
    if not torch.compiler.is_compiling() and plain_matrices(tensors, dims, same):
        return  # one look by C++: what follows tells what is wrong with the others
    for x in tensors:
        if not isinstance(x, Tensor):
            fail(op, contract, type(x).__name__)
        # A generator takes longer than all the rest: only where a length is 0 it is made.
        if x.dim() != dims or (
            (torch.compiler.is_compiling() or 0 in x.shape)
            and any(length == 0 and i != may_be_empty for i, length in enumerate(x.shape))
        ):
            fail(op, contract, " and ".join(str(shape(t)) for t in tensors))
        if not x.is_floating_point():
            fail(op, f"{contract}, floating-point", x.dtype)
        memory(op, x)
    if same:
        for x in tensors[1:]:
            if x.shape != tensors[0].shape:
                fail(op, contract, " and ".join(str(shape(t)) for t in tensors))
    one_device(op, tensors)


def memory(op: str, x: Tensor) -> None:
    """Refuse a tensor whose memory was freed, before torch computes with it: `torch.stack` would crash, for one.

    Freed memory begins at 0, and a view of it at most as far from there as its offset is. More is looked at only on the
    host, where good tensors haven't come this far (`plain_matrices`); on a GPU an operator looks (`kernels.guard`).
    """
    if type(x) not in PLAIN or torch.compiler.is_compiling():
        return
    try:
        begin = x.data_ptr()
    except RuntimeError:  # a tensor around another one, within torch.func.grad or vmap
        return
    if (x.is_cpu or begin < NO_ADDRESS) and not guard.holds_its_memory(x):
        guard.refuse_freed(op, x)


def one_device(op: str, tensors: Sequence[Tensor]) -> None:
    device = tensors[0].device
    for x in tensors[1:]:
        if x.device != device:
            fail(op, "tensors must be on one device", " and ".join(str(x.device) for x in tensors))


def number(
    op: str,
    name: str,
    value: object,
    like: Tensor | None = None,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    inclusive: bool = False,
) -> float | Tensor:
    """A number that is scheduled or learned, between `low` and `high` (themselves too, if `inclusive`).

    Python's and numpy's numbers come back as float. A tensor of one element comes back 0-dim, with its gradient; its
    value is never looked at, as that would wait for the device. Under torch.compile a number that the graph doesn't
    know as a constant, because it has been another one before, becomes a tensor too: an operator's float would compile
    a graph for each of its values.

    Args:
        op, name: of the function that the user called and of its argument, for the message.
        like: a tensor must be on its device; None: any.
    """
    if type(value) is float and low < value < high and not torch.compiler.is_compiling():
        return value
    if isinstance(value, Tensor):
        return _one_element(op, name, value, like)
    value = _real(op, name, value, low, high, inclusive)
    return _constant_or_tensor(value, like) if torch.compiler.is_compiling() else value


def host_number(
    op: str,
    name: str,
    value: object,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    inclusive: bool = False,
) -> float:
    """As `number`, for one that nobody schedules (an eps): a tensor is read, and so has to be on the CPU."""
    if type(value) is float and low < value < high:
        return value
    if isinstance(value, Tensor):
        value = _one_element(op, name, value, None)
        if value.device.type != "cpu" or value.requires_grad:
            came = f"a tensor on {value.device}" + (" that requires a gradient" if value.requires_grad else "")
            fail(op, f"{name} must be a number, or a constant on the CPU", came)
        value = value.item()
    return _real(op, name, value, low, high, inclusive)


def integer(op: str, name: str, value: object, least: int | None = None) -> int:
    """A whole number, Python's, numpy's or a tensor's on the CPU; neither a truth value nor 2.0."""
    if type(value) is int and (least is None or value >= least):
        return value
    try:
        if isinstance(value, bool) or (isinstance(value, Tensor) and (value.dtype == torch.bool or value.is_cuda)):
            raise TypeError
        whole = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        fail(op, f"{name} must be an integer", f"{value!r} ({type(value).__name__})")
    if least is not None and whole < least:
        fail(op, f"{name} must be at least {least}", whole)
    return whole


def positive(op: str, name: str, value: object, like: Tensor | None = None) -> float | Tensor:
    """`number` above 0: temperatures."""
    return number(op, name, value, like, low=0.0)


def _one_element(op: str, name: str, value: Tensor, like: Tensor | None) -> Tensor:
    if value.numel() != 1 or value.dtype == torch.bool or value.is_complex():
        came = tuple(value.shape) if value.numel() != 1 else value.dtype
        fail(op, f"{name} must be a number or a 0-dim tensor", came)
    if like is not None and value.device != like.device:
        fail(op, f"{name} must be on the tensors' device {like.device}", value.device)
    value = value.reshape(())
    return value if value.is_floating_point() else value.to(torch.float32)


def _real(op: str, name: str, value: object, low: float, high: float, inclusive: bool) -> float:
    if isinstance(value, np.ndarray) and not value.ndim:
        value = value[()]  # numpy's scalar
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        fail(op, f"{name} must be a number", f"{value!r} ({type(value).__name__})")
    real = float(value)
    if not (low < real < high or (inclusive and low <= real <= high and -math.inf < real < math.inf)):
        fail(op, f"{name} must be {_interval(low, high, inclusive)}", value)
    return real


def _interval(low: float, high: float, inclusive: bool) -> str:
    if math.isfinite(high):
        return f"in [{low:g}, {high:g}]" if inclusive else f"between {low:g} and {high:g}"
    if math.isfinite(low) and inclusive:
        return f"at least {low:g} and finite"
    return "a positive finite number" if low == 0 else "a finite number"


def _constant_or_tensor(value: float, like: Tensor | None) -> float | Tensor:
    from torch.fx.experimental.symbolic_shapes import has_static_value

    if has_static_value(value):
        return value
    device = torch.device("cpu") if like is None else like.device
    # A product, because of all ways to make a tensor of a symbolic float it is one that compiles once for all values.
    return torch.ones((), dtype=widest_dtype(device), device=device) * value


def common(*tensors: Tensor) -> list[Tensor]:
    """The tensors in their common dtype (torch's promotion), as one operator call wants them."""
    dtype = tensors[0].dtype
    for x in tensors[1:]:
        dtype = dtype if x.dtype == dtype else torch.promote_types(dtype, x.dtype)
    return [x if x.dtype == dtype else x.to(dtype) for x in tensors]
