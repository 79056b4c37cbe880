"""An image as training takes it, in levels from 0 to 255: uint8 of 8-bit pictures in colour, float32 of all others."""

from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import fastjem.functional as F
from fastjem.data.files import check_size, stored
from fastjem.data.levels import RGB, Levels, extremes, kind_of, of_image, range_of, to_levels
from fastjem.data.size import Size

GRAY = np.array([0.299, 0.587, 0.114], np.float32)  # of red, green and blue: Pillow's, which are ITU-R BT.601's


class Bands:
    """An image of any number of channels in float32, with those parts of Pillow's interface that cutting and resizing
    need.

    Args:
        values: [H, W, C] float32 levels.
        channels: that the image has; where it is more than C = 1, all of them are that one.
    """

    def __init__(self, values: np.ndarray, channels: int | None = None):
        self.values = np.ascontiguousarray(values, np.float32)
        self.channels = channels or values.shape[2]

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        return self.width, self.height

    @property
    def width(self) -> int:
        return self.values.shape[1]

    @property
    def height(self) -> int:
        return self.values.shape[0]

    def crop(self, box: tuple[int, int, int, int]) -> "Bands":
        left, top, right, bottom = box
        return Bands(self.values[top:bottom, left:right], self.channels)

    def resize(self, size: tuple[int, int], resample: int | None = None, box: tuple[Any, ...] | None = None) -> "Bands":
        """Pillow's of each channel, which rounds nowhere in its mode "F"."""
        bands = (Image.fromarray(np.ascontiguousarray(band)) for band in np.moveaxis(self.values, 2, 0))
        return Bands(np.stack([np.asarray(band.resize(size, resample, box)) for band in bands], 2), self.channels)

    def window(self, row: np.ndarray, size: Size, bicubic: bool) -> np.ndarray:
        """`fastjem.functional.crop_resize` of the window of a table's row [P]: [H, W, C] float32.

        That operator and not `resize`, so that an image held in memory has the same views to the bit; and it is the
        faster one: of 5 channels, 300 x 300 pixels to 224, 2.2 ms of a core for Pillow's 3.5, bicubic 2.1 for 5.0.
        """
        images: Tensor = torch.from_numpy(self.values)[None]
        first = torch.zeros(1, dtype=torch.int64)
        view = F.crop_resize(images, first, torch.from_numpy(row)[None], size=size, bicubic=bicubic)[0].numpy()
        return np.broadcast_to(view, (*view.shape[:2], self.channels))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """[H, W, C] float32."""
        values = np.broadcast_to(self.values, (*self.values.shape[:2], self.channels))
        return values.astype(dtype or np.float32, copy=bool(copy))


Picture: TypeAlias = Image.Image | Bands  # Pillow's, in mode "RGB", where `Levels.floats` isn't so; else bands


def to_image(data: bytes | bytearray | memoryview | np.ndarray, levels: Levels | None = None) -> Picture:
    """An image file's bytes, or values [H, W] or [H, W, C], -> levels, turned as EXIF says.

    Args:
        levels: the data set's rule. None: three channels, by what this one image holds, which for any other than an
            8-bit one is a guess.

    Raises:
        Exception: whatever a decoder raises on a broken file; ValueError where the image has other channels.
    """
    if isinstance(data, (bytes, bytearray, memoryview)):
        return picture(stored(bytes(data), levels.channels if levels else RGB), levels)
    values = np.asarray(data)
    if values.ndim not in (2, 3) or 0 in values.shape:
        raise ValueError(f"pixels must be [H, W] or [H, W, C], got {values.shape}")
    check_size(values.shape[1], values.shape[0], values[:1, :1].size)
    return picture(values, levels)


def picture(image: Image.Image | np.ndarray, levels: Levels | None = None) -> Picture:
    """What `stored` gave, or values, -> levels in the channels that are wanted."""
    dtype = of_image(image)
    if levels is None:
        kind = kind_of(dtype)
        bounds = extremes(image) if kind != "8-bit" else None
        return shown(picture(image, Levels(RGB, kind, range_of(kind, *(bounds or (0, 0))))))
    black, white = levels.range_of(dtype)
    if isinstance(image, Image.Image) and dtype == np.uint8 and not levels.floats:
        return _stretched(to_rgb(image), black, white)
    values = _in_channels(_values_of(image, levels.channels), levels.channels)
    values = to_levels(values, black, white, floats=levels.floats)
    if not levels.floats:
        return Image.fromarray(values if values.shape[2] == RGB else values.repeat(RGB, 2))
    if levels.channels == 1 and values.shape[2] == RGB:
        values = (values @ GRAY)[:, :, None]
    return Bands(values, levels.channels)


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB of any 8-bit mode: grayscale, palette, CMYK, with alpha."""
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")


def _stretched(image: Image.Image, black: float, white: float) -> Image.Image:
    """The levels of an 8-bit image between `black` and `white`."""
    if (black, white) == (0, 255):
        return image
    table = to_levels(np.arange(256, dtype=np.uint8), black, white).tolist()
    return image.point(table * len(image.getbands()))


def _values_of(image: Image.Image | np.ndarray, channels: int) -> np.ndarray:
    """[H, W, C] as they are stored; of a picture that has no channels of its own, a palette's, the colours."""
    if isinstance(image, Image.Image):
        if image.mode == "1":
            image = image.convert("L")
        elif image.mode in ("P", "PA") or (channels in (1, RGB) and image.mode in ("CMYK", "YCbCr", "LAB", "HSV")):
            image = to_rgb(image)
        image = np.asarray(image)
    return image[:, :, None] if image.ndim == 2 else image


def _in_channels(values: np.ndarray, channels: int) -> np.ndarray:
    """[H, W, C] -> those that an image of so many channels is made of: of a picture, which 3 or 1 mean, its three
    colours or its gray, without a transparency; else all of as many as there are."""
    count = values.shape[2]
    if channels in (1, RGB) and count <= 4:
        return values[:, :, : count - 1] if count in (2, 4) else values
    if count != channels:
        raise ValueError(f"{count} channel{'s' * (count > 1)}, not the {channels} of --channels")
    return values


def shown(image: Picture) -> Image.Image:
    """For people, in RGB of 8 bits: the first three channels, or the first as gray where there are fewer."""
    if isinstance(image, Bands):
        values = np.asarray(image)
        values = values[:, :, :RGB] if image.channels >= RGB else values[:, :, :1].repeat(RGB, 2)
        return Image.fromarray(values.clip(0, 255).round().astype(np.uint8))
    return image
