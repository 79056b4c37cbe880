"""All images in memory as one uint8 array, of the CPU or a GPU, and views of them without any decoding.

For sets of small images (CIFAR), and for larger ones shrunk once until they fit a stated number of bytes.
"""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

import fastjem.functional as F
from fastjem.data.batches import Crops, Order
from fastjem.data.folder import ImageFolder, is_rgb, none_readable, read_arrays, reason
from fastjem.data.parameters import Parameters
from fastjem.data.views import ViewSpec
from fastjem.errors import UserError

GIBIBYTE = 2**30


@dataclass
class ImageArray:
    """N images of one size with their labels.

    Args:
        images: [N, H, W, 3] uint8, on any device.
        labels: [N] int64, zeros if there are none.
        classes: the labels' names, if they have any.
        unreadable: (path, reason) of files that were left out.
    """

    images: Tensor
    labels: Tensor | None = None
    classes: list[str] = field(default_factory=list)
    unreadable: list[tuple[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        x = self.images
        if not is_rgb(x):
            raise ValueError(
                f"ImageArray: images must be [N, H, W, 3] or [N, 3, H, W] uint8, got {tuple(x.shape)} {x.dtype}"
            )
        self.images = (x if x.shape[3] == 3 else x.permute(0, 2, 3, 1)).contiguous()
        if self.labels is None:
            self.labels = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        self.labels = self.labels.to(x.device, torch.int64)
        if self.labels.shape != (len(x),):
            raise ValueError(f"ImageArray: labels must be [{len(x)}], got {tuple(self.labels.shape)}")

    def __len__(self) -> int:
        return len(self.images)

    @property
    def height(self) -> int:
        return self.images.shape[1]

    @property
    def width(self) -> int:
        return self.images.shape[2]

    def to(self, device: torch.device | str) -> "ImageArray":
        return ImageArray(self.images.to(device), self.labels.to(device), self.classes, self.unreadable)  # type: ignore

    @classmethod
    def from_npz(cls, path: str | os.PathLike[str]) -> "ImageArray":
        """A .npz or .npy file, as `fastjem.data.folder.read_arrays` describes it."""
        found = read_arrays(path)
        labels = torch.from_numpy(found["labels"]) if "labels" in found else None
        return cls(torch.from_numpy(found["images"]), labels, [str(name) for name in found.get("classes", ())])

    @classmethod
    def from_folder(
        cls, root: str | os.PathLike[str], *, size: int, budget: float = 4 * GIBIBYTE, threads: int = 0
    ) -> "ImageArray":
        """Every image of a folder, its shorter side resized to `size` pixels and the middle square kept.

        Args:
            root: nested or flat; the first level of folders are the classes.
            size: in pixels, H and W of the array; images of that size already stay as they are.
            budget: the most bytes that the array may take. Beyond it a UserError says which size would fit.
            threads: that decode; 0: as many as there are cores.

        A file that can't be read is left out and named in `unreadable`.
        """
        folder = ImageFolder(root)
        needed, count = len(folder) * size * size * 3, len(folder)
        if needed > budget:
            fits = int((budget / 3 / count) ** 0.5)
            raise UserError(
                f"{count} images of {size} x {size} take {needed / GIBIBYTE:.2f} GiB, more than the budget of "
                f"{budget / GIBIBYTE:.2f} GiB; {fits} x {fits} would fit"
            )
        images, bad = np.empty((count, size, size, 3), np.uint8), {}

        def read(i: int) -> None:
            try:
                images[i] = _square(folder.image(i), size)
            except Exception as error:  # whatever a decoder may raise on a broken file
                bad[i] = reason(error, folder.path(i))

        with ThreadPoolExecutor(threads or os.cpu_count() or 1) as pool:
            list(pool.map(read, range(count)))
        good = np.array([i for i in range(count) if i not in bad], dtype=np.int64)
        unreadable = [(folder.path(i), bad[i]) for i in sorted(bad)]
        if not len(good):
            raise none_readable(unreadable)
        kept = images if len(good) == count else images[good]
        return cls(torch.from_numpy(kept), torch.from_numpy(folder.labels[good]), list(folder.classes), unreadable)

    def crops(self, indices: Tensor, tables: Sequence[Tensor], specs: Sequence[ViewSpec]) -> list[Tensor]:
        """V tensors [B, size, size, 3] uint8: the tables' windows of images `indices`, in the specs' sizes."""
        return [
            F.crop_resize(self.images, indices, table, size=spec.size, bicubic=spec.bicubic)
            for table, spec in zip(tables, specs, strict=True)
        ]

    def views(self, indices: Tensor, tables: Sequence[Tensor], specs: Sequence[ViewSpec], **options) -> list[Tensor]:
        """V tensors [B, 3, size, size]: the tables carried out; options as of `fastjem.functional.augment`."""
        return [
            F.augment(crop, table, mean=spec.mean, std=spec.std, **options)
            for crop, table, spec in zip(self.crops(indices, tables, specs), tables, specs, strict=True)
        ]


def _square(image, size: int) -> np.ndarray:
    """A Pillow image -> [size, size, 3]."""
    if image.size != (size, size):
        from PIL import Image

        short = min(image.size)
        left, top = (image.width - short) / 2, (image.height - short) / 2
        box = (left, top, left + short, top + short)
        image = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    return np.asarray(image)


class MemoryLoader:
    """Batches of crops of an `ImageArray` from step `start` to `stop`, on its device: `ViewLoader`'s interface.

    Args:
        array: the images.
        specs: one for each view.
        batch: images over all ranks; this rank gets batch / ranks of them. An epoch is the whole batches in the data.
        seed, start, stop, rank, ranks: as for `ViewLoader`; samples are numbered as in the array.
    """

    def __init__(
        self, array: ImageArray, specs: Sequence[ViewSpec], *, batch: int, seed: int = 0, start: int = 0, stop: int,
        rank: int = 0, ranks: int = 1,
    ):  # fmt: skip
        if batch > len(array) or batch % ranks:
            raise ValueError(
                f"MemoryLoader: batch must divide by {ranks} ranks and be at most {len(array)} images, got {batch}"
            )
        self.array, self.specs, self.seed = array, list(specs), seed
        self.order = Order(len(array), batch, seed, start, stop, rank, ranks)

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[Crops]:
        array, draw, unreadable = self.array, Parameters(self.specs), self.array.unreadable
        device = array.images.device
        for keys in self.order:
            samples = np.array([sample for _, sample in keys])
            drawn = torch.from_numpy(draw(self.seed, keys[0][0], samples, array.height, array.width))
            tables = list(drawn.to(device, non_blocking=True))
            indices = torch.from_numpy(samples).to(device, non_blocking=True)
            yield Crops(array.crops(indices, tables, self.specs), tables, unreadable)
            unreadable = []
