"""Windows of images in memory, resized with antialiasing: see `reference.resize_matrix`. One launch.

A program makes a block of a view's pixels, each from the pixels of the window that it covers.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launch, tiling
from . import columns, reference

TOP = tl.constexpr(columns.TOP)
LEFT = tl.constexpr(columns.LEFT)
HEIGHT = tl.constexpr(columns.HEIGHT)
WIDTH = tl.constexpr(columns.WIDTH)
COLUMNS = tl.constexpr(columns.COLUMNS)


@triton.jit
def _window(start, length, source):
    """Cut to the image: the first pixel and how many."""
    start = tl.minimum(tl.maximum(start, 0.0), source - 1.0).to(tl.int32)
    return start, tl.minimum(tl.maximum(length, 1.0), (source - start).to(tl.float32)).to(tl.int32)


@triton.jit
def _weight(x, BICUBIC: tl.constexpr):
    x = tl.abs(x)
    if BICUBIC:
        far = tl.where(x < 2, ((-0.5 * x + 2.5) * x - 4) * x + 2, 0.0)
        return tl.where(x < 1, (1.5 * x - 2.5) * x * x + 1, far)
    return tl.maximum(1 - x, 0.0)


@triton.jit
def _stored(x, WHOLE: tl.constexpr):
    """Rounded to levels, where these are whole."""
    return tl.minimum(tl.maximum(tl.floor(x + 0.5), 0.0), 255.0) if WHOLE else x


@triton.jit
def _crop_resize_kernel(
    images,  # [N, H, W, C] uint8 or float32
    indices,  # [B] int64
    parameters,  # [B, P] float32
    out,  # [B, out_height, out_width, C] as the images
    N,
    H,
    W,
    out_height,
    out_width,
    CHANNELS: tl.constexpr,
    WHOLE: tl.constexpr,  # levels are whole numbers
    BICUBIC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    view = tl.program_id(0).to(tl.int64)
    row = parameters + view * COLUMNS
    top, height = _window(tl.load(row + TOP), tl.load(row + HEIGHT), H)
    left, width = _window(tl.load(row + LEFT), tl.load(row + WIDTH), W)
    index = tl.load(indices + view)
    index = tl.minimum(tl.maximum(index, 0), N - 1)  # never a foreign address
    images += ((index * H + top) * W + left) * CHANNELS

    pixel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = pixel < out_height * out_width
    radius: tl.constexpr = 2.0 if BICUBIC else 1.0
    y_scale = height.to(tl.float32) / out_height
    x_scale = width.to(tl.float32) / out_width
    y_wide = tl.maximum(y_scale, 1.0)
    x_wide = tl.maximum(x_scale, 1.0)
    y_centre = y_scale * ((pixel // out_width).to(tl.float32) + 0.5)
    x_centre = x_scale * ((pixel % out_width).to(tl.float32) + 0.5)
    y_first = tl.floor(y_centre - radius * y_wide + 0.5).to(tl.int32)
    x_first = tl.floor(x_centre - radius * x_wide + 0.5).to(tl.int32)
    y_taps = tl.ceil(2 * radius * y_wide).to(tl.int32)
    x_taps = tl.ceil(2 * radius * x_wide).to(tl.int32)

    out += (view * out_height * out_width + pixel) * CHANNELS
    for first in range(0, CHANNELS, 3):  # three channels at a time, of which the last three may lack some
        has_second = first + 1 < CHANNELS
        has_third = first + 2 < CHANNELS
        one = tl.zeros([BLOCK], tl.float32)
        two = tl.zeros([BLOCK], tl.float32)
        three = tl.zeros([BLOCK], tl.float32)
        weights = tl.zeros([BLOCK], tl.float32)
        for i in range(0, y_taps):
            y = y_first + i
            y_inside = mask & (y >= 0) & (y < height)
            y_weight = tl.where(y_inside, _weight((y.to(tl.float32) + 0.5 - y_centre) / y_wide, BICUBIC), 0.0)
            row_one = tl.zeros([BLOCK], tl.float32)
            row_two = tl.zeros([BLOCK], tl.float32)
            row_three = tl.zeros([BLOCK], tl.float32)
            row_weights = tl.zeros([BLOCK], tl.float32)
            for j in range(0, x_taps):
                x = x_first + j
                inside = y_inside & (x >= 0) & (x < width)
                weight = tl.where(inside, _weight((x.to(tl.float32) + 0.5 - x_centre) / x_wide, BICUBIC), 0.0)
                source = images + (y * W + x) * CHANNELS + first
                row_one += weight * tl.load(source, inside, 0).to(tl.float32)
                row_two += weight * tl.load(source + 1, inside & has_second, 0).to(tl.float32)
                row_three += weight * tl.load(source + 2, inside & has_third, 0).to(tl.float32)
                row_weights += weight
            over = 1 / tl.where(row_weights > 0, row_weights, 1.0)
            one += y_weight * _stored(row_one * over, WHOLE)
            two += y_weight * _stored(row_two * over, WHOLE)
            three += y_weight * _stored(row_three * over, WHOLE)
            weights += y_weight
        over = 1 / tl.where(weights > 0, weights, 1.0)
        tl.store(out + first, _stored(one * over, WHOLE).to(out.dtype.element_ty), mask)
        tl.store(out + first + 1, _stored(two * over, WHOLE).to(out.dtype.element_ty), mask & has_second)
        tl.store(out + first + 2, _stored(three * over, WHOLE).to(out.dtype.element_ty), mask & has_third)


def crop_resize(
    images: Tensor,  # [N, H, W, C] uint8 or float32
    indices: Tensor,  # [B] int64
    parameters: Tensor,  # [B, P]
    size: Sequence[int],  # height and width
    bicubic: bool,
) -> Tensor:
    if parameters.dtype != torch.float32:
        return reference.crop_resize(images, indices, parameters, size, bicubic)
    images = images.contiguous()
    indices = indices.contiguous()
    parameters = parameters.contiguous()
    out = torch.empty((len(indices), *size, images.shape[3]), dtype=images.dtype, device=images.device)
    pixels = size[0] * size[1]
    tile = tiling.crop_resize(pixels)
    grid = (len(indices), triton.cdiv(pixels, tile["BLOCK"]))
    launch.launch(
        _crop_resize_kernel,
        grid,
        images,
        indices,
        parameters,
        out,
        *images.shape[:3],
        *size,
        CHANNELS=images.shape[3],
        WHOLE=images.dtype == torch.uint8,
        BICUBIC=bicubic,
        **tile,
        device_of=images,
    )
    return out
