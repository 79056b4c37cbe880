"""One source of images, whatever they are stored in: how many there are, and the i-th as bytes or as pixels.

Everything that reads images takes a `Source`: the loaders, evaluation, the report. A format is a class with these
members, in a module of `fastjem.data.sources` and with a line in `SOURCES`; an object of the user's needs `len` and
`read` alone (docs/adding-a-source.md).
"""

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar, cast

import numpy as np

from fastjem.data.copies import known
from fastjem.data.levels import Levels
from fastjem.data.picture import Picture, to_image
from fastjem.data.remote import is_remote, within
from fastjem.data.sources import naming
from fastjem.data.sources.arrays import Arrays
from fastjem.data.sources.arrow import TABLES
from fastjem.data.sources.folder import Folder
from fastjem.data.sources.listing import Listing
from fastjem.data.sources.mixture import Mixture
from fastjem.data.sources.pairs import Pairs, check_sources, roots
from fastjem.data.sources.shards import COMPRESSED, LostError, Shards
from fastjem.data.sources.table import Table
from fastjem.errors import UserError
from fastjem.printing import say

T = TypeVar("T")


class Source(Protocol):
    """N images that can be read in any order, by several threads and processes at once."""

    root: str  # what the user named, for messages
    labels: np.ndarray | None  # [N] integers that number `classes`
    classes: list[str]  # empty where there are no labels
    decoded: bool  # whether `read` gives pixels; a loader that decodes by itself needs files' bytes

    def __len__(self) -> int: ...

    def name(self, i: int) -> str:
        """What the i-th image is called within the source; for a file its path below the root."""
        ...

    def read(self, i: int) -> bytes | np.ndarray:
        """A file's bytes, or values [H, W] or [H, W, C], integers or floats. Whatever is wrong with it may raise."""
        ...


class Format(Protocol):
    """A class of sources that a path names."""

    def __call__(self, root: str | Path) -> Source: ...

    def recognises(self, root: Path) -> bool:
        """Whether the path is one of this format; nothing but its name and kind is looked at."""
        ...

    def read_named(self, root: str, name: str) -> bytes | np.ndarray:
        """`read` of the image called `name`, without opening the whole source: for reports."""
        ...


# The first that recognises a path opens it.
SOURCES: dict[str, Format] = {"arrays": Arrays, "listing": Listing, "shards": Shards, "table": Table, "folder": Folder}


def format_of(root: str | Path) -> Format:
    if is_remote(root):
        return _format_in_store(os.fspath(root))
    return next(kind for kind in SOURCES.values() if kind.recognises(Path(root)))


def _format_in_store(root: str) -> Format:
    """By its name or, of a folder, by what is in it.

    Raises:
        UserError: for other files than tar files and tables, and where a folder has none of these.
    """
    path = naming.split_options(root)[0]
    tars = (".tar", *COMPRESSED)
    for name in [path] if path.lower().endswith((*tars, *TABLES)) or naming.is_pattern(path) else within(path):
        if name.lower().endswith(tars):
            return Shards
        if name.lower().endswith(TABLES):
            return Table
    raise UserError(f"{root}: of a store tar files and tables are read, {', '.join(('.tar', *TABLES))}")


def open_sources(data: str | os.PathLike[str] | Any, count: int = 1) -> Source:
    """`open_source`; for a method that compares images of several sources, `Pairs` of so many of them: "a,b", or a list
    of paths or objects.

    Raises:
        UserError: for another number of sources, and as `open_source` and `Pairs` do.
    """
    pairs = inner(data)
    if isinstance(pairs, Pairs):
        check_sources(count, pairs.parts, pairs.root)
        return cast(Source, data)
    if count == 1:
        return open_source(data)
    given = roots(os.fspath(data)) if isinstance(data, (str, os.PathLike)) else data
    given = list(given) if isinstance(given, (list, tuple)) else [given]
    check_sources(count, given, data)
    return Pairs([open_source(one) for one in given])


def open_source(data: str | os.PathLike[str] | Any) -> Source:
    """A source of what the user named: a path that one of `SOURCES` recognises, several of them with commas between
    (`Mixture`), or an object of their own with `len` and `read`.

    Raises:
        UserError: if it is none of these, or can't be opened.

    What in it can't be looked into is said on stderr: a class that vanishes silently would spoil a run.
    """
    if isinstance(data, (str, os.PathLike)):
        parts = naming.split(os.fspath(data)) or [(os.fspath(data), None)]
        if len(parts) > 1 or parts[0][1] is not None:
            return mixed([root for root, _ in parts], [weight for _, weight in parts])
        root = parts[0][0]
        source = format_of(root)(root if is_remote(root) else Path(root))
        for folder, why in getattr(source, "unlisted", ()):
            say(f"fastjem: {folder} can't be listed ({why}): what is in it is left out")
        for notice in getattr(source, "notices", ()):
            say(f"fastjem: {notice}")
        return source
    if isinstance(data, (Completed, Levelled, Pairs, Mixture)) or type(data) in SOURCES.values():
        return data
    return Completed(data)


def mixed(parts: Sequence[Any], weights: Sequence[float | None] | None = None) -> Mixture:
    """Several sources as one, see `Mixture`.

    Args:
        parts: what `open_source` takes, each.
        weights: how often each image of a part is seen in an epoch; None: once.

    Raises:
        UserError: as `open_source` and `Mixture` do.
    """
    return Mixture([open_source(part) for part in parts], weights)


class Completed:
    """A user's object with `len` and `read`, and what else it has of a `Source`; this class fills in the others."""

    def __init__(self, given: Any):
        kind = type(given).__name__
        if not (hasattr(given, "__len__") and callable(getattr(given, "read", None))):
            raise UserError(f"a source of images has len() and read(i), or is a path; got {kind}")
        if not len(given):
            raise UserError(f"{kind} has no images")
        self.given = given
        self.root = str(getattr(given, "root", kind))
        self.labels, self.classes = labels_and_classes(
            kind, len(given), getattr(given, "labels", None), getattr(given, "classes", None)
        )
        self.decoded = bool(given.decoded) if hasattr(given, "decoded") else self._reads_pixels()

    def _reads_pixels(self) -> bool:
        try:
            return isinstance(self.given.read(0), np.ndarray)
        except Exception:  # an image that can't be read is no reason to refuse the others
            return False

    def __len__(self) -> int:
        return len(self.given)

    def name(self, i: int) -> str:
        return str(self.given.name(i)) if hasattr(self.given, "name") else str(i)

    def read(self, i: int) -> bytes | np.ndarray:
        data = self.given.read(i)
        return bytes(data) if isinstance(data, (bytearray, memoryview)) else data


def labels_and_classes(
    owner: str, images: int, labels: Any, classes: Sequence[str] | None
) -> tuple[np.ndarray | None, list[str]]:
    """Labels [N] as numbers from 0 on, and the names that they number; names are made of the values if none are given.

    Raises:
        UserError: for labels that aren't N integers, or don't number the classes.
    """
    if labels is None:
        return None, []
    values = np.asarray(labels)
    if values.shape != (images,) or values.dtype.kind not in "iu":
        raise UserError(f"{owner}: labels must be [{images}] integers, got {values.shape} {values.dtype}")
    if classes is None:
        present, numbers = np.unique(values, return_inverse=True)
        return numbers, [str(value) for value in present]
    if values.min() < 0 or values.max() >= len(classes):
        raise UserError(f"{owner}: labels must number the {len(classes)} classes")
    return values.astype(np.int64), [str(name) for name in classes]


def path_of(source: Source, i: int) -> str:
    """The i-th image's name with its root's before it, as messages and reports call it: of an image in a file of its
    own that file's path.
    """
    given = inner(source)
    if isinstance(given, (Pairs, Mixture)):
        return path_of(*given.place(i))
    return _path(type(given), given.root, given.name(i))


def path_named(root: str, name: str) -> str:
    """`path_of` the image called `name` of the source that `open_source(root)` opens."""
    part, name = part_named(root, name)
    if is_remote(part):  # nobody asks the store
        return os.path.join(naming.folder_of(part), name)
    return _path(format_of(part), part, name)


def _path(kind: Any, root: str, name: str) -> str:
    return kind.path_named(root, name) if hasattr(kind, "path_named") else os.path.join(root, name)


def part_named(root: str, name: str) -> tuple[str, str]:
    """Which of several sources that `root` names has the image `name`, and what it is called there."""
    parts = naming.split(root)
    if parts and all(weight is not None for _, weight in parts):
        return Mixture.part_named([part for part, _ in parts], name)
    return (parts[0][0] if parts else root), name  # of pairs, names are those of the first one's images


def decode_all(source: Source, i: int) -> list[Picture]:
    """The i-th image of each source of `Pairs`, or of the one that there is; see `decode`."""
    return [to_image(data, rule_of(source)) for data in read_all(source, i)]


def read_all(source: Source, i: int) -> list[bytes | np.ndarray]:
    """The i-th image of each source of `Pairs`, or of the one that there is, as it is stored."""
    pairs = inner(source)
    return pairs.read_all(i) if isinstance(pairs, Pairs) else [source.read(i)]


def decode(source: Source, i: int) -> Picture:
    """The i-th image as levels, the right way up, by the source's rule. Whatever is wrong with it raises."""
    return to_image(source.read(i), rule_of(source))


def decode_named(root: str, name: str, levels: Levels | None = None) -> Picture:
    """The image called `name` of the source that `open_source(root)` opens, which isn't listed for it."""
    part, name = part_named(root, name)
    if is_remote(part) and not known(naming.split_options(part)[0]):
        raise OSError(f"{part} wasn't opened on this machine yet")
    return to_image(format_of(part).read_named(part, name), levels)


class Levelled:
    """A source and how what it stores becomes levels: whoever decodes its images does so by that rule."""

    def __init__(self, source: Source, levels: Levels):
        self.source = source.source if isinstance(source, Levelled) else source
        self.levels = levels
        self.root = source.root
        self.labels = source.labels
        self.classes = source.classes
        self.decoded = source.decoded

    def __len__(self) -> int:
        return len(self.source)

    def name(self, i: int) -> str:
        return self.source.name(i)

    def read(self, i: int) -> bytes | np.ndarray:
        return self.source.read(i)


def inner(source: Any) -> Any:
    """The source itself, without the rule for its values."""
    return source.source if isinstance(source, Levelled) else source


def are_pairs(source: Source) -> bool:
    """Whether images of several sources belong together."""
    return isinstance(inner(source), Pairs)


def parts_of(source: Source) -> tuple[tuple[int, float], ...]:
    """Of a `Mixture` how many images each part has, and how often each is seen in an epoch; of any other source ()."""
    given = inner(source)
    return given.parts_of_epoch if isinstance(given, Mixture) else ()


def rule_of(source: Source) -> Levels | None:
    """How a source's values become levels; None: nobody has said."""
    return source.levels if isinstance(source, Levelled) else None


@dataclass
class Read(Generic[T]):
    """What `read_or_next` found."""

    sample: int  # the image that was really read
    value: T
    unreadable: list[tuple[str, str]]  # (path, reason) of those before it that can't be


def read_or_next(source: Source, sample: int, read: Callable[[int], T]) -> Read[T]:
    """`read` of the sample, or of the next one that can be read: a broken file doesn't end a run.

    Raises:
        NoneReadable: if there is none.
    """
    unreadable = []
    tried = 0
    while tried < len(source):
        at = (sample + tried) % len(source)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow warns of harmless EXIF trouble, once per file
                return Read(at, read(at), unreadable)
        except Exception as error:  # whatever a decoder may raise on a broken file
            path = path_of(source, at)
            unreadable.append((path, reason(error, path)))
            # A file of thousands of images is lost once, and not for each of them.
            tried += error.images if isinstance(error, LostError) and not are_pairs(source) else 1
    raise NoneReadable(unreadable)


class NoneReadable(UserError):
    """Not one image of the source can be read."""

    def __init__(self, unreadable: Sequence[tuple[str, str]]):
        self.unreadable = list(unreadable)
        path, why = self.unreadable[0]
        super().__init__(f"none of the files can be read; the first: {path}: {why}")


def reason(error: Exception, path: str) -> str:
    """What a decoder said of a file, in one line and without the file's name."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = str(error).splitlines()
    return (lines[0] if lines else type(error).__name__).replace(f" '{path}'", "").partition(" <_io")[0]
