"""Rows of embeddings in a folder of their own, a part at a time: whoever is killed goes on behind the last part."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from fastjem import reading
from fastjem.checkpoints import write_atomically
from fastjem.errors import UserError

STATE = "state.json"
ROWS, IMAGES, UNREADABLE = FILES = ("rows.bin", "images.bin", "unreadable.jsonl")


class Rows:
    """[N, D] in `rows.bin`, the N positions of their images in `images.bin`, the images that can't be read as lines.

    `state.json` says how much of each file counts: what a kill left behind that is cut off when the folder is opened
    again, so that every row is there once.

    Args:
        folder: it is made if need be; nobody else may write to it meanwhile.
        identity: what decides the values of the rows, by name. A folder that holds rows of another one is refused.
        anew: or else emptied.

    Raises:
        UserError: for such a folder, with what is different, and one that is damaged.
    """

    def __init__(self, folder: Path, identity: dict[str, str], dtype: np.dtype, *, anew: bool = False):
        self.folder = folder
        self.identity = identity
        self.dtype = dtype
        self.done = 0  # images that were looked at, from the first one on
        self.width = 0  # D; 0 before the first row
        self.sizes: dict[str, int] = dict.fromkeys(FILES, 0)  # bytes that count
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / STATE).exists():
            self._take(reading.json_object(folder / STATE), anew)
        self.files = {name: self._opened(folder / name) for name in FILES}

    def _take(self, state: dict[str, Any], anew: bool) -> None:
        """What `save` wrote, if it is of this identity."""
        try:
            before = dict(state["identity"])
            done = int(state["done"])
            width = int(state["width"])
            sizes = {name: int(state["sizes"][name]) for name in FILES}
        except (KeyError, TypeError, ValueError):
            raise UserError(
                f"{self.folder / STATE} is damaged; without {self.folder} all images are read anew"
            ) from None
        other = [name for name in {**before, **self.identity} if before.get(name) != self.identity.get(name)]
        if not other:
            self.done = done
            self.width = width
            self.sizes = sizes
        elif not anew:
            raise UserError(
                f"{self.folder} holds a part of other embeddings (not the same {', '.join(other)}): without "
                "that folder, by --overwrite, or with another --out a new file is begun"
            )

    def _opened(self, path: Path) -> int:
        """A descriptor at the end of what counts."""
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
        descriptor = os.open(path, flags, 0o666)
        size = self.sizes[path.name]
        if os.fstat(descriptor).st_size < size:
            os.close(descriptor)
            raise UserError(f"{path} is damaged: it lacks bytes; without {self.folder} all images are read anew")
        os.ftruncate(descriptor, size)
        os.lseek(descriptor, size, os.SEEK_SET)
        return descriptor

    def __len__(self) -> int:
        """N."""
        return self.sizes[IMAGES] // 8

    def add(self, rows: np.ndarray, images: list[int], unreadable: list[tuple[int, str, str]]) -> None:
        """One more part.

        Args:
            rows: [B, D], which become of the folder's dtype.
            images: B positions in the source.
            unreadable: (position, path, reason) of those between them that can't be read.
        """
        if len(images):
            self.width = rows.shape[1]
            self._append(ROWS, np.ascontiguousarray(rows, self.dtype).tobytes())
            self._append(IMAGES, np.asarray(images, "<i8").tobytes())
        self._append(UNREADABLE, "".join(json.dumps(one) + "\n" for one in unreadable).encode())
        self.done += len(images) + len(unreadable)

    def _append(self, name: str, content: bytes) -> None:
        left = memoryview(content)
        try:
            while left:  # a nearly full disk takes a part of it
                left = left[os.write(self.files[name], left) :]
        except OSError as error:
            raise self._refused(error) from None
        self.sizes[name] += len(content)

    def save(self) -> None:
        """What was added counts from now on, whatever happens to the process or the machine.

        Raises:
            UserError: where the disk refuses it.
        """
        state = {"identity": self.identity, "done": self.done, "width": self.width, "sizes": self.sizes}
        try:
            for descriptor in self.files.values():
                os.fsync(descriptor)
            write_atomically(self.folder / STATE, (json.dumps(state) + "\n").encode())
        except OSError as error:
            raise self._refused(error) from None

    def _refused(self, error: OSError) -> UserError:
        """What the disk says; what was saved before is still there."""
        return UserError(f"{self.folder} can't be written to: {reading.why_not(error)}")

    def close(self) -> None:
        """Once or twice is the same; rows are read behind it, too."""
        for descriptor in self.files.values():
            os.close(descriptor)
        self.files = {}

    def rows(self) -> np.ndarray:
        """[N, D], mapped from the disk."""
        if not len(self):
            return np.empty((0, self.width), self.dtype)
        return np.memmap(self.folder / ROWS, self.dtype, "r", shape=(len(self), self.width))

    def images(self) -> np.ndarray:
        """[N] int64."""
        return np.fromfile(self.folder / IMAGES, "<i8", len(self)).astype(np.int64)

    def unreadable(self) -> list[tuple[int, str, str]]:
        """(position, path, reason), in order."""
        lines = (self.folder / UNREADABLE).read_bytes()[: self.sizes[UNREADABLE]].decode().splitlines()
        return [(int(i), path, why) for i, path, why in map(json.loads, lines)]
