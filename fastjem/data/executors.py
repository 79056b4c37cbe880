"""Who makes a run's views, DALI or torch, behind one iterator of batches that are ready for the encoder."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import fastjem.functional as F
from fastjem.data.dali import DaliViews, drawn
from fastjem.data.folder import ImageFolder
from fastjem.data.loader import ViewLoader, _Order, normalise
from fastjem.data.views import ViewSpec


@dataclass
class Ready:
    """One batch on the training's device."""

    views: list[Tensor]  # V tensors [B, 3, size, size], float32, normalised
    unreadable: list[tuple[str, str]]  # (path, reason) of files that another image replaced


def batches(
    loader: str, folder: ImageFolder, specs: Sequence[ViewSpec], *, device: torch.device, layout: torch.memory_format,
    batch: int, seed: int, start: int, stop: int, workers: int, rank: int = 0, ranks: int = 1,
) -> Iterator[Ready]:  # fmt: skip
    """From step `start` to `stop`, arguments as of `ViewLoader`.

    Windows and all other parameters are the same whoever makes the views; pixels differ by rounding, and at DALI's
    edges (see `DaliViews`), so that a run stays with the loader it began with.

    Args:
        loader: "dali", "dali-cpu" or "torch", as `fastjem.data.dali.choose` says.
    """
    if loader == "torch":
        source = ViewLoader(
            folder, specs, batch=batch, seed=seed, start=start, stop=stop, workers=workers, rank=rank, ranks=ranks,
            pin_memory=device.type == "cuda",
        )  # fmt: skip
        for made in source:
            yield Ready(normalise(made.views, specs, device, layout), made.unreadable)
        return
    order = _Order(len(folder), batch, seed, start, stop, rank, ranks)
    source_of_crops = DaliViews(
        folder, specs, order, drawn(specs, seed), batch=batch // ranks, threads=workers,
        device="cuda" if loader == "dali" else "cpu",
    )  # fmt: skip
    last = layout == torch.channels_last
    for crops in source_of_crops:
        views = [
            F.augment(view.to(device), table.to(device), mean=spec.mean, std=spec.std, channels_last=last)
            for view, table, spec in zip(crops.views, crops.tables, specs, strict=True)
        ]
        yield Ready(views, crops.unreadable)
