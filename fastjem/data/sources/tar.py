"""What a tar file of images holds and where in it: one pass over its headers, by Python's `tarfile`."""

import json
import os
import posixpath
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from io import FileIO
from typing import Any, BinaryIO

import numpy as np

from fastjem.data.files import ENDINGS, open_regular
from fastjem.data.sources.labels import LABELS, Label
from fastjem.reading import why_not

KEYS = ("cls", *LABELS)  # of a sample's .json; the first that is there counts
LARGEST_LABEL = 2**20  # bytes of a .cls or .json member
BLOCK = 512
PADDING = 2**20  # bytes behind a tar file's end that are looked at: zeros, usually 10 kB
GZIP = b"\x1f\x8b"


class DamagedError(Exception):
    """The rest of a tar file can't be used; the text says why."""

    def __init__(self, why: str, at: int):
        super().__init__(why)
        self.at = at  # byte from which on it can't


@dataclass
class Sample:
    """The members that share a name up to the first dot of its last part."""

    images: dict[str, tuple[int, int]] = field(default_factory=dict)  # member -> (first byte, bytes)
    cls: Label | None = None
    json: Label | None = None

    def chosen(self, key: str) -> list[str]:
        """The members that are its images: the first called like `0001.jpg`, or all that are called like
        `0001.left.jpg` where there is none."""
        whole = [name for name in self.images if name[len(key) :].lower() in ENDINGS]
        return whole[:1] or list(self.images)

    @property
    def label(self) -> Label | None:
        return self.json if self.cls is None else self.cls


@dataclass
class Listed:
    """The images of a tar file in the order in which they lie in it; R of them."""

    names: list[bytes] = field(default_factory=list)
    offsets: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))  # [R] first bytes
    sizes: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint32))  # [R] bytes
    labels: list[Label | None] = field(default_factory=list)
    without: int = 0  # samples without an image
    unlisted: list[tuple[str, str]] = field(default_factory=list)  # (what of the file, "": all; why it is left out)


def list_tar(path: str, opened: Callable[[str], FileIO] = open_regular) -> Listed:
    """What is in a tar file up to where it is damaged."""
    samples: dict[str, Sample] = {}
    links: list[tuple[str, str, str]] = []  # key, member, what it leads to
    found = Listed()
    last = ""
    try:
        with opened(path) as file:
            for member, name in _members(file):  # type: ignore[arg-type]
                folder, base = posixpath.split(name)
                if not base or any(part.startswith(".") for part in name.split("/")):
                    continue  # "._1.jpg" is what macOS knows of "1.jpg"
                key = posixpath.join(folder, base.partition(".")[0])
                ending = os.path.splitext(base)[1].lower()
                if member.issym() or member.islnk():
                    beside = folder if member.issym() else ""
                    links += [(key, name, posixpath.normpath(posixpath.join(beside, member.linkname)))]
                    continue
                if member.issparse():
                    if ending in ENDINGS:
                        found.unlisted.append((f"/{name}", "a sparse member, which isn't in one piece"))
                    continue
                last = key
                sample = samples.setdefault(key, Sample())
                if ending in ENDINGS:
                    sample.images[name] = (member.offset_data, member.size)
                elif ending in (".cls", ".json") and member.size <= LARGEST_LABEL:
                    data = os.pread(file.fileno(), member.size, member.offset_data)
                    if ending == ".cls":
                        sample.cls = of_text(data)
                    else:
                        sample.json = of_json(data)
    except DamagedError as error:
        found.unlisted.append((f" from byte {error.at} on" if error.at else "", str(error)))
        if last and samples[last].label is None and any(one.label is not None for one in samples.values()):
            del samples[last]  # its label lay behind the damage
    except OSError as error:
        found.unlisted.append(("", why_not(error)))
    _follow(links, samples, found.unlisted)
    _gather(found, samples)
    return found


def _members(file: BinaryIO) -> Iterator[tuple[tarfile.TarInfo, str]]:
    """The whole files and links of a tar file with their names below its root.

    Raises:
        DamagedError: where it can't be read any further.
    """
    size = os.fstat(file.fileno()).st_size
    if not size:
        raise DamagedError("it is empty", 0)
    if os.pread(file.fileno(), 2, 0) == GZIP:
        raise DamagedError("it is compressed by gzip: images are read at random from uncompressed tar files", 0)
    try:
        archive = tarfile.open(fileobj=file, mode="r:", errorlevel=0)  # noqa: SIM115
    except Exception as error:  # whatever `tarfile` may raise on a broken file
        raise DamagedError(f"it is no tar file ({error})", 0) from None
    at = 0
    while True:
        try:
            member = archive.next()
        except Exception as error:  # the same
            raise DamagedError(f"it is damaged or cut off ({error})", archive.offset) from None
        archive.members = []  # type: ignore[attr-defined]  # it keeps all of them, a kilobyte each
        if member is None:
            header = os.pread(file.fileno(), BLOCK, archive.offset)
            if header != bytes(BLOCK):
                raise DamagedError("it is damaged" if len(header) == BLOCK else "it is cut off", archive.offset)
            if os.pread(file.fileno(), PADDING, archive.offset).strip(b"\0"):
                raise DamagedError(
                    "it ends there, and more follows: tar -A joins tar files, cat doesn't", archive.offset
                )
            return
        if member.size < 0 or archive.offset <= at or member.offset_data < 0:
            raise DamagedError("it is damaged", at)
        begin, at = at, archive.offset
        name = posixpath.normpath(member.name).lstrip("/")
        if member.isreg():
            if not member.issparse() and member.offset_data + member.size > size:
                raise DamagedError("it is cut off", begin)
        elif not (member.issym() or member.islnk()):
            continue
        if "\0" not in name and not name.startswith("../"):
            yield member, name


def _follow(links: list[tuple[str, str, str]], samples: dict[str, Sample], unlisted: list[tuple[str, str]]) -> None:
    """A link to an image of the same tar file is that image; one to anything else with an image's name is said."""
    for key, name, target in links:
        if os.path.splitext(name)[1].lower() not in ENDINGS:
            continue
        folder, base = posixpath.split(target)
        there = samples.get(posixpath.join(folder, base.partition(".")[0]))
        if there is None or target not in there.images:
            unlisted.append((f"/{name}", f"a link to {target}, which is no image in it"))
        else:
            samples.setdefault(key, Sample()).images[name] = there.images[target]


def _gather(found: Listed, samples: dict[str, Sample]) -> None:
    places: list[tuple[int, int]] = []
    for key, sample in samples.items():
        images = sample.chosen(key)
        found.without += not images
        for name in images:
            found.names.append(name.encode("utf-8", "surrogateescape"))
            found.labels.append(sample.label)
            places.append(sample.images[name])
    found.offsets = np.array([offset for offset, _ in places], np.uint64)
    found.sizes = np.array([min(size, 2**32 - 1) for _, size in places], np.uint32)


def of_text(data: bytes) -> Label | None:
    """A .cls member's label: a number, or a name."""
    text = data.decode("utf-8", "replace").strip()
    try:
        return int(text)
    except ValueError:
        return text or None


def of_json(data: bytes) -> Label | None:
    """The label among what a .json member says; None where there is none that is a number or a name."""
    try:
        said: Any = json.loads(data)
    except (ValueError, RecursionError):
        return None
    if not isinstance(said, dict):
        return None
    found = next((said[key] for key in KEYS if type(said.get(key)) in (int, str)), None)
    return of_text(found.encode("utf-8", "replace")) if isinstance(found, str) else found
