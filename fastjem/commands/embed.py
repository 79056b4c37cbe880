"""`fastjem embed`: an encoder's embeddings of many images as a table; nearest neighbours and duplicates beside it."""

import contextlib
import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import nn

from fastjem import __version__, fields
from fastjem.data.fingerprint import fingerprint
from fastjem.data.source import Source, open_source, path_of
from fastjem.data.sources import naming
from fastjem.embeddings import files, near
from fastjem.embeddings.files import Column, Table
from fastjem.embeddings.rows import Rows
from fastjem.errors import UserError
from fastjem.lock import FILE as LOCK
from fastjem.lock import Lock
from fastjem.printing import say
from fastjem.probes import NAMED, device_of, parts, workers_of
from fastjem.runs import Opened, open_run

SAVED_EVERY = 10.0  # seconds


@dataclass
class EmbedOptions:
    """Embeddings of images as a table: path, label, embedding. Killed and started again, it goes on where it was."""

    run: str = field(
        metadata={"help": "run folder, or an exported encoder.safetensors", "positional": True, "path": True}
    )
    data: str | None = field(
        default=None, metadata={"help": "images, as --data of pretrain; none: the run's", "path": True}
    )
    out: str | None = field(default=None, metadata={"help": "file to write: .parquet, .npz or .csv", "path": True})
    teacher: bool = field(default=False, metadata={"help": "of the run's momentum encoder, not of the trained one"})
    half: bool = field(default=False, metadata={"help": "as float16, half the size"})
    neighbors: int = field(
        default=0, metadata={"help": "so many nearest other images of each, in NAME.neighbors.ENDING beside --out"}
    )
    duplicates: float = field(
        default=0.0,
        metadata={"help": "groups of images linked by a cosine of at least this, in NAME.duplicates.ENDING: 0.97"},
    )
    overwrite: bool = field(default=False, metadata={"help": "a finished file, or a part of other embeddings"})
    batch_size: int = field(default=256, metadata={"help": "images of one forward pass"})
    workers: int = field(default=-1, metadata={"help": "processes that read images; -1: one a core"})
    device: Literal["auto", "cpu", "cuda"] = field(
        default="auto", metadata={"help": "where the encoder runs", "device": True}
    )


class Embedded(NamedTuple):
    """N embeddings, in the order of the source, of those of its images that can be read."""

    embeddings: np.ndarray  # [N, D] float32 or float16
    paths: list[str]  # N
    images: np.ndarray  # [N] int64, positions in the source
    labels: np.ndarray | None  # [N] int64 that number `classes`; None where the source has none
    classes: list[str]
    unreadable: list[tuple[str, str]]  # (path, reason) of the others
    neighbors: tuple[np.ndarray, np.ndarray] | None = None  # (cosines, rows of `embeddings`), [N, k] each
    duplicates: list[near.Group] | None = None
    out: Path | None = None


def embed(options: EmbedOptions, *, encoder: nn.Module | None = None, source: Source | None = None) -> Embedded:
    """Embeddings of images, prepared as those of the run were, as arrays in memory, and as a file where `out` says.

    With `out` the rows go to the folder OUT.part first; a call that was killed goes on there, and what it writes in the
    end is what one go would have written. Images that can't be read are left out, said, and listed with the reasons in
    NAME.unreadable.csv beside the file.

    Args:
        options: as the command line takes them.
        encoder: the module that the run was begun with in place of a backbone's name.
        source: any object with `len` and `read(i)` in place of `data`.

    Raises:
        UserError: for what can't be done, with the reason: a file that is there already, a part of other embeddings.
    """
    with _computed(options, encoder, source) as found:
        return Embedded(
            np.array(found.rows.rows()),
            found.paths(0, len(found.images)),
            found.images,
            found.labels,
            found.source.classes,
            [(path, why) for _, path, why in found.rows.unreadable()],
            found.neighbors,
            found.duplicates,
            found.out,
        )


def main(options: EmbedOptions) -> int:
    if options.out is None:
        raise UserError("needs --out FILE, which ends in .parquet, .npz or .csv")
    with _computed(options) as found:
        for path in found.written:
            say(path, sys.stdout)
        width = found.rows.width
        say(f"fastjem: {len(found.images):,} embeddings of {width} numbers, {found.rows.dtype}{found.near_in_words()}")
    return 0


@dataclass
class _Found:
    """All rows of a source, and what is known of them."""

    rows: Rows
    source: Source
    opened: Opened
    images: np.ndarray
    out: Path | None
    written: list[Path]
    neighbors: tuple[np.ndarray, np.ndarray] | None = None
    duplicates: list[near.Group] | None = None

    @property
    def labels(self) -> np.ndarray | None:
        labels = self.source.labels
        return None if labels is None else np.asarray(labels, np.int64)[self.images]

    def paths(self, a: int, b: int) -> list[str]:
        return [path_of(self.source, int(i)) for i in self.images[a:b]]

    def near_in_words(self) -> str:
        if self.duplicates is None:
            return ""
        count = sum(len(group.rows) for group in self.duplicates)
        return f"; {count:,} images in {len(self.duplicates):,} groups of duplicates"

    def metadata(self) -> dict[str, Any]:
        """What a file says of its rows: which encoder made them, and how its images became numbers."""
        return {
            "fastjem": __version__,
            "run": str(self.opened.path),
            "step": self.opened.step,
            "teacher": self.opened.teacher,
            "encoder": {name: _plain(text) for name, text in self.opened.metadata.items()},
            "data": self.source.root,
            "classes": self.source.classes,
            "identity": self.rows.identity,
        }

    def table(self) -> Table:
        """index, path, label and class where there are some, embedding."""
        named = [
            Column("index", lambda a, b: self.images[a:b], np.dtype(np.int64)),
            Column("path", self.paths),
        ]
        labels, classes = self.labels, self.source.classes
        if labels is not None:
            named += [
                Column("label", lambda a, b: labels[a:b], np.dtype(np.int64)),
                Column("class", lambda a, b: [classes[label] for label in labels[a:b]]),
            ]
        rows = self.rows.rows()
        embedding = Column("embedding", lambda a, b: rows[a:b], self.rows.dtype, self.rows.width)
        return Table([*named, embedding], len(self.images), self.metadata())

    def write(self) -> None:
        """The file, and those that are asked for beside it; the file itself comes last: it says that all is there."""
        if self.out is None:
            return
        beside = {"neighbors": self._neighbors(), "duplicates": self._duplicates()}
        for name, table in beside.items():
            if table is not None:
                self.written.append(_beside(self.out, name))
                files.write(self.written[-1], table)
        unreadable = self.rows.unreadable()
        listed = _beside(self.out, "unreadable", ".csv")
        if unreadable:
            columns = [
                Column("index", lambda a, b: np.array([one[0] for one in unreadable[a:b]]), np.dtype(np.int64)),
                Column("path", lambda a, b: [one[1] for one in unreadable[a:b]]),
                Column("reason", lambda a, b: [one[2] for one in unreadable[a:b]]),
            ]
            files.write(listed, Table(columns, len(unreadable), {}))
            self.written.append(listed)
        files.write(self.out, self.table())
        self.written.insert(0, self.out)

    def _neighbors(self) -> Table | None:
        """index and path of each row; positions in the source and cosines of its neighbours, [k] each."""
        if self.neighbors is None:
            return None
        cosines, who = self.neighbors
        k = cosines.shape[1]
        columns = [
            Column("index", lambda a, b: self.images[a:b], np.dtype(np.int64)),
            Column("path", self.paths),
            Column("neighbor", lambda a, b: self.images[who[a:b]], np.dtype(np.int64), k),
            Column("cosine", lambda a, b: cosines[a:b], np.dtype(np.float32), k),
        ]
        return Table(columns, len(self.images), self.metadata())

    def _duplicates(self) -> Table | None:
        """group, index, path of each row of a group, and the cosine with the one of the others nearest to it."""
        if self.duplicates is None:
            return None
        empty = np.empty(0, np.int64)
        numbers = np.concatenate([empty, *(np.full(len(g.rows), i) for i, g in enumerate(self.duplicates))])
        rows = np.concatenate([empty, *(g.rows for g in self.duplicates)])
        cosines = np.concatenate([empty.astype(np.float32), *(g.cosines for g in self.duplicates)])
        columns = [
            Column("group", lambda a, b: numbers[a:b], np.dtype(np.int64)),
            Column("index", lambda a, b: self.images[rows[a:b]], np.dtype(np.int64)),
            Column("path", lambda a, b: [path_of(self.source, int(self.images[row])) for row in rows[a:b]]),
            Column("cosine", lambda a, b: cosines[a:b], np.dtype(np.float32)),
        ]
        return Table(columns, len(rows), self.metadata())


def _plain(text: str) -> Any:
    """A value of an export's metadata, JSON where it is some."""
    try:
        return json.loads(text) if text.startswith("{") else text
    except ValueError:
        return text


def _beside(out: Path, name: str, ending: str = "") -> Path:
    return out.with_name(f"{out.stem}.{name}{ending or out.suffix}")


@contextlib.contextmanager
def _computed(
    options: EmbedOptions, encoder: nn.Module | None = None, source: Source | None = None
) -> Iterator[_Found]:
    """All rows, on the disk while the block runs, and every file written."""
    _check(options, source)
    out = None if options.out is None else Path(options.out)
    if out is not None and out.exists() and not options.overwrite:
        raise UserError(f"--out {out} is there already; --overwrite writes it anew")
    opened = open_run(options.run, teacher=options.teacher, encoder=encoder)
    images = _source(options, opened, source)
    device = device_of(options.device)
    dtype = np.dtype(np.float16 if options.half else np.float32)
    identity = {
        "encoder": opened.digest(),
        "data": hashlib.sha256(json.dumps([images.root, fingerprint(images)]).encode()).hexdigest()[:32],
        "options": f"{dtype}, batches of {options.batch_size}, on {device}",
    }
    with _folder(out) as folder:
        rows = Rows(folder, identity, dtype, anew=options.overwrite)
        try:
            _fill(rows, opened, images, options, device)
        finally:
            rows.close()
        found = _Found(rows, images, opened, rows.images(), out, [])
        if not len(rows):
            _, path, why = rows.unreadable()[0]
            raise UserError(f"none of the images in {images.root} can be read; the first: {path}: {why}")
        if options.neighbors:
            found.neighbors = near.neighbors(rows.rows(), options.neighbors)
        if options.duplicates:
            found.duplicates = near.duplicates(rows.rows(), options.duplicates)
        found.write()
        yield found


@contextlib.contextmanager
def _folder(out: Path | None) -> Iterator[Path]:
    """Where rows are kept until all are there: beside the file, locked, or somewhere for the time of the call."""
    if out is None:
        with tempfile.TemporaryDirectory(prefix="fastjem-") as name:
            yield Path(name)
        return
    folder = out.with_name(f"{out.name}.part")
    lock = Lock(folder)
    lock.acquire()
    try:
        yield folder
        for path in folder.iterdir():
            if path.name != LOCK:
                path.unlink()
    finally:
        lock.release()
    with contextlib.suppress(OSError):
        folder.rmdir()


def _fill(rows: Rows, opened: Opened, source: Source, options: EmbedOptions, device: str) -> None:
    """What is lacking of the rows, saved every few seconds, always between two batches: so batches are the same images
    however often it was killed, and rows the same bits."""
    module = opened.encoder.to(device)
    if rows.done:
        say(f"fastjem: {rows.done:,} of {len(source):,} images are embedded already: it goes on behind them")
    saved = begin = time.monotonic()
    first = rows.done
    indices = range(rows.done, len(source))
    workers = workers_of(options.workers)
    named = 0
    found = parts(
        lambda x: [module(x)], source, opened.pixels, indices=indices, batch=options.batch_size, workers=workers,
        device=device,
    )  # fmt: skip
    for part in found:
        unreadable = [(i, path_of(source, i), _reason(text, path_of(source, i))) for i, text in part.unreadable]
        for _, path, why in unreadable[: max(NAMED - named, 0)]:
            say(f"fastjem: left out: {path} can't be read: {why}")
        named += len(unreadable)
        values = part.arrays[0].cpu().numpy() if part.arrays else np.empty((0, 0), rows.dtype)
        rows.add(values, part.images, unreadable)
        if time.monotonic() - saved > SAVED_EVERY:
            rows.save()
            saved = time.monotonic()
            rate = (rows.done - first) / (saved - begin)
            left = (len(source) - rows.done) / rate / 60
            say(f"{rows.done:,} of {len(source):,} images, {rate:.0f} a second, {left:.1f} min left")
    rows.save()
    if named > NAMED:
        say(f"fastjem: left out: {named:,} images in all")


def _reason(text: str, path: str) -> str:
    return text.removeprefix(f"{path} can't be read: ")


def _source(options: EmbedOptions, opened: Opened, source: Source | None) -> Source:
    if source is not None:
        return open_source(source)
    root = options.data or (opened.config.data if opened.config else None)
    if root is None:
        raise UserError(f"needs --data, the images: {opened.path} doesn't say of which it was trained")
    if options.data is None:
        if not naming.exists(root):
            raise UserError(f"the run's data, {root}, is no longer there; --data says what to embed")
        say(f"fastjem: no data is named: the run's is embedded ({root})")
    return open_source(root)


def _check(options: EmbedOptions, source: Source | None) -> None:
    fields.conform(options, "embed: {}".format)
    if options.out is not None:
        files.check(Path(options.out))
    if source is not None and options.data is not None:
        raise UserError(f"takes data or source, got both (data={options.data!r})")
    if options.neighbors < 0:
        raise UserError(f"--neighbors must be at least 0, got {options.neighbors}")
    if not 0 <= options.duplicates <= 1:
        raise UserError(f"--duplicates must be a cosine between 0 (none) and 1, got {options.duplicates:g}")
    if options.batch_size < 1:
        raise UserError(f"--batch-size must be at least 1, got {options.batch_size}")
    if options.workers < -1:
        raise UserError(f"--workers must be at least 0, or -1 for one a core, got {options.workers}")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device here; --device cpu works")
