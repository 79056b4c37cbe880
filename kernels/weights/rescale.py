"""`gradient.mul_(upstream * scale)`, computed in float32 and rounded once; gradients of one shape in one launch.

Where the factor is 1, as it is where backward begins with the loss and gradients have their scale already, nothing is
read or written but the factor.
"""

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


@triton.jit(do_not_specialize=["elements", "blocks"])
def _rescale_kernel(
    gradients,  # tuple of [elements], dense, in any order
    upstream,  # 0-dim
    scale,  # 0-dim, or None
    elements,
    blocks,  # of a gradient
    COMPUTE: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    gradient = launch.chosen(gradients, tl.program_id(0) // blocks)
    offset = tl.cast(tl.program_id(0) % blocks, tl.int64) * BLOCK
    b_factor = tl.load(upstream).to(COMPUTE)
    if scale is not None:
        b_factor *= tl.load(scale).to(COMPUTE)
    if b_factor != 1:
        inside = tl.minimum(elements - offset, BLOCK).to(tl.int32)
        whole = inside // VECTOR * VECTOR  # a mask that changes only between vectors keeps the 128-bit accesses
        index = tl.arange(0, BLOCK)
        _multiply(gradient + offset, b_factor, index, index < whole)
        if whole < inside:
            tail = whole + tl.arange(0, VECTOR)
            _multiply(gradient + offset, b_factor, tail, tail < inside)


def rescale_(gradient: Tensor, factor: Tensor) -> None:
    _rescaled([gradient], factor, None)


def rescale_all_(gradients: list[Tensor], upstream: Tensor, scale: Tensor) -> None:
    alike: dict[tuple[torch.dtype, int], list[Tensor]] = {}
    for gradient in gradients:
        alike.setdefault((gradient.dtype, gradient.numel()), []).append(gradient)
    for group in alike.values():
        _rescaled(group, upstream, scale)


def _rescaled(gradients: list[Tensor], upstream: Tensor, scale: Tensor | None) -> None:
    """Of one dtype and number of elements."""
    first = gradients[0]
    if not first.numel():
        return
    dense = all(x.is_contiguous() or torch.ops.aten.is_non_overlapping_and_dense(x) for x in gradients)
    if first.dtype not in launch.DTYPES or not dense:
        factor = upstream if scale is None else upstream * scale
        for gradient in gradients:
            reference.rescale_(gradient, factor)
        return
    meta = tiling.elementwise(first.dtype)
    blocks = triton.cdiv(first.numel(), meta["BLOCK"])
    launch.launch(
        _rescale_kernel,
        (blocks * len(gradients),),
        tuple(gradients),
        upstream,
        scale,
        first.numel(),
        blocks,
        COMPUTE=launch.DTYPES[compute_dtype(first.dtype)],
        **meta,
        device_of=first,
    )
