"""A run's folder, read: what a report is made of.

A run that was killed, copied in part or sent by somebody has files that are damaged or say anything. The configuration
must be right; whatever is wrong with the others is one of `Run.troubles`, and the report goes on without.
"""

import io
import os
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from fastjem import config as configuration
from fastjem import reading
from fastjem.data.levels import Levels
from fastjem.data.pixels import Pixels
from fastjem.data.source import path_named
from fastjem.data.sources import naming
from fastjem.errors import UserError
from fastjem.fields import came
from fastjem.methods import METHODS, Method

MOST_ROWS = 10_000  # embeddings of a report; a run saves a tenth of it
MOST_BYTES = 2**28  # of embeddings, unpacked
EXACT = 2**53  # integers below have a float of their own
WHOLE = ("steps", "steps_per_epoch", "images", "patch", "ranks", "classes")  # numbers of environment.json


@dataclass(frozen=True)
class Embeddings:
    """Some images' embeddings at one step of the run."""

    step: int
    rows: np.ndarray  # [N, D] float32, of length one
    indices: list[int]  # N positions in the data
    files: list[str]  # N paths below `root`
    root: str
    labels: np.ndarray  # [N] index of the class
    classes: list[str]
    images: int  # in the folder, of which these are N
    labelled: bool  # False: a flat folder; the one class has no name
    hidden: frozenset[str] = frozenset()  # files that aren't opened
    levels: Levels | None = None  # how the run reads its images


@dataclass(frozen=True)
class Run:
    path: Path
    config: dict[str, Any]  # every option as it was given or is by default
    rows: list[dict[str, Any]]  # of metrics.jsonl
    knn: list[dict[str, Any]]
    environment: dict[str, Any] = field(default_factory=dict)
    embeddings: Embeddings | None = None
    troubles: tuple[str, ...] = ()  # what is wrong with its files, a sentence each
    ran: dict[str, Any] = field(default_factory=dict)  # the values that it trains with; empty for runs of before

    @property
    def name(self) -> str:
        return self.path.name or str(self.path)

    @property
    def method(self) -> type[Method] | None:
        """None for one that isn't ours."""
        return METHODS.get(self.config.get("method", ""))

    @property
    def has_teacher(self) -> bool:
        asked = self.config.get("momentum_encoder")
        return bool(self.method and self.method.momentum) if asked is None else bool(asked)

    @property
    def steps_per_epoch(self) -> int:
        return self.environment.get("steps_per_epoch", 0)


def read(path: str | os.PathLike[str], *, data: str | None = None, trusted: bool = False) -> Run:
    """The run in that folder, finished or not.

    Args:
        data: where its images are now, if not where the run says. Links in this folder are followed.
        trusted: the files are this process's own, so that images are opened wherever they say.

    Raises:
        UserError: there is no run, or its configuration can't be read.
    """
    path = Path(path)
    options, given = configuration.read_options(path)
    troubles: list[str] = []
    rows = _rows(path / "metrics.jsonl", ("step",), troubles)
    knn = _rows(path / "knn.jsonl", ("step", "classes", "knn"), troubles)
    environment = _environment(path / "environment.json", troubles)
    embeddings = _embeddings(path / "embeddings.npz", troubles)
    if embeddings is not None and data is not None:
        embeddings = replace(embeddings, root=data)
    elif embeddings is not None and not trusted:
        embeddings = _within_data(embeddings, options.data, troubles)
    if embeddings is not None and "pixels" in given:
        with reading.named(path / configuration.FILE):
            embeddings = replace(embeddings, levels=Pixels.from_dict(given["pixels"]).levels)
    ran = given.pop("ran", None)
    given.pop("given", None)
    config = {**given, **asdict(options)}
    values = ran if isinstance(ran, dict) else {}
    return Run(path.resolve(), config, rows, knn, environment, embeddings, tuple(troubles), values)


def _rows(path: Path, whole: Sequence[str], troubles: list[str]) -> list[dict[str, Any]]:
    """The objects of a file of figures that have integers of the names `whole` (kNN: a share), with those of their
    values that are numbers.
    """
    try:
        found, damaged = reading.json_rows(path)
    except reading.Missing:
        return []
    except UserError as error:
        troubles.append(f"{error}; the report goes on without it")
        return []
    rows = []
    for row in found:
        numbers = {name: value for name, value in row.items() if _is_number(value)}
        if all(_is_figure(name, numbers.get(name)) for name in whole):
            rows.append(numbers)
        else:
            damaged += 1
    if damaged:
        troubles.append(f"{path}: {damaged} of {damaged + len(rows)} lines can't be read and are left out")
    return rows


def _is_number(value: Any) -> bool:
    if isinstance(value, int) and not isinstance(value, bool):
        return abs(value) < EXACT
    return isinstance(value, float)


def _is_figure(name: str, value: Any) -> bool:
    """Whether a number that each row must have is one: a share for "knn", else a natural number."""
    if name == "knn":
        return value is not None and 0 <= value <= 1
    return isinstance(value, int) and value >= (name != "step")


def _environment(path: Path, troubles: list[str]) -> dict[str, Any]:
    try:
        found = reading.json_object(path)
    except reading.Missing:
        return {}
    except UserError as error:
        troubles.append(f"{error}; the report goes on without it")
        return {}
    wrong = [name for name in WHOLE if name in found and not (_is_number(found[name]) and found[name] >= 0)]
    wrong += [name for name in WHOLE if name in found and name not in wrong and not isinstance(found[name], int)]
    for name in wrong:
        troubles.append(f"{path}: {name} must be a natural number, got {came(found.pop(name))}")
    return found


def _embeddings(path: Path, troubles: list[str]) -> Embeddings | None:
    try:
        with reading.named(path):
            return unpacked(reading.content(path, MOST_BYTES))
    except reading.Missing:
        return None
    except UserError as error:
        troubles.append(f"{error}; the report goes on without it")
        return None


def unpacked(content: bytes) -> Embeddings:
    """What `SampleImages.pack` wrote; UserError for anything else. Nothing in it is ever executed."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            unpacked_bytes = sum(member.file_size for member in archive.infolist())
        if unpacked_bytes > MOST_BYTES:
            raise UserError(f"it has {unpacked_bytes:,} bytes unpacked, more than the {MOST_BYTES:,} that are read")
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except UserError:
        raise
    except Exception as error:  # a broken archive raises whatever zipfile, zlib or numpy may
        raise UserError(f"it is no .npz file of arrays: {str(error).partition('. ')[0]}") from None
    lacking = [name for name in CONTRACT if name not in arrays]
    if lacking:
        raise UserError(f"it lacks {', '.join(lacking)}")
    for name, (kinds, dimensions) in CONTRACT.items():
        array = arrays[name]
        if array.dtype.kind not in kinds or array.ndim != dimensions:
            raise UserError(f"its array {name} can't be {array.dtype} {list(array.shape)}")
    found = Embeddings(
        step=int(arrays["step"]),
        rows=arrays["rows"].astype(np.float32),
        indices=arrays["indices"].tolist(),
        files=arrays["files"].tolist(),
        root=str(arrays["root"]),
        labels=arrays["labels"].astype(np.int64),
        classes=arrays["classes"].tolist(),
        images=int(arrays["images"]),
        labelled=bool(arrays["labelled"]),
    )
    _check(found)
    return found


# The arrays of a file of embeddings: kinds of dtype, dimensions.
CONTRACT = {
    "step": ("iu", 0), "rows": ("f", 2), "indices": ("iu", 1), "files": ("U", 1), "root": ("U", 0),
    "labels": ("iu", 1), "classes": ("U", 1), "images": ("iu", 0), "labelled": ("b", 0),
}  # fmt: skip


def _check(found: Embeddings) -> None:
    """UserError where sizes don't fit one another, numbers can't be, or names lead out of the data."""
    images, width = found.rows.shape
    lengths = {len(found.indices), len(found.files), len(found.labels)}
    if lengths != {images} or not width:
        raise UserError(f"its {images} rows of {width} numbers don't fit {sorted(lengths)} files, indices and labels")
    if images > MOST_ROWS:
        raise UserError(f"it has {images} rows, more than the {MOST_ROWS} that are shown")
    numbers = [found.step, found.images, *found.indices]
    if not all(0 <= number < EXACT for number in numbers) or found.images < images:
        raise UserError("its step, images or indices can't be right")
    if images and not 0 <= found.labels.min() <= found.labels.max() < len(found.classes):
        raise UserError(f"its labels must number the {len(found.classes)} classes")
    if any(naming.is_list(root) for root, _ in naming.split(found.root)):
        return  # it may name what lies elsewhere
    for name in found.files:
        if not is_below(name):
            raise UserError(f"it names a file that isn't below the data folder: {name}")


def is_below(name: str) -> bool:
    """Whether a path stays below the folder that it is taken from, but for links."""
    parts = name.replace("\\", "/").split("/")
    return bool(name) and ".." not in parts and "\0" not in name and not os.path.isabs(name) and parts[0] != ""


def _within_data(found: Embeddings, data: str | None, troubles: list[str]) -> Embeddings:
    """The embeddings with what must not be opened hidden: a page that is passed on must not carry somebody's files
    because a folder that was sent names them.
    """
    parts = [root for root, _ in naming.split(found.root)]
    if not any(naming.is_there(root) for root in parts):  # a name may lead to something nevertheless
        return replace(found, hidden=frozenset(name for name in found.files if os.path.exists(_path(found.root, name))))
    if data is not None and not _is_folder_of(found.root, data):
        troubles.append(
            f"the images in {found.root} are not shown, as the configuration names {data}; --data says where they are"
        )
        return replace(found, hidden=frozenset(found.files))
    folders = tuple(os.path.join(os.path.realpath(naming.folder_of(root)), "") for root in parts)
    outside = frozenset(name for name in found.files if not _path(found.root, name).startswith(folders))
    if outside:
        troubles.append(
            f"{len(outside)} images are not shown, as links, or what a list names, lead out of {found.root}; "
            f"--data {found.root} follows them"
        )
    return replace(found, hidden=outside)


def _path(root: str, name: str) -> str:
    """Where an image lies, links followed; "" for one that no part of the data has."""
    try:
        return os.path.realpath(path_named(root, name))
    except (UserError, ValueError):
        return ""


def _is_folder_of(root: str, data: str) -> bool:
    """Whether the absolute `root` is what the configuration calls `data`, perhaps from another working directory."""
    named, asked = naming.split(root), naming.split(data)
    return len(named) == len(asked) and all(map(_is_path_of, (one for one, _ in named), (one for one, _ in asked)))


def _is_path_of(root: str, data: str) -> bool:
    if os.path.isabs(data):
        return os.path.normpath(root) == os.path.normpath(data)
    parts = [part for part in os.path.normpath(data).split(os.sep) if part not in (".", "..")]
    return not parts or Path(os.path.normpath(root)).parts[-len(parts) :] == tuple(parts)
