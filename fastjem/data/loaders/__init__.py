"""The loaders by name, and which of them a run reads its images by.

A loader is made by `LOADERS[name](source, specs, order, budget)` and yields `Crops`.
"""

from collections.abc import Sequence

from fastjem.data.loaders import dali, memory
from fastjem.data.loaders.ahead import files_at_a_time, order_told, windows
from fastjem.data.loaders.protocol import Budget, Loader, LoaderFactory, Order, Windows, images_per_epoch
from fastjem.data.loaders.staged import Staged
from fastjem.data.loaders.torch import TorchLoader
from fastjem.data.source import Source, are_pairs
from fastjem.data.views import ViewSpec
from fastjem.errors import UserError

__all__ = [
    "LOADERS",
    "NAMES",
    "Budget",
    "Loader",
    "LoaderFactory",
    "Order",
    "Staged",
    "TorchLoader",
    "Windows",
    "choose",
    "create",
    "files_at_a_time",
    "holds_images",
    "images_per_epoch",
    "order_told",
    "windows",
]

LOADERS: dict[str, LoaderFactory] = {
    "dali": dali.on_gpu,
    "dali-cpu": dali.on_cpu,
    "memory": memory.create,
    "torch": TorchLoader,
}
NAMES = ("auto", *LOADERS)  # what a user may ask for


def create(name: str, source: Source, specs: Sequence[ViewSpec], order: Order, budget: Budget) -> Loader:
    """The loader of that name, one of `NAMES`; `loader.reads` says in words which it is.

    Raises:
        UserError: for one that was asked for by name and can't run here, with its reason.
    """
    chosen = choose(name, source, specs, budget)
    if name == "auto" and chosen == "memory" and not source.decoded:
        try:
            return memory.create(source, specs, order, budget, unchanged=True)
        except memory.OtherSizeError:
            chosen = _of_files(source, budget)
    return LOADERS[chosen](source, specs, order, budget)


def choose(name: str, source: Source, specs: Sequence[ViewSpec], budget: Budget) -> str:
    """The name of a loader for "auto", and any other name as it is, if that loader can run here.

    "auto" is, for a source of pixels, "memory" where they fit the budget and "torch" where they don't. For one of files
    it is "memory" where images are small and of one size (`memory.are_small`); else "dali" where training runs on a GPU
    and DALI works there, "dali-cpu" where DALI works on the GPU's host alone, else "torch": a run on the CPU takes DALI
    only when it is named, and so does one whose images DALI can't decode, as they are read as float32.

    Raises:
        UserError: if the one that was named can't run here, with the reason.
    """
    if name not in NAMES:
        raise UserError(f"--loader must be one of {', '.join(NAMES)}, got {name}")
    if are_pairs(source):
        if name not in ("auto", "torch"):
            raise UserError(f"--loader {name} reads one source, and these are pairs of images; torch can")
        return "torch"
    if name == "auto" and source.decoded:
        return "memory" if memory.fits_in_memory(source, specs, budget.memory) else "torch"
    if name == "auto":
        holds = memory.are_small(source, specs, budget.memory) if budget.holds is None else budget.holds
        return "memory" if holds else _of_files(source, budget)
    if name.startswith("dali") and (why := dali.why_not("cuda" if name == "dali" else "cpu")):
        raise UserError(f"--loader {name} can't run here: {why}")
    return name


def holds_images(loader: Loader) -> bool:
    """Whether a run's loader holds all images in memory: it decides about pixels, so a run keeps it."""
    return isinstance(loader.loader if isinstance(loader, Staged) else loader, memory.MemoryLoader)


def _of_files(source: Source, budget: Budget) -> str:
    """Who reads files that aren't held in memory."""
    return "torch" if memory.holds_floats(source) else dali.best(budget.device)
