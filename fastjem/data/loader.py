"""Views of files on the CPU: Pillow reads, torchvision moves the pixels, a DataLoader's workers do so in parallel."""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as V

from fastjem.data.folder import ImageFolder
from fastjem.data.parameters import Parameters, draw, generator
from fastjem.data.views import ViewSpec
from fastjem.errors import UserError

ADJUST = {
    "brightness": V.adjust_brightness,
    "contrast": V.adjust_contrast,
    "saturation": V.adjust_saturation,
    "hue": V.adjust_hue,
}


def execute(image: Image.Image, spec: ViewSpec, parameters: Parameters) -> Tensor:
    """One view, [3, H, W] uint8."""
    mode = InterpolationMode.BICUBIC if spec.bicubic else InterpolationMode.BILINEAR
    view = V.resized_crop(image, *parameters.box, [spec.size, spec.size], interpolation=mode, antialias=True)
    if parameters.flip:
        view = V.horizontal_flip(view)
    for name, factor in parameters.jitter:
        view = ADJUST[name](view, factor)
    if parameters.grayscale:
        view = V.rgb_to_grayscale(view, num_output_channels=3)
    if parameters.sigma is not None:
        # 3 sigma each side; a window is at most the image
        window = min(2 * int(np.ceil(3 * parameters.sigma)) + 1, (spec.size - 1) // 2 * 2 + 1)
        view = V.gaussian_blur(view, [window, window], [parameters.sigma, parameters.sigma])
    if parameters.solarize:
        view = V.solarize(view, 128)
    return torch.from_numpy(np.array(view)).permute(2, 0, 1)  # in memory the channels stay last


@dataclass
class Batch:
    views: list[Tensor]  # V tensors [B, 3, H, W], uint8
    unreadable: list[tuple[str, str]]  # (path, reason) of files that another image replaced


class _Samples(Dataset):
    """(epoch, sample) -> its views. A file that can't be read is replaced by the next that can, and named."""

    def __init__(self, folder: ImageFolder, specs: Sequence[ViewSpec], seed: int):
        self.folder, self.specs, self.seed = folder, list(specs), seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[list[Tensor] | None, list[tuple[str, str]]]:
        epoch, sample = key
        unreadable = []
        for i in range(len(self.folder)):
            at = (sample + i) % len(self.folder)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # Pillow warns of harmless EXIF trouble, once per file
                    image = self.folder.image(at)
                break
            except Exception as error:  # whatever a decoder may raise on a broken file
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                path = self.folder.path(at)
                unreadable.append((path, reason.replace(f" '{path}'", "")))
        else:
            return None, unreadable
        views = []
        for view, spec in enumerate(self.specs):
            random = generator(self.seed, epoch, sample, view)
            views.append(execute(image, spec, draw(spec, image.height, image.width, random)))
        return views, unreadable


def _collate(samples: list) -> Batch:
    unreadable = [bad for _, some in samples for bad in some]
    views = [sample for sample, _ in samples]
    if any(sample is None for sample in views):
        return Batch([], unreadable)
    # [B, H, W, 3] in memory, as it was decoded: no byte changes its place
    stacked = [torch.stack([x.permute(1, 2, 0) for x in one]) for one in zip(*views, strict=True)]
    return Batch([x.permute(0, 3, 1, 2) for x in stacked], unreadable)


class _Order:
    """The samples of each batch, from the first step asked for to the last: a permutation keyed (seed, epoch)."""

    def __init__(self, samples: int, batch: int, seed: int, start: int, stop: int, rank: int, ranks: int):
        self.samples, self.batch, self.seed = samples, batch, seed
        self.start, self.stop, self.rank, self.ranks = start, stop, rank, ranks

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        per_epoch, epoch_of_order, order = self.samples // self.batch, -1, np.arange(0)
        local = self.batch // self.ranks
        for step in range(self.start, self.stop):
            epoch, position = divmod(step, per_epoch)
            if epoch != epoch_of_order:
                order = np.random.Generator(np.random.Philox(key=[self.seed, epoch + 1])).permutation(self.samples)
                epoch_of_order = epoch
            first = position * self.batch + self.rank * local
            yield [(epoch, int(sample)) for sample in order[first : first + local]]


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
        order = _Order(len(folder), batch, seed, start, stop, rank, ranks)
        self.loader = DataLoader(
            _Samples(folder, specs, seed),
            batch_sampler=order,  # type: ignore[arg-type]
            num_workers=workers,
            collate_fn=_collate,
            pin_memory=pin_memory,
            prefetch_factor=4 if workers else None,
            worker_init_fn=_one_thread,
            generator=torch.Generator(),  # else its first batch takes a number from the run's: not where it is resumed
        )

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.loader:
            if not batch.views:
                path, reason = batch.unreadable[0]
                raise UserError(f"none of the files can be read; the first: {path}: {reason}")
            yield batch


def _one_thread(worker: int) -> None:
    import signal

    torch.set_num_threads(1)
    for number in (signal.SIGINT, signal.SIGTERM):  # both may go to the whole group; the main process ends the run
        signal.signal(number, signal.SIG_IGN)


def normalise(
    views: Sequence[Tensor],
    specs: Sequence[ViewSpec],
    device: torch.device,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> list[Tensor]:
    """uint8 -> float32 with the recipe's mean and deviation, on the device."""
    out = []
    for view, spec in zip(views, specs, strict=True):
        mean, std = _constants(spec.mean, spec.std, device)
        view = view.to(device, non_blocking=True)
        out.append(view.to(torch.float32, memory_format=memory_format).sub_(mean).div_(std))
    return out


_CACHE: dict[tuple, tuple[Tensor, Tensor]] = {}


def _constants(mean: tuple, std: tuple, device: torch.device) -> tuple[Tensor, Tensor]:
    key = (mean, std, str(device))
    if key not in _CACHE:
        _CACHE[key] = tuple(torch.tensor(x, device=device).view(3, 1, 1) * 255 for x in (mean, std))  # type: ignore
    return _CACHE[key]
