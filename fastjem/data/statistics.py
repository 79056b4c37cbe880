"""Mean and standard deviation of the images' values, by which a run normalises what its encoder is given."""

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from fastjem.data.levels import strips
from fastjem.data.picture import Bands
from fastjem.data.source import Source, decode, path_of, reason
from fastjem.data.spread import spread
from fastjem.errors import UserError
from fastjem.machine import available_cores

MEASURED = 1000  # images that are read, evenly over the source
LEAST_STD = 1 / 255  # of a channel that is all but constant: what it varies by is rounding


def parsed(flag: str, given: str | None, channels: int) -> list[float] | None:
    """ "0.5" or "0.5,0.4,0.3" -> a number for each channel; None: nothing is given.

    Raises:
        UserError: for anything else; means are from 0 to 1 (one of levels from 0 to 255 would make all images black),
            deviations above 0.
    """
    if given is None:
        return None
    try:
        values = [float(part) for part in given.split(",")]
    except ValueError:
        values = []
    sensible = all(math.isfinite(value) and (value > 0 if flag == "--std" else 0 <= value <= 1) for value in values)
    if len(values) not in (1, channels) or not sensible:
        wanted = "from 0 to 1" if flag == "--mean" else "finite and above 0"
        form = "one number" if channels == 1 else f"one number, or {channels} as 0.5,0.4,... for the channels,"
        raise UserError(f"{flag} must be {form} {wanted}, where black is 0 and white 1; got {given}")
    return values if len(values) == channels else values * channels


def measured(source: Source) -> tuple[list[float], list[float], int]:
    """(mean, std, images): of each channel over the pixels of `MEASURED` images, black being 0 and white 1, and of how
    many. Every image counts alike, however large it is; those that can't be read are left out.

    Raises:
        UserError: where none can be read, with the first one's reason.
    """
    chosen = spread(len(source), MEASURED).tolist()
    with ThreadPoolExecutor(available_cores()) as pool:
        read = list(pool.map(lambda i: _moments(source, i), chosen))
    found = [moments for moments in read if not isinstance(moments, str)]
    if not found:
        raise UserError(
            f"--statistics measure: none of {len(chosen)} images in {source.root} can be read; the first: "
            f"{path_of(source, chosen[0])}: {read[0]}"
        )
    first, second = np.mean(found, axis=0)  # [C] each
    std = np.sqrt(np.maximum(second - first**2, 0))
    return first.tolist(), np.maximum(std, LEAST_STD).tolist(), len(found)


def _moments(source: Source, i: int) -> tuple[np.ndarray, np.ndarray] | str:
    """Mean and mean square of an image's values by channel; where it can't be read, why."""
    try:
        image = decode(source, i)
    except Exception as error:  # whatever a decoder may raise on a broken file
        return reason(error, path_of(source, i))
    if isinstance(image, Bands):
        return _moments_of_floats(image)
    levels = np.arange(256) / 255
    counts = np.array(image.histogram()).reshape(-1, 256)  # [C, 256]: how many pixels have each level
    shares = counts / counts.sum(1, keepdims=True)
    return shares @ levels, shares @ levels**2


def _moments_of_floats(image: Bands) -> tuple[np.ndarray, np.ndarray]:
    sums = np.zeros((2, image.values.shape[2]))
    for _, strip in strips(image.values):
        wide = strip.reshape(-1, strip.shape[2]).astype(np.float64) / 255
        sums += [wide.sum(0), (wide**2).sum(0)]
    first, second = np.repeat(sums / (image.width * image.height), image.channels // sums.shape[1], 1)
    return first, second
