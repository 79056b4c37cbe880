"""The Gaussian blur of `augment.py`: rows that are set aside, and a band of them blurred down and across."""

import triton
import triton.language as tl


@triton.jit
def radius_of(sigma, size):
    most = (size - 1) // 2 * 1.0  # a size of 1 is no tensor
    return tl.where(sigma > 0, tl.minimum(tl.ceil(3 * sigma), most), 0.0).to(tl.int32)


@triton.jit
def set_aside(x, aside, at, mask):
    """As a float; or as its first 15 bits, which are those of the mantissa of a float from 1 to 2."""
    if aside.dtype.element_ty == tl.int16:
        x = x * (32767 / 32768) + (1 + 1 / 65536)  # to the nearest: what follows cuts off
        x = (x.to(tl.int32, bitcast=True) >> 8).to(tl.int16)
    tl.store(aside + at, x, mask)


@triton.jit
def _from_aside(aside, at, exponent, BLOCK: tl.constexpr):
    """[BAND, 1] -> [BAND, BLOCK]; in 16 bits two pixels are a word, and [BAND, BLOCK / 2] twice, to which 1 is added.

    Columns that are no pixel hold anything.
    """
    if aside.dtype.element_ty == tl.int16:
        word = tl.load(
            aside.to(tl.pointer_type(tl.int32), bitcast=True) + (at // 2 + tl.arange(0, BLOCK // 2)[None, :])
        )
        even = ((word << 8) & 0x00FFFF00) | exponent
        odd = ((word >> 8) & 0x00FFFF00) | exponent
        return even.to(tl.float32, bitcast=True), odd.to(tl.float32, bitcast=True)
    else:
        x = tl.load(aside + (at + tl.arange(0, BLOCK)[None, :]))
        return x, x


@triton.jit
def blurred(
    aside,  # [H, pitch], a channel
    scratch,  # [BLOCK, BAND] float32
    first,  # row
    sigma,
    H,
    W,
    pitch,
    ring,
    EXACT: tl.constexpr,
    BAND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """[BAND, BLOCK]: rows `first` and on, blurred with reflected borders; columns and rows of no pixel hold anything.

    Down by whole words of the rows above and below; then across through memory of the program's own, in which a
    column's rows lie together, so that a column to the left or right is a word of each thread, too.
    """
    PAIRS: tl.constexpr = aside.dtype.element_ty == tl.int16
    rate = -0.7213475204444817 / (sigma * sigma)  # exp(-k^2 / (2 sigma^2)) by powers of 2
    exponent = tl.where(W > 0, 0x3F000000, 0)  # no constant: one instruction has room for one, and the mask is that
    y = tl.minimum(first + tl.arange(0, BAND)[:, None], H - 1)
    even, odd = _from_aside(aside, (y & ring) * pitch, exponent, BLOCK)
    weights = 1.0
    for k in range(1, radius_of(sigma, H) + 1):
        weight = tl.exp2(k * 1.0 * k * rate)
        weights += 2 * weight
        even_above, odd_above = _from_aside(aside, (tl.abs(y - k) & ring) * pitch, exponent, BLOCK)
        even_below, odd_below = _from_aside(aside, ((H - 1 - tl.abs(H - 1 - y - k)) & ring) * pitch, exponent, BLOCK)
        even += weight * (even_above + even_below)
        if PAIRS:
            odd += weight * (odd_above + odd_below)
    over = 1 / weights
    x = (tl.reshape(tl.join(even, odd), [BAND, BLOCK]) * over - 1) * (32768 / 32767) if PAIRS else even * over
    tl.store(scratch + tl.arange(0, BLOCK)[None, :] * BAND + tl.arange(0, BAND)[:, None], x)
    tl.debug_barrier()  # the columns come back to other threads

    column = tl.minimum(tl.arange(0, BLOCK)[:, None], W - 1)
    scratch += tl.arange(0, BAND)[None, :]
    x = tl.load(scratch + column * BAND)
    weights = 1.0
    for k in range(1, radius_of(sigma, W) + 1):
        weight = tl.exp2(k * 1.0 * k * rate)
        weights += 2 * weight
        left = tl.abs(column - k)
        right = W - 1 - tl.abs(W - 1 - column - k)
        x += weight * (tl.load(scratch + left * BAND) + tl.load(scratch + right * BAND))
    x = x * (1 / weights)
    if EXACT:
        x = (x + 12582912.0) - 12582912.0  # to the nearest, ties to even
    return tl.trans(x)
