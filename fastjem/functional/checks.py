"""Errors that say which function was called (`op`), its contract, and what came."""

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor


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
    for x in tensors:
        if not isinstance(x, Tensor):
            fail(op, contract, type(x).__name__)
        if x.dim() != dims or any(length == 0 and i != may_be_empty for i, length in enumerate(x.shape)):
            fail(op, contract, " and ".join(str(shape(t)) for t in tensors))
        if not x.is_floating_point():
            fail(op, f"{contract}, floating-point", x.dtype)
    if same and any(x.shape != tensors[0].shape for x in tensors):
        fail(op, contract, " and ".join(str(shape(t)) for t in tensors))
    one_device(op, tensors)


def one_device(op: str, tensors: Sequence[Tensor]) -> None:
    device = tensors[0].device
    if any(x.device != device for x in tensors):
        fail(op, "tensors must be on one device", " and ".join(str(x.device) for x in tensors))


def positive(op: str, **values: float) -> None:
    for name, value in values.items():
        if not isinstance(value, (int, float)) or not 0 < value < float("inf"):
            fail(op, f"{name} must be a positive finite number", value)


def common(*tensors: Tensor) -> list[Tensor]:
    """The tensors in their common dtype (torch's promotion), as one operator call wants them."""
    dtype = tensors[0].dtype
    for x in tensors[1:]:
        dtype = dtype if x.dtype == dtype else torch.promote_types(dtype, x.dtype)
    return [x if x.dtype == dtype else x.to(dtype) for x in tensors]
