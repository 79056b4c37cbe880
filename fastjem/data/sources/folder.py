"""A folder of image files."""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fastjem.data.files import ENDINGS, read_file
from fastjem.data.sources.arrays import ENDINGS as ARRAYS
from fastjem.data.sources.arrow import TABLES
from fastjem.data.sources.naming import LISTS
from fastjem.data.sources.packed import Packed
from fastjem.errors import UserError
from fastjem.reading import why_not

TAKEN = frozenset(ENDINGS)
SEPARATOR = os.fsencode(os.sep)
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
        if not listed.images:
            others = "".join(f"; {path} can't be listed ({why})" for path, why in listed.unlisted)
            others += f"; there are {', '.join(f'{n} {e}' for e, n in listed.others.items())}" if listed.others else ""
            raise UserError(f"{root} has no images; files ending in {' '.join(ENDINGS)} are read{others}")
        runs: list[tuple[str, int]] = []
        self.files = Packed(listed.in_order(runs))
        self.classes: list[str] = []
        self.labels: np.ndarray | None = None  # [N] int32
        if any(name for name, _ in runs):
            self.classes = sorted({name for name, _ in runs})
            number = {name: i for i, name in enumerate(self.classes)}
            numbers = np.array([number[name] for name, _ in runs], np.int32)
            self.labels = np.repeat(numbers, [count for _, count in runs])

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

    def hash_names(self, into: Any) -> None:
        """All names, for a fingerprint."""
        self.files.hash_into(into)


@dataclass
class Listed:
    """What is below a folder."""

    # Of each folder, by its path below the first: the images in it, sorted, one string, and its folders. An object for
    # each of ten million names would take a gigabyte.
    folders: dict[bytes, tuple[bytes, list[bytes]]] = field(default_factory=dict)
    images: int = 0
    others: Counter[str] = field(default_factory=Counter)  # endings that aren't taken, and how many files have them
    unlisted: list[tuple[str, str]] = field(default_factory=list)  # (path, reason): folders that nobody can look into

    def add(self, below: str, images: list[str], subfolders: list[str]) -> None:
        names = sorted(os.fsencode("\0".join(images)).split(b"\0")) if images else []
        self.folders[os.fsencode(below)] = (b"\0".join(names), [os.fsencode(name) for name in subfolders])
        self.images += len(names)

    def in_order(self, runs: list[tuple[str, int]]) -> Iterator[bytes]:
        """All paths, sorted as bytes.

        Args:
            runs: is given (first-level folder or "", how many paths), one behind the other.
        """
        for entry in self._entries(b""):
            first = entry[:-1] if entry.endswith(SEPARATOR) else b""
            seen = 0
            for path in self._below(first) if first else (entry,):
                seen += 1
                yield path
            name = os.fsdecode(first)
            if runs and runs[-1][0] == name:
                runs[-1] = (name, runs[-1][1] + seen)
            elif seen:
                runs.append((name, seen))

    def _entries(self, below: bytes) -> list[bytes]:
        """What is in a folder, other folders with a separator behind them: sorted so, whole paths are sorted."""
        names, subfolders = self.folders.get(below, (b"", []))  # one that a link has led to before isn't listed again
        return sorted([*(names.split(b"\0") if names else ()), *(name + SEPARATOR for name in subfolders)])

    def _below(self, folder: bytes) -> Iterator[bytes]:
        for entry in self._entries(folder):
            path = folder + SEPARATOR + entry
            if entry.endswith(SEPARATOR):
                yield from self._below(path[:-1])
            else:
                yield path


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
        images = []
        for name in files:
            if name.startswith("."):
                continue
            dot = name.rfind(".")
            ending = name[dot:].lower() if dot > 0 else ""
            if ending in TAKEN:
                images.append(name)
            elif not ending and not os.path.exists(path := os.path.join(folder, name)):
                listed.unlisted.append((path, "a link to nothing"))  # that may have been a class
            else:
                listed.others[ending or "no ending"] += 1
        listed.add("" if folder == root else os.path.relpath(folder, root), images, subfolders)
    if listed.unlisted and listed.unlisted[0][0] == root:
        raise UserError(f"{root} can't be listed: {listed.unlisted[0][1]}")
    return listed


def first_folder(name: str) -> str:
    """ "cat/old/1.png" -> "cat"; "1.png" -> ""."""
    first, separator, _ = name.partition(os.sep)
    return first if separator else ""
