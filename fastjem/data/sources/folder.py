"""A folder of image files."""

import os
from pathlib import Path

import numpy as np

from fastjem.errors import UserError

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")


class Folder:
    """The image files below a folder, nested or flat; none of them is opened until it is read.

    A file's label is the number of its first-level folder in `classes`. A flat folder has no labels.
    """

    decoded = False

    def __init__(self, root: str | os.PathLike[str]):
        self.root = os.fspath(root)
        if not os.path.isdir(self.root):
            raise UserError(f"{root} is {'a file, no' if os.path.exists(self.root) else 'not a'} folder")
        found = image_files(self.root)
        if not found:
            raise UserError(f"{root} has no images; files ending in {' '.join(ENDINGS)} are read, in subfolders too")
        # One array of bytes instead of a list of strings: a forked worker then copies no reference counts.
        self.files = np.array(sorted(os.fsencode(name) for name in found))
        folders = [first_folder(os.fsdecode(name)) for name in self.files]
        self.classes: list[str] = []
        self.labels: np.ndarray | None = None
        if any(folders):
            self.classes = sorted(set(folders))
            number = {name: i for i, name in enumerate(self.classes)}
            self.labels = np.array([number[name] for name in folders])

    @staticmethod
    def recognises(root: Path) -> bool:
        return True  # what isn't a folder is refused with the reason

    @staticmethod
    def read_named(root: str, name: str) -> bytes:
        """The file's bytes, without listing the folder."""
        with open(os.path.join(root, name), "rb") as file:
            return file.read()

    def __len__(self) -> int:
        return len(self.files)

    def name(self, i: int) -> str:
        """The file's path below the folder."""
        return os.fsdecode(self.files[i])

    def read(self, i: int) -> bytes:
        return self.read_named(self.root, self.name(i))


def image_files(root: str) -> list[str]:
    """Paths below `root` of its image files, those in linked folders too; hidden files and folders are left out."""
    found: list[str] = []
    visited = set()
    for folder, subfolders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in visited:  # a link that leads back
            subfolders.clear()
            continue
        visited.add(real)
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        images = [name for name in files if name.lower().endswith(ENDINGS) and not name.startswith(".")]
        below = "" if folder == root else os.path.relpath(folder, root)
        found += [os.path.join(below, name) for name in images]
    return found


def first_folder(name: str) -> str:
    """ "cat/old/1.png" -> "cat"; "1.png" -> ""."""
    first, separator, _ = name.partition(os.sep)
    return first if separator else ""
