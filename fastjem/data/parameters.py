"""Augmentation parameters, drawn by us: a function of (seed, epoch, sample, view) and the image's size, nothing else.

Whoever carries them out, in whatever batch, on whatever rank and after whatever resume, sees the same views. The
table's columns are named in `fastjem.kernels.augment.columns`.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike

from fastjem.data.views import ViewSpec
from fastjem.kernels.augment import columns as column

REST = 1 << 31  # first block of numbers behind those of the crop, whose try i takes block i
Numbers = Callable[[int, np.ndarray], np.ndarray]


def philox(counter: Sequence[np.ndarray], seed: int) -> np.ndarray:
    """Philox4x32-10 (Salmon et al. 2011): four arrays [N] of 32 bits -> [4, N] uniform in (0, 1)."""
    c = [np.asarray(x).astype(np.uint64) & 0xFFFFFFFF for x in counter]
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
    for _ in range(10):
        a, b = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [b >> 32 ^ c[1] ^ k0, b & 0xFFFFFFFF, a >> 32 ^ c[3] ^ k1, a & 0xFFFFFFFF]
        k0, k1 = k0 + 0x9E3779B9 & 0xFFFFFFFF, k1 + 0xBB67AE85 & 0xFFFFFFFF
    return (np.stack(np.broadcast_arrays(*c)).astype(np.float64) + 0.5) * 2.0**-32


class Parameters:
    """Tables for a list of views: `parameters(seed, epoch, samples, heights, widths)`.

    Args:
        specs: one a view; a view's number in the key is its place in the list.
    """

    def __init__(self, specs: Sequence[ViewSpec]):
        self.specs = list(specs)

        def field(name: str) -> np.ndarray:  # [V] or [V, ...]
            return np.array([getattr(spec, name) for spec in specs], np.float64)

        self.scale, self.ratio, self.tries = field("scale"), np.log(field("ratio")), field("tries").astype(int)
        self.limits = field("ratio")
        self.flip, self.grayscale, self.solarize = field("flip"), field("grayscale"), field("solarize")
        self.jitter, self.jittered = field("jitter"), field("jitter_probability")
        self.blur, self.sigma = field("blur"), field("sigma")

    def __call__(self, seed: int, epoch: int, samples: ArrayLike, heights: ArrayLike, widths: ArrayLike) -> np.ndarray:
        """samples, heights, widths: [B], the images' indices in the data and sizes in pixels -> [V, B, P] float32."""
        views = len(self.specs)
        shape = (views, len(np.atleast_1d(samples)))
        sample, height, width = (
            np.broadcast_to(np.asarray(x, np.int64), shape).ravel() for x in (samples, heights, widths)
        )
        view = np.repeat(np.arange(views), shape[1])

        def numbers(block: int, rows: np.ndarray | slice = slice(None)) -> np.ndarray:  # [4, N]
            return philox([sample[rows], np.int64(epoch), view[rows], np.int64(block)], seed)

        table = np.empty((len(view), column.COLUMNS))
        table[:, column.TOP : column.WIDTH + 1] = self._crop(height, width, view, numbers)
        # All are drawn whether used or not: changing one probability leaves every other parameter as it was.
        flip, jitter, gray, blur = numbers(REST)
        solarize, *factors = numbers(REST + 1)
        hue, order, sigma, _ = numbers(REST + 2)
        table[:, column.FLIP] = flip < self.flip[view]
        on = jitter < self.jittered[view]
        for i, u in enumerate(factors):  # torchvision's: uniform from max(0, 1 - x) to 1 + x
            low, high = np.maximum(1 - self.jitter[view, i], 0), 1 + self.jitter[view, i]
            table[:, column.BRIGHTNESS + i] = np.where(on, low + (high - low) * u, 1)
        table[:, column.HUE] = np.where(on, self.jitter[view, 3] * (2 * hue - 1), 0)
        table[:, column.ORDER] = np.floor(len(column.ORDERS) * order)
        table[:, column.GRAYSCALE] = gray < self.grayscale[view]
        low, high = self.sigma[view].T
        table[:, column.SIGMA] = np.where(blur < self.blur[view], low + (high - low) * sigma, 0)
        table[:, column.SOLARIZE] = solarize < self.solarize[view]
        return table.astype(np.float32).reshape(*shape, column.COLUMNS)

    def _crop(self, height: np.ndarray, width: np.ndarray, view: np.ndarray, numbers: Numbers) -> np.ndarray:
        """torchvision's RandomResizedCrop: area and log aspect uniform, the first of `tries` that fits, or the centre.

        numbers: (block, rows) -> [4, N] of those rows.
        """
        low, high = self.limits[view].T
        wide, tall = width / height > high, width / height < low
        w = np.where(wide, np.minimum(np.maximum(np.rint(height * high), 1), width), width)
        h = np.where(tall, np.minimum(np.maximum(np.rint(width / low), 1), height), height)
        crop = np.stack([(height - h) // 2, (width - w) // 2, h, w], 1).astype(np.float64)
        rest = np.arange(len(view))
        for i in range(self.tries.max()):
            rest = rest[self.tries[view[rest]] > i]
            if not len(rest):
                break
            of, u = view[rest], numbers(i, rest)
            area = height[rest] * width[rest] * (self.scale[of, 0] + (self.scale[of, 1] - self.scale[of, 0]) * u[0])
            ratio = np.exp(self.ratio[of, 0] + (self.ratio[of, 1] - self.ratio[of, 0]) * u[1])
            w, h = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
            fits = (w > 0) & (w <= width[rest]) & (h > 0) & (h <= height[rest])
            top, left = np.floor((height[rest] - h + 1) * u[2]), np.floor((width[rest] - w + 1) * u[3])
            crop[rest[fits]] = np.stack([top, left, h, w], 1)[fits]
            rest = rest[~fits]
        return crop
