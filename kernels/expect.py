"""What is expected of an operator's arguments, and its error: what the tables of shapes are made of."""

from typing import NoReturn

import torch
from torch import Tensor


def fail(op: str, contract: str, came: object) -> NoReturn:
    raise ValueError(f"{op}: {contract}, got {came}")


def told(x: Tensor) -> str:
    return f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}"


def expect(op: str, name: str, x: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> None:
    """Refuse x of another shape or dtype, unless there is none."""
    if x is not None and (x.shape != shape or (dtype is not None and x.dtype != dtype)):
        contract = f"{list(shape)}" + ("" if dtype is None else f" {str(dtype).removeprefix('torch.')}")
        fail(op, f"{name} must be {contract}", told(x))


def alike(op: str, names: str, *tensors: Tensor, dims: int = 2, rows: bool = False) -> None:
    """Refuse tensors that aren't all of one shape, of so many dimensions, and of one floating-point dtype.

    Kernels divide work by the width, which can't be 0; with `rows`, neither can the number of rows.
    """
    first = tensors[0]
    if first.dim() != dims or not first.is_floating_point():
        fail(op, f"{names} must have {dims} dimensions, floating-point", told(first))
    if not (first.numel() if rows else first.shape[-1]):
        fail(op, f"{names} must not be empty", told(first))
    for x in tensors[1:]:
        if x.shape != first.shape or x.dtype != first.dtype:
            fail(op, f"{names} must be of one shape and dtype", f"{told(first)} and {told(x)}")


def same_width(op: str, names: str, x: Tensor, y: Tensor) -> None:
    """Refuse anything but [N, D] and [M, D]."""
    if x.dim() != 2 or y.dim() != 2 or x.shape[1] != y.shape[1] or not x.shape[1]:
        fail(op, f"{names} must be [N, D] and [M, D]", f"{told(x)} and {told(y)}")
