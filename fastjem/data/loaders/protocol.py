"""What a loader is, and what it is told."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike

from fastjem.data.batch import Crops
from fastjem.data.source import Source
from fastjem.data.upload import to_device
from fastjem.data.views import ViewSpec

Key = tuple[int, int]  # (epoch, sample)
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Windows:
    """Images that lie in files of which there are some at a time on this machine.

    In each epoch the files are taken in another order, `most` of them at a time at most: their images, shuffled, lie
    evenly between the epoch's other images, and come before those of the next files.
    """

    first: int  # the number of the first of these images in the data
    counts: tuple[int, ...]  # images of each file
    most: int  # files at a time

    def times(self, images: np.ndarray, chance: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """[n]: when in an epoch, from 0 to 1, each of these images is seen.

        Args:
            images: [n] their numbers from `first` on.
            chance: [n] evenly from 0 to 1.
        """
        windows = np.array_split(random.permutation(len(self.counts)), -(-len(self.counts) // self.most))
        of_file = np.empty(len(self.counts), np.int64)
        for number, files in enumerate(windows):
            of_file[files] = number
        window = of_file[np.searchsorted(np.cumsum(self.counts), images, side="right")]  # [n]
        seen = np.bincount(window, minlength=len(windows))  # images of each window
        return (np.cumsum(seen)[window] - seen[window] + chance * seen[window]) / max(len(images), 1)


@dataclass(frozen=True, kw_only=True)
class Order:
    """The samples of each batch of this rank from step `start` to `stop`, as lists of (epoch, sample).

    Each epoch is a permutation keyed (seed, epoch): the place in a run is told by the step alone. It is any permutation
    or, of data with `windows`, one by files. An epoch is the whole batches in the data, and of them the whole groups of
    `accumulate`, that make an optimiser's step.

    A sample is an image's number in the data; where an image is seen once more in an epoch, it is that number and
    `samples` more, so that it has other views.
    """

    samples: int  # in the data
    parts: tuple[tuple[int, float], ...] = ()  # of each of several sources: images, how often they are seen in an epoch
    windows: tuple[Windows, ...] = ()  # of images that can't be seen in any order
    batch: int  # images over all ranks; each rank has batch / ranks of them
    accumulate: int = 1
    seed: int = 0
    start: int = 0
    stop: int
    rank: int = 0
    ranks: int = 1

    @property
    def batches_per_epoch(self) -> int:
        whole = self.images_per_epoch // self.batch
        return whole - whole % self.accumulate or whole  # fewer batches than one step takes: it takes several epochs

    @property
    def images_per_epoch(self) -> int:
        return images_per_epoch(self.samples, self.parts)

    @property
    def of_rank(self) -> int:
        """Images of one batch that are this rank's."""
        return self.batch // self.ranks

    def __len__(self) -> int:
        return self.stop - self.start

    def part(self, start: int, stop: int) -> "Order":
        """The batches of these that are from `start` to before `stop`: they have the samples that they had."""
        start = max(start, self.start)
        return replace(self, start=start, stop=max(min(stop, self.stop), start))

    def __iter__(self) -> Iterator[list[Key]]:
        batches_per_epoch = self.batches_per_epoch
        permuted_epoch = -1
        permutation = np.arange(0)
        for step in range(self.start, self.stop):
            epoch, batch = divmod(step, batches_per_epoch)
            if epoch != permuted_epoch:
                permutation = self.permutation(epoch)
                permuted_epoch = epoch
            first = batch * self.batch + self.rank * self.of_rank
            yield [(epoch, int(sample)) for sample in permutation[first : first + self.of_rank]]

    def permutation(self, epoch: int) -> np.ndarray:
        """[images_per_epoch] int64: the order of an epoch."""
        random = np.random.Generator(np.random.Philox(key=[self.seed, epoch + 1]))
        all_once = all(weight == 1 for _, weight in self.parts)
        if self.windows:
            return self._windowed(np.arange(self.samples) if all_once else self._chosen(epoch), random)
        order = random.permutation(self.images_per_epoch)
        return order if all_once else self._chosen(epoch)[order]

    def _windowed(self, chosen: np.ndarray, random: np.random.Generator) -> np.ndarray:
        times = random.random(len(chosen))
        images = chosen % self.samples
        for part in self.windows:
            mine = np.flatnonzero((images >= part.first) & (images < part.first + sum(part.counts)))
            times[mine] = part.times(images[mine] - part.first, times[mine], random)
        return chosen[np.argsort(times, kind="stable")]

    def _chosen(self, epoch: int) -> np.ndarray:
        """[images_per_epoch] int64: the samples of an epoch, part after part.

        Of a part of which a share is seen, epochs take one stretch after another of a circle on which its images lie in
        an order keyed (seed, part): two epochs share as few images as can be, and all images are seen alike.
        """
        chosen = []
        for part, (count, weight) in enumerate(self.parts):
            first = sum(images for images, _ in self.parts[:part])
            whole, share = _times(count, weight)
            chosen += [np.arange(first, first + count) + again * self.samples for again in range(whole)]
            if not share:
                continue
            key = np.array([self.seed, 2**63 + part], np.uint64)  # a list of them would be rounded to floats
            circle = np.random.Generator(np.random.Philox(key=key)).permutation(count)
            stretch = circle[(epoch * share + np.arange(share)) % count]
            chosen.append(first + stretch + whole * self.samples)
        return np.concatenate(chosen)


def images_per_epoch(samples: int, parts: Sequence[tuple[int, float]]) -> int:
    """All samples, or as many of each part as its weight says."""
    return sum(whole * count + share for count, weight in parts for whole, share in [_times(count, weight)]) or samples


def _times(count: int, weight: float) -> tuple[int, int]:
    """How often all of a part's images are seen in an epoch, and how many of them once more; one at least."""
    images = max(round(count * weight), 1)
    return images // count, images % count


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a loader may use of the machine."""

    workers: int = 0  # processes of the torch loader, threads of DALI's
    memory: float = 4.0  # GiB that the memory loader's images may take
    holds: bool | None = None  # whether "auto" holds a folder's images in memory; None: as they are (a run keeps it)
    device: torch.device = CPU  # the run's
    decoder_share: float | None = None  # of JPEG files, for a GPU's fixed-function decoder; None: may be measured
    agree: Callable[[float], float] = float  # the share that all ranks take when each has measured its own


class Loader(Protocol):
    """Batches of crops in an `Order`, without a pause between epochs."""

    reads: str  # who decodes the images and where, in words
    decoder_share: float | None  # the budget's, or what was measured: it decides about pixels, so a run keeps it

    def __iter__(self) -> Iterator[Crops]: ...

    def at(self, specs: Sequence[ViewSpec], order: Order) -> "Loader":
        """The same images by the same means, with these views, in this order."""
        ...


class LoaderFactory(Protocol):
    def __call__(self, source: Source, specs: Sequence[ViewSpec], order: Order, budget: Budget) -> Loader: ...


def mask_keys(index: Sequence[int] | torch.Tensor, samples: ArrayLike, images: int) -> torch.Tensor:
    """[B] int64: the numbers `index` of the images that are there, and `images` more for each time that the epoch had
    the `samples` before: an image that is seen again has other masks."""
    index = torch.as_tensor(index)
    again = torch.as_tensor(np.asarray(samples) // images * images)
    return index + to_device(again, index.device)


def labels_of(source: Source, index: Sequence[int]) -> torch.Tensor | None:
    """[B] int64: the labels of these images, if the source has any."""
    return None if source.labels is None else torch.as_tensor(source.labels[list(index)], dtype=torch.int64)
