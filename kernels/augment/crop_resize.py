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
def _level(x):
    return tl.minimum(tl.maximum(tl.floor(x + 0.5), 0.0), 255.0)


@triton.jit
def _crop_resize_kernel(
    images,  # [N, H, W, 3] uint8
    indices,  # [B] int64
    parameters,  # [B, P] float32
    out,  # [B, out_height, out_width, 3] uint8
    N,
    H,
    W,
    out_height,
    out_width,
    BICUBIC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    view = tl.program_id(0).to(tl.int64)
    row = parameters + view * COLUMNS
    top, height = _window(tl.load(row + TOP), tl.load(row + HEIGHT), H)
    left, width = _window(tl.load(row + LEFT), tl.load(row + WIDTH), W)
    index = tl.load(indices + view)
    index = tl.minimum(tl.maximum(index, 0), N - 1)  # never a foreign address
    images += (index * H + top) * W * 3 + left * 3

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

    red = tl.zeros([BLOCK], tl.float32)
    green = tl.zeros([BLOCK], tl.float32)
    blue = tl.zeros([BLOCK], tl.float32)
    weights = tl.zeros([BLOCK], tl.float32)
    for i in range(0, y_taps):
        y = y_first + i
        y_inside = mask & (y >= 0) & (y < height)
        y_weight = tl.where(y_inside, _weight((y.to(tl.float32) + 0.5 - y_centre) / y_wide, BICUBIC), 0.0)
        row_red = tl.zeros([BLOCK], tl.float32)
        row_green = tl.zeros([BLOCK], tl.float32)
        row_blue = tl.zeros([BLOCK], tl.float32)
        row_weights = tl.zeros([BLOCK], tl.float32)
        for j in range(0, x_taps):
            x = x_first + j
            inside = y_inside & (x >= 0) & (x < width)
            weight = tl.where(inside, _weight((x.to(tl.float32) + 0.5 - x_centre) / x_wide, BICUBIC), 0.0)
            source = images + (y * W + x) * 3
            row_red += weight * tl.load(source, inside, 0).to(tl.float32)
            row_green += weight * tl.load(source + 1, inside, 0).to(tl.float32)
            row_blue += weight * tl.load(source + 2, inside, 0).to(tl.float32)
            row_weights += weight
        over = 1 / tl.where(row_weights > 0, row_weights, 1.0)
        red += y_weight * _level(row_red * over)
        green += y_weight * _level(row_green * over)
        blue += y_weight * _level(row_blue * over)
        weights += y_weight
    over = 1 / tl.where(weights > 0, weights, 1.0)
    out += view * out_height * out_width * 3 + pixel * 3
    tl.store(out, _level(red * over).to(tl.uint8), mask)
    tl.store(out + 1, _level(green * over).to(tl.uint8), mask)
    tl.store(out + 2, _level(blue * over).to(tl.uint8), mask)


def crop_resize(
    images: Tensor,  # [N, H, W, 3] uint8
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
    out = torch.empty((len(indices), *size, 3), dtype=torch.uint8, device=images.device)
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
        BICUBIC=bicubic,
        **tile,
        device_of=images,
    )
    return out
