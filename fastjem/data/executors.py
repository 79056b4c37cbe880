"""Which loader a run reads its images by."""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch

from fastjem.data import dali
from fastjem.data.batches import Crops, Order
from fastjem.data.folder import ImageFolder, none_readable, readable
from fastjem.data.loader import ViewLoader
from fastjem.data.memory import GIBIBYTE, ImageArray, MemoryLoader
from fastjem.data.views import ViewSpec
from fastjem.errors import UserError

LOADERS = dali.LOADERS
WORTH_TUNING = 1000  # batches of a run that is long enough to measure the decoder's share


class Loader(Protocol):
    def __iter__(self) -> Iterator[Crops]: ...


def create(
    name: str, folder: ImageFolder, specs: Sequence[ViewSpec], device: torch.device, *, workers: int, memory: float,
    batch: int, seed: int, start: int, stop: int, rank: int, ranks: int,
    share: float | None = None, agree: Callable[[float], float] = float,
) -> tuple[Loader, str]:  # fmt: skip
    """The loader, and in words which.

    Args:
        name: see `fastjem.data.dali.choose`; "memory" holds all images, shrunk to 8/7 of the views' size at most; for a
            file of arrays within the budget it is the choice.
        workers: processes of torch's loader, threads of DALI.
        memory: GiB that the images may take.
        share: of the JPEG files, for a GPU's fixed-function decoder. None: measured, where the run is long enough.
        agree: what all ranks take when each has measured its own share.

    Raises:
        UserError: for one that was asked for by name and can't run here, with its reason.
    """
    if folder.arrays and name.startswith("dali"):
        raise UserError(f"--loader {name} reads files, and {folder.root} holds pixels; memory or torch can")
    if folder.arrays and name == "auto":
        name = "memory" if 3 * len(folder) * _side(folder, specs) ** 2 <= memory * GIBIBYTE else "torch"
    name = dali.choose(name, device)
    order = {"batch": batch, "seed": seed, "start": start, "stop": stop, "rank": rank, "ranks": ranks}
    if name == "memory":
        size = _side(folder, specs)
        array = ImageArray.from_folder(folder.root, size=size, budget=memory * GIBIBYTE)
        said = f"{len(array)} images of {size} x {size} are held in memory on {device}"
        return MemoryLoader(array.to(device), specs, **order), said
    if name == "torch":
        loader = ViewLoader(folder, specs, workers=workers, pin_memory=device.type == "cuda", **order)
        return loader, f"images are decoded by Pillow in {workers} processes"

    def views(place: str, share: float) -> dali.DaliViews:
        keys, tables = Order(len(folder), batch, seed, start, stop, rank, ranks), dali.drawn(specs, seed)
        return dali.DaliViews(
            folder, specs, keys, tables, batch=batch // ranks, device=place, threads=workers, hardware=share
        )

    if name == "dali-cpu":
        return views("cpu", 0.0), "images are decoded by DALI on the CPU"
    why = ""
    if share is None and stop - start >= WORTH_TUNING:
        rates = dali.tune(lambda share: iter(views("cuda", share)))
        share = agree(max(rates, key=rates.__getitem__))
        why = f"; images a second by share: {', '.join(f'{one:g}: {rate:.0f}' for one, rate in rates.items())}"
    share = dali.SHARE if share is None else share
    said = f"images are decoded by DALI on the GPU, {share:.0%} of JPEG files by its fixed-function decoder{why}"
    return views("cuda", share), said


def _side(folder: ImageFolder, specs: Sequence[ViewSpec]) -> int:
    """Pixels of the images that are held in memory: no more than the first image has, or than the views need."""
    image, bad = readable(folder, 0, folder.image)
    if image is None:
        raise none_readable(bad)
    return min(*image.size, round(specs[0].size * 8 / 7))
