"""What all Triton kernels share: the one launcher, the addressing of rows, and the mean of a loss over rows.

Launchers call `launch.launch(...)` through the module, so that a test can replace it: to record, or to compile for a
GPU that isn't there (tests/aot.py). Nothing here needs a GPU at import.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tiling

DTYPES = {torch.float32: tl.float32, torch.float64: tl.float64, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


# What CUDA allows in a grid's second and third dimension; the first may have 2^31 - 1 programs. So a kernel whose
# programs are rows by blocks of columns has a grid of one dimension, and takes its number apart.
MOST_IN_OTHER_DIMENSIONS = 65535


def launch(kernel, grid: tuple[int, ...], *args, device_of: Tensor, **meta) -> None:
    """`kernel[grid](*args, **meta)` on the device of a tensor, which needn't be the current one."""
    check_grid(grid)
    with torch.cuda.device_of(device_of):
        kernel[grid](*args, **meta)


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured on the current stream."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()  # it raises without a GPU


def check_grid(grid: tuple[int, ...]) -> None:
    """Refuse what CUDA would: its own error says neither the grid nor the limit."""
    if len(grid) > 1 and max(grid[1:]) > MOST_IN_OTHER_DIMENSIONS:
        raise ValueError(f"a grid may have {MOST_IN_OTHER_DIMENSIONS} programs beyond its first dimension, got {grid}")


def gain(dtype: torch.dtype) -> int:
    """What probabilities are multiplied by before a product in this dtype, and its result divided by.

    Below 6e-5 float16 has subnormal numbers, of few digits; most probabilities of thousands of columns are there.
    """
    return 1024 if dtype == torch.float16 else 1


def alignment(*matrices: Tensor) -> int:
    """The largest number of elements, at most 16 bytes of them, that divides the width and every row stride.

    Kernels take widths and strides as multiples of it. Triton sees by itself only that an integer is divisible by 16;
    K = 3000 isn't, though rows of 3000 bfloat16 are whole 128-bit words.
    """
    common = 16 // min(x.element_size() for x in matrices)
    return math.gcd(common, matrices[0].shape[-1], *(stride for x in matrices for stride in x.stride()[:-1]))


@triton.jit
def finite(x):
    """x, or the largest finite number of its sign where it is infinite; NaN may become finite. For maxima as pivots.

    Infinity less infinity is NaN. From the lowest number -inf is still infinitely far, and from the largest one +inf:
    each exponential is 0, 1 or infinite, and so is their sum, whose logarithm plus the pivot is the infinity again.
    A NaN is in the sum anyway.
    """
    largest = tl.full((), 1.7976931348623157e308 if x.dtype == tl.float64 else 3.4028234663852886e38, x.dtype)
    return tl.minimum(tl.maximum(x, -largest), largest)


@triton.jit
def no_softmax(logsumexp):
    """A log-sum-exp as a softmax subtracts it: NaN where it is infinite (a row of -inf alone, or with +inf)."""
    return tl.where(tl.abs(logsumexp) == float("inf"), float("nan"), logsumexp)


@triton.jit
def row_start(i_row, s_row, ALIGN: tl.constexpr):
    """Where a row, or each of several, begins; the stride is s_row * ALIGN elements. In int64: N x K may pass 2^31."""
    return tl.cast(i_row, tl.int64) * s_row * ALIGN


@triton.jit
def number(tensor, value):
    """In float64: what a 0-dim tensor holds, or if there is none, the value, a kernel's `tl.float64`."""
    if tensor is not None:
        return tl.load(tensor).to(tl.float64)
    return tl.full((), value, tl.float64)


@triton.jit
def chosen(tensors, i):
    """Of a tuple of pointers to one dtype the i-th, by selections, through which their alignment stays known."""
    pointer = tensors[0]
    for place in tl.static_range(1, len(tensors)):
        pointer = tl.where(i == place, tensors[place], pointer)
    return pointer


@triton.jit
def summed(sums, parts, BLOCK: tl.constexpr):
    """`sums[:parts].sum()`, by one program in a fixed order."""
    index = tl.arange(0, BLOCK)
    b_sum = tl.zeros([BLOCK], sums.dtype.element_ty)
    for i in range(0, parts, BLOCK):
        b_sum += tl.load(sums + i + index, index < parts - i, 0)
    return tl.sum(b_sum, 0)


@triton.jit
def no_number(over):
    """0, or NaN where a scale that is in the gradients isn't finite: then zeros among them are no numbers either."""
    return over - over


@triton.jit(do_not_specialize=["parts"])
def _total_kernel(
    sums,  # [parts] float
    over,  # 0-dim, what the total is multiplied by, too; or None
    total,  # 0-dim
    scale,  # 0-dim
    parts,
    factor: tl.float64,
    scale_value: tl.float64,
    BLOCK: tl.constexpr,
):
    dtype: tl.constexpr = sums.dtype.element_ty
    sum_of_all = summed(sums, parts, BLOCK) * tl.full((), factor, dtype)
    of_gradients = tl.full((), scale_value, dtype)
    if over is not None:
        sum_of_all *= tl.load(over)
        of_gradients += no_number(tl.load(over))
    tl.store(total, sum_of_all)
    tl.store(scale, of_gradients)


def total(
    sums: Tensor,  # [parts], contiguous
    factor: float,
    scale: float,
    over: Tensor | None = None,  # 0-dim
) -> tuple[Tensor, Tensor]:
    """`sums.sum() * factor * over`, and the scale as a tensor: what an operator returns beside its gradients."""
    loss = sums.new_empty(())
    of_gradients = sums.new_empty(())
    launch(
        _total_kernel,
        (1,),
        sums,
        over,
        loss,
        of_gradients,
        sums.numel(),
        float(factor),
        float(scale),
        **tiling.mean_of_rows(),
        device_of=sums,
    )
    return loss, of_gradients


@triton.jit(do_not_specialize=["N"])
def _one_over_kernel(weights, out, N, times: tl.float64, BLOCK: tl.constexpr):
    tl.store(out, 1 / (summed(weights, N, BLOCK) * tl.full((), times, weights.dtype.element_ty)))


def one_over(weights: Tensor, times: float) -> Tensor:
    """`1 / (weights.sum() * times)` of contiguous weights [N], in their dtype."""
    out = weights.new_empty(())
    tile = tiling.mean_of_rows()
    launch(_one_over_kernel, (1,), weights, out, len(weights), float(times), **tile, device_of=weights)
    return out


@triton.jit(do_not_specialize=["parts"])
def _mean_kernel(
    sums,  # [parts] float
    counts,  # [parts] int32
    loss,  # 0-dim
    scale,  # 0-dim
    parts,
    BLOCK: tl.constexpr,
):
    index = tl.arange(0, BLOCK)
    b_sum = tl.zeros([BLOCK], sums.dtype.element_ty)
    b_count = tl.zeros([BLOCK], tl.int32)
    for i in range(0, parts, BLOCK):
        mask = index < parts - i
        b_sum += tl.load(sums + i + index, mask, 0)
        b_count += tl.load(counts + i + index, mask, 0)
    one_over = 1 / tl.sum(b_count, 0).to(sums.dtype.element_ty)
    tl.store(loss, tl.sum(b_sum, 0) * one_over)
    tl.store(scale, one_over)


def mean(
    sums: Tensor,  # [parts], of the loss over the rows of a part
    counts: Tensor,  # [parts] int32, how many rows that is
) -> tuple[Tensor, Tensor]:
    """The mean over all rows and 1 / their number (NaN and infinity for none), by one program in a fixed order."""
    loss = sums.new_empty(())
    scale = sums.new_empty(())
    launch(_mean_kernel, (1,), sums, counts, loss, scale, len(sums), **tiling.mean_of_rows(), device_of=sums)
    return loss, scale
