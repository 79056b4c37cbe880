"""A folder of image files."""

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fastjem.data.files import ENDINGS, read_file
from fastjem.data.sources.arrays import ENDINGS as ARRAYS
from fastjem.data.sources.arrow import TABLES
from fastjem.data.sources.naming import LISTS
from fastjem.errors import UserError
from fastjem.reading import why_not

FILES = (*LISTS, ".tar", *TABLES, *ARRAYS)  # of other sources


class Folder:
    """The image files below a folder, nested or flat; none of them is opened until it is read.

    A file's label is the number of its first-level folder in `classes`. A flat folder has no labels.
    """

    decoded = False

    def __init__(self, root: str | os.PathLike[str]):
        self.root = os.fspath(root)
        if not os.path.isdir(self.root):
            if os.path.exists(self.root):
                raise UserError(f"{root} is a file, no folder; of files these are read: {' '.join(FILES)}")
            raise UserError(f"{root} is not a folder, and no file is there")
        listed = list_images(self.root)
        self.unlisted = listed.unlisted
        self.others = dict(sorted(listed.others.items(), key=lambda item: (-item[1], item[0])))
        found = listed.images
        if not found:
            others = "".join(f"; {path} can't be listed ({why})" for path, why in listed.unlisted)
            others += f"; there are {', '.join(f'{n} {e}' for e, n in listed.others.items())}" if listed.others else ""
            raise UserError(f"{root} has no images; files ending in {' '.join(ENDINGS)} are read{others}")
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
        return read_file(os.path.join(root, name))

    def __len__(self) -> int:
        return len(self.files)

    def name(self, i: int) -> str:
        """The file's path below the folder."""
        return os.fsdecode(self.files[i])

    def read(self, i: int) -> bytes:
        return self.read_named(self.root, self.name(i))


@dataclass
class Listed:
    """What is below a folder."""

    images: list[str] = field(default_factory=list)  # paths below the folder
    others: Counter[str] = field(default_factory=Counter)  # endings that aren't taken, and how many files have them
    unlisted: list[tuple[str, str]] = field(default_factory=list)  # (path, reason): folders that nobody can look into


def list_images(root: str) -> Listed:
    """The image files below `root`, those in linked folders too; hidden files and folders are left out.

    Raises:
        UserError: where the folder itself can't be listed.
    """
    listed = Listed()
    visited = set()

    def unlisted(error: OSError) -> None:  # os.walk would leave the folder out without a word
        listed.unlisted.append((os.fsdecode(error.filename or root), why_not(error)))

    for folder, subfolders, files in os.walk(root, followlinks=True, onerror=unlisted):
        real = os.path.realpath(folder)
        if real in visited:  # a link that leads back
            subfolders.clear()
            continue
        visited.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        below = "" if folder == root else os.path.relpath(folder, root)
        for name in files:
            if name.startswith("."):
                continue
            ending = os.path.splitext(name)[1].lower()
            if ending in ENDINGS:
                listed.images.append(os.path.join(below, name))
            elif not ending and not os.path.exists(path := os.path.join(folder, name)):
                listed.unlisted.append((path, "a link to nothing"))  # that may have been a class
            else:
                listed.others[ending or "no ending"] += 1
    if listed.unlisted and listed.unlisted[0][0] == root:
        raise UserError(f"{root} can't be listed: {listed.unlisted[0][1]}")
    return listed


def first_folder(name: str) -> str:
    """ "cat/old/1.png" -> "cat"; "1.png" -> ""."""
    first, separator, _ = name.partition(os.sep)
    return first if separator else ""
