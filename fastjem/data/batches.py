"""What every loader hands out: crops of a batch, and the order of samples. The rest of a view is `augmented`."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import fastjem.functional as F
from fastjem.data.views import ViewSpec

Key = tuple[int, int]  # (epoch, sample)


@dataclass
class Crops:
    """V views of B images, cut and resized; colours are still the images' own."""

    views: list[Tensor]  # V tensors [B, size, size, 3], uint8
    tables: list[Tensor]  # V tensors [B, P]: what is still to be done
    unreadable: list[tuple[str, str]]  # (path, reason) of files that another image replaced


class Order:
    """The samples of each batch, from the first step asked for to the last: a permutation keyed (seed, epoch)."""

    def __init__(self, samples: int, batch: int, seed: int, start: int, stop: int, rank: int, ranks: int):
        self.samples, self.batch, self.seed = samples, batch, seed
        self.start, self.stop, self.rank, self.ranks = start, stop, rank, ranks

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[Key]]:
        per_epoch, epoch_of_order, order = self.samples // self.batch, -1, np.arange(0)
        local = self.batch // self.ranks
        for step in range(self.start, self.stop):
            epoch, position = divmod(step, per_epoch)
            if epoch != epoch_of_order:
                order = np.random.Generator(np.random.Philox(key=[self.seed, epoch + 1])).permutation(self.samples)
                epoch_of_order = epoch
            first = position * self.batch + self.rank * local
            yield [(epoch, int(sample)) for sample in order[first : first + local]]


def augmented(
    crops: Crops,
    specs: Sequence[ViewSpec],
    device: torch.device,
    *,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
) -> list[Tensor]:
    """The views as the encoder takes them: V tensors [B, 3, size, size] on the device."""

    def one(view: Tensor, table: Tensor, spec: ViewSpec) -> Tensor:
        view, table = view.to(device, non_blocking=True), table.to(device, non_blocking=True)
        return F.augment(view, table, mean=spec.mean, std=spec.std, dtype=dtype, channels_last=channels_last)

    return [one(*parts) for parts in zip(crops.views, crops.tables, specs, strict=True)]
