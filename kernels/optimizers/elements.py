"""What the kernels of all optimisers do with a block of elements."""

import triton
import triton.language as tl


@triton.jit
def tensor_at(addresses, i, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The i-th of addresses (a table's line, a vector of gradients'), as a pointer."""
    pointer = tl.load(addresses + i).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def gradient_factor(grad_scale, SCALED: tl.constexpr):
    """What gradients are multiplied by, float64."""
    if SCALED:
        return 1 / tl.load(grad_scale).to(tl.float64)
    return tl.full((), 1.0, tl.float64)


@triton.jit
def is_taken(found_inf, CHECKED: tl.constexpr):
    """Whether the step is taken: what is written otherwise is what was there."""
    if CHECKED:
        return tl.load(found_inf) == 0
    return tl.full((), 1, tl.int1)


@triton.jit
def follow(teacher, updated, weight, index, mask):
    """The teacher's elements towards the parameter's: lerp in torch's two forms, as `ema_update_` has it."""
    t = tl.load(teacher + index, mask)
    difference = updated - t
    tl.store(
        teacher + index, tl.where(weight < 0.5, t + weight * difference, updated - difference * (1 - weight)), mask
    )
