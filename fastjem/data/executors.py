"""Who reads, decodes and crops: NVIDIA DALI on the GPU or the CPU, or Pillow in a torch DataLoader's workers."""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch

from fastjem.data.folder import ImageFolder
from fastjem.data.loader import Batch, ViewLoader
from fastjem.data.views import ViewSpec
from fastjem.errors import UserError, nearest

LOADERS = ("auto", "dali", "dali-cpu", "torch")


class Loader(Protocol):
    def __iter__(self) -> Iterator[Batch]: ...


def create(
    name: str, folder: ImageFolder, specs: Sequence[ViewSpec], device: torch.device, *, workers: int, **position: Any
) -> tuple[Loader, str]:
    """A loader, and in words which.

    Args:
        name: "auto": DALI on the GPU where training runs on one and DALI works there, else torch. Others must work.
        workers: processes of torch's loader, threads of DALI.
        position: batch, seed, start, stop, rank, ranks, as of `ViewLoader`.

    Raises:
        UserError: for a loader asked for by name that can't run here, with its reason.
    """
    if name not in LOADERS:
        raise nearest("loader", name, LOADERS)
    if name == "dali" and device.type != "cuda":
        raise UserError(f"--loader dali decodes on the GPU, and the run's device is {device}; --loader dali-cpu works")
    if name in ("dali", "dali-cpu") or (name == "auto" and device.type == "cuda"):
        from fastjem.data.dali import DaliLoader

        place = torch.device("cpu") if name == "dali-cpu" else device
        try:
            loader = DaliLoader(folder, specs, threads=workers, device=place, **position)
            return loader, f"DALI decodes on {place}"
        except UserError as error:
            if name != "auto":
                raise
            why = f" ({error})"
    else:
        why = ""
    loader = ViewLoader(folder, specs, workers=workers, pin_memory=device.type == "cuda", **position)
    return loader, f"Pillow decodes in {workers} worker processes{why}"
