"""Crops of images with Pillow's pixels (`rgb.py`), in a torch DataLoader's workers."""

import contextlib
import signal
from collections.abc import Iterator, Sequence
from multiprocessing import active_children
from multiprocessing.process import BaseProcess

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from fastjem.data.batch import Crops
from fastjem.data.loaders import ahead, rgb
from fastjem.data.loaders.protocol import Budget, Key, Order, labels_of, mask_keys
from fastjem.data.parameters import Parameters, column
from fastjem.data.picture import Bands
from fastjem.data.sharing import check_semaphores, share, shared_like
from fastjem.data.size import height_and_width
from fastjem.data.source import NoneReadable, Read, Source, read_or_next
from fastjem.data.upload import uploaded
from fastjem.data.views import ViewSpec

HELD = 2**23  # bytes of decoded images that a batch holds at a time: what stays in a processor's cache is read faster


def crop(image: rgb.Pixels, spec: ViewSpec, row: np.ndarray) -> np.ndarray:
    """The window of a table's row [P], resized with antialiasing: [H, W, C] uint8 or, of `Bands`, float32."""
    if isinstance(image, Bands):
        return image.window(row, spec.size, spec.bicubic)
    top, left, height, width = (int(x) for x in row[column.TOP : column.WIDTH + 1])
    return rgb.window(image, (left, top, left + width, top + height), height_and_width(spec.size), spec.bicubic)


def _bytes_of(image: rgb.Pixels) -> int:
    """Pillow has four bytes a pixel."""
    if isinstance(image, Bands):
        return image.values.nbytes
    return image.nbytes if isinstance(image, np.ndarray) else 4 * image.width * image.height


class _BatchesByKeys(Dataset):
    """A batch's (epoch, sample) keys -> its crops; without views where not one image can be read."""

    def __init__(self, source: Source, specs: Sequence[ViewSpec], seed: int):
        self.source = source
        self.specs = list(specs)
        self.seed = seed
        self.parameters = Parameters(specs)

    def __getitem__(self, keys: list[Key]) -> Crops:
        epoch = keys[0][0]  # a batch lies in one epoch
        index: list[int] = []
        asked = [sample for _, sample in keys]
        unreadable: list[tuple[str, str]] = []
        tables: list[np.ndarray] = []  # [V, b, P] each
        views: list[torch.Tensor] = []
        try:
            for samples, read in self._read(asked):
                # view i is cut from the image of source i % sources
                images = [[found.value[v % len(found.value)] for found in read] for v in range(len(self.specs))]
                sizes = np.array([[rgb.size_of(image) for image in of_view] for of_view in images])
                heights, widths = np.moveaxis(sizes, 2, 0)
                tables.append(self.parameters(self.seed, epoch, samples, heights, widths))
                cut = zip(self.specs, tables[-1], images, strict=True)
                for view, (spec, table, of_view) in enumerate(cut):
                    for i, (image, row) in enumerate(zip(of_view, table, strict=True)):
                        pixels = crop(image, spec, row)
                        if len(views) == view:
                            views.append(shared_like(pixels, len(keys)))
                        views[view].numpy()[len(index) + i] = pixels
                index += [found.sample for found in read]
                unreadable += [one for found in read for one in found.unreadable]
        except NoneReadable as error:  # a worker's exception would arrive without its type
            return Crops([], [], torch.empty(0, dtype=torch.int64), epoch, None, error.unreadable)
        crops = Crops(
            views,
            list(torch.from_numpy(np.concatenate(tables, 1))),
            torch.tensor(index),
            epoch,
            labels_of(self.source, index),
            unreadable,
            mask_keys(index, asked, len(self.source)),
        )
        of_images = (one for one in (crops.index, crops.labels, crops.keys) if one is not None)
        share((*crops.tables, *of_images))
        return crops

    def _read(self, samples: list[int]) -> Iterator[tuple[list[int], list[Read[list[rgb.Pixels]]]]]:
        """The samples and their images, as many at a time as take `HELD` bytes; of small ones the whole batch."""
        waiting: list[int] = []
        read: list[Read[list[rgb.Pixels]]] = []
        held = 0
        for sample in samples:
            found = read_or_next(self.source, sample, lambda i: rgb.decoded(self.source, i))
            waiting.append(sample)
            read.append(found)
            held += sum(_bytes_of(image) for image in found.value)
            if held >= HELD:
                yield waiting, read
                waiting, read, held = [], [], 0
        if waiting:
            yield waiting, read


class TorchLoader:
    """Crops in `budget.workers` processes; 0: in this one. A process has one batch ready and makes another."""

    def __init__(self, source: Source, specs: Sequence[ViewSpec], order: Order, budget: Budget):
        self.source = source
        self.order = order
        self.budget = budget
        rgb.tall_first()  # tried before there are workers, who would each try it
        self.reads = f"images are decoded by Pillow in {budget.workers} processes"
        self.decoder_share = budget.decoder_share
        self.loader = DataLoader(
            _BatchesByKeys(source, specs, order.seed),
            batch_size=None,
            sampler=order,  # type: ignore[arg-type]
            num_workers=budget.workers,
            pin_memory=budget.device.type == "cuda",
            prefetch_factor=2 if budget.workers else None,
            worker_init_fn=_one_thread,
            generator=torch.Generator(),  # else the first batch takes a number of the run's, and a resumed run differs
        )

    def at(self, specs: Sequence[ViewSpec], order: Order) -> "TorchLoader":
        return TorchLoader(self.source, specs, order, self.budget)

    def __iter__(self) -> Iterator[Crops]:
        """The workers start at once, and are gone when the iteration is, a stuck one too."""
        check_semaphores(self.loader.num_workers)
        ahead.begins(self.source, self.order)
        others = set(active_children())
        batches = iter(self.loader)
        checked = _checked(batches, set(active_children()) - others)
        return uploaded(ahead.followed(checked, self.source, self.order), self.budget.device)


def _checked(batches: Iterator[Crops], workers: set[BaseProcess]) -> Iterator[Crops]:
    try:
        for crops in batches:
            if not crops.views:
                raise NoneReadable(crops.unreadable)
            # a DataLoader turns the tuples in a list to lists
            yield crops._replace(unreadable=[(path, why) for path, why in crops.unreadable])
    except BaseException:
        for worker in workers:  # which ignores what asks it to end; Python would wait for it at its own end
            worker.kill()
        for worker in workers:
            with contextlib.suppress(RuntimeError):  # torch's handler of SIGCHLD, which tells of those killed here
                worker.join()
        raise


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)
    for number in (signal.SIGINT, signal.SIGTERM):  # both may go to the whole group; the main process ends the run
        signal.signal(number, signal.SIG_IGN)
