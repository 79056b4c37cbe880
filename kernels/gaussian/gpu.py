"""SIGReg's sums on a GPU: sine and cosine of an angle once, and each further frequency by a rotation, in registers.

float32 alone; float64 is the reference's.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launch, tiling
from . import reference


@triton.jit
def _sine_cosine(x):
    """Reduced by multiples of pi / 2 in float64, so that float32 angles of any size that matters keep their digits.

    The library's own have a branch for large angles that puts a table into local memory.
    """
    wide = x.to(tl.float64)
    n = tl.floor(wide * tl.full((), 0.63661977236758134, tl.float64) + 0.5)
    r = (wide - n * tl.full((), 1.5707963267948966, tl.float64)).to(tl.float32)
    quadrant = n.to(tl.int64).to(tl.int32)
    z = r * r
    # Taylor's series to r^9 and r^10: errors below 2e-9 for |r| <= pi / 4
    s = 1 / 362880
    s = s * z - 1 / 5040
    s = s * z + 1 / 120
    s = s * z - 1 / 6
    s = s * z * r + r
    c = -1 / 3628800
    c = c * z + 1 / 40320
    c = c * z - 1 / 720
    c = c * z + 1 / 24
    c = c * z - 0.5
    c = c * z + 1
    sine = tl.where(quadrant & 1 == 0, s, c)
    cosine = tl.where(quadrant & 1 == 0, c, s)
    return tl.where(quadrant & 2 == 0, sine, -sine), tl.where((quadrant + 1) & 2 == 0, cosine, -cosine)


@triton.jit(do_not_specialize=["N", "V", "frequencies"])
def _characteristic_kernel(
    theta,  # [V, N, S]
    out,  # [2, frequencies, parts, V, S]: the sums of cosines and sines over a part of the rows
    N,
    S,
    V,
    frequencies,
    ROWS: tl.constexpr,  # of a part
    BLOCK: tl.constexpr,
):
    parts = tl.cdiv(N, ROWS)
    blocks = tl.cdiv(S, BLOCK)
    block = tl.program_id(0) % blocks
    part = tl.program_id(0) // blocks % parts
    view = tl.program_id(0) // blocks // parts
    i_row = part * ROWS + tl.arange(0, ROWS)
    column = block * BLOCK + tl.arange(0, BLOCK)
    inside = (i_row < N)[:, None] & (column < S)[None, :]
    at = launch.row_start(view.to(tl.int64) * N + i_row, S, 1)
    x = tl.load(theta + at[:, None] + column[None, :], inside, 0)
    one_sine, one_cosine = _sine_cosine(x)
    one_cosine = tl.where(inside, one_cosine, 0.0)  # rows that aren't there: both stay 0
    sine = one_sine
    cosine = one_cosine
    one = launch.row_start(parts * V, S, 1)  # elements of a frequency
    out += launch.row_start(part * V + view, S, 1)
    for k in range(0, frequencies):
        tl.store(out + k * one + column, tl.sum(cosine, 0), column < S)
        tl.store(out + (frequencies + k) * one + column, tl.sum(sine, 0), column < S)
        rotated = cosine * one_cosine - sine * one_sine
        sine = sine * one_cosine + cosine * one_sine
        cosine = rotated


@triton.jit(do_not_specialize=["N", "V", "frequencies"])
def _characteristic_backward_kernel(
    theta,  # [V, N, S]
    weights,  # [2, frequencies, V, S]
    out,  # [V, N, S]
    N,
    S,
    V,
    frequencies,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    parts = tl.cdiv(N, ROWS)
    blocks = tl.cdiv(S, BLOCK)
    block = tl.program_id(0) % blocks
    part = tl.program_id(0) // blocks % parts
    view = tl.program_id(0) // blocks // parts
    i_row = part * ROWS + tl.arange(0, ROWS)
    column = block * BLOCK + tl.arange(0, BLOCK)
    inside = (i_row < N)[:, None] & (column < S)[None, :]
    at = launch.row_start(view.to(tl.int64) * N + i_row, S, 1)[:, None] + column[None, :]
    one_sine, one_cosine = _sine_cosine(tl.load(theta + at, inside, 0))
    sine = one_sine
    cosine = one_cosine
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    one = launch.row_start(V, S, 1)
    weights += launch.row_start(view, S, 1)
    for k in range(0, frequencies):
        of_cosine = tl.load(weights + k * one + column, column < S, 0)[None, :]
        of_sine = tl.load(weights + (frequencies + k) * one + column, column < S, 0)[None, :]
        total += of_sine * cosine - of_cosine * sine
        rotated = cosine * one_cosine - sine * one_sine
        sine = sine * one_cosine + cosine * one_sine
        cosine = rotated
    tl.store(out + at, total, inside)


def characteristic(theta: Tensor, frequencies: int) -> Tensor:
    if theta.dtype != torch.float32:
        return reference.characteristic(theta, frequencies)
    theta = theta.contiguous()
    views, n, slices = theta.shape
    tile = tiling.characteristic()
    parts = triton.cdiv(n, tile["ROWS"])
    sums = theta.new_empty(2, frequencies, parts, views, slices)
    grid = (views * parts * triton.cdiv(slices, tile["BLOCK"]),)
    launch.launch(_characteristic_kernel, grid, theta, sums, n, slices, views, frequencies, **tile, device_of=theta)
    return sums.sum(2, dtype=torch.float64).float()


def characteristic_backward(theta: Tensor, weights: Tensor) -> Tensor:
    if theta.dtype != torch.float32 or weights.dtype != torch.float32:
        return reference.characteristic_backward(theta, weights)
    theta = theta.contiguous()
    weights = weights.contiguous()
    views, n, slices = theta.shape
    out = torch.empty_like(theta)
    tile = tiling.characteristic_backward()
    grid = (views * triton.cdiv(n, tile["ROWS"]) * triton.cdiv(slices, tile["BLOCK"]),)
    launch.launch(
        _characteristic_backward_kernel, grid, theta, weights, out, n, slices, views, weights.shape[1], **tile,
        device_of=theta,
    )  # fmt: skip
    return out
