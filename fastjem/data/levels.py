"""From the values that images store to levels: one rule for a whole data set, found once at the start of a run.

An 8-bit picture has black at 0 and white at 255. A 16-bit one may hold 12 bits, or heights in metres, and a float's
white may be 1 or 255: what black and white are can't be told from one image. So they are told from some of all of
them, or by the user, and every image of the run is read by them.
"""

import functools
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from fastjem.data.files import TIFF, deep_png, open_image, stored
from fastjem.data.spread import spread
from fastjem.errors import UserError

KINDS = {"8-bit": (0.0, 255.0), "integer": (0.0, 65535.0), "float": (0.0, 1.0)}  # from black to white, where unsaid
SAMPLED = 64  # images of a data set that are looked at
SAMPLED_VALUES = 2**27  # and no more once they have so many values together
LARGEST_WHOLE = 2.0**32  # floats from there on count nothing
STRIP = 2**20  # values that are widened at a time
RGB = 3
_UINT8, _UINT16 = np.dtype(np.uint8), np.dtype(np.uint16)
_DEEP = {
    "F": np.dtype(np.float32),
    "I": np.dtype(np.int32),
}  # Pillow's modes of more than 8 bits but "I;16" and its kin


@dataclass(frozen=True)
class Levels:
    """What an image's values are read as: levels from 0 (black) to 255 (white) in `channels` channels.

    Args:
        channels: 3: red, green and blue of any picture; 1: its gray; any other: as many as the image stores.
        values: the kind that `value_range` is of, one of `KINDS`. An image of another kind has that kind's own range: a
            JPEG among 16-bit files is still white at 255.
        value_range: (black, white); what lies outside of it is the nearer of the two, what isn't finite is black.
    """

    channels: int = RGB
    values: str = "8-bit"
    value_range: tuple[float, float] = KINDS["8-bit"]

    def range_of(self, dtype: np.dtype) -> tuple[float, float]:
        """Black and white of values of that type."""
        kind = kind_of(dtype)
        return self.value_range if kind == self.values else KINDS[kind]

    @property
    def floats(self) -> bool:
        """Whether images become float32 levels with all that their values tell; 8-bit pictures in colour stay uint8."""
        return self.channels != RGB or self.values != "8-bit"

    @property
    def plain(self) -> bool:
        """Whether an 8-bit picture in colour stays as it is, so that any decoder may read it."""
        return self.channels == RGB and self.range_of(np.dtype(np.uint8)) == KINDS["8-bit"]


def kind_of(dtype: np.dtype) -> str:
    """One of `KINDS`. TypeError for what is no number."""
    if dtype.kind not in "biuf":
        raise TypeError(f"pixels must be integers or floats, got {dtype}")
    if dtype.kind == "f":
        return "float"
    return "8-bit" if dtype in (np.uint8, np.bool_) else "integer"


def of_image(image: Image.Image | np.ndarray) -> np.dtype:
    """The type of the values that an image stores."""
    if isinstance(image, np.ndarray):
        return image.dtype
    return _UINT16 if image.mode.startswith("I;") else _DEEP.get(image.mode, _UINT8)


def strips(image: Image.Image | np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, values [h, W] or [h, W, C]) from top to bottom, of at most `STRIP` values or one row."""
    height, width = image.shape[:2] if isinstance(image, np.ndarray) else (image.height, image.width)
    across = image[:1].size if isinstance(image, np.ndarray) else width
    rows = max(STRIP // max(across, 1), 1)
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        if isinstance(image, np.ndarray):
            yield top, image[top:bottom]
        else:
            yield top, np.asarray(image.crop((0, top, width, bottom)))


def extremes(image: Image.Image | np.ndarray) -> tuple[float, float] | None:
    """The least and the largest finite value; None where there is none."""
    found: list[float] = []
    for _, values in strips(image):
        finite = values[np.isfinite(values)] if values.dtype.kind == "f" else values
        if finite.size:
            found += [float(finite.min()), float(finite.max())]
    return (min(found), max(found)) if found else None


def to_levels(values: np.ndarray, black: float, white: float, *, floats: bool = True) -> np.ndarray:
    """Numbers [H, W] or [H, W, C] -> float32 levels, 0 at `black` and 255 at `white`; without `floats` rounded to
    uint8."""
    if values.dtype == np.bool_:
        values = values.astype(np.uint8) * np.uint8(255)
    if values.dtype == np.uint8 and (black, white) == KINDS["8-bit"]:
        return values.astype(np.float32) if floats else values
    if values.dtype.kind in "iu" and values.dtype.itemsize <= 2:
        unsigned = np.dtype(f"u{values.dtype.itemsize}")
        native = np.ascontiguousarray(values, values.dtype.newbyteorder("="))
        return _table(native.dtype.str, black, white, floats)[native.view(unsigned)]
    out = np.empty(values.shape, np.float32 if floats else np.uint8)
    for top, strip in strips(values):
        out[top : top + len(strip)] = _computed(strip, black, white, floats)
    return out


@functools.lru_cache(16)
def _table(dtype: str, black: float, white: float, floats: bool) -> np.ndarray:
    """The level of each of a type's values, in the order of their bits: of 16 bits 256 KiB of floats."""
    kind = np.dtype(dtype)
    every = np.arange(256**kind.itemsize, dtype=f"u{kind.itemsize}").view(kind)
    return _computed(every, black, white, floats)


def _computed(values: np.ndarray, black: float, white: float, floats: bool) -> np.ndarray:
    wide = values.astype(np.float64)
    if values.dtype.kind == "f":
        wide[~np.isfinite(wide)] = black
    wide -= black
    wide *= 255 / (white - black)
    np.clip(wide, 0, 255, out=wide)
    return wide.astype(np.float32) if floats else wide.round().astype(np.uint8)


def range_of(kind: str, least: float, largest: float) -> tuple[float, float]:
    """(black, white) of values of that kind between `least` and `largest`.

    Integers, and floats that exceed 1 but not 2^32, have as many bits as the largest needs, of 8, 10, 12, 14 and so on:
    black is 0, white the largest number of so many bits, and negative integers begin at the power of two that holds the
    least. Floats from 0 to 1, or from -1 to 1, have these; all others have their own extremes.
    """
    if kind == "8-bit":
        return KINDS[kind]
    if kind == "float" and max(-least, largest) <= 1:
        return (0.0 if least >= 0 else -1.0), 1.0
    if kind == "float" and (least < 0 or largest >= LARGEST_WHOLE):
        least, largest = (float(np.clip(x, -1e300, 1e300)) for x in (least, largest))  # whose difference is a number
        return least, (largest if largest > least else least + max(abs(least), 1.0))
    white = 2.0 ** _bits(largest) - 1
    return (-(2.0 ** _bits(-least - 1)) if least < 0 else 0.0), white


def _bits(largest: float) -> int:
    """How many bits hold the number: at least 8, and even."""
    bits = max(int(max(largest, 0) + 0.5).bit_length(), 8)
    return bits + bits % 2


@dataclass
class Survey:
    """What some images of a data set store."""

    images: int = 0  # that could be read
    kinds: Counter[str] = field(default_factory=Counter)
    channels: Counter[int] = field(default_factory=Counter)
    bounds: dict[str, tuple[float, float]] = field(default_factory=dict)  # of each deeper kind the extremes
    dropped: int = 0  # TIFF files with a fourth channel, which three of a picture leave out

    def add(self, image: Image.Image | np.ndarray) -> int:
        """Count an image; how many of its values were looked at."""
        kind = kind_of(of_image(image))
        self.images += 1
        self.kinds[kind] += 1
        self.channels[channels_of(image)] += 1
        self.dropped += getattr(image, "format", "") == "TIFF" and channels_of(image) == 4
        if kind == "8-bit":
            return 0
        if found := extremes(image):
            before = self.bounds.get(kind, found)
            self.bounds[kind] = (min(before[0], found[0]), max(before[1], found[1]))
        return image.size if isinstance(image, np.ndarray) else image.width * image.height

    @property
    def deepest(self) -> str:
        """The kind that a range of values is for: floats, or else integers of more than 8 bits, where there are any."""
        return next((kind for kind in ("float", "integer") if self.kinds[kind]), "8-bit")


def channels_of(image: Image.Image | np.ndarray) -> int:
    """How many channels an image stores; a palette's colours are three."""
    if isinstance(image, np.ndarray):
        return image.shape[2] if image.ndim == 3 else 1
    return RGB if image.mode in ("P", "PA") else len(image.getbands())


def levels_of(channels: int, value_range: tuple[float, float] | None, survey: Survey) -> Levels:
    """The rule for a data set; value_range: the user's, for the deepest kind that it has."""
    kind = survey.deepest
    if value_range is None:
        value_range = range_of(kind, *survey.bounds.get(kind, KINDS[kind]))
    return Levels(channels, kind, value_range)


def parsed_range(text: str) -> tuple[float, float] | None:
    """ "0,4095" -> (0.0, 4095.0), "auto" -> None. UserError for anything else."""
    if text == "auto":
        return None
    try:
        black, white = (float(part) for part in text.split(","))
        if np.isfinite([black, white]).all() and black < white:
            return black, white
    except ValueError:
        pass
    raise UserError(f"--value-range must be auto, or black and white as 0,4095, got {text}")


def describe(levels: Levels, survey: Survey) -> list[str]:
    """What of the rule isn't as everybody expects it, a sentence each; nothing of pictures of 8 bits in colour."""
    said = []
    black, white = (f"{value:.10g}" for value in levels.value_range)
    if levels.values != "8-bit" or not Levels(RGB, levels.values, levels.value_range).plain:
        name = {"8-bit": "8-bit values", "integer": "integers of more than 8 bits", "float": "floats"}[levels.values]
        text = f"{name}: black is {black}, white {white} (--value-range LOW,HIGH)"
        if bounds := survey.bounds.get(levels.values):
            text += f"; {bounds[0]:g} to {bounds[1]:g} in the {survey.kinds[levels.values]} looked at"
        others = [kind for kind in KINDS if survey.kinds[kind] and kind != levels.values]
        if others:
            text += f"; {' and '.join(others)} images beside them have their own, 0 to " + " and 0 to ".join(
                f"{KINDS[kind][1]:g}" for kind in others
            )
        said.append(text)
    if levels.channels != RGB:
        said.append(
            f"{levels.channels} channel{'s' if levels.channels > 1 else ''}: saturation, hue and grayscale need red, "
            "green and blue and are left out"
        )
    elif survey.dropped:
        said.append(f"{survey.dropped} of {survey.images} images have a fourth channel; --channels 4 keeps it")
    return said


def survey(source: Any, channels: int = RGB) -> Survey:
    """What `SAMPLED` images store, spread evenly over a source; those that can't be read tell nothing."""
    found = Survey()
    values = 0
    for i in spread(len(source), SAMPLED).tolist():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow warns of harmless EXIF trouble
                values += found.add(_looked_at(source.read(i), channels))
        except Exception:  # whatever a decoder may raise on a broken file
            continue
        if values > SAMPLED_VALUES:
            break
    return found


def _looked_at(data: bytes | np.ndarray, channels: int) -> Image.Image | np.ndarray:
    """The image; of an 8-bit file the header alone, which tells enough."""
    if isinstance(data, np.ndarray):
        return data
    if not (data.startswith(TIFF) or deep_png(data)):
        image = open_image(data)
        if of_image(image) == np.uint8:
            return image
    return stored(data, channels)
