"""A .npz or .npy file of images."""

import functools
import os
from pathlib import Path
from typing import Any

import numpy as np

from fastjem.errors import UserError

ENDINGS = (".npz", ".npy")


class Arrays:
    """The images of a file that `read_arrays` can read, called 0, 1, 2, ...

    Labels are renumbered to the classes that are there. Where all images have one label they tell nothing apart: such a
    file has no labels.
    """

    decoded = True

    def __init__(self, root: str | os.PathLike[str]):
        self.root = os.fspath(root)
        found = read_once(self.root)
        self.images = found["images"]
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
        return read_once(root)["images"][int(name)]

    def __reduce__(self) -> tuple[Any, ...]:
        return Arrays, (self.root,)  # a worker that isn't a fork reads the file instead of being sent all its pixels

    def __len__(self) -> int:
        return len(self.images)

    def name(self, i: int) -> str:
        return str(i)

    def read(self, i: int) -> np.ndarray:
        """[H, W, 3] uint8."""
        return self.images[i]


def is_rgb(x: Any) -> bool:
    """Whether an array or a tensor is [N, H, W, 3] or [N, 3, H, W] uint8, and not empty."""
    uint8 = str(x.dtype).rpartition(".")[2] == "uint8"
    return x.ndim == 4 and uint8 and 0 not in x.shape and 3 in (x.shape[1], x.shape[3])


def read_arrays(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """What a .npz or .npy file holds: `images` [N, H, W, 3] uint8, stored so or as [N, 3, H, W]; in a .npz file perhaps
    `labels` [N] int64 and `classes`, the names that they number.

    Raises:
        UserError: for anything else, with what came.
    """
    try:
        loaded = np.load(path, allow_pickle=False)
        found = {"images": loaded} if isinstance(loaded, np.ndarray) else dict(loaded)
    except Exception as error:  # a broken archive raises whatever zipfile, zlib or numpy may
        raise UserError(f"{path} can't be read as .npz or .npy: {str(error).partition('. ')[0]}") from None
    if "images" not in found:
        raise UserError(f"{path} must hold an array `images`, and may hold `labels`; it holds {sorted(found)}")
    images = found["images"]
    if not is_rgb(images):
        raise UserError(f"{path}: images must be [N, H, W, 3] or [N, 3, H, W] uint8, got {images.shape} {images.dtype}")
    arrays = {"images": images if images.shape[3] == 3 else images.transpose(0, 2, 3, 1)}
    if "labels" in found:
        labels = found["labels"]
        if labels.size != len(images) or labels.dtype.kind not in "iu":
            raise UserError(f"{path}: labels must be [{len(images)}] integers, got {labels.shape} {labels.dtype}")
        arrays["labels"] = labels.astype(np.int64).reshape(-1)
        if "classes" in found:
            arrays["classes"] = found["classes"]
            if arrays["labels"].min() < 0 or arrays["labels"].max() >= found["classes"].size:
                raise UserError(f"{path}: labels must number the {found['classes'].size} classes")
    return arrays


def read_once(path: str) -> dict[str, np.ndarray]:
    """`read_arrays`, once a process for each version of the file; forked workers share its pages."""
    return _read_version(path, os.stat(path).st_mtime_ns)


@functools.lru_cache(maxsize=4)
def _read_version(path: str, changed: int) -> dict[str, np.ndarray]:
    return read_arrays(path)
