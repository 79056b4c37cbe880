"""What every launcher of a C++ kernel needs of a tensor: its dtype's code and its address.

C++ is given addresses and trusts them: what they stand for has been looked at before a launcher is called (guard.py).
Launchers take tensors of any layout and copy rows that aren't dense. A dtype without a code is widened, or the
reference computes it.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .arithmetic import compute_dtype

LARGE = 4 << 20  # bytes; what is smaller comes from memory that was used before

CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}  # csrc/common.h: enum Dtype


def address(x: Tensor | None) -> int:
    """0 for no tensor, and for an empty one, which stands for a gradient that isn't wanted."""
    return 0 if x is None else x.data_ptr()


def address_of_row(x: Tensor | None, row: int) -> int:
    """Where row `row` of x begins; 0 for no tensor."""
    return 0 if x is None else x.data_ptr() + row * x.stride(0) * x.element_size()


def _memory_like(x: Tensor) -> Tensor:
    """Contiguous, in the shape and dtype of x.

    The system hands out large memory anew each time, page by page as it is first written: 128 MiB in pages of 4 KiB
    took 100 ms of a cross-entropy's 180.
    """
    memory = torch.empty_like(x) if x.is_contiguous() else torch.empty(x.shape, dtype=x.dtype)  # half of `empty`'s time
    return in_huge_pages(memory)


def in_huge_pages(memory: Tensor) -> Tensor:
    """Memory that nobody has written yet, as it is."""
    if memory.nbytes >= LARGE:
        from . import _C  # here, as `Found` is wanted where the extension isn't built, too

        _C.prefer_huge_pages(address(memory), memory.nbytes)
    return memory


def gradient_for(x: Tensor, wanted: bool) -> Tensor:
    """Memory for the gradient of x, contiguous; empty where it isn't wanted."""
    return _memory_like(x) if wanted else x.new_empty(0)


def scale_within(scale: float, dtype: torch.dtype) -> float:
    """What a kernel multiplies a gradient of that dtype by of the loss's scale, so that backward needn't read it again.

    1 for float16: 1/N takes half of a gradient's numbers below what it can hold.
    """
    return 1.0 if dtype == torch.float16 or not 0 < abs(scale) < math.inf else scale


def same_layout(*tensors: Tensor) -> bool:
    """Whether the same index into each one's memory is the same element of each: one block, in one order."""
    return all(map(Tensor.is_contiguous, tensors)) or (  # twice as fast as a loop: hundreds of weights go through here
        tensors[0].dim() == 4 and all(x.is_contiguous(memory_format=torch.channels_last) for x in tensors)
    )


class Found(NamedTuple):
    """What C++ found of plain tensors (plain.py). Gradients are still to be multiplied by their factors; None where one
    isn't wanted.
    """

    loss: Tensor
    gradients: Sequence[Tensor | None]
    factors: Sequence[float]


def gradients_for(inputs: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor | None]:
    """Memory for the gradients of plain tensors; None where one isn't wanted."""
    return [_memory_like(x) if want else None for x, want in zip(inputs, wanted, strict=True)]


def scalar(value: float, dtype: torch.dtype) -> Tensor:
    """0-dim; infinite where the number is beyond the dtype, which `scalar_tensor` refuses."""
    try:
        return torch.scalar_tensor(value, dtype=dtype)
    except RuntimeError:
        return torch.scalar_tensor(math.copysign(math.inf, value), dtype=dtype)


def loss_like(x: Tensor, value: float) -> Tensor:
    """A loss of x: 0-dim, in the dtype to compute in."""
    return scalar(value, compute_dtype(x.dtype))
