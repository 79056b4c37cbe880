"""What lists, tar files and tables have in common: labels that are numbers or names, and columns found by theirs."""

from array import array
from collections.abc import Iterable, Sequence

import numpy as np

from fastjem.errors import UserError

Label = int | str
IMAGES = ("path", "file", "filename", "file_name", "image", "image_path", "filepath")
LABELS = ("label", "class", "target", "category", "class_name")


class Labels:
    """Labels, numbered as they appear, to be put in order when all have been seen."""

    def __init__(self) -> None:
        self.numbers: dict[Label, int] = {}
        self.given = array("i")  # of each image its label's number, -1: it has none
        self.lacking = -1  # the first image that has none

    def add(self, label: Label | None) -> None:
        if label is None:
            if self.lacking < 0:
                self.lacking = len(self.given)
            self.given.append(-1)
        else:
            self.given.append(self.numbers.setdefault(label, len(self.numbers)))

    def ordered(self) -> tuple[np.ndarray, list[str]]:
        """([N] int32, the classes that they number): integers by number, also where they are text, names by the
        alphabet."""
        by_number = all(isinstance(label, int) or is_integer(label) for label in self.numbers)
        order = sorted(self.numbers, key=int if by_number else str)
        rank = np.zeros(len(order), np.int32)
        rank[[self.numbers[label] for label in order]] = np.arange(len(order))
        return rank[np.frombuffer(self.given, np.int32)], [str(label) for label in order]


def is_integer(text: str) -> bool:
    try:
        return len(text) < 20 and int(text) is not None
    except ValueError:
        return False


class Names:
    """Many texts in two arrays; a list would take a hundred bytes for each beside its letters."""

    def __init__(self, texts: Iterable[bytes] = ()):
        self.letters = bytearray()
        self.ends = array("Q")
        for text in texts:
            self.add(text)

    def add(self, text: bytes) -> None:
        self.letters += text
        self.ends.append(len(self.letters))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, i: int) -> bytes:
        return bytes(self.letters[self.ends[i - 1] if i else 0 : self.ends[i]])


def column(root: str, header: Sequence[str], option: str, named: str | None, usual: Sequence[str]) -> str | None:
    """The column that the user named, or else the one that has one of the usual names; None where none has.

    Args:
        option: by which the user names it, "label" of "a.csv?label=kind".

    Raises:
        UserError: where there is no such column, or several have usual names.
    """
    if named is not None:
        if header.count(named) == 1:
            return named
        raise UserError(
            f"{root} has {'no' if named not in header else 'more than one'} column {named}: {shown(header)}"
        )
    found = [name for name in header if name.strip().lower() in usual]
    if len(found) > 1:
        raise UserError(
            f"{root}: which column is the {option}? {shown(header)}; ?{option}={found[0]} behind it says so"
        )
    return found[0] if found else None


def shown(header: Sequence[str]) -> str:
    return f"its columns are {', '.join(header[:40])}{', ...' if len(header) > 40 else ''}"
