"""All images in memory as one array, uint8 or float32, of the CPU or a GPU, and crops of them without any decoding.

For sets of small images (CIFAR), and for larger ones shrunk once until they fit a stated number of bytes.
"""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

import fastjem.functional as F
from fastjem.data.batch import Crops
from fastjem.data.files import open_image
from fastjem.data.levels import levels_of, survey, to_levels
from fastjem.data.loaders.protocol import Budget, Order, mask_keys
from fastjem.data.parameters import Parameters
from fastjem.data.picture import Picture
from fastjem.data.size import Size, as_size, height_and_width
from fastjem.data.source import SOURCES, NoneReadable, Source, decode, inner, path_of, read_or_next, reason, rule_of
from fastjem.data.sources.arrays import Arrays, channels_axis, read_arrays
from fastjem.data.sources.mixture import Mixture
from fastjem.data.spread import spread
from fastjem.data.upload import to_device
from fastjem.data.views import ViewSpec
from fastjem.errors import UserError
from fastjem.machine import available_cores

GIBIBYTE = 2**30
SIZES = 1024  # images whose sides are looked at before all are read
ENLARGED = 8 / 7  # images are held a little larger than the views, 256 pixels for 224
UNASKED = 1.0  # GiB a rank that images may take without being asked for
SMALL = 96  # pixels of a side of images that are held without being asked for: STL-10's; a start decodes all of them


class OtherSizeError(Exception):
    """An image isn't of the size that the others have."""


@dataclass
class ImageArray:
    """N images of one size with their labels.

    Args:
        images: [N, H, W, C] uint8, or float32 levels from 0 to 255, on any device; [N, 3, H, W] becomes [N, H, W, 3].
        labels: [N] integers; None where there are none.
        classes: the labels' names, if they have any.
        samples: [N] integers, each image's number in its source; None: they are numbered as in the array.
        unreadable: (path, reason) of images that were left out.
    """

    images: Tensor
    labels: Tensor | None = None
    classes: list[str] = field(default_factory=list)
    samples: Tensor | None = None
    unreadable: list[tuple[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        x = self.images
        if x.dim() != 4 or x.dtype not in (torch.uint8, torch.float32) or 0 in x.shape:
            raise ValueError(
                "ImageArray: images must be [N, H, W, C] or [N, 3, H, W] uint8 or float32, "
                f"got {tuple(x.shape)} {x.dtype}"
            )
        self.images = (x.permute(0, 2, 3, 1) if channels_axis(x.shape) == 1 else x).contiguous()
        if self.samples is None:
            self.samples = torch.arange(len(x))
        self.samples = self._one_each("samples", self.samples)
        if self.labels is not None:
            self.labels = self._one_each("labels", self.labels)

    def _one_each(self, name: str, numbers: Tensor) -> Tensor:
        if numbers.shape != (len(self.images),):
            raise ValueError(f"ImageArray: {name} must be [{len(self.images)}], got {tuple(numbers.shape)}")
        return numbers.to(self.images.device, torch.int64)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def height(self) -> int:
        return self.images.shape[1]

    @property
    def width(self) -> int:
        return self.images.shape[2]

    def to(self, device: torch.device | str) -> "ImageArray":
        """The same images on a device; labels and samples follow."""
        return replace(self, images=self.images.to(device))

    @classmethod
    def from_npz(cls, path: str | os.PathLike[str]) -> "ImageArray":
        """A .npz or .npy file, as `fastjem.data.sources.arrays.read_arrays` describes it; values of other types than
        uint8 become float32 levels by the file's rule (`fastjem.data.levels`)."""
        found = read_arrays(path)
        images = found["images"]
        if images.dtype != np.uint8:
            rule = levels_of(images.shape[3], None, survey(Arrays(path)))
            images = to_levels(images, *rule.range_of(images.dtype))
        images = np.require(images, requirements="W")  # those of a .npy file are mapped
        labels = torch.from_numpy(found["labels"]) if "labels" in found else None
        return cls(torch.from_numpy(images), labels, [str(name) for name in found.get("classes", ())])

    @classmethod
    def from_source(
        cls, source: Source, *, size: Size, budget: float = 4 * GIBIBYTE, threads: int = 0, unchanged: bool = False
    ) -> "ImageArray":
        """Every image of a source, its middle of the aspect of `size` resized to `size`.

        Args:
            size: in pixels, H and W of the array: a square's side, or both; images of that size already stay as they
                are.
            budget: the most bytes that the array may take. Beyond it a UserError says which size would fit.
            threads: that decode; 0: as many as there are cores.
            unchanged: no image may be resized or cut; OtherSizeError for one that would have to be.

        An image that can't be read is left out and named in `unreadable`.
        """
        count = len(source)
        channels = channels_of(source)
        height, width = height_and_width(size)
        needed = count * height * width * bytes_of_pixel(source)
        if needed > budget:
            pixels = budget / bytes_of_pixel(source) / count
            high = int((pixels * height / width) ** 0.5)
            wide = int((pixels * width / height) ** 0.5)
            raise UserError(
                f"{count} images of {height} x {width} take {needed / GIBIBYTE:.2f} GiB, more than the budget of "
                f"{budget / GIBIBYTE:.2f} GiB; {high} x {wide} would fit"
            )
        images = np.empty((count, height, width, channels), np.float32 if holds_floats(source) else np.uint8)
        reasons: dict[int, str] = {}
        others: list[int] = []  # images of another size, where that is refused

        def read(i: int) -> None:
            if others:
                return
            try:
                image = decode(source, i)
                if unchanged and image.size != (width, height):
                    others.append(i)
                    return
                images[i] = middle(image, size)
            except Exception as error:  # whatever a decoder may raise on a broken file
                reasons[i] = reason(error, path_of(source, i))

        with ThreadPoolExecutor(threads or available_cores()) as pool:
            list(pool.map(read, range(count)))
        if others:
            raise OtherSizeError(f"{path_of(source, others[0])} isn't {height} x {width}")
        unreadable = [(path_of(source, i), reasons[i]) for i in sorted(reasons)]
        samples = np.array([i for i in range(count) if i not in reasons], dtype=np.int64)
        if not len(samples):
            raise NoneReadable(unreadable)
        held = images if not reasons else images[samples]
        labels = None if source.labels is None else torch.from_numpy(source.labels[samples])
        return cls(torch.from_numpy(held), labels, list(source.classes), torch.from_numpy(samples), unreadable)

    def crops(self, indices: Tensor, tables: Sequence[Tensor], specs: Sequence[ViewSpec]) -> list[Tensor]:
        """V tensors [B, H, W, C] of the images' dtype: the tables' windows of images `indices`, in the specs' sizes."""
        return [
            F.crop_resize(self.images, indices, table, size=spec.size, bicubic=spec.bicubic)
            for table, spec in zip(tables, specs, strict=True)
        ]

    def views(self, indices: Tensor, tables: Sequence[Tensor], specs: Sequence[ViewSpec], **options) -> list[Tensor]:
        """V tensors [B, C, H, W]: the tables carried out; options as of `fastjem.functional.augment`."""
        return [
            F.augment(crop, table, mean=spec.mean, std=spec.std, **options)
            for crop, table, spec in zip(self.crops(indices, tables, specs), tables, specs, strict=True)
        ]


def channels_of(source: Source) -> int:
    """How many channels a source's images are read in."""
    rule = rule_of(source)
    return rule.channels if rule else 3


def holds_floats(source: Source) -> bool:
    """Whether a source's images are read as float32; else they are uint8."""
    rule = rule_of(source)
    return rule is not None and rule.floats


def bytes_of_pixel(source: Source) -> int:
    return channels_of(source) * (4 if holds_floats(source) else 1)


def middle(image: Picture, size: Size) -> np.ndarray:
    """The largest part of the aspect of `size` in the middle of an image, resized: [H, W, C] uint8 or float32."""
    height, width = height_and_width(size)
    if image.size != (width, height):
        down, across = _largest(image.height, image.width, size)
        left = (image.width - across) / 2
        top = (image.height - down) / 2
        box = (left, top, left + across, top + down)
        image = image.resize((width, height), Image.Resampling.BICUBIC, box=box)
    return np.asarray(image)


def _largest(height: int, width: int, size: Size) -> tuple[float, float]:
    """Height and width of the largest part of an image that has the aspect of `size`: of squares, the shorter side."""
    high, wide = height_and_width(size)
    return min(height, width * high / wide), min(width, height * wide / high)


class MemoryLoader:
    """Crops of an `ImageArray`, on its device.

    The order's samples are the array's images or, where some couldn't be read, those of the array's source: the next
    image stands in for one that isn't held, as with any loader.
    """

    decoder_share: float | None = None

    def __init__(self, array: ImageArray, specs: Sequence[ViewSpec], order: Order):
        most = order.images_per_epoch
        if order.batch > most or order.batch % order.ranks:
            raise ValueError(
                f"MemoryLoader: batch must divide by {order.ranks} ranks and be at most {most} images, "
                f"got {order.batch}"
            )
        self.array = array
        self.specs = list(specs)
        self.order = order
        held = np.arange(len(array))
        if order.samples != len(array):
            held = array.samples.cpu().numpy()  # type: ignore[union-attr]
        self.rows = np.searchsorted(held, np.arange(order.samples)) % len(array)  # of each sample, in the array
        size = f"{array.height} x {array.width}"
        self.reads = f"{len(array)} images of {size} are held in memory on {array.images.device}"

    def __len__(self) -> int:
        return len(self.order)

    def at(self, specs: Sequence[ViewSpec], order: Order) -> "MemoryLoader":
        """Of the same images, which are held once."""
        loader = MemoryLoader(self.array, specs, order)
        loader.decoder_share = self.decoder_share
        return loader

    def __iter__(self) -> Iterator[Crops]:
        array, order = self.array, self.order
        parameters = Parameters(self.specs)
        device = array.images.device
        unreadable = array.unreadable
        for keys in order:
            epoch = keys[0][0]  # a batch lies in one epoch
            samples = np.array([sample for _, sample in keys])
            drawn = torch.from_numpy(parameters(order.seed, epoch, samples, array.height, array.width))
            tables = list(to_device(drawn, device))
            indices = to_device(torch.from_numpy(self.rows[samples % order.samples]), device)
            labels = None if array.labels is None else array.labels[indices]
            index = array.samples[indices]  # type: ignore[index]
            views = array.crops(indices, tables, self.specs)
            yield Crops(views, tables, index, epoch, labels, unreadable, mask_keys(index, samples, order.samples))
            unreadable = []


def size_in_memory(source: Source, specs: Sequence[ViewSpec]) -> Size:
    """Pixels of the images that are held: as many as the views need, or as the largest has where all are smaller, in
    the large views' aspect.

    No single file decides: the sides of `SIZES` images are looked at, evenly over the source.
    """
    size = specs[0].size
    needed = as_size(*(round(side * ENLARGED) for side in height_and_width(size)))
    largest = (0.0, 0.0)
    for i in spread(len(source), SIZES).tolist():
        try:
            largest = max(largest, _largest(*sides(source, i), size))
        except Exception:  # whatever is wrong with it is said when it is read
            continue
        if largest >= height_and_width(needed):
            return needed
    if not any(largest):  # where none of these can be read, one of the others may be
        width, height = read_or_next(source, 0, lambda i: decode(source, i)).value.size
        largest = min(_largest(height, width, size), height_and_width(needed))
    return as_size(*(max(round(side), 1) for side in largest))


def sides(source: Source, i: int) -> tuple[int, int]:
    """Height and width of an image in pixels, of a file by its header."""
    data = source.read(i)
    if isinstance(data, np.ndarray):
        return data.shape[0], data.shape[1]
    try:
        width, height = open_image(data).size
    except UnidentifiedImageError:  # a TIFF file that Pillow has no mode for
        width, height = decode(source, i).size
    return height, width


def are_small(source: Source, specs: Sequence[ViewSpec], gibibytes: float) -> bool:
    """Whether files' images are so small that they are best held as they are: of one size with the views' aspect, their
    sides up to `SMALL` pixels, no larger than the views need, that fit in so much memory, `UNASKED` GiB at most.

    `SIZES` images are looked at, evenly over the source, up to the first that isn't. Another one may be of another size
    nevertheless: `create(unchanged=True)` sees all of them. What an object of the user's reads may be another image
    each time, so it isn't held.
    """
    given = inner(source)
    parts = given.parts if isinstance(given, Mixture) else [given]
    if source.decoded or not all(type(part) in SOURCES.values() for part in parts):
        return False
    found: set[tuple[int, int]] = set()
    for i in spread(len(source), SIZES).tolist():
        try:
            found.add(sides(source, i))
        except Exception:  # whatever is wrong with it is said when it is read
            continue
        height, width = min(found)
        high, wide = height_and_width(specs[0].size)
        if len(found) > 1 or width * high != height * wide or max(width, height) > SMALL:
            return False
        if width > round(wide * ENLARGED):
            return False
    return bool(found) and fits_in_memory(source, specs, min(gibibytes, UNASKED))


def fits_in_memory(source: Source, specs: Sequence[ViewSpec], gibibytes: float) -> bool:
    height, width = height_and_width(size_in_memory(source, specs))
    return bytes_of_pixel(source) * len(source) * height * width <= gibibytes * GIBIBYTE


def create(
    source: Source, specs: Sequence[ViewSpec], order: Order, budget: Budget, *, unchanged: bool = False
) -> MemoryLoader:
    """The source's images on the run's device, each read once, now.

    Raises:
        UserError: if they take more than the budget's memory, with the size that would fit.
        OtherSizeError: with `unchanged`, for an image that would have to be resized or cut.
    """
    size = size_in_memory(source, specs)
    array = ImageArray.from_source(source, size=size, budget=budget.memory * GIBIBYTE, unchanged=unchanged)
    loader = MemoryLoader(array.to(budget.device), specs, order)
    loader.decoder_share = budget.decoder_share
    return loader
