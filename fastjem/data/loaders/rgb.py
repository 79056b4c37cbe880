"""8-bit RGB images as arrays, for the torch loader: Pillow's pixels and Pillow's windows, bit for bit, in less time.

Pillow has four bytes a pixel, copies a window before it resizes it, and adds up one level at a time. Here libjpeg-turbo
(torchvision's, by the same transform and the same upsampling as Pillow's) writes an array, and C++ cuts from that:
`kernels/augment/window.py`. Whatever isn't a plain JPEG file is decoded by Pillow as before, and where there is no C++,
or the Pillow that is installed resizes in another way, Pillow does all of it.
"""

import functools
from typing import cast

import numpy as np
import torch
from PIL import Image

from fastjem.data.files import ORIENTATION, open_image
from fastjem.data.levels import Levels
from fastjem.data.picture import Picture, to_image
from fastjem.data.source import Source, read_all, rule_of

try:
    from fastjem.kernels.augment.window import resize_window
except ImportError:  # the extension isn't built
    resize_window = None
try:
    import torchvision.io as torchvision_io
except ImportError:
    torchvision_io = None

Pixels = Picture | np.ndarray  # an array is [H, W, 3] uint8, contiguous
BOXES = ((0, 0, 40, 30), (3, 2, 38, 30), (1, 0, 12, 30), (0, 4, 40, 9))  # of 40 x 30; the third is taller than wide


@functools.cache
def tall_first() -> bool | None:
    """Which order of passes the Pillow that is installed has (`resize_window`); None: neither, or there is no C++."""
    if resize_window is None:
        return None
    image = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    for first in (True, False):
        both = (
            (
                _resized(image, box, (9, 9), bicubic, first),
                np.asarray(_by_pillow(Image.fromarray(image), box, (9, 9), bicubic)),
            )
            for box in BOXES
            for bicubic in (False, True)
        )
        if all(np.array_equal(ours, theirs) for ours, theirs in both):
            return first
    return None


def decoded(source: Source, i: int) -> list[Pixels]:
    """`decode_all`, RGB images as arrays."""
    return [to_pixels(data, rule_of(source)) for data in read_all(source, i)]


def to_pixels(data: bytes | np.ndarray, levels: Levels | None = None) -> Pixels:
    """`to_image`, an RGB image as an array.

    Raises:
        Exception: as `to_image` does.
    """
    if tall_first() is None:
        return to_image(data, levels)
    if isinstance(data, bytes) and (levels is None or levels.plain):
        pixels = _plain_jpeg(data)
        if pixels is not None:
            return pixels
    image = to_image(data, levels)
    return np.asarray(image) if isinstance(image, Image.Image) and image.mode == "RGB" else image


def _plain_jpeg(data: bytes) -> np.ndarray | None:
    """The pixels of a JPEG file, gray or in colour, that is stored the right way up; None for everything else.

    Pillow reads the header, so that its bounds and its formats hold; a file that torchvision refuses is Pillow's to
    refuse, or to read.
    """
    if torchvision_io is None or not data.startswith(b"\xff\xd8"):
        return None
    with open_image(data) as image:
        plain = image.format == "JPEG" and image.mode in ("RGB", "L")
        if not plain or image.getexif().get(ORIENTATION, 1) != 1:
            return None
    try:
        encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        pixels = cast(torch.Tensor, torchvision_io.decode_jpeg(encoded, torchvision_io.ImageReadMode.RGB))
    except RuntimeError:
        return None
    return np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())  # which torchvision's memory is already


def size_of(image: Pixels) -> tuple[int, int]:
    """Height and width."""
    if isinstance(image, np.ndarray):
        return image.shape[0], image.shape[1]
    return image.height, image.width


def window(image: Pixels, box: tuple[int, int, int, int], size: tuple[int, int], bicubic: bool) -> np.ndarray:
    """`image.crop(box).resize((width, height))` of Pillow, with antialiasing: [height, width, C] uint8.

    Args:
        box: left, top, right, bottom.
        size: height and width.
    """
    if isinstance(image, np.ndarray):
        first = tall_first()
        assert first is not None  # else `to_pixels` makes no arrays
        return _resized(image, box, size, bicubic, first)
    return np.asarray(_by_pillow(image, box, size, bicubic))


def _resized(
    image: np.ndarray, box: tuple[int, int, int, int], size: tuple[int, int], bicubic: bool, first: bool
) -> np.ndarray:
    out = np.empty((*size, 3), np.uint8)
    assert resize_window is not None  # `tall_first` has looked
    resize_window(image, box, bicubic, first, out)
    return out


def _by_pillow(image: Picture, box: tuple[int, int, int, int], size: tuple[int, int], bicubic: bool) -> Picture:
    mode = Image.Resampling.BICUBIC if bicubic else Image.Resampling.BILINEAR
    height, width = size
    return image.crop(box).resize((width, height), mode)
