"""A .npz or .npy file of images."""

import functools
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastjem.data.files import check_size
from fastjem.errors import UserError

ENDINGS = (".npz", ".npy")


class Arrays:
    """The images of a file that `read_arrays` can read, called 0, 1, 2, ...

    Labels are renumbered to the classes that are there. Where all images have one label they tell nothing apart: such a
    file has no labels.

    The images of a .npy file stay in it: they are mapped, so that processes share what memory holds of them and they
    may be more than it can. A mapped file that shrinks would end the process (SIGBUS), so its size is looked at before
    an image is copied out of it. A .npz file is read whole, which checks its sums; forked workers share its pages.
    """

    decoded = True

    def __init__(self, root: str | os.PathLike[str]):
        self.root = os.fspath(root)
        found = read_once(self.root)
        self.images = found["images"]
        self.mapped = os.path.getsize(self.root) if self.root.endswith(".npy") else 0  # bytes
        self.classes: list[str] = []
        self.labels: np.ndarray | None = None
        if "labels" in found:
            values, labels = np.unique(found["labels"], return_inverse=True)
            if len(values) > 1:
                names = found.get("classes")
                self.classes = [str(value if names is None else names[value]) for value in values]
                self.labels = labels

    @staticmethod
    def recognises(root: Path) -> bool:
        return root.suffix in ENDINGS and root.is_file()

    @staticmethod
    def read_named(root: str, name: str) -> np.ndarray:
        return Arrays(root).read(int(name))  # the file is opened once

    def __reduce__(self) -> tuple[Any, ...]:
        return Arrays, (self.root,)  # a worker that isn't a fork reads the file instead of being sent all its pixels

    def __len__(self) -> int:
        return len(self.images)

    def name(self, i: int) -> str:
        return str(i)

    def read(self, i: int) -> np.ndarray:
        """[H, W, C]; OSError where the file isn't what it was."""
        if not self.mapped:
            return self.images[i]
        if os.path.getsize(self.root) != self.mapped:
            raise OSError(f"{self.root} has changed since it was opened")
        return np.array(self.images[i])


def channels_axis(shape: Sequence[int]) -> int:
    """Which axis of [N, H, W, C] or [N, C, H, W] the channels are: one of 3, else the shorter; the last where they are
    alike."""
    if 3 in (shape[1], shape[3]):
        return 3 if shape[3] == 3 else 1
    return 1 if shape[1] < shape[3] else 3


def read_arrays(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """What a .npz or .npy file holds: `images` [N, H, W, C] of integers or floats, stored so, as [N, C, H, W] or as
    [N, H, W], those of a .npy file mapped and read-only; in a .npz file perhaps `labels` [N] int64 and `classes`, the
    names that they number.

    Raises:
        UserError: for anything else, with what came.
    """
    found = _loaded(path)
    images = found["images"]
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.dtype.kind not in "biuf" or 0 in images.shape:
        raise UserError(
            f"{path}: images must be [N, H, W, C], [N, C, H, W] or [N, H, W] integers or floats, "
            f"got {found['images'].shape} {images.dtype}"
        )
    arrays = {"images": images.transpose(0, 2, 3, 1) if channels_axis(images.shape) == 1 else images}
    if "labels" in found:
        labels = found["labels"]
        if labels.size != len(images) or labels.dtype.kind not in "iu":
            raise UserError(f"{path}: labels must be [{len(images)}] integers, got {labels.shape} {labels.dtype}")
        arrays["labels"] = labels.astype(np.int64).reshape(-1)
        if "classes" in found:
            arrays["classes"] = names = found["classes"]
            if names.ndim != 1 or names.dtype.kind not in "USiu":
                raise UserError(f"{path}: classes must be a list of names, got {names.shape} {names.dtype}")
            if arrays["labels"].min() < 0 or arrays["labels"].max() >= names.size:
                raise UserError(f"{path}: labels must number the {names.size} classes")
    return arrays


def _loaded(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The arrays of the file that are ours, once its header says that they can be held."""
    try:
        opened = np.load(path, mmap_mode="r", allow_pickle=False)  # of a .npy file the header alone
        if isinstance(opened, np.ndarray):
            _check_sizes(opened.shape)
            return {"images": np.asarray(opened)}
        with opened:
            names = sorted(opened)
            if "images" not in names:
                raise UserError(f"must hold an array `images`, and may hold `labels`; it holds {names}")
            with opened.zip.open("images.npy") as file:
                _check_held(*_header(file))
            return {name: opened[name] for name in ("images", "labels", "classes") if name in names}
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:  # a broken archive raises whatever zipfile, zlib or numpy may
        raise UserError(f"{path} can't be read as .npz or .npy: {str(error).partition('. ')[0]}") from None


def _header(file: Any) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and type of an array that is stored, without its values."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    return shape, dtype


def _check_sizes(shape: tuple[int, ...]) -> None:
    """UserError for images that are too large each."""
    if len(shape) == 4:
        axis = channels_axis(shape)
        height, width = (size for i, size in enumerate(shape) if i not in (0, axis))
        try:
            check_size(width, height, shape[axis])
        except ValueError as error:
            raise UserError(f"images of {error}") from None


def _check_held(shape: tuple[int, ...], dtype: np.dtype) -> None:
    """UserError for images that are too large each, or more together than this machine has memory."""
    _check_sizes(shape)
    needed = math.prod(shape) * dtype.itemsize
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else math.inf
    if needed > memory:
        raise UserError(f"its images take {needed / 2**30:.1f} GiB, and this machine has {memory / 2**30:.1f}")


def read_once(path: str) -> dict[str, np.ndarray]:
    """`read_arrays`, once a process for each version of the file; forked workers share its pages."""
    return _read_version(path, os.stat(path).st_mtime_ns)


@functools.lru_cache(maxsize=4)
def _read_version(path: str, changed: int) -> dict[str, np.ndarray]:
    return read_arrays(path)
