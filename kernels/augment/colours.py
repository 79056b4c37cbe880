"""The colour steps of `augment.py`, on tensors of red, green and blue, or of one channel.

Where levels needn't be whole, 1 stands for 255: a number that is cut off below 0 and above 1 costs no instruction.
"""

import triton
import triton.language as tl

from . import columns

BRIGHTNESS = tl.constexpr(columns.BRIGHTNESS)
ORDER = tl.constexpr(columns.ORDER)
RED_GRAY, GREEN_GRAY, BLUE_GRAY = (tl.constexpr(weight) for weight in columns.GRAY)

# The 24 orders in four numbers: number i holds, 2 bits for each order, which step comes at place i.
PACKED_ORDERS = tuple(sum(order[i] << 2 * k for k, order in enumerate(columns.ORDERS)) for i in range(4))


@triton.jit
def _unit(x):
    """Cut off below 0 and above 1, and NaN is 0: nothing but a bit of the instruction that made x."""
    return tl.minimum(tl.maximum(x, 0.0), 1.0)


@triton.jit
def whole(x, EXACT: tl.constexpr):
    if EXACT:
        return tl.floor(tl.minimum(tl.maximum(x, 0.0), 255.0))
    else:
        return _unit(x)


@triton.jit
def scaled(x, EXACT: tl.constexpr):
    """What stands for a level from 0 to 255 here: itself where levels are whole, else a 255th of it."""
    return x if EXACT else x * (1 / 255)


@triton.jit
def gray(red, green, blue, EXACT: tl.constexpr):
    y = RED_GRAY * red + GREEN_GRAY * green + BLUE_GRAY * blue
    return tl.floor(y) if EXACT else y


@triton.jit
def _channel(top, chroma, distance, EXACT: tl.constexpr):
    x = top - chroma * (1 - _unit(distance))
    return whole(x * (255.999 / 255) if EXACT else x, EXACT)


@triton.jit
def _turn_hue(red, green, blue, turns, EXACT: tl.constexpr):
    top = tl.maximum(tl.maximum(red, green), blue)
    chroma = top - tl.minimum(tl.minimum(red, green), blue)
    over = 1 / tl.where(chroma > 0, chroma, 1.0)
    h = tl.where(top == green, (blue - red) * over + 2, (red - green) * over + 4)
    h = tl.where(top == red, (green - blue) * over, h) + 6 * turns
    h -= 6 * tl.floor(h * (1 / 6))
    red = _channel(top, chroma, tl.abs(h - 3) - 1, EXACT)
    green = _channel(top, chroma, 2 - tl.abs(h - 2), EXACT)
    blue = _channel(top, chroma, 2 - tl.abs(h - 4), EXACT)
    return red, green, blue


@triton.jit
def _step(row, orders, CHANNELS: tl.constexpr):
    """What comes at one place of the row's order: the step's kind, its index in JITTER, and its factor.

    A kind of 4 is no step: one that does nothing, or that needs colours where there are none.
    """
    shift = 2 * tl.minimum(tl.maximum(tl.load(row + ORDER), 0.0), 23.0).to(tl.int64)
    kind = ((orders >> shift) & 3).to(tl.int32)
    factor = tl.load(row + BRIGHTNESS + kind)
    does = factor != tl.where(kind == 3, 0.0, 1.0)
    if CHANNELS != 3:
        does = does & (kind < 2)
    return tl.where(does, kind, 4), factor


@triton.jit
def steps(row, ORDERS: tl.constexpr, CHANNELS: tl.constexpr):
    """The kinds and factors of the four steps, read once: a load in the loops over pixels would wait in each tile."""
    kind_0, factor_0 = _step(row, ORDERS[0], CHANNELS)
    kind_1, factor_1 = _step(row, ORDERS[1], CHANNELS)
    kind_2, factor_2 = _step(row, ORDERS[2], CHANNELS)
    kind_3, factor_3 = _step(row, ORDERS[3], CHANNELS)
    return (kind_0, kind_1, kind_2, kind_3), (factor_0, factor_1, factor_2, factor_3)


@triton.jit
def before_contrast(kinds):
    """The kinds of the steps that the mean for contrast is taken behind."""
    kind_0 = tl.where(kinds[0] == 1, 4, kinds[0])
    ahead = kinds[0] != 1
    kind_1 = tl.where(ahead & (kinds[1] != 1), kinds[1], 4)
    ahead = ahead & (kinds[1] != 1)
    kind_2 = tl.where(ahead & (kinds[2] != 1), kinds[2], 4)
    ahead = ahead & (kinds[2] != 1)
    kind_3 = tl.where(ahead & (kinds[3] != 1), kinds[3], 4)
    return (kind_0, kind_1, kind_2, kind_3)


@triton.jit
def jitter(red, green, blue, kinds, factors, mean, EXACT: tl.constexpr):
    for i in tl.static_range(4):
        kind = kinds[i]
        factor = factors[i]
        if kind == 3:
            red, green, blue = _turn_hue(red, green, blue, factor, EXACT)
        elif kind == 2:
            other = gray(red, green, blue, EXACT) * (1 - factor)
            red = whole(red * factor + other, EXACT)
            green = whole(green * factor + other, EXACT)
            blue = whole(blue * factor + other, EXACT)
        elif kind < 2:
            level = tl.where(kind == 1, mean, 0.0) * (1 - factor)
            red = whole(red * factor + level, EXACT)
            green = whole(green * factor + level, EXACT)
            blue = whole(blue * factor + level, EXACT)
    return red, green, blue


@triton.jit
def jitter_channel(x, kinds, factors, mean, EXACT: tl.constexpr):
    """`jitter` of a channel that is none of red, green and blue: brightness and contrast, kinds 0 and 1."""
    for i in tl.static_range(4):
        if kinds[i] < 2:
            x = whole(x * factors[i] + tl.where(kinds[i] == 1, mean, 0.0) * (1 - factors[i]), EXACT)
    return x
