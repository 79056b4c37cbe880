"""Masks of patches on a GPU: one launch for the numbers of a batch, one for what rectangles of them hide.

A program has an image. Its patches are bits, a row of the grid a word of 32 or several, so that a warp holds a grid of
32 x 32 with one word a thread. Numbers are computed with in float64, as the specification does: a side that is rounded
another way is another mask.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launch
from . import reference
from .keyed_uniform import keyed_uniform

__all__ = ["block_masks", "even_block_scores", "inverse_rectangle_masks", "keyed_uniform", "multi_block_masks"]

MOST_WORDS = 8192  # of a grid that a program keeps in registers: 512 rows of 512 patches, say
PATCHES = 256  # of a program
PATCHES_OF_MANY = 64  # where each of them is compared with all rectangles


@triton.jit
def _rounded(x):
    """To the nearest integer, of two the even one, as torch.round does; of float64 from 0 to 2 ** 51."""
    return (x + 6755399441055744.0) - 6755399441055744.0


@triton.jit
def _ones(count):
    """int32 -> uint32: its `count` lowest bits are set; none below 0, all from 32 on."""
    count = tl.minimum(tl.maximum(count, 0), 32)
    return ((tl.full((), 1, tl.int64) << count.to(tl.int64)) - 1).to(tl.uint32)


@triton.jit
def _without(words, others):
    """Bits of the first that aren't in the second."""
    return words ^ (words & others)


@triton.jit
def _rectangle(row, column, top, left, tall, broad):
    """The words of a rectangle's patches: of the row of each word, from the column of its first bit on."""
    bits = _without(_ones(left + broad - column), _ones(left - column))
    return tl.where((row >= top) & (row < top + tall), bits, tl.full((), 0, tl.uint32))


@triton.jit
def _ones_in(words):
    """How many bits of uint32 words are set, all together."""
    x = words - ((words >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    x = x + (x >> 8)
    x = (x + (x >> 16)) & 0x3F
    return tl.sum(x.to(tl.int32), 0)


@triton.jit
def _store_words(out, words, as_one, row, column, height, width):
    """Bits as bytes, 1 where a bit is `as_one`: out [height, width]."""
    start = out + row * width + column
    for i in range(tl.minimum(width, 32)):
        bit = (words >> i) & 1
        tl.store(start + i, (bit == as_one).to(tl.uint8), (row < height) & (column + i < width))


@triton.jit(do_not_specialize=["tries", "height", "width", "attempts"])
def _block_masks_kernel(
    drawn,  # [N, 2 + 4 tries] float32 or float64
    wanted,  # [N], or None
    out,  # [N, height, width] of bytes
    tries,
    height,
    width,
    attempts,
    images: tl.float64,
    low: tl.float64,
    span: tl.float64,
    least: tl.float64,
    most: tl.float64,
    log_aspect: tl.float64,
    WORDS: tl.constexpr,  # in a row
    BLOCK: tl.constexpr,  # words of all rows
):
    image = tl.program_id(0).to(tl.int64)
    numbers = drawn + image * (2 + 4 * tries)
    i = tl.arange(0, BLOCK)
    row = i // WORDS
    column = i % WORDS * 32
    if wanted is not None:
        left_over = tl.load(wanted + image).to(tl.float64)
    else:
        has_mask = tl.load(numbers).to(tl.float64) < tl.full((), images, tl.float64)
        share = tl.full((), low, tl.float64) + tl.load(numbers + 1).to(tl.float64) * tl.full((), span, tl.float64)
        left_over = tl.where(has_mask, tl.floor(share * (height * width)), 0.0)
    mask = tl.zeros([BLOCK], tl.uint32)
    high = tl.cast(height, tl.float64)
    wide = tl.cast(width, tl.float64)
    smallest = tl.full((), least, tl.float64)
    tried = 0
    failed = 0
    while (tried < tries) & (left_over > 0) & (failed < attempts):
        at = numbers + 2 + 4 * tried
        room = tl.minimum(left_over, tl.full((), most, tl.float64))
        area = smallest + tl.load(at).to(tl.float64) * (room - smallest)
        ratio = tl.exp((2 * tl.load(at + 1).to(tl.float64) - 1) * tl.full((), log_aspect, tl.float64))
        h = _rounded(tl.sqrt(tl.maximum(area * ratio, 0.0)))
        w = _rounded(tl.sqrt(tl.maximum(area / ratio, 0.0)))
        top = tl.floor(tl.load(at + 2).to(tl.float64) * (high - h + 1)).to(tl.int32)
        left = tl.floor(tl.load(at + 3).to(tl.float64) * (wide - w + 1)).to(tl.int32)
        block = _rectangle(row, column, top, left, h.to(tl.int32), w.to(tl.int32))
        new = _ones_in(_without(block, mask))
        taken = (h < high) & (w < wide) & (new > 0) & (new.to(tl.float64) <= room)
        mask = tl.where(taken, mask | block, mask)
        left_over = tl.where(taken, left_over - new.to(tl.float64), left_over)
        failed = tl.where(taken, 0, failed + 1)
        tried += 1
    _store_words(out + image * height * width, mask, 1, row, column, height, width)


@triton.jit
def _clamped(x, most):
    """A whole float64 number as int32, from 0 (NaN as well) to `most`."""
    return tl.minimum(tl.maximum(x, 0.0), most).to(tl.int32)


@triton.jit(do_not_specialize=["height", "width", "rectangles", "programs"])
def _even_block_scores_kernel(
    drawn,  # [N, 4 rectangles + height width] float32 or float64
    scores,  # [N, height width] float64
    height,
    width,
    rectangles,
    programs,  # of an image
    log_aspect: tl.float64,
    RECTANGLES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    image = (tl.program_id(0) // programs).to(tl.int64)
    patches = height * width
    patch = tl.program_id(0) % programs * BLOCK + tl.arange(0, BLOCK)
    numbers = drawn + image * (4 * rectangles + patches)
    i = tl.arange(0, RECTANGLES)
    exists = i < rectangles
    b_area = tl.load(numbers + i, exists, 0).to(tl.float64)
    b_aspect = tl.load(numbers + rectangles + i, exists, 0).to(tl.float64)
    b_top = tl.load(numbers + 2 * rectangles + i, exists, 0).to(tl.float64)
    b_left = tl.load(numbers + 3 * rectangles + i, exists, 0).to(tl.float64)
    area = patches * (0.08 + 0.32 * b_area)
    aspect = tl.exp((2 * b_aspect - 1) * tl.full((), log_aspect, tl.float64))
    tall = tl.maximum(_clamped(_rounded(tl.sqrt(area * aspect)), height), 1)
    broad = tl.maximum(_clamped(_rounded(tl.sqrt(area / aspect)), width), 1)
    top = _clamped(tl.floor(b_top * height), height - 1)
    left = _clamped(tl.floor(b_left * width), width - 1)
    below = (patch // width)[:, None] - top[None, :]
    below = tl.where(below < 0, below + height, below)
    beside = (patch % width)[:, None] - left[None, :]
    beside = tl.where(beside < 0, beside + width, beside)
    over = (below < tall[None, :]) & (beside < broad[None, :]) & exists[None, :]
    first = tl.min(tl.where(over, i[None, :], rectangles), 1)
    lot = tl.load(numbers + 4 * rectangles + patch, patch < patches, 0).to(tl.float64)
    turn = (tl.full([BLOCK], 1, tl.int64) << first.to(tl.int64)).to(tl.float64)
    tl.store(scores + image * patches + patch, -turn * (1 + lot), patch < patches)


@triton.jit(do_not_specialize=["height", "width", "seen", "programs"])
def _inverse_rectangle_masks_kernel(
    drawn,  # [N, 3] float32 or float64
    out,  # [N, height, width] of bytes
    height,
    width,
    seen,
    programs,  # of an image
    low: tl.float64,
    span: tl.float64,
    BLOCK: tl.constexpr,
):
    image = (tl.program_id(0) // programs).to(tl.int64)
    patch = tl.program_id(0) % programs * BLOCK + tl.arange(0, BLOCK)
    numbers = drawn + image * 3
    area = tl.cast(seen, tl.float64)
    exponent = tl.full((), low, tl.float64) + tl.full((), span, tl.float64) * tl.load(numbers).to(tl.float64)
    tall = tl.maximum(_clamped(tl.ceil(tl.sqrt(area * tl.exp(exponent)) - 1e-4), height), 1)
    broad = tl.maximum(_clamped(tl.ceil(area / tall - 1e-4), width), 1)
    top = _clamped(tl.floor(tl.load(numbers + 1).to(tl.float64) * height), height - 1)
    left = _clamped(tl.floor(tl.load(numbers + 2).to(tl.float64) * width), width - 1)
    below = patch // width - top
    below = tl.where(below < 0, below + height, below)
    beside = patch % width - left
    beside = tl.where(beside < 0, beside + width, beside)
    is_seen = (beside < broad) & (below * broad + beside < seen)
    tl.store(out + image * height * width + patch, (is_seen == 0).to(tl.uint8), patch < height * width)


@triton.jit
def _corner(number, size, side):
    """Top or left of a block, below size - side."""
    room = size - side
    return _clamped(tl.floor(tl.load(number).to(tl.float64) * room), room - 1)


@triton.jit(
    do_not_specialize=[
        "places", "height", "width", "target_height", "target_width", "context_height", "context_width", "targets",
        "keep",
    ]
)  # fmt: skip
def _multi_block_masks_kernel(
    drawn,  # [N, 2 (targets + (targets + 1) places)] float32 or float64
    out,  # [N, height, width] of bytes
    indices,  # [N, targets, target_height target_width] int64
    places,
    height,
    width,
    target_height,
    target_width,
    context_height,
    context_width,
    targets,
    keep,
    WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    numbers = drawn + image * (2 * (targets + (targets + 1) * places))
    i = tl.arange(0, BLOCK)
    row = i // WORDS
    column = i % WORDS * 32
    inside = target_height * target_width
    for t in range(targets):
        top = _corner(numbers + 2 * t, height, target_height)
        left = _corner(numbers + 2 * t + 1, width, target_width)
        start = indices + (image * targets + t) * inside
        for first in range(0, inside, BLOCK):
            place = first + i
            index = (top + place // target_width) * width + left + place % target_width
            tl.store(start + place, index.to(tl.int64), place < inside)
    context = tl.zeros([BLOCK], tl.uint32)
    found = 0
    tried = 0  # places of the first round, of the second one ...
    while (found == 0) & (tried < (targets + 1) * places):
        at = numbers + 2 * (targets + tried)
        top = _corner(at, height, context_height)
        left = _corner(at + 1, width, context_width)
        block = _rectangle(row, column, top, left, context_height, context_width)
        for t in range(targets - tried // places):  # the last ones are allowed in it first
            top = _corner(numbers + 2 * t, height, target_height)
            left = _corner(numbers + 2 * t + 1, width, target_width)
            block = _without(block, _rectangle(row, column, top, left, target_height, target_width))
        found = (_ones_in(block) > keep).to(tl.int32)
        context = tl.where((found == 1) | (tried % places == 0), block, context)
        tried += 1
    _store_words(out + image * height * width, context, 0, row, column, height, width)


def _words(height: int, width: int) -> dict | None:
    """A program's words of an image, or None where they are too many for its registers."""
    words = triton.next_power_of_2(triton.cdiv(width, 32))
    block = max(triton.next_power_of_2(height) * words, 32)
    return None if block > MOST_WORDS else {"WORDS": words, "BLOCK": block, "num_warps": min(max(block // 256, 1), 16)}


def block_masks(
    drawn: Tensor,
    wanted: Tensor | None,
    height: int,
    width: int,
    images: float,
    low: float,
    high: float,
    least: int,
    most: int,
    aspect: float,
    attempts: int,
) -> Tensor:
    tile = _words(height, width)
    if tile is None:
        return reference.block_masks(drawn, wanted, height, width, images, low, high, least, most, aspect, attempts)
    drawn = drawn.contiguous()
    wanted = None if wanted is None else wanted.contiguous()
    out = torch.empty(len(drawn), height, width, dtype=torch.uint8, device=drawn.device)
    if out.numel():
        launch.launch(
            _block_masks_kernel,
            (len(drawn),),
            drawn,
            wanted,
            out,
            (drawn.shape[1] - 2) // 4,
            height,
            width,
            attempts,
            float(images),
            float(low),
            float(high - low),
            float(least),
            float(most),
            math.log(1 / aspect),
            **tile,
            device_of=drawn,
        )
    return out.view(torch.bool)


def even_block_scores(drawn: Tensor, height: int, width: int) -> Tensor:
    drawn = drawn.contiguous()
    patches = height * width
    out = torch.empty(len(drawn), patches, dtype=torch.float64, device=drawn.device)
    if out.numel():
        programs = triton.cdiv(patches, PATCHES_OF_MANY)
        rectangles = (drawn.shape[1] - patches) // 4
        launch.launch(
            _even_block_scores_kernel,
            (len(drawn) * programs,),
            drawn,
            out,
            height,
            width,
            rectangles,
            programs,
            math.log(1 / 0.3),
            RECTANGLES=triton.next_power_of_2(rectangles),
            BLOCK=PATCHES_OF_MANY,
            num_warps=2,
            device_of=drawn,
        )
    return out


def inverse_rectangle_masks(drawn: Tensor, height: int, width: int, seen: int, low: float, high: float) -> Tensor:
    drawn = drawn.contiguous()
    out = torch.empty(len(drawn), height, width, dtype=torch.uint8, device=drawn.device)
    if out.numel():
        programs = triton.cdiv(height * width, PATCHES)
        launch.launch(
            _inverse_rectangle_masks_kernel,
            (len(drawn) * programs,),
            drawn,
            out,
            height,
            width,
            seen,
            programs,
            float(low),
            float(high - low),
            BLOCK=PATCHES,
            num_warps=2,
            device_of=drawn,
        )
    return out.view(torch.bool)


def multi_block_masks(
    drawn: Tensor, height: int, width: int, target: list[int], context: list[int], targets: int, keep: int
) -> tuple[Tensor, Tensor]:
    tile = _words(height, width)
    if tile is None:
        return reference.multi_block_masks(drawn, height, width, target, context, targets, keep)
    drawn = drawn.contiguous()
    out = torch.empty(len(drawn), height, width, dtype=torch.uint8, device=drawn.device)
    indices = torch.empty(len(drawn), targets, target[0] * target[1], dtype=torch.int64, device=drawn.device)
    if out.numel():
        places = (drawn.shape[1] // 2 - targets) // (targets + 1)
        sizes = (places, height, width, *target, *context, targets, keep)
        launch.launch(_multi_block_masks_kernel, (len(drawn),), drawn, out, indices, *sizes, **tile, device_of=drawn)
    return out.view(torch.bool), indices
