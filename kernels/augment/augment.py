"""`(augmented image / 255 - mean) / std`, see `reference.augment`: two launches for any number of images, no atomics.

The first has one program (or a few) for each image: the mean for contrast over the steps before it, then all colour
steps on rows in registers: of red, green and blue at once (`_augment_kernel`), of other channels one after the other
(`_augment_channels_kernel`). Images without blur are finished there; of others the rows are blurred across and set
aside, as float32 or, for half-precision results, in 16 bits (1/128 of a level), and the second launch blurs them down.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launch, tiling
from . import columns, reference

COLUMNS = tl.constexpr(columns.COLUMNS)
FLIP = tl.constexpr(columns.FLIP)
BRIGHTNESS = tl.constexpr(columns.BRIGHTNESS)
CONTRAST = tl.constexpr(columns.CONTRAST)
ORDER = tl.constexpr(columns.ORDER)
GRAYSCALE = tl.constexpr(columns.GRAYSCALE)
SIGMA = tl.constexpr(columns.SIGMA)
SOLARIZE = tl.constexpr(columns.SOLARIZE)
RED_GRAY, GREEN_GRAY, BLUE_GRAY = (tl.constexpr(weight) for weight in columns.GRAY)

# The 24 orders in four numbers: number i holds, 2 bits for each order, which step comes at place i.
PACKED_ORDERS = tuple(sum(order[i] << 2 * k for k, order in enumerate(columns.ORDERS)) for i in range(4))


@triton.jit
def _whole(x, EXACT: tl.constexpr):
    x = tl.minimum(tl.maximum(x, 0.0), 255.0)
    return tl.floor(x) if EXACT else x


@triton.jit
def _read(pixel, mask):
    """Levels: of floats what is beyond 0 and 255 is cut off, and NaN is 0."""
    x = tl.load(pixel, mask, 0).to(tl.float32)
    return tl.minimum(tl.maximum(x, 0.0), 255.0) if pixel.dtype.element_ty == tl.float32 else x


@triton.jit
def _of(VALUES: tl.constexpr, channel, CHANNELS: tl.constexpr):
    """VALUES[channel]."""
    value = VALUES[0]
    for i in tl.static_range(1, CHANNELS):
        value = tl.where(channel == i, VALUES[i], value)
    return value


@triton.jit
def _gray(red, green, blue, EXACT: tl.constexpr):
    y = RED_GRAY * red + GREEN_GRAY * green + BLUE_GRAY * blue
    return tl.floor(y) if EXACT else y


@triton.jit
def _channel(top, chroma, distance, EXACT: tl.constexpr):
    x = top - chroma * (1 - tl.minimum(tl.maximum(distance, 0.0), 1.0))
    return _whole(x * (255.999 / 255) if EXACT else x, EXACT)


@triton.jit
def _turn_hue(red, green, blue, turns, EXACT: tl.constexpr):
    top = tl.maximum(tl.maximum(red, green), blue)
    chroma = top - tl.minimum(tl.minimum(red, green), blue)
    over = 1 / tl.where(chroma > 0, chroma, 1.0)
    h = tl.where(top == green, (blue - red) * over + 2, (red - green) * over + 4)
    h = tl.where(top == red, (green - blue) * over, h) + 6 * turns
    h -= 6 * tl.floor(h / 6)
    red = _channel(top, chroma, tl.abs(h - 3) - 1, EXACT)
    green = _channel(top, chroma, 2 - tl.abs(h - 2), EXACT)
    blue = _channel(top, chroma, 2 - tl.abs(h - 4), EXACT)
    return red, green, blue


@triton.jit
def _jitter(red, green, blue, row, mean, ORDERS: tl.constexpr, BEFORE_CONTRAST: tl.constexpr, EXACT: tl.constexpr):
    """The four steps in the row's order, or those that come before contrast. A step's kind is its index in JITTER."""
    shift = 2 * tl.minimum(tl.maximum(tl.load(row + ORDER), 0.0), 23.0).to(tl.int64)
    ahead = shift >= 0
    for i in tl.static_range(4):
        kind = ((ORDERS[i] >> shift) & 3).to(tl.int32)
        factor = tl.load(row + BRIGHTNESS + kind)
        if BEFORE_CONTRAST:
            ahead = ahead & (kind != 1)
        if ahead & (factor != tl.where(kind == 3, 0.0, 1.0)):
            if kind == 3:
                red, green, blue = _turn_hue(red, green, blue, factor, EXACT)
            else:
                other = tl.zeros_like(red) + tl.where(kind == 1, mean, 0.0)
                if kind == 2:
                    other = _gray(red, green, blue, EXACT)
                other *= 1 - factor
                red = _whole(red * factor + other, EXACT)
                green = _whole(green * factor + other, EXACT)
                blue = _whole(blue * factor + other, EXACT)
    return red, green, blue


@triton.jit
def _jitter_channel(x, row, mean, ORDERS: tl.constexpr, BEFORE_CONTRAST: tl.constexpr, EXACT: tl.constexpr):
    """`_jitter` of a channel that is none of red, green and blue: brightness and contrast, kinds 0 and 1."""
    shift = 2 * tl.minimum(tl.maximum(tl.load(row + ORDER), 0.0), 23.0).to(tl.int64)
    ahead = shift >= 0
    for i in tl.static_range(4):
        kind = ((ORDERS[i] >> shift) & 3).to(tl.int32)
        factor = tl.load(row + BRIGHTNESS + kind)
        if BEFORE_CONTRAST:
            ahead = ahead & (kind != 1)
        if ahead & (kind < 2) & (factor != 1.0):
            x = _whole(x * factor + tl.where(kind == 1, mean, 0.0) * (1 - factor), EXACT)
    return x


@triton.jit
def _radius(sigma, size):
    most = (size - 1) // 2 * 1.0  # a size of 1 is no tensor
    return tl.where(sigma > 0, tl.minimum(tl.ceil(3 * sigma), most), 0.0).to(tl.int32)


@triton.jit
def _across(x, column, radius, sigma, W, BLOCK: tl.constexpr):
    """Rows blurred with reflected borders; columns that are no pixel hold anything."""
    total = x
    weights = 1.0
    for k in range(1, radius + 1):
        weight = tl.exp(-0.5 * (k / sigma) * (k / sigma))
        weights += 2 * weight
        left = tl.minimum(tl.abs(column - k), BLOCK - 1)
        right = tl.maximum(W - 1 - tl.abs(W - 1 - column - k), 0)
        total += weight * (
            tl.gather(x, tl.broadcast_to(left, x.shape), 1) + tl.gather(x, tl.broadcast_to(right, x.shape), 1)
        )
    return total / weights


@triton.jit
def _finish(
    x, out, at, mask, channel, solarized, scale, shift, plane, CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr
):
    x = tl.where(x >= solarized, 255 - x, x) * scale + shift
    at = at * CHANNELS + channel if CHANNELS_LAST else at + channel * plane
    tl.store(out + at, x.to(out.dtype.element_ty), mask)


@triton.jit
def _augment_kernel(
    images,  # [B, H, W, 3] uint8 or float32
    parameters,  # [B, P] float32
    out,  # [B, 3, H, W], channels last or not
    aside,  # [B, 3, H, W] float32, or int16 in 1/128 of a level
    H,
    W,
    tiles,  # of ROWS rows, for each of the programs of an image
    threshold,
    SCALE: tl.constexpr,  # (red, green, blue)
    SHIFT: tl.constexpr,
    ORDERS: tl.constexpr,
    UNIT: tl.constexpr,  # of what is set aside
    CHANNELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    EXACT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,  # >= W
):
    image = tl.program_id(0).to(tl.int64)
    row = parameters + image * COLUMNS
    column = tl.arange(0, BLOCK)[None, :]
    i_row = tl.arange(0, ROWS)[:, None]
    plane = H * W
    images += image * plane * 3
    out += image * plane * 3
    aside += image * plane * 3
    source = tl.where(tl.load(row + FLIP) > 0.5, W - 1 - column, column)
    grayscale = tl.load(row + GRAYSCALE)
    sigma = tl.load(row + SIGMA)
    solarized = tl.where(tl.load(row + SOLARIZE) > 0.5, threshold, float("inf"))  # from where on

    mean = 0.0
    if tl.load(row + CONTRAST) != 1:
        sums = tl.zeros([ROWS, BLOCK], tl.float32)
        for y in range(0, H, ROWS):
            mask = (y + i_row < H) & (column < W)
            pixel = images + ((y + i_row) * W + source) * 3
            red = _read(pixel, mask)
            green = _read(pixel + 1, mask)
            blue = _read(pixel + 2, mask)
            red, green, blue = _jitter(red, green, blue, row, 0.0, ORDERS, True, EXACT)
            sums += tl.where(mask, _gray(red, green, blue, EXACT), 0.0)
        mean = tl.sum(tl.sum(sums, 1), 0) / plane

    radius = _radius(sigma, W)
    blurred = (radius > 0) | (_radius(sigma, H) > 0)
    first = tl.program_id(1) * tiles * ROWS
    for y in range(first, tl.minimum(first + tiles * ROWS, H), ROWS):
        mask = (y + i_row < H) & (column < W)
        pixel = images + ((y + i_row) * W + source) * 3
        red = _read(pixel, mask)
        green = _read(pixel + 1, mask)
        blue = _read(pixel + 2, mask)
        red, green, blue = _jitter(red, green, blue, row, mean, ORDERS, False, EXACT)
        if grayscale > 0.5:
            red = _whole(_gray(red, green, blue, EXACT), EXACT)
            green = red
            blue = red
        at = (y + i_row) * W + column
        if blurred:
            red = _across(red, column, radius, sigma, W, BLOCK) * UNIT
            green = _across(green, column, radius, sigma, W, BLOCK) * UNIT
            blue = _across(blue, column, radius, sigma, W, BLOCK) * UNIT
            half: tl.constexpr = 0.0 if UNIT == 1 else 0.5  # a conversion cuts off
            tl.store(aside + at, (red + half).to(aside.dtype.element_ty), mask)
            tl.store(aside + at + plane, (green + half).to(aside.dtype.element_ty), mask)
            tl.store(aside + at + 2 * plane, (blue + half).to(aside.dtype.element_ty), mask)
        else:
            _finish(red, out, at, mask, 0, solarized, SCALE[0], SHIFT[0], plane, CHANNELS, CHANNELS_LAST)
            _finish(green, out, at, mask, 1, solarized, SCALE[1], SHIFT[1], plane, CHANNELS, CHANNELS_LAST)
            _finish(blue, out, at, mask, 2, solarized, SCALE[2], SHIFT[2], plane, CHANNELS, CHANNELS_LAST)


@triton.jit
def _augment_channels_kernel(
    images,  # [B, H, W, C] uint8 or float32
    parameters,  # [B, P] float32
    out,  # [B, C, H, W], channels last or not
    aside,  # [B, C, H, W] float32, or int16 in 1/128 of a level
    H,
    W,
    tiles,  # of ROWS rows, for each of the programs of an image
    threshold,
    SCALE: tl.constexpr,  # a number for each channel
    SHIFT: tl.constexpr,
    ORDERS: tl.constexpr,
    UNIT: tl.constexpr,  # of what is set aside
    CHANNELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    EXACT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,  # >= W
):
    image = tl.program_id(0).to(tl.int64)
    row = parameters + image * COLUMNS
    column = tl.arange(0, BLOCK)[None, :]
    i_row = tl.arange(0, ROWS)[:, None]
    plane = H * W
    images += image * plane * CHANNELS
    out += image * plane * CHANNELS
    aside += image * plane * CHANNELS
    source = tl.where(tl.load(row + FLIP) > 0.5, W - 1 - column, column)
    sigma = tl.load(row + SIGMA)
    solarized = tl.where(tl.load(row + SOLARIZE) > 0.5, threshold, float("inf"))  # from where on

    mean = 0.0
    if tl.load(row + CONTRAST) != 1:
        sums = tl.zeros([ROWS, BLOCK], tl.float32)
        for channel in range(0, CHANNELS):
            for y in range(0, H, ROWS):
                mask = (y + i_row < H) & (column < W)
                x = _read(images + ((y + i_row) * W + source) * CHANNELS + channel, mask)
                sums += tl.where(mask, _jitter_channel(x, row, 0.0, ORDERS, True, EXACT), 0.0)
        mean = tl.sum(tl.sum(sums, 1), 0) / (plane * CHANNELS)

    radius = _radius(sigma, W)
    blurred = (radius > 0) | (_radius(sigma, H) > 0)
    first = tl.program_id(1) * tiles * ROWS
    for channel in range(0, CHANNELS):
        scale = _of(SCALE, channel, CHANNELS)
        shift = _of(SHIFT, channel, CHANNELS)
        for y in range(first, tl.minimum(first + tiles * ROWS, H), ROWS):
            mask = (y + i_row < H) & (column < W)
            x = _read(images + ((y + i_row) * W + source) * CHANNELS + channel, mask)
            x = _jitter_channel(x, row, mean, ORDERS, False, EXACT)
            at = (y + i_row) * W + column
            if blurred:
                x = _across(x, column, radius, sigma, W, BLOCK) * UNIT
                half: tl.constexpr = 0.0 if UNIT == 1 else 0.5  # a conversion cuts off
                tl.store(aside + at + channel * plane, (x + half).to(aside.dtype.element_ty), mask)
            else:
                _finish(x, out, at, mask, channel, solarized, scale, shift, plane, CHANNELS, CHANNELS_LAST)


@triton.jit
def _blur_down_kernel(
    parameters,  # [B, P] float32
    out,  # [B, C, H, W], channels last or not
    aside,  # [B, C, H, W]
    H,
    W,
    threshold,
    SCALE: tl.constexpr,
    SHIFT: tl.constexpr,
    UNIT: tl.constexpr,
    CHANNELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    EXACT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    row = parameters + image * COLUMNS
    sigma = tl.load(row + SIGMA)
    solarized = tl.where(tl.load(row + SOLARIZE) > 0.5, threshold, float("inf"))
    radius = _radius(sigma, H)
    plane = H * W
    if (radius > 0) | (_radius(sigma, W) > 0):
        y = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
        column = tl.arange(0, BLOCK)[None, :]
        mask = (y < H) & (column < W)
        out += image * plane * CHANNELS
        aside += image * plane * CHANNELS
        for channel in range(0, CHANNELS):
            scale = _of(SCALE, channel, CHANNELS)
            shift = _of(SHIFT, channel, CHANNELS)
            x = tl.load(aside + y * W + column, mask, 0).to(tl.float32)
            weights = 1.0
            for k in range(1, radius + 1):
                weight = tl.exp(-0.5 * (k / sigma) * (k / sigma))
                weights += 2 * weight
                above = tl.abs(y - k)
                below = H - 1 - tl.abs(H - 1 - y - k)
                both = tl.load(aside + above * W + column, mask, 0).to(tl.float32)
                both += tl.load(aside + below * W + column, mask, 0).to(tl.float32)
                x += weight * both
            x = x / (weights * UNIT)
            if EXACT:
                x = (x + 12582912.0) - 12582912.0  # to the nearest, ties to even
            at = y * W + column
            _finish(x, out, at, mask, channel, solarized, scale, shift, plane, CHANNELS, CHANNELS_LAST)
            aside += plane


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
    tile = tiling.augment(width)
    if parameters.dtype != torch.float32 or tile is None:
        return reference.augment(images, parameters, mean, std, dtype, channels_last, exact, threshold)
    images = images.contiguous()
    parameters = parameters.contiguous()
    shape = (batch, channels, height, width)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    out = torch.empty(shape, dtype=dtype, device=images.device, memory_format=layout)
    fine = exact or dtype == torch.float32  # what is set aside stays float32
    aside = torch.empty(shape, dtype=torch.float32 if fine else torch.int16, device=images.device)
    blocks = triton.cdiv(height, tile["ROWS"])
    parts = min(blocks, max(1, tiling.AUGMENT_PROGRAMS // batch))
    common = {
        "SCALE": tuple(1 / (255 * s) for s in std),
        "SHIFT": tuple(-m / s for m, s in zip(mean, std, strict=True)),
        "UNIT": 1 if fine else 128,
        "CHANNELS": channels,
        "CHANNELS_LAST": channels_last,
        "EXACT": exact,
        **tile,
        "device_of": images,
    }
    tiles = triton.cdiv(blocks, parts)
    launch.launch(
        _augment_kernel if channels == reference.COLOURS else _augment_channels_kernel,
        (batch, parts),
        images,
        parameters,
        out,
        aside,
        height,
        width,
        tiles,
        threshold,
        ORDERS=PACKED_ORDERS,
        **common,
    )
    launch.launch(_blur_down_kernel, (batch, blocks), parameters, out, aside, height, width, threshold, **common)
    return out
