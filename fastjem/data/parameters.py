"""Augmentation parameters, drawn by us: a function of (seed, epoch, sample, view) and the image's size, nothing else.

Whoever carries them out, in whatever batch, on whatever rank and after whatever resume, sees the same views. The
table that they are handed over in has the columns of `fastjem.kernels.augment.columns`.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike

from fastjem.data.philox import FIRST_COLOUR_BLOCK, FIRST_CROP_BLOCK, philox
from fastjem.data.size import height_and_width
from fastjem.data.views import ViewSpec
from fastjem.kernels.augment import columns as column

Numbers = Callable[[int, np.ndarray], np.ndarray]  # (block, N of the rows) -> [4, N] uniform in (0, 1)


class Parameters:
    """Tables for a list of views: `parameters(seed, epoch, samples, heights, widths)`.

    Args:
        specs: one a view; a view's number in the key is its place in the list.
    """

    def __init__(self, specs: Sequence[ViewSpec]):
        self.specs = list(specs)

        def field(name: str) -> np.ndarray:  # [V] or [V, ...]
            return np.array([getattr(spec, name) for spec in specs], np.float64)

        self.scale = field("scale")
        sides = [height_and_width(spec.size) for spec in specs]
        aspect = np.array([width / height for height, width in sides])
        self.ratio = field("ratio") * aspect[:, None]
        self.log_ratio = np.log(self.ratio)
        self.tries = field("tries").astype(int)
        self.flip = field("flip")
        self.jitter = field("jitter")
        self.jitter_probability = field("jitter_probability")
        self.grayscale = field("grayscale")
        self.blur = field("blur")
        self.sigma = field("sigma")
        self.solarize = field("solarize")

    def __call__(self, seed: int, epoch: int, samples: ArrayLike, heights: ArrayLike, widths: ArrayLike) -> np.ndarray:
        """samples [B], the images' numbers in the data; heights and widths in pixels, [B] or each view's [V, B]
        -> [V, B, P] float32."""
        views = len(self.specs)
        images = len(np.atleast_1d(samples))

        def for_each_view(values: ArrayLike) -> np.ndarray:  # [B] or [V, B] -> [V B]
            return np.broadcast_to(np.asarray(values, np.int64), (views, images)).ravel()

        sample = for_each_view(samples)
        view = np.repeat(np.arange(views), images)

        def numbers(block: int, rows: np.ndarray | slice = slice(None)) -> np.ndarray:  # [4, N]
            return philox([sample[rows], np.int64(epoch), view[rows], np.int64(block)], seed)

        table = np.empty((len(view), column.COLUMNS))
        table[:, column.TOP : column.WIDTH + 1] = self._crop(
            for_each_view(heights), for_each_view(widths), view, numbers
        )
        self._colours(table, view, numbers)
        return table.astype(np.float32).reshape(views, images, column.COLUMNS)

    def _colours(self, table: np.ndarray, view: np.ndarray, numbers: Callable[[int], np.ndarray]) -> None:
        """Fill in the columns behind the crop's.

        All numbers are drawn whether used or not: changing one probability leaves every other parameter as it was.
        """
        flip, jitter, gray, blur = numbers(FIRST_COLOUR_BLOCK)
        solarize, *factors = numbers(FIRST_COLOUR_BLOCK + 1)
        hue, order, sigma, _ = numbers(FIRST_COLOUR_BLOCK + 2)
        table[:, column.FLIP] = flip < self.flip[view]
        jittered = jitter < self.jitter_probability[view]
        for i, u in enumerate(factors):  # torchvision's: uniform from max(0, 1 - x) to 1 + x
            low = np.maximum(1 - self.jitter[view, i], 0)
            high = 1 + self.jitter[view, i]
            table[:, column.BRIGHTNESS + i] = np.where(jittered, low + (high - low) * u, 1)
        table[:, column.HUE] = np.where(jittered, self.jitter[view, 3] * (2 * hue - 1), 0)
        table[:, column.ORDER] = np.floor(len(column.ORDERS) * order)
        table[:, column.GRAYSCALE] = gray < self.grayscale[view]
        low, high = self.sigma[view].T
        table[:, column.SIGMA] = np.where(blur < self.blur[view], low + (high - low) * sigma, 0)
        table[:, column.SOLARIZE] = solarize < self.solarize[view]

    def _crop(self, height: np.ndarray, width: np.ndarray, view: np.ndarray, numbers: Numbers) -> np.ndarray:
        """[N, 4]: top, left, height and width, torchvision's RandomResizedCrop: area and log aspect uniform, the first
        of `tries` that fits into the image, or the centre. The aspect is a ratio to the view's own."""
        crop = self._centre(height, width, view)
        left_over = np.arange(len(view))  # rows that no try has fitted yet
        for i in range(self.tries.max()):
            left_over = left_over[self.tries[view[left_over]] > i]
            if not len(left_over):
                break
            place_in_area, place_in_ratio, from_top, from_left = numbers(FIRST_CROP_BLOCK + i, left_over)
            image_height = height[left_over]
            image_width = width[left_over]
            smallest, largest = self.scale[view[left_over]].T
            narrowest, widest = self.log_ratio[view[left_over]].T
            area = image_height * image_width * (smallest + (largest - smallest) * place_in_area)
            ratio = np.exp(narrowest + (widest - narrowest) * place_in_ratio)
            w = np.rint(np.sqrt(area * ratio))
            h = np.rint(np.sqrt(area / ratio))
            fits = (w > 0) & (w <= image_width) & (h > 0) & (h <= image_height)
            top = np.floor((image_height - h + 1) * from_top)
            left = np.floor((image_width - w + 1) * from_left)
            crop[left_over[fits]] = np.stack([top, left, h, w], 1)[fits]
            left_over = left_over[~fits]
        return crop

    def _centre(self, height: np.ndarray, width: np.ndarray, view: np.ndarray) -> np.ndarray:
        """[N, 4]: the largest part in the middle of each image whose aspect ratio is allowed."""
        narrowest, widest = self.ratio[view].T
        too_wide = width / height > widest
        too_tall = width / height < narrowest
        w = np.where(too_wide, np.minimum(np.maximum(np.rint(height * widest), 1), width), width)
        h = np.where(too_tall, np.minimum(np.maximum(np.rint(width / narrowest), 1), height), height)
        return np.stack([(height - h) // 2, (width - w) // 2, h, w], 1).astype(np.float64)
