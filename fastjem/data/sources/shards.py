"""Tar files of images, in WebDataset's layout: 0001.jpg, 0001.cls, 0002.jpg, ..."""

import contextlib
import functools
import os
from collections.abc import Sequence
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np

from fastjem.data import copies as local
from fastjem.data import remote
from fastjem.data.copies import Copies, gigabytes
from fastjem.data.files import ENDINGS, LARGEST_FILE, open_regular, too_large
from fastjem.data.sources import naming
from fastjem.data.sources.index import Index, index_of
from fastjem.errors import UserError
from fastjem.reading import why_not

COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
UNCOMPRESSED = "compressed tar files: images are read at random, which uncompressed ones allow (gunzip makes them)"
OPEN = 128  # tar files that a process has open at a time


class LostError(OSError):
    """A tar file can't be read; with it are lost the image that was asked for and those behind it, `images` in all."""

    def __init__(self, why: str, images: int):
        super().__init__(why)
        self.images = images


class Shards:
    """The images in tar files, read at random: one file, a folder of them, or a pattern (`naming.expand`).

    Members that share a name up to the first dot of its last part are a sample: an image, whose ending tells it, and
    perhaps a label, in `.cls` (a number or a name) or in `.json` (under one of `tar.KEYS`). Where no sample has one,
    the first-level folders in the tar files are the classes, if all images lie in such. Images are in the order of the
    files and of the members in them; they are called by their members' names, behind their file's where there may be
    several.

    What is behind a damage is left out and in `unlisted`; a file that isn't what it was when it was listed raises in
    `read`.

    Files in a store are read from local copies of whole files. Where there can't be copies of all of them, an image
    that is read by itself is fetched alone: whole files are fetched for whoever reads one image after the other, and
    for an order that stays with some files at a time (`whole`, which `loaders.ahead` sets).

    Raises:
        UserError: where there is no image at all, a file is compressed, or some images have labels and others none, and
            for a store that can't be asked.
    """

    decoded = False

    def __init__(self, root: str | os.PathLike[str]):
        files = shard_files(os.fspath(root))
        copies = Copies.of(os.fspath(root), files) if remote.is_remote(root) else None
        self._open(os.fspath(root), files, None, copies)

    def _open(self, root: str, files: Sequence[str], index: Index | None, copies: Copies | None) -> None:
        self.root = root
        self.files = list(files)  # paths, or URLs, of which `copies` has copies
        self.folder = home_of(root)
        self.copies = copies
        self.whole = copies is None or copies.fits
        self.last = -2  # the image that was read last
        self.index = index or index_of(self.files, self.folder, root, copies)
        self.labels: np.ndarray | None = self.index.labels
        self.classes = self.index.classes
        self.unlisted = [(os.path.join(self.folder, what), why) for what, why in self.index.unlisted]
        without = self.index.without
        self.notices = [f"{root}: {without} samples have no image and are left out"] if without else []
        if copies is not None:
            self.notices.append(
                f"{root}: {len(self.files)} files, {gigabytes(copies.size)}; copies of them are kept in "
                f"{copies.folder}, {gigabytes(copies.budget)} at most ({local.GIGABYTES})"
            )
        self.single = is_single(root)
        self.opened: dict[int, FileIO] = {}

    @staticmethod
    def recognises(root: Path) -> bool:
        path = os.fspath(root)
        if os.path.isdir(path):
            return holds_files(path, (".tar", *COMPRESSED))
        return path.lower().endswith((".tar", *COMPRESSED)) and (os.path.isfile(path) or naming.is_pattern(path))

    @staticmethod
    def read_named(root: str, name: str) -> bytes:
        """The member's bytes, by the index, which is opened once a process for each version of the files."""
        version = () if remote.is_remote(root) else tuple(_changed(path) for path in shard_files(root))
        source = _source(root, version)
        shard = 0
        if not source.single:
            shard = next(k for k in range(len(source.files)) if name.startswith(source.called(k) + "/"))
            name = name[len(source.called(shard)) + 1 :]
        return source.read(source.index.find(shard, name))

    @staticmethod
    def path_named(root: str, name: str) -> str:
        """photos.tar/cat/1.jpg; DIR/train-000.tar/0001.jpg."""
        return os.path.join(root if is_single(root) else home_of(root), name)

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (self.root, self.files, self.index, self.copies, self.whole)

    def __len__(self) -> int:
        return len(self.index)

    def called(self, shard: int) -> str:
        """A tar file's path below the folder."""
        return self.index.signature[shard][0]

    def name(self, i: int) -> str:
        name = self.index.name(i)
        return name if self.single else f"{self.called(self.index.shard_of(i))}/{name}"

    def hash_names(self, into: Any) -> None:
        self.index.hash_names(into)

    @property
    def file_sizes(self) -> list[int]:
        """Bytes of each file when it was listed; -1: it wasn't there."""
        return [size for _, size, _ in self.index.signature]

    def read(self, i: int) -> bytes:
        """The member's bytes.

        Raises:
            OSError: for one that is larger than `LARGEST_FILE`.
            LostError: for a tar file that isn't what it was, or can't be fetched.
        """
        shard, offset, size = self.index.place(i)
        if size > LARGEST_FILE:
            raise too_large()
        follows, self.last = i == self.last + 1, i
        lost = self.index.starts[shard + 1] - i
        try:
            if not (self.whole or follows) and (data := self._alone(shard, offset, size)) is not None:
                return data
            file = self._file(shard)
        except OSError as error:
            raise LostError(why_not(error), lost) from None
        found = os.fstat(file.fileno())
        _, listed, changed = self.index.signature[shard]
        if self.copies is not None:
            changed = found.st_mtime_ns  # which says when the copy was used; that it is the right one says its name
        if (found.st_size, found.st_mtime_ns) != (listed, changed):
            how = "shrunk" if found.st_size < listed else "changed"
            raise LostError(f"{self.files[shard]} has {how} since its index was made", lost)
        data = os.pread(file.fileno(), size, offset)
        if len(data) != size:
            raise OSError(f"{self.files[shard]} ends before this image does")
        return data

    def _alone(self, shard: int, offset: int, size: int) -> bytes | None:
        """The member's bytes from the store, where there is no copy of its file and the store knows parts of files."""
        if self.copies is None or shard in self.opened or self.copies.has(shard):
            return None
        data = self.copies.part(shard, offset, size)
        if len(data) == size:
            return data
        self.whole = True  # that server sends no parts
        return None

    def _file(self, shard: int) -> FileIO:
        """The tar file, open. Forks and threads may share it, as nobody has a position in it; one that is no longer
        among the `OPEN`, or a copy that had to go, is closed when its last reader has let go of it."""
        file = self.opened.get(shard)
        if file is None:
            file = open_regular(self.files[shard]) if self.copies is None else self.copies.open(shard)
            for oldest in list(self.opened)[: len(self.opened) - OPEN + 1]:
                self.opened.pop(oldest, None)
            for other in list(self.opened) if self.copies is not None else ():
                self._let_go(other)
            self.opened[shard] = file
        return file

    def _let_go(self, shard: int) -> None:
        """Of a copy that is gone, whose place on the disk isn't free before the last one has closed it."""
        with contextlib.suppress(KeyError):  # another thread was quicker
            if not os.fstat(self.opened[shard].fileno()).st_nlink:
                self.opened.pop(shard)


def _again(root: str, files: list[str], index: Index, copies: Copies | None, whole: bool) -> Shards:
    """The source in another process: nothing is listed anew, so that image i stays image i."""
    source = Shards.__new__(Shards)
    source._open(root, files, index, copies)
    source.whole = whole
    return source


@functools.lru_cache(maxsize=4)
def _source(root: str, version: tuple[int, ...]) -> Shards:
    return Shards(root)


def _changed(path: str) -> int:
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return -1


def is_single(root: str) -> bool:
    """Whether it names one tar file, and no folder or pattern of them."""
    if remote.is_remote(root):
        return root.lower().endswith(".tar") and not naming.is_pattern(root)
    return os.path.isfile(root)


def home_of(root: str) -> str:
    """The folder from which the tar files are called."""
    if remote.is_remote(root) and not root.lower().endswith(".tar") and not naming.is_pattern(root):
        return root.rstrip("/")
    return root if os.path.isdir(root) else naming.home(root)


def shard_files(root: str) -> list[str]:
    """The tar files that a path or a pattern names, in the order given; those of a folder are sorted."""
    if root.lower().endswith(COMPRESSED) and not os.path.isdir(root):
        raise UserError(f"{root}: {UNCOMPRESSED}")
    if remote.is_remote(root) and home_of(root) == root.rstrip("/"):
        found = [url for url in remote.within(root) if is_shown(os.path.basename(url), (".tar",))]
        if not found:
            raise UserError(f"{root} has {UNCOMPRESSED}")
        return found
    if not os.path.isdir(root):
        return naming.expand(root)
    try:
        with os.scandir(root) as entries:
            found = sorted(os.path.join(root, one.name) for one in entries if is_shown(one.name, (".tar",)))
    except OSError as error:
        raise UserError(f"{root} can't be listed: {error.strerror}") from None
    if not found:
        raise UserError(f"{root} has {UNCOMPRESSED}")
    return found


def is_shown(name: str, endings: tuple[str, ...]) -> bool:
    return name.lower().endswith(endings) and not name.startswith(".")


def holds_files(root: str, endings: tuple[str, ...]) -> bool:
    """Whether a folder is one of such files: it has neither images nor folders, but for hidden ones; what else lies
    beside them (an index, a readme) doesn't matter. A folder of images is told by the first of them."""
    found = False
    try:
        with os.scandir(root) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.name.lower().endswith(ENDINGS) or entry.is_dir():
                    return False
                found |= is_shown(entry.name, endings)
    except OSError:
        return False
    return found
