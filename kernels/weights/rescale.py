"""`gradient.mul_(factor)`, computed in float32 and rounded once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launch, tiling
from ..arithmetic import compute_dtype
from . import reference


@triton.jit
def _multiply(gradient, factor, index, mask):
    g = tl.load(gradient + index, mask).to(factor.dtype)
    tl.store(gradient + index, g * factor, mask)


@triton.jit(do_not_specialize=["elements"])
def _rescale_kernel(
    gradient,  # [elements], dense, in any order
    factor,  # 0-dim
    elements,
    COMPUTE: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offset = tl.cast(tl.program_id(0), tl.int64) * BLOCK
    inside = tl.minimum(elements - offset, BLOCK).to(tl.int32)
    whole = inside // VECTOR * VECTOR  # a mask that changes only between vectors keeps the 128-bit accesses
    index = tl.arange(0, BLOCK)
    b_factor = tl.load(factor).to(COMPUTE)
    _multiply(gradient + offset, b_factor, index, index < whole)
    if whole < inside:
        tail = whole + tl.arange(0, VECTOR)
        _multiply(gradient + offset, b_factor, tail, tail < inside)


def rescale_(gradient: Tensor, factor: Tensor) -> None:
    dense = gradient.is_contiguous() or torch.ops.aten.is_non_overlapping_and_dense(gradient)
    if gradient.dtype not in launch.DTYPES or not dense:
        return reference.rescale_(gradient, factor)
    meta = tiling.elementwise(gradient.dtype)
    launch.launch(
        _rescale_kernel,
        (triton.cdiv(gradient.numel(), meta["BLOCK"]),),
        gradient,
        factor,
        gradient.numel(),
        COMPUTE=launch.DTYPES[compute_dtype(gradient.dtype)],
        **meta,
        device_of=gradient,
    )
