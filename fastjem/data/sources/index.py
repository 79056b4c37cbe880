"""Where the images of many tar files lie: made once, kept in one file, and read from there through mapped memory.

A file of N images in S tar files, all numbers little-endian and each part at a multiple of 8 bytes:

    of each tar file with R images: first bytes uint64 [R], bytes uint32 [R], ends of names uint32 [R], names [bytes]
    labels int32 [N], if there are any
    what else there is, as JSON; its length as uint64; `MAGIC`

Ten million images take 16 bytes each and their names, of which a process holds what it reads; ranks share the pages.
"""

import bisect
import hashlib
import io
import json
import mmap
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from fastjem.data import cache
from fastjem.data.sources.folder import first_folder
from fastjem.data.sources.labels import Labels
from fastjem.data.sources.tar import Listed, list_tar
from fastjem.errors import UserError
from fastjem.printing import say

MAGIC = b"FJTARS01"  # the last two digits are the format's version
THREADS = 4  # that wait for a file server's answers
Signature = list[list[Any]]  # of each tar file [name, bytes, time of its last change in ns]


def signature_of(files: Sequence[str], folder: str) -> Signature:
    """What tells that a tar file isn't what it was; -1 for one that isn't there."""
    found: Signature = []
    for path in files:
        try:
            stat = os.stat(path)
            found.append([os.path.relpath(path, folder or "."), stat.st_size, stat.st_mtime_ns])
        except OSError:
            found.append([os.path.relpath(path, folder or "."), -1, -1])
    return found


class Index:
    """An index, opened.

    Args:
        buffer: the file's bytes.
        path: of the file; "" where nothing could be written.

    Raises:
        ValueError: for bytes that are none of an index.
    """

    def __init__(self, buffer: Any, path: str):
        self.buffer = buffer
        self.path = path
        end = len(buffer) - 16
        if end < 0 or bytes(buffer[-8:]) != MAGIC:
            raise ValueError("no index")
        begin = end - int(np.frombuffer(buffer, "<u8", 1, end)[0])
        if begin < 0:
            raise ValueError("no index")
        said = json.loads(bytes(buffer[begin:end]))
        self.signature: Signature = said["signature"]
        self.classes: list[str] = said["classes"]
        self.unlisted: list[tuple[str, str]] = [(str(what), str(why)) for what, why in said["unlisted"]]
        self.without: int = said["without"]
        self.positions: list[int] = said["positions"]  # of the parts
        self.starts: list[int] = said["starts"]  # of each tar file its first image's number, and N behind the last
        rows = np.diff(self.starts)
        room = np.diff([*self.positions, said["labels"]]) - 16 * rows
        if len(rows) != len(self.signature) or len(room) != len(rows) or (rows < 0).any() or (room < 0).any():
            raise ValueError("no index")
        self.labels: np.ndarray | None = None  # [N] int32
        if self.classes:
            self.labels = np.frombuffer(buffer, "<i4", self.starts[-1], said["labels"])
            if self.labels.min() < 0 or self.labels.max() >= len(self.classes):
                raise ValueError("no index")

    @classmethod
    def opened(cls, path: str, signature: Signature) -> "Index | None":
        """The index in a file, if there is one and it is of these tar files as they are now."""
        try:
            with open(path, "rb") as file:
                index = cls(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), path)
        except (OSError, ValueError, KeyError, TypeError):  # not there, of another version, or broken
            return None
        return index if index.signature == signature else None

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (self.path, self.signature, b"" if self.path else bytes(self.buffer))

    def __len__(self) -> int:
        return self.starts[-1]

    def shard_of(self, i: int) -> int:
        """The number of the tar file in which image i lies."""
        return bisect.bisect_right(self.starts, i) - 1

    def place(self, i: int) -> tuple[int, int, int]:
        """(tar file, first byte, bytes) of image i."""
        shard = self.shard_of(i)
        offsets, sizes, _, _ = self._part(shard)
        row = i - self.starts[shard]
        return shard, int(offsets[row]), int(sizes[row])

    def name(self, i: int) -> str:
        """Of the member that is image i."""
        shard = self.shard_of(i)
        _, _, ends, names = self._part(shard)
        row = i - self.starts[shard]
        begin = int(ends[row - 1]) if row else 0
        return names[begin : int(ends[row])].tobytes().decode("utf-8", "surrogateescape")

    def find(self, shard: int, name: str) -> int:
        """The number of the image that is called so in a tar file; KeyError where there is none."""
        wanted = name.encode("utf-8", "surrogateescape")
        _, _, ends, names = self._part(shard)
        blob = names.tobytes()
        at = blob.find(wanted)
        while at >= 0:
            row = int(np.searchsorted(ends, at, side="right"))
            if int(ends[row]) == at + len(wanted) and at == (int(ends[row - 1]) if row else 0):
                return self.starts[shard] + row
            at = blob.find(wanted, at + 1)
        raise KeyError(name)

    def hash_names(self, into: Any) -> None:
        """All images' names and bytes, and which tar file each is in, without an object for each."""
        for shard, (name, _, _) in enumerate(self.signature):
            _, sizes, ends, names = self._part(shard)
            into.update(f"{name}\0{len(ends)}\0".encode("utf-8", "surrogatepass"))
            into.update(sizes)
            into.update(ends)
            into.update(names)

    def _part(self, shard: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """First bytes, bytes, ends of names and names of a tar file's images, where they lie."""
        rows = self.starts[shard + 1] - self.starts[shard]
        at = self.positions[shard]
        ends = np.frombuffer(self.buffer, "<u4", rows, at + 12 * rows)
        return (
            np.frombuffer(self.buffer, "<u8", rows, at),
            np.frombuffer(self.buffer, "<u4", rows, at + 8 * rows),
            ends,
            np.frombuffer(self.buffer, np.uint8, int(ends[-1]) if rows else 0, at + 16 * rows),
        )


def _again(path: str, signature: Signature, content: bytes) -> Index:
    """An index in another process."""
    if not path:
        return Index(content, "")
    index = Index.opened(path, signature)
    if index is None:
        raise UserError(f"{path}, the index of the tar files, has changed since the run began")
    return index


def write(file: BinaryIO, signature: Signature, listed: Iterable[Listed], root: str) -> int:
    """Write an index of what was found in each tar file; how many images there are.

    Args:
        listed: a `Listed` for each tar file, made while they are written.
        root: what the user named, for messages.

    Raises:
        UserError: where there is no image, or some have labels and others have none.
    """
    told = Labels()  # by .cls and .json
    folders = Labels()  # by the first folder in the tar file
    positions: list[int] = []
    starts = [0]
    unlisted: list[tuple[str, str]] = []
    without = 0
    lacking = ""
    for (shard, _, _), found in zip(signature, listed, strict=True):
        positions.append(_aligned(file))
        rows = len(found.names)
        file.write(found.offsets.astype("<u8").tobytes())
        file.write(found.sizes.astype("<u4").tobytes())
        file.write(np.cumsum([len(name) for name in found.names], dtype="<u4").tobytes())
        file.write(b"".join(found.names))
        starts.append(starts[-1] + rows)
        unlisted += [(shard + what, why) for what, why in found.unlisted]
        without += found.without
        for name, label in zip(found.names, found.labels, strict=True):
            told.add(label)
            folders.add(first_folder(os.fsdecode(name)) or None)
            if label is None and not lacking:
                lacking = f"{shard}/{os.fsdecode(name)}"
    if not starts[-1]:
        why = "".join(f"; {what}: {reason}" for what, reason in unlisted[:3])
        raise UserError(f"{root} has no images" + (f" in its {without} samples" if without else "") + why)
    at = _aligned(file)
    labels = np.zeros(0, np.int32)
    classes: list[str] = []
    if told.numbers and lacking:
        raise UserError(f"{root}: some images have labels (.cls or .json), and {lacking} has none")
    if told.numbers:
        labels, classes = told.ordered()
    elif len(folders.numbers) > 1 and folders.lacking < 0:
        labels, classes = folders.ordered()
    file.write(labels.astype("<i4").tobytes())
    said = {
        "signature": signature, "classes": classes, "unlisted": unlisted, "without": without, "positions": positions,
        "starts": starts, "labels": at,
    }  # fmt: skip
    begin = _aligned(file)
    file.write(json.dumps(said).encode())
    file.write(np.array(file.tell() - begin, "<u8").tobytes() + MAGIC)
    return starts[-1]


def _aligned(file: BinaryIO) -> int:
    file.write(bytes(-file.tell() % 8))
    return file.tell()


def index_of(files: Sequence[str], folder: str, root: str) -> Index:
    """The index of these tar files, which is made if there is none of them as they are now.

    It is kept beside them or, where that can't be, in the cache folder; where neither can be written, in memory.

    Args:
        folder: that the tar files are called from.
        root: what the user named, for messages.

    Raises:
        UserError: as `write` does.
    """
    signature = signature_of(files, folder)
    names = "\n".join(name for name, _, _ in signature)
    key = hashlib.sha256(names.encode("utf-8", "surrogatepass")).hexdigest()[:12]
    places = [os.path.join(folder or ".", f".fastjem-{key}.index")]
    try:
        whole = hashlib.sha256(os.fsencode(os.path.abspath(folder)) + key.encode()).hexdigest()[:16]
        places.append(str(Path(cache.folder()) / f"shards-{whole}.index"))
    except RuntimeError:  # an account without a home
        pass
    for place in places:
        if (index := Index.opened(place, signature)) is not None:
            return index
    say(f"fastjem: {root}: an index of {len(files)} tar file{'s' if len(files) > 1 else ''} is made, once")
    for place in places:
        try:
            with ThreadPoolExecutor(THREADS) as pool, cache.written(place) as file:
                write(file, signature, pool.map(list_tar, files), root)
        except OSError:  # nobody may write there, or there is no room
            continue
        if (index := Index.opened(place, signature)) is not None:
            return index
    memory = io.BytesIO()
    write(memory, signature, map(list_tar, files), root)
    say(f"fastjem: {root}: the index can't be kept, neither beside the tar files nor in the cache folder")
    return Index(memory.getvalue(), "")
