"""`(augmented image / 255 - mean) / std`, see `reference.augment`: one launch for any number of images, no atomics.

A program (or a few) for each image takes the mean for contrast over the steps before it, then all colour steps on rows
in registers: of red, green and blue at once, of other channels one after the other. An image without blur is finished
there. Of others the rows are set aside, as float32 or, for half-precision results, in 16 bits (1/128 of a level), and
as soon as a band of rows has its neighbours it is blurred, down and then across (`blurred`).

Where levels needn't be whole, 1 stands for 255 until the end (colours.py).
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launch
from . import columns, reference
from .blur import blurred, radius_of, set_aside
from .colours import PACKED_ORDERS, before_contrast, gray, jitter, jitter_channel, scaled, steps, whole
from .rows import finished, read, read_colours, store_channel, store_colours

COLUMNS = tl.constexpr(columns.COLUMNS)
FLIP = tl.constexpr(columns.FLIP)
CONTRAST = tl.constexpr(columns.CONTRAST)
GRAYSCALE = tl.constexpr(columns.GRAYSCALE)
SIGMA = tl.constexpr(columns.SIGMA)
SOLARIZE = tl.constexpr(columns.SOLARIZE)

PROGRAMS = 512  # at the least, where there are rows enough: a few images are divided by rows
WIDEST = 2048


@triton.jit
def _of(VALUES: tl.constexpr, channel, CHANNELS: tl.constexpr):
    """VALUES[channel]."""
    value = VALUES[0]
    for i in tl.static_range(1, CHANNELS):
        value = tl.where(channel == i, VALUES[i], value)
    return value


@triton.jit(do_not_specialize=["bands"])
def _augment_kernel(
    images,  # [B, H, W, C] uint8 or float32
    parameters,  # [B, P] float32
    out,  # [B, C, H, W], channels last or not
    aside,  # [B, C, H, pitch] float32, or int16 in 1/128 of a level
    scratch,  # [programs, 2, BLOCK, BAND] float32
    H,
    W,
    pitch,
    bands,  # of BAND rows, for each of the programs of an image
    threshold,
    SCALE: tl.constexpr,  # a number for each channel
    SHIFT: tl.constexpr,
    ORDERS: tl.constexpr,
    CHANNELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    EXACT: tl.constexpr,
    QUADS: tl.constexpr,  # of red, green and blue; rows are whole quads of pixels
    ROWS: tl.constexpr,  # of a tile of colours
    BAND: tl.constexpr,  # rows of a tile of the blur, whole tiles of colours
    BLOCK: tl.constexpr,  # >= W
):
    image = tl.program_id(0).to(tl.int64)
    row = parameters + image * COLUMNS
    column = tl.arange(0, BLOCK)[None, :]
    i_row = tl.arange(0, ROWS)[:, None]
    plane = H * W
    images += image * plane * CHANNELS
    out += image * plane * CHANNELS
    aside += image * (H * pitch) * CHANNELS
    scratch += (image * tl.num_programs(1) + tl.program_id(1)) * (2 * BLOCK * BAND)
    flipped = tl.load(row + FLIP) > 0.5
    source = tl.where(flipped, W - 1 - column, column)
    kinds, factors = steps(row, ORDERS, CHANNELS)
    grayscale = tl.load(row + GRAYSCALE)
    sigma = tl.load(row + SIGMA)
    solarized = tl.where(tl.load(row + SOLARIZE) > 0.5, scaled(threshold, EXACT), float("inf"))  # from where on

    mean = 0.0
    if tl.load(row + CONTRAST) != 1:
        ahead = before_contrast(kinds)
        sums = tl.zeros([ROWS, BLOCK], tl.float32)
        for y in range(0, H, ROWS):
            mask = (y + i_row < H) & (column < W)
            pixel = images + ((y + i_row) * W + source) * CHANNELS
            if CHANNELS == 3:
                red, green, blue = read_colours(images, y, H, W, flipped, QUADS, EXACT, ROWS, BLOCK)
                red, green, blue = jitter(red, green, blue, ahead, factors, 0.0, EXACT)
                sums += tl.where(mask, gray(red, green, blue, EXACT), 0.0)
            else:
                for channel in range(0, CHANNELS):
                    x = jitter_channel(read(pixel + channel, mask, EXACT), ahead, factors, 0.0, EXACT)
                    sums += tl.where(mask, x, 0.0)
        mean = tl.sum(tl.sum(sums, 1), 0) / (plane if CHANNELS == 3 else plane * CHANNELS)

    radius = tl.maximum(radius_of(sigma, W), radius_of(sigma, H))
    behind = (radius_of(sigma, H) + BAND - 1) // BAND  # bands whose colours a band's blur needs on either side
    # A blur of a short reach needs few rows at a time: a row takes the memory of one that is done, which stays in the
    # cache. Programs that share an image would take each other's; all rows have a place there.
    ring = tl.where((behind <= 3) & (tl.num_programs(1) == 1), 8 * BAND - 1, 0x7FFFFFFF)
    begin = tl.program_id(1) * bands
    end = tl.minimum(begin + bands, (H + BAND - 1) // BAND)
    for band in range(tl.maximum(begin - behind, 0), end + behind):
        for first in range(band * BAND, tl.minimum(band * BAND + BAND, H), ROWS):
            y = first + i_row
            mask = (y < H) & (column < W)
            at = (y & ring) * pitch + column
            if CHANNELS == 3:
                red, green, blue = read_colours(images, first, H, W, flipped, QUADS, EXACT, ROWS, BLOCK)
                red, green, blue = jitter(red, green, blue, kinds, factors, mean, EXACT)
                if grayscale > 0.5:
                    red = whole(gray(red, green, blue, EXACT), EXACT)
                    green = red
                    blue = red
                if radius > 0:
                    set_aside(red, aside, at, mask)
                    set_aside(green, aside + H * pitch, at, mask)
                    set_aside(blue, aside + 2 * H * pitch, at, mask)
                else:
                    r = finished(red, solarized, SCALE[0], SHIFT[0], out, EXACT)
                    g = finished(green, solarized, SCALE[1], SHIFT[1], out, EXACT)
                    b = finished(blue, solarized, SCALE[2], SHIFT[2], out, EXACT)
                    store_colours(r, g, b, out, y, H, W, CHANNELS_LAST, QUADS, ROWS, BLOCK)
            else:
                for channel in range(0, CHANNELS):
                    x = read(images + ((y * W + source) * CHANNELS + channel), mask, EXACT)
                    x = jitter_channel(x, kinds, factors, mean, EXACT)
                    if radius > 0:
                        set_aside(x, aside + channel * (H * pitch), at, mask)
                    else:
                        scale = _of(SCALE, channel, CHANNELS)
                        level = finished(x, solarized, scale, _of(SHIFT, channel, CHANNELS), out, EXACT)
                        store_channel(level, out, y, channel, H, W, CHANNELS, CHANNELS_LAST, BLOCK)
        if (radius > 0) & (band - behind >= begin):
            tl.debug_barrier()  # the rows come back to other threads
            first = (band - behind) * BAND
            y = first + tl.arange(0, BAND)[:, None]
            if QUADS and CHANNELS_LAST:
                here = scratch + band % 2 * (BLOCK * BAND)
                there = scratch + (band + 1) % 2 * (BLOCK * BAND)
                r = blurred(aside, here, first, sigma, H, W, pitch, ring, EXACT, BAND, BLOCK)
                r = finished(r, solarized, SCALE[0], SHIFT[0], out, EXACT)
                g = blurred(aside + H * pitch, there, first, sigma, H, W, pitch, ring, EXACT, BAND, BLOCK)
                g = finished(g, solarized, SCALE[1], SHIFT[1], out, EXACT)
                b = blurred(aside + 2 * H * pitch, here, first, sigma, H, W, pitch, ring, EXACT, BAND, BLOCK)
                b = finished(b, solarized, SCALE[2], SHIFT[2], out, EXACT)
                store_colours(r, g, b, out, y, H, W, CHANNELS_LAST, QUADS, BAND, BLOCK)
            else:
                for channel in range(0, CHANNELS):
                    half = (band * CHANNELS + channel) % 2 * (BLOCK * BAND)  # the other one may still be read
                    x = blurred(
                        aside + channel * (H * pitch),
                        scratch + half,
                        first,
                        sigma,
                        H,
                        W,
                        pitch,
                        ring,
                        EXACT,
                        BAND,
                        BLOCK,
                    )
                    scale = _of(SCALE, channel, CHANNELS)
                    level = finished(x, solarized, scale, _of(SHIFT, channel, CHANNELS), out, EXACT)
                    store_channel(level, out, y, channel, H, W, CHANNELS, CHANNELS_LAST, BLOCK)


def _tile(width: int) -> dict:
    """Whole rows: four pixels' colours a thread (of more than 1024 columns eight), eight numbers of a blur's channel.

    Sixteen of a blur take 122 to 250 registers and a tenth less instructions. Without a bound of 128 the compiler aims
    at 72 or 96 in some versions of this kernel, and spills up to 16 numbers.
    """
    block = max(16, triton.next_power_of_2(width))
    tile = {"ROWS": max(1, 512 // block), "BAND": max(1, 1024 // block), "BLOCK": block}
    return tile | {"num_warps": max(4, block // 128), "maxnreg": 128}


def augment(
    images: Tensor,  # [B, H, W, C] uint8 or float32
    parameters: Tensor,  # [B, P]
    mean: list[float],
    std: list[float],
    dtype: torch.dtype,
    channels_last: bool,
    exact: bool,
    threshold: float,
) -> Tensor:
    batch, height, width, channels = images.shape
    tile = _tile(width)
    if parameters.dtype != torch.float32 or width > WIDEST:
        return reference.augment(images, parameters, mean, std, dtype, channels_last, exact, threshold)
    images = images.contiguous()
    parameters = parameters.contiguous()
    shape = (batch, channels, height, width)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    out = torch.empty(shape, dtype=dtype, device=images.device, memory_format=layout)
    fine = exact or dtype == torch.float32  # what is set aside stays float32
    pitch = triton.cdiv(width, 16) * 16  # rows of whole 16-byte words
    aside = torch.empty(
        batch * channels * height * pitch + tile["BLOCK"],  # the last row is read as far as a block goes
        dtype=torch.float32 if fine else torch.int16,
        device=images.device,
    )
    bands = triton.cdiv(height, tile["BAND"])
    parts = min(bands, max(1, PROGRAMS // batch))
    bands = triton.cdiv(bands, parts)
    scratch = torch.empty(batch * parts, 2, tile["BLOCK"], tile["BAND"], dtype=torch.float32, device=images.device)
    # Words of a view into other bytes, which may begin anywhere, can't be read.
    quads = channels == reference.COLOURS and width % 4 == 0 and images.data_ptr() % 4 == 0
    launch.launch(
        _augment_kernel,
        (batch, parts),
        images,
        parameters,
        out,
        aside,
        scratch,
        height,
        width,
        pitch,
        bands,
        threshold if threshold > 0 else -math.inf,  # a black set aside in 16 bits may be below 0
        SCALE=tuple(1 / (255 * s if exact else s) for s in std),
        SHIFT=tuple(-m / s for m, s in zip(mean, std, strict=True)),
        ORDERS=PACKED_ORDERS,
        CHANNELS=channels,
        CHANNELS_LAST=channels_last,
        EXACT=exact,
        QUADS=quads,
        **tile,
        device_of=images,
    )
    return out
