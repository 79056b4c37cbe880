"""Crops of files by Pillow, in a torch DataLoader's workers."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import fastjem.functional as F
from fastjem.data.batches import Crops, Key, Order
from fastjem.data.folder import ImageFolder, none_readable, readable
from fastjem.data.parameters import Parameters
from fastjem.data.views import ViewSpec
from fastjem.kernels.augment import columns as column


def crop(image: Image.Image, spec: ViewSpec, row: np.ndarray) -> np.ndarray:
    """The window of a table's row, resized with antialiasing: [size, size, 3] uint8."""
    top, left, height, width = (int(x) for x in row[column.TOP : column.WIDTH + 1])
    mode = Image.Resampling.BICUBIC if spec.bicubic else Image.Resampling.BILINEAR
    window = image.crop((left, top, left + width, top + height))
    return np.asarray(window.resize((spec.size, spec.size), mode))


class _Batches(Dataset):
    """(epoch, sample) of a batch -> its crops. A file that can't be read is named; the next that can stands in."""

    def __init__(self, folder: ImageFolder, specs: Sequence[ViewSpec], seed: int):
        self.folder, self.specs, self.seed = folder, list(specs), seed
        self.parameters = Parameters(specs)

    def __getitem__(self, keys: list[Key]) -> Crops:
        images, unreadable = [], []
        for _, sample in keys:
            image, bad = readable(self.folder, sample, self.folder.image)
            unreadable += bad
            if image is None:
                return Crops([], [], unreadable)
            images.append(image)
        epoch = keys[0][0]  # a batch lies in one epoch
        samples, (widths, heights) = [sample for _, sample in keys], zip(*(image.size for image in images), strict=True)
        tables = self.parameters(self.seed, epoch, samples, heights, widths)  # [V, B, P]
        crops = [
            torch.from_numpy(np.stack([crop(image, spec, row) for image, row in zip(images, table, strict=True)]))
            for spec, table in zip(self.specs, tables, strict=True)
        ]
        return Crops(crops, list(torch.from_numpy(tables)), unreadable)


class ViewLoader:
    """Batches of views from step `start` to `stop`, without a pause between epochs.

    Args:
        batch: images over all ranks; this rank loads batch / ranks of them. An epoch is the whole batches in the data.
    """

    def __init__(
        self,
        folder: ImageFolder,
        specs: Sequence[ViewSpec],
        *,
        batch: int,
        seed: int = 0,
        start: int = 0,
        stop: int,
        workers: int = 0,
        rank: int = 0,
        ranks: int = 1,
        pin_memory: bool = False,
    ):
        order = Order(len(folder), batch, seed, start, stop, rank, ranks)
        self.loader = DataLoader(
            _Batches(folder, specs, seed),
            batch_size=None,
            sampler=order,  # type: ignore[arg-type]
            num_workers=workers,
            pin_memory=pin_memory,
            prefetch_factor=4 if workers else None,
            worker_init_fn=_one_thread,
            generator=torch.Generator(),  # else its first batch takes a number from the run's: not where it is resumed
        )

    def __iter__(self) -> Iterator[Crops]:
        for batch in self.loader:
            if not batch.views:
                raise none_readable(batch.unreadable)
            yield batch


def _one_thread(worker: int) -> None:
    import signal

    torch.set_num_threads(1)
    for number in (signal.SIGINT, signal.SIGTERM):  # both may go to the whole group; the main process ends the run
        signal.signal(number, signal.SIG_IGN)


def normalise(images: Tensor, device: torch.device | str, channels_last: bool = False) -> Tensor:
    """Whole images [B, 3, H, W] uint8 -> float32 with ImageNet's mean and deviation, on the device."""
    images, spec = images.to(device, non_blocking=True), ViewSpec()
    nothing = torch.zeros(len(images), column.COLUMNS, device=device)
    nothing[:, column.BRIGHTNESS : column.HUE] = 1
    return F.augment(images.permute(0, 2, 3, 1), nothing, mean=spec.mean, std=spec.std, channels_last=channels_last)
