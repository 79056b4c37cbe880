"""Rows of images as `augment.py` reads and stores them."""

import triton
import triton.language as tl

from .colours import scaled


@triton.jit
def read(pixel, mask, EXACT: tl.constexpr):
    """Of floats what is beyond 0 and 255 is cut off, and NaN is 0."""
    x = tl.load(pixel, mask, 0).to(tl.float32)
    if pixel.dtype.element_ty == tl.float32:
        x = tl.minimum(tl.maximum(x, 0.0), 255.0)
    return scaled(x, EXACT)


@triton.jit
def _byte(word, i: tl.constexpr, EXACT: tl.constexpr):
    return scaled(((word >> (8 * i)) & 255).to(tl.float32), EXACT)


@triton.jit
def _together(x0, x1, x2, x3):
    """[..., 2, 2], the first of four, the second, ...; they stay in their thread."""
    return tl.join(tl.join(x0, x2), tl.join(x1, x3))


@triton.jit
def _in_turn(x0, x1, x2, x3, flipped, SHAPE: tl.constexpr):
    """[ROWS * BLOCK / 4] four times -> [ROWS, BLOCK], or the other way round."""
    return tl.reshape(_together(x3, x2, x1, x0) if flipped else _together(x0, x1, x2, x3), SHAPE)


@triton.jit
def _apart(x, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """[ROWS, BLOCK] -> [ROWS, BLOCK / 4] four times: the first pixels of quads, the second, ..."""
    x02, x13 = tl.split(tl.reshape(x, [ROWS, BLOCK // 4, 2, 2]))
    x0, x2 = tl.split(x02)
    x1, x3 = tl.split(x13)
    return x0, x1, x2, x3


@triton.jit
def read_colours(
    images, y, H, W, flipped, QUADS: tl.constexpr, EXACT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """[ROWS, BLOCK] three times. Where rows are quads of pixels, a thread reads a quad's bytes as three words."""
    if QUADS and images.dtype.element_ty == tl.uint8:
        # In one dimension, from which threads go on to rows of four pixels each as they are stored.
        i = tl.arange(0, ROWS * BLOCK // 4)
        group = i % (BLOCK // 4)
        groups = W // 4
        y += i // (BLOCK // 4)
        source = tl.where(flipped, groups - 1 - group, group)
        mask = (y < H) & (group < groups)
        word = images.to(tl.pointer_type(tl.int32), bitcast=True) + (y * groups + source) * 3
        a = tl.load(word, mask, 0)
        b = tl.load(word + 1, mask, 0)
        c = tl.load(word + 2, mask, 0)
        shape: tl.constexpr = [ROWS, BLOCK]
        red = _in_turn(_byte(a, 0, EXACT), _byte(a, 3, EXACT), _byte(b, 2, EXACT), _byte(c, 1, EXACT), flipped, shape)
        green = _in_turn(_byte(a, 1, EXACT), _byte(b, 0, EXACT), _byte(b, 3, EXACT), _byte(c, 2, EXACT), flipped, shape)
        blue = _in_turn(_byte(a, 2, EXACT), _byte(b, 1, EXACT), _byte(c, 0, EXACT), _byte(c, 3, EXACT), flipped, shape)
        return red, green, blue
    else:
        y += tl.arange(0, ROWS)[:, None]
        column = tl.arange(0, BLOCK)[None, :]
        source = tl.where(flipped, W - 1 - column, column)
        mask = (y < H) & (column < W)
        pixel = images + (y * W + source) * 3
        return read(pixel, mask, EXACT), read(pixel + 1, mask, EXACT), read(pixel + 2, mask, EXACT)


@triton.jit
def finished(x, solarized, scale, shift, out, EXACT: tl.constexpr):
    x = tl.where(x >= solarized, (255.0 if EXACT else 1.0) - x, x) * scale + shift
    return x.to(out.dtype.element_ty)


@triton.jit
def store_channel(x, out, y, channel, H, W, CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK: tl.constexpr):
    """x: [ROWS, BLOCK], the rows y, [ROWS, 1]."""
    column = tl.arange(0, BLOCK)[None, :]
    at = y * W + column
    at = at * CHANNELS + channel if CHANNELS_LAST else at + channel * (H * W)
    tl.store(out + at, x, (y < H) & (column < W))


@triton.jit
def store_colours(
    red,  # [ROWS, BLOCK], finished
    green,
    blue,
    out,
    y,  # [ROWS, 1]
    H,
    W,
    CHANNELS_LAST: tl.constexpr,
    QUADS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of channels last a thread stores a quad's twelve numbers as three words, which are whole cache lines of a warp;
    number by number a line would be written three times."""
    if QUADS and CHANNELS_LAST:
        r0, r1, r2, r3 = _apart(red, ROWS, BLOCK)
        g0, g1, g2, g3 = _apart(green, ROWS, BLOCK)
        b0, b1, b2, b3 = _apart(blue, ROWS, BLOCK)
        column = tl.arange(0, BLOCK)[None, :]
        mask = (y < H) & (column < W)
        at = out + (y * (3 * W) + column // 4 * 12 + column % 4)
        tl.store(at, tl.reshape(_together(r0, g0, b0, r1), [ROWS, BLOCK]), mask)
        tl.store(at + 4, tl.reshape(_together(g1, b1, r2, g2), [ROWS, BLOCK]), mask)
        tl.store(at + 8, tl.reshape(_together(b2, r3, g3, b3), [ROWS, BLOCK]), mask)
    else:
        store_channel(red, out, y, 0, H, W, 3, CHANNELS_LAST, BLOCK)
        store_channel(green, out, y, 1, H, W, 3, CHANNELS_LAST, BLOCK)
        store_channel(blue, out, y, 2, H, W, 3, CHANNELS_LAST, BLOCK)
