"""A list of image files: a path a line in a .txt file, or a column of a .csv or .tsv file."""

import codecs
import csv
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fastjem.data.files import read_file
from fastjem.data.sources.labels import IMAGES, LABELS, Labels, Names, column, shown
from fastjem.data.sources.naming import LISTS, split_columns, split_options
from fastjem.errors import UserError
from fastjem.reading import why_not

# The first that the header has; where the comma is for decimals, Excel writes semicolons.
DELIMITERS = {".csv": ",;\t", ".tsv": "\t"}


class Listing:
    """The files that a list names, none of which is looked at before it is read; relative paths begin at its folder.

    The text is UTF-8, or UTF-16 with its mark. In a .txt file blank lines and those that begin with "#" are left out. A
    .csv or .tsv file has a header: one column has the paths, perhaps another one labels, numbers or names. They are
    found by usual names (`labels.IMAGES`, `labels.LABELS`) or named behind the list: `a.csv?image=photo&label=kind`.

    Raises:
        UserError: for a list that can't be read, has no path or no column of them, or lacks some labels.
    """

    decoded = False

    def __init__(self, root: str | os.PathLike[str]):
        self.root = os.fspath(root)
        path, options = split_columns(self.root)
        self.folder = os.path.dirname(path)
        self.names = Names()
        self.labels: np.ndarray | None = None
        self.classes: list[str] = []
        labels = Labels()
        try:
            for name, label in _rows(path, options):
                self.names.add(os.fsencode(name))
                if label is not None:
                    labels.add(label)
        except OSError as error:
            raise UserError(f"{path} can't be read: {why_not(error)}") from None
        except (csv.Error, UnicodeError) as error:
            raise UserError(f"{path} can't be read as a list: {error}") from None
        if not len(self.names):
            raise UserError(f"{path} names no images")
        if labels.numbers:
            self.labels, self.classes = labels.ordered()

    @staticmethod
    def recognises(root: Path) -> bool:
        path = split_options(root)[0]
        return path.lower().endswith(LISTS) and os.path.isfile(path)

    @staticmethod
    def read_named(root: str, name: str) -> bytes:
        """The file's bytes, without reading the list."""
        return read_file(Listing.path_named(root, name))

    @staticmethod
    def path_named(root: str, name: str) -> str:
        return os.path.join(os.path.dirname(split_options(root)[0]), name)

    def __len__(self) -> int:
        return len(self.names)

    def name(self, i: int) -> str:
        """The path as the list has it."""
        return os.fsdecode(self.names[i])

    def read(self, i: int) -> bytes:
        return read_file(os.path.join(self.folder, self.name(i)))


def _encoding(path: str) -> str:
    """UTF-8, or UTF-16 where the file begins with its mark: what Excel calls Unicode text."""
    with open(path, "rb") as file:
        return "utf-16" if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"


def _rows(path: str, options: dict[str, str]) -> Iterator[tuple[str, str | None]]:
    """(path, label) of each image; None where the list has no labels."""
    ending = os.path.splitext(path)[1].lower()
    newline = "" if ending in DELIMITERS else None
    with open(path, encoding=_encoding(path), errors="surrogateescape", newline=newline) as file:
        if ending not in DELIMITERS:
            if options:
                raise UserError(f"{path} has no columns: each of its lines is a path")
            for line in file:
                if (text := line.strip()) and not text.startswith("#"):
                    yield text, None
            return
        first = file.readline()
        file.seek(0)
        delimiter = next((one for one in DELIMITERS[ending] if one in first), DELIMITERS[ending][0])
        lines = csv.reader(file, delimiter=delimiter)
        header = [name.strip() for name in next(lines, [])]
        image = column(path, header, "image", options.get("image"), IMAGES)
        label = column(path, header, "label", options.get("label"), LABELS)
        if image is None:
            raise UserError(f"{path}: which column has the paths? {shown(header)}; ?image=NAME behind it says so")
        at = header.index(image)
        labelled = -1 if label is None else header.index(label)
        for row in lines:
            if not any(map(str.strip, row)):
                continue
            name, kind = (row[i].strip() if i < len(row) else "" for i in (at, labelled))
            if not name:
                raise UserError(f"{path}, line {lines.line_num}: there is no {image}")
            if labelled >= 0 and not kind:
                raise UserError(f"{path}, line {lines.line_num}: {name} has no {label}")
            yield name, kind if labelled >= 0 else None
