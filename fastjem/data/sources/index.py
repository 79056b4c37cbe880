"""Where the images of many tar files lie: made once, kept in one file, and read from there through mapped memory.

A file of N images in S tar files, all numbers little-endian and each part at a multiple of 8 bytes:

    the names of all members, those of one tar file behind those of another
    where each image's name ends among those of its tar file uint32 [N]
    labels int32 [N], if there are any
    sizes uint32 [N] and first bytes uint64 [N] of the members
    what else there is, as JSON; its length as uint64; `MAGIC`

A process has the pages that it reads, and shares them with all others: a run has 16 bytes of each image, and no names.
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
from fastjem.data.copies import Copies
from fastjem.data.sources.folder import first_folder
from fastjem.data.sources.labels import Labels
from fastjem.data.sources.stored import listed_all
from fastjem.data.sources.tar import Listed, list_tar
from fastjem.errors import UserError
from fastjem.printing import say

MAGIC = b"FJTARS01"  # the last two digits are the format's version
THREADS = 4  # that wait for a file server's answers
Signature = list[list[Any]]  # of each tar file [name, bytes, time of its last change in ns, or a store's version]


def signature_of(files: Sequence[str], folder: str, copies: Copies | None) -> Signature:
    """What tells that a tar file isn't what it was; -1 for one that isn't there."""
    if copies is not None:
        return [[os.path.relpath(file.url, folder), file.size, file.version] for file in copies.files]
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
        self.positions: list[int] = said["positions"]  # of each tar file's names
        self.starts: list[int] = said["starts"]  # of each tar file its first image's number, and N behind the last
        images = self.starts[-1]
        shards = {len(self.signature), len(self.positions), len(self.starts) - 1}
        if len(shards) > 1 or (np.diff(self.starts) < 0).any():
            raise ValueError("no index")
        self.ends = np.frombuffer(buffer, "<u4", images, said["ends"])
        self.sizes = np.frombuffer(buffer, "<u4", images, said["sizes"])
        self.offsets = np.frombuffer(buffer, "<u8", images, said["offsets"])
        self.labels: np.ndarray | None = None  # [N] int32
        if self.classes:
            self.labels = np.frombuffer(buffer, "<i4", images, said["labels"])
            if self.labels.min() < 0 or self.labels.max() >= len(self.classes):
                raise ValueError("no index")

    @classmethod
    def opened(cls, path: str, signature: Signature) -> "Index | None":
        """The index in a file, if there is one and it is of these tar files as they are now."""
        try:
            with open(path, "rb") as file:
                index = cls(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), path)
        # not there, of another version, or broken
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
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
        return self.shard_of(i), int(self.offsets[i]), int(self.sizes[i])

    def name(self, i: int) -> str:
        """Of the member that is image i."""
        shard = self.shard_of(i)
        at = self.positions[shard]
        begin = int(self.ends[i - 1]) if i > self.starts[shard] else 0
        return bytes(self.buffer[at + begin : at + int(self.ends[i])]).decode("utf-8", "surrogateescape")

    def find(self, shard: int, name: str) -> int:
        """The number of the image that is called so in a tar file; KeyError where there is none."""
        wanted = name.encode("utf-8", "surrogateescape")
        names = self._names(shard)
        ends = self.ends[self.starts[shard] : self.starts[shard + 1]]
        at = names.find(wanted)
        while at >= 0:
            row = int(np.searchsorted(ends, at, side="right"))
            if int(ends[row]) == at + len(wanted) and at == (int(ends[row - 1]) if row else 0):
                return self.starts[shard] + row
            at = names.find(wanted, at + 1)
        raise KeyError(name)

    def hash_names(self, into: Any) -> None:
        """All images' names and bytes, and which tar file each is in, without an object for each."""
        for shard, (name, _, _) in enumerate(self.signature):
            rows = slice(self.starts[shard], self.starts[shard + 1])
            into.update(f"{name}\0{rows.stop - rows.start}\0".encode("utf-8", "surrogatepass"))
            into.update(self.sizes[rows])
            into.update(self.ends[rows])
            into.update(self._names(shard))

    def _names(self, shard: int) -> bytes:
        """Of a tar file's images, one behind the other."""
        at = self.positions[shard]
        stop = self.starts[shard + 1]
        return bytes(self.buffer[at : at + int(self.ends[stop - 1])]) if stop > self.starts[shard] else b""


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
    ends: list[np.ndarray] = []
    sizes: list[np.ndarray] = []
    offsets: list[np.ndarray] = []
    unlisted: list[tuple[str, str]] = []
    without = 0
    lacking = ""
    for (shard, _, _), found in zip(signature, listed, strict=True):
        positions.append(file.tell())
        file.write(b"".join(found.names))
        ends.append(np.cumsum([len(name) for name in found.names], dtype="<u4"))
        sizes.append(found.sizes)
        offsets.append(found.offsets)
        starts.append(starts[-1] + len(found.names))
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
    labels = np.zeros(0, np.int32)
    classes: list[str] = []
    if told.numbers and lacking:
        raise UserError(f"{root}: some images have labels (.cls or .json), and {lacking} has none")
    if told.numbers:
        labels, classes = told.ordered()
    elif len(folders.numbers) > 1 and folders.lacking < 0:
        labels, classes = folders.ordered()
    said = {
        "signature": signature, "classes": classes, "unlisted": unlisted, "without": without, "positions": positions,
        "starts": starts,
        "ends": _written(file, [part.astype("<u4") for part in ends]),
        "labels": _written(file, [labels.astype("<i4")]),
        "sizes": _written(file, [part.astype("<u4") for part in sizes]),
        "offsets": _written(file, [part.astype("<u8") for part in offsets]),
    }  # fmt: skip
    begin = file.tell()
    file.write(json.dumps(said).encode())
    file.write(np.array(file.tell() - begin, "<u8").tobytes() + MAGIC)
    return starts[-1]


def _written(file: BinaryIO, parts: Sequence[np.ndarray]) -> int:
    """Write arrays one behind the other, at a multiple of 8 bytes; where they begin."""
    file.write(bytes(-file.tell() % 8))
    at = file.tell()
    for part in parts:
        file.write(part.tobytes())
    return at


def index_of(files: Sequence[str], folder: str, root: str, copies: Copies | None = None) -> Index:
    """The index of these tar files, which is made if there is none of them as they are now.

    It is kept beside them or, where that can't be, in the cache folder; where neither can be written, in memory.

    Args:
        folder: that the tar files are called from.
        root: what the user named, for messages.
        copies: of the tar files, if these are in a store; their index is in the cache folder.

    Raises:
        UserError: as `write` does.
    """
    signature = signature_of(files, folder, copies)
    names = "\n".join(name for name, _, _ in signature)
    key = hashlib.sha256(names.encode("utf-8", "surrogatepass")).hexdigest()[:12]
    places = [] if copies else [os.path.join(folder or ".", f".fastjem-{key}.index")]
    try:
        home = folder if copies else os.path.abspath(folder)
        whole = hashlib.sha256(os.fsencode(home) + key.encode()).hexdigest()[:16]
        places.append(str(Path(cache.folder()) / f"shards-{whole}.index"))
    except RuntimeError:  # an account without a home
        pass
    if (index := _kept(places, signature)) is not None:
        return index
    with cache.alone(places[-1]):
        return _kept(places, signature) or _made(files, signature, places, root, copies)


def _kept(places: Sequence[str], signature: Signature) -> Index | None:
    return next((index for place in places if (index := Index.opened(place, signature)) is not None), None)


def _made(files: Sequence[str], signature: Signature, places: Sequence[str], root: str, copies: Copies | None) -> Index:
    """An index in the first place that can be written, else in memory."""
    say(f"fastjem: {root}: an index of {len(files)} tar file{'s' if len(files) > 1 else ''} is made, once")
    for place in places:
        try:
            with ThreadPoolExecutor(THREADS) as pool, cache.written(place) as file:
                listed = listed_all(copies, root) if copies else pool.map(list_tar, files)
                write(file, signature, listed, root)
        except OSError:  # nobody may write there, or there is no room
            continue
        if (index := Index.opened(place, signature)) is not None:
            return index
    memory = io.BytesIO()
    write(memory, signature, listed_all(copies, root) if copies else map(list_tar, files), root)
    say(f"fastjem: {root}: the index can't be kept, neither beside the tar files nor in the cache folder")
    return Index(memory.getvalue(), "")
