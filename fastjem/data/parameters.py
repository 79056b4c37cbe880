"""Augmentation parameters, drawn by us and keyed (seed, epoch, sample, view).

Whoever executes them, in whatever batch, on whatever rank and after whatever resume, sees the same views.
"""

import math
from dataclasses import dataclass

import numpy as np

from fastjem.data.views import ViewSpec


@dataclass(frozen=True)
class Parameters:
    """One view of one image; `None` and `()` stand for a step that isn't applied."""

    box: tuple[int, int, int, int]  # top, left, height, width
    flip: bool
    jitter: tuple[tuple[str, float], ...]  # in the order of application
    grayscale: bool
    sigma: float | None
    solarize: bool


def generator(seed: int, epoch: int, sample: int, view: int) -> np.random.Generator:
    """Counter-based, so that any key is as good as any other."""
    key = (seed & 0xFFFFFFFFFFFFFFFF, (epoch << 40 | sample) & 0xFFFFFFFFFFFFFFFF)
    return np.random.Generator(np.random.Philox(key=np.array(key, np.uint64), counter=[0, 0, 0, view]))


def draw(spec: ViewSpec, height: int, width: int, random: np.random.Generator) -> Parameters:
    """Parameters of one view of an image of that height and width."""
    box = _crop(spec, height, width, random)
    # All are drawn whether used or not: changing one probability leaves every other parameter as it was.
    flip, jitter, gray, blur, solarize = random.random(5)
    factors = [1 + x * (2 * u - 1) for x, u in zip(spec.jitter[:3], random.random(3), strict=True)]
    factors = [max(f, 0.0) for f in factors] + [spec.jitter[3] * (2 * random.random() - 1)]
    order = random.permutation(4)
    sigma = random.uniform(*spec.sigma)
    names = ("brightness", "contrast", "saturation", "hue")
    return Parameters(
        box=box,
        flip=bool(flip < spec.flip),
        jitter=tuple((names[i], float(factors[i])) for i in order if spec.jitter[i])
        if jitter < spec.jitter_probability
        else (),
        grayscale=bool(gray < spec.grayscale),
        sigma=float(sigma) if blur < spec.blur else None,
        solarize=bool(solarize < spec.solarize),
    )


def _crop(spec: ViewSpec, height: int, width: int, random: np.random.Generator) -> tuple[int, int, int, int]:
    low, high = (math.log(r) for r in spec.ratio)
    for _ in range(10):
        area = height * width * random.uniform(*spec.scale)
        ratio = math.exp(random.uniform(low, high))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(random.integers(height - h + 1)), int(random.integers(width - w + 1)), h, w
    w = min(width, max(round(height * spec.ratio[1]), 1)) if width / height > spec.ratio[1] else width
    h = min(height, max(round(width / spec.ratio[0]), 1)) if width / height < spec.ratio[0] else height
    return (height - h) // 2, (width - w) // 2, h, w
