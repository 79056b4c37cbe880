"""An image as training takes it: 8-bit levels, in colour or in any number of channels."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from PIL import Image

from fastjem.data.files import check_size, stored
from fastjem.data.levels import RGB, Levels, extremes, kind_of, of_image, range_of, strips, to_levels


class Bands:
    """An image of any number of channels: a gray picture of each, and those parts of Pillow's interface that cutting
    and resizing need. Pillow's own images of 2 and 4 channels take one of them for a transparency when they resize.
    """

    def __init__(self, bands: Sequence[Image.Image]):
        self.bands = list(bands)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        return self.bands[0].size

    @property
    def width(self) -> int:
        return self.size[0]

    @property
    def height(self) -> int:
        return self.size[1]

    def crop(self, box: tuple[Any, ...]) -> "Bands":
        return Bands([band.crop(box) for band in self.bands])

    def resize(self, size: tuple[int, int], resample: int | None = None, box: tuple[Any, ...] | None = None) -> "Bands":
        return Bands([band.resize(size, resample, box) for band in self.bands])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """[H, W, C] uint8."""
        return np.stack([np.asarray(band) for band in self.bands], 2).astype(dtype or np.uint8, copy=False)


Picture: TypeAlias = Image.Image | Bands  # Pillow's, in mode "RGB", for three channels; else bands


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
        levels = Levels(RGB, kind, range_of(kind, *(bounds or (0, 0))))
    black, white = levels.range_of(dtype)
    if isinstance(image, np.ndarray):
        if levels.plain and dtype == np.uint8 and image.shape[2:] == (RGB,):
            return Image.fromarray(image)
        return _in_channels(_bands_of(image, black, white), levels.channels)
    if dtype != np.uint8:
        gray = Image.new("L", image.size)
        for top, values in strips(image):
            gray.paste(Image.fromarray(to_levels(values, black, white)), (0, top))
        return _in_channels([gray], levels.channels)
    if levels.channels == RGB:
        return _stretched(to_rgb(image), black, white)
    if image.mode in ("P", "PA", "1"):
        image = to_rgb(image) if image.mode != "1" else image.convert("L")
    if levels.channels == 1:
        return Bands([_stretched(image if image.mode == "L" else image.convert("L"), black, white)])
    return _in_channels([_stretched(band, black, white) for band in image.split()], levels.channels)


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


def _bands_of(values: np.ndarray, black: float, white: float) -> list[Image.Image]:
    """Values [H, W] or [H, W, C] -> a gray picture of each channel."""
    values = values[:, :, None] if values.ndim == 2 else values
    out = np.empty((values.shape[2], *values.shape[:2]), np.uint8)
    for top, strip in strips(values):
        out[:, top : top + len(strip)] = np.moveaxis(to_levels(strip, black, white), 2, 0)
    return [Image.fromarray(band) for band in out]


def _in_channels(bands: list[Image.Image], channels: int) -> Picture:
    """Gray pictures -> `channels` of them: three of any picture, gray of one in colour, else as many as there are."""
    if channels in (1, RGB) and len(bands) <= 4:
        bands = bands[: len(bands) - 1] if len(bands) in (2, 4) else bands  # without the transparency
        if channels == RGB:
            return Image.merge("RGB", bands if len(bands) == RGB else bands * RGB)
        return Bands(bands if len(bands) == 1 else [Image.merge("RGB", bands).convert("L")])
    if len(bands) != channels:
        raise ValueError(f"{len(bands)} channel{'s' * (len(bands) > 1)}, not the {channels} of --channels")
    return Bands(bands)


def shown(image: Picture) -> Image.Image:
    """For people, in RGB: the first three channels, or the first as gray where there are fewer."""
    if isinstance(image, Bands):
        bands = image.bands[:RGB] if len(image.bands) >= RGB else image.bands[:1] * RGB
        return Image.merge("RGB", bands)
    return image
