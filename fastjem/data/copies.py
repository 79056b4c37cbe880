"""Copies of a store's files on the local disk, which take up to a budget: those that were used last stay.

All processes of a machine share them. A file is fetched by one of them while the others wait for it; a copy that goes
stays readable for whoever has it open. What can't be fetched is left alone for `FORGET` seconds, by all of them.
"""

import contextlib
import errno
import hashlib
import math
import os
import re
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from io import FileIO
from typing import BinaryIO

from fastjem.data import cache, remote
from fastjem.data.files import open_regular
from fastjem.data.remote import File
from fastjem.errors import UserError
from fastjem.reading import why_not

GIGABYTES = "FASTJEM_CACHE_GB"
NAME = re.compile(r"[0-9a-f]{24}-(\d+)(\.[a-z]+)?")  # of a copy: what it is of, its bytes, the ending
FORGET = 60.0  # seconds
FAILED, OPENED = ".failed", ".opened"
FETCHING = 4  # files at a time


def folder() -> str:
    """Where copies are.

    Raises:
        UserError: for an account without a home.
    """
    try:
        return str(cache.folder() / "store")
    except RuntimeError as error:
        raise UserError(f"copies of a store's files need a cache folder ({error}): FASTJEM_CACHE names one") from None


def budget() -> int:
    """Bytes that all copies may take: $FASTJEM_CACHE_GB, else half of what the disk has for them."""
    if given := os.environ.get(GIGABYTES):
        try:
            found = float(given)
        except ValueError:
            found = math.nan
        if not (math.isfinite(found) and found > 0):
            raise UserError(f"{GIGABYTES} must be a number of gigabytes above 0, got {given}")
        return int(found * 1e9)
    return (_free(folder()) + sum(size for _, size, _ in _kept(folder()))) // 2


def _free(place: str) -> int:
    while not os.path.exists(place) and place != os.path.dirname(place):
        place = os.path.dirname(place)
    return shutil.disk_usage(place).free


def _kept(place: str) -> list[tuple[float, int, str]]:
    """(when it was used last, bytes, path) of each copy, the oldest first."""
    found = []
    with contextlib.suppress(FileNotFoundError), os.scandir(place) as entries:
        for one in entries:
            with contextlib.suppress(OSError):  # gone in between
                if NAME.fullmatch(one.name):
                    found.append((one.stat().st_mtime, one.stat().st_size, one.path))
    return sorted(found)


def is_copy(path: str) -> bool:
    """Whether it is a copy's name: of the same name are the same bytes."""
    return NAME.fullmatch(os.path.basename(path)) is not None and os.path.dirname(path) == folder()


_used: dict[str, BinaryIO] = {}  # copies that stay as long as this process runs


@dataclass
class Copies:
    """The files of one source and the copies that there are of them.

    Args:
        files: as the store had them when the source was opened.
        folder: where copies are.
        budget: bytes that all copies in it may take.
    """

    files: list[File]
    folder: str
    budget: int
    same: set[int] = field(default_factory=set)  # files of which this process has seen that they haven't changed

    @classmethod
    def of(cls, root: str, urls: Sequence[str]) -> "Copies":
        """Of these files as they are now.

        Raises:
            UserError: where the store can't be asked.
        """
        copies = cls(remote.look_all(urls), folder(), budget())
        for number in range(len(urls)):
            with contextlib.suppress(OSError):  # whoever begins anew tries anew
                os.unlink(copies.place(number) + FAILED)
        with contextlib.suppress(OSError), cache.written(_mark(root)):
            pass
        return copies

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(max(file.size, 0) for file in self.files)

    @property
    def largest(self) -> int:
        return max((file.size for file in self.files), default=0)

    @property
    def fits(self) -> bool:
        """Whether there may be copies of all files."""
        return self.size <= self.budget

    def place(self, number: int) -> str:
        """Where a file's copy is, if there is one."""
        file = self.files[number]
        key = hashlib.sha256(f"{file.url}\0{file.size}\0{file.version}".encode("utf-8", "surrogatepass"))
        ending = os.path.splitext(file.url)[1].lower()
        return os.path.join(self.folder, f"{key.hexdigest()[:24]}-{max(file.size, 0)}{ending}")

    def has(self, number: int) -> bool:
        """Whether there is a copy, as long as the file is."""
        try:
            return os.path.getsize(self.place(number)) == self.files[number].size
        except OSError:
            return False

    def fetch(self, number: int) -> str:
        """The path of a file's copy, which is made if there is none.

        Raises:
            OSError: with the reason, for a file that can't be had, and for a disk that has no room.
        """
        file = self.files[number]
        if file.size < 0:
            raise FileNotFoundError(errno.ENOENT, file.why, file.url)
        place = self.place(number)
        if self.has(number):
            return place
        with cache.alone(place):
            if self.has(number):  # somebody was quicker
                return place
            self._check(place)
            try:
                self._make_room(place, file.size)
                with cache.filled(place) as part:
                    remote.download(file, part)
            except OSError as error:
                raise self._noted(place, error) from None
        return place

    def open(self, number: int) -> FileIO:
        """A file's copy, open and unbuffered; OSError as `fetch`."""
        while True:
            path = self.fetch(number)
            with contextlib.suppress(FileNotFoundError):  # it had to go in between
                file = open_regular(path)
                self.touch(number)
                return file

    def keep_all(self, root: str) -> list[str]:
        """The paths of copies of all files, which stay for as long as this process runs.

        Args:
            root: what the user named, for messages.

        Raises:
            UserError: for a file that can't be had, and for more bytes than the budget is.
        """
        if not self.fits:
            raise UserError(
                f"{root}: tables are read at random from copies of all of them, {gigabytes(self.size)}, and "
                f"{gigabytes(self.budget)} may be kept in {self.folder}: {GIGABYTES} says how many"
            )
        with ThreadPoolExecutor(FETCHING) as pool:
            return list(pool.map(self._keep, range(len(self.files))))

    def _keep(self, number: int) -> str:
        try:
            while True:
                path = self.fetch(number)
                with contextlib.suppress(FileNotFoundError):
                    if path not in _used:
                        _used[path] = cache.used(path)
                    return path
        except OSError as error:
            raise UserError(f"{self.files[number].url} can't be read: {why_not(error)}") from None

    def part(self, number: int, start: int, size: int) -> bytes:
        """Some of a file's bytes by a request of their own, without a copy; others from a server that can't do that."""
        place = self.place(number)
        file = self.files[number]
        self._check(place)
        try:
            if number not in self.same:
                remote.check_same(file)
                self.same.add(number)
            return remote.part(file, start, start + size)
        except OSError as error:
            raise self._noted(place, error) from None

    def touch(self, number: int) -> None:
        """Say that a file's copy is used now: those that weren't for longest go first."""
        with contextlib.suppress(OSError):
            os.utime(self.place(number))

    def _check(self, place: str) -> None:
        """OSError with the reason of before, where somebody has tried in vain a moment ago."""
        with contextlib.suppress(FileNotFoundError):
            if time.time() - os.stat(place + FAILED).st_mtime < FORGET:
                with open(place + FAILED, encoding="utf-8", errors="replace") as file:
                    raise OSError(file.read())

    def _noted(self, place: str, error: OSError) -> OSError:
        """The error with its reason, which is left for others, too."""
        why = why_not(error)
        if error.errno in remote.DISK or str(error.filename or "").startswith(self.folder):
            why = f"its copy can't be written in {self.folder} ({why}): FASTJEM_CACHE says where it may be"
        with contextlib.suppress(OSError), cache.written(place + FAILED) as file:
            file.write(why.encode("utf-8", "replace"))
        return OSError(why)

    def _make_room(self, place: str, size: int) -> None:
        """Let copies go, those that weren't used for longest first, until a file of so many bytes may come, and those
        that are coming already. One that a process has to keep stays.

        Raises:
            OSError: where the disk has no room.
        """
        with cache.alone(os.path.join(self.folder, "room")):
            taken = size + _coming(self.folder, os.path.basename(place))
            kept = _kept(self.folder)
            taken += sum(length for _, length, _ in kept)
            for _, length, path in kept:
                if taken <= self.budget and _free(self.folder) > size:
                    break
                if not cache.is_used(path):
                    with contextlib.suppress(OSError):
                        os.unlink(path)
                    taken -= length
        free = _free(self.folder)
        if free <= size:
            raise OSError(errno.ENOSPC, f"it has {gigabytes(size)}, and the disk {gigabytes(free)} left")


def _coming(place: str, own: str) -> int:
    """Bytes of the copies but `own` that are made at this moment. What makers that were killed have left is removed."""
    coming = 0
    with contextlib.suppress(FileNotFoundError), os.scandir(place) as entries:
        for one in entries:
            name, ending = os.path.splitext(one.name)
            if ending == cache.LOCK and name != own and (found := NAME.fullmatch(name)):
                whole = os.path.join(place, name)
                coming += int(found[1]) if cache.is_made(whole) and not os.path.exists(whole) else 0
            name = os.path.splitext(name)[0].lstrip(".")  # of a part: .NAME.RANDOM.part
            if ending == cache.PART and name != own and not cache.is_made(os.path.join(place, name)):
                with contextlib.suppress(OSError):
                    if cache.is_left(one.path):
                        os.unlink(one.path)
    return coming


def gigabytes(size: int) -> str:
    return f"{size / 1e9:.3g} GB"


def _mark(root: str) -> str:
    return os.path.join(folder(), hashlib.sha256(os.fsencode(root)).hexdigest()[:24] + OPENED)


def known(root: str) -> bool:
    """Whether this was opened on this machine before. What shows images by a name that somebody else may have written
    down asks no store that its user didn't."""
    return os.path.exists(_mark(root))
