"""Tables of many rows as Parquet, .npz or CSV, written a block of rows at a time."""

import csv
import io
import json
import re
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from fastjem import reading
from fastjem.checkpoints import open_atomically
from fastjem.errors import UserError

BLOCK = 4096  # rows that are in memory at a time, one row group of a Parquet file
ENDINGS = (".parquet", ".npz", ".csv")
METADATA = "fastjem"  # the key in a Parquet file's metadata
HALVES = re.compile("[\ud800-\udfff]")  # by which Python holds the bytes of a file's name that are no text


@dataclass(frozen=True)
class Column:
    """One column: `rows(a, b)` are its values from row a to row b, an array [b - a] or [b - a, width], or texts."""

    name: str
    rows: Callable[[int, int], np.ndarray | list[str]]
    dtype: np.dtype | None = None  # None: text
    width: int = 0  # of a vector in each row; 0: one value


@dataclass(frozen=True)
class Table:
    """Columns of N rows, and what a file says of them."""

    columns: Sequence[Column]
    rows: int
    metadata: dict[str, Any]

    def blocks(self, most: int = BLOCK) -> Iterator[tuple[int, int]]:
        """(first, last + 1) of a few rows after another."""
        return ((a, min(a + most, self.rows)) for a in range(0, self.rows, most))


def check(path: Path) -> None:
    """UserError for a name of another ending, and for a Parquet file where there is no pyarrow."""
    if path.suffix not in ENDINGS:
        raise UserError(f"--out must end in {', '.join(ENDINGS)}, got {path}")
    if path.suffix == ".parquet":
        try:
            import pyarrow.parquet  # noqa: F401
        except ModuleNotFoundError:
            raise UserError(
                f"--out {path}: Parquet needs the package pyarrow: pip install 'fastjem[tables]'; .npz and .csv don't"
            ) from None


def write(path: Path, table: Table) -> None:
    """The table, whole or not at all; beside a CSV file, which has no place for them, its metadata as PATH.json.

    Undecodable bytes of names are `\\xff` in Parquet and CSV, which hold UTF-8; in .npz they are as Python has them.
    """
    writers = {".parquet": _parquet, ".npz": _npz, ".csv": _csv}
    try:
        with open_atomically(path) as file:
            writers[path.suffix](file, table)
        if path.suffix == ".csv" and table.metadata:
            with open_atomically(path.with_name(f"{path.name}.json")) as file:
                file.write((json.dumps(table.metadata, indent=2) + "\n").encode())
    except OSError as error:
        raise UserError(f"--out {path}: {reading.why_not(error)}") from None


def utf8(text: str) -> str:
    r"""A text without halves of surrogate pairs: the byte 0xff of a file's name is `\xff`."""
    return HALVES.sub(lambda found: f"\\x{ord(found[0]) & 0xFF:02x}", text)


def _parquet(file: BinaryIO, table: Table) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    def kind(column: Column) -> Any:
        value = pa.string() if column.dtype is None else pa.from_numpy_dtype(column.dtype)
        return pa.list_(value, column.width) if column.width else value

    def array(column: Column, a: int, b: int) -> Any:
        values = column.rows(a, b)
        if column.dtype is None:
            return pa.array(map(utf8, values), pa.string(), size=b - a)
        values = np.ascontiguousarray(values, column.dtype)
        return (
            pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), column.width)
            if column.width
            else pa.array(values)
        )

    schema = pa.schema([pa.field(column.name, kind(column)) for column in table.columns])
    schema = schema.with_metadata({METADATA: json.dumps(table.metadata)})
    with pq.ParquetWriter(file, schema) as writer:
        for a, b in table.blocks():
            writer.write_batch(pa.record_batch([array(column, a, b) for column in table.columns], schema=schema))


def _npz(file: BinaryIO, table: Table) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        for column in table.columns:
            dtype = _text_dtype(column, table) if column.dtype is None else column.dtype
            shape = (table.rows, column.width) if column.width else (table.rows,)
            with archive.open(f"{column.name}.npy", "w", force_zip64=True) as member:
                about = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_2_0(member, about)
                for a, b in table.blocks():
                    member.write(np.ascontiguousarray(column.rows(a, b), dtype).tobytes())
        with archive.open("metadata.npy", "w") as member:
            np.lib.format.write_array(member, np.array(json.dumps(table.metadata)))


def _text_dtype(column: Column, table: Table) -> np.dtype:
    """NumPy's texts have one length: that of the longest."""
    longest = max((len(text) for a, b in table.blocks() for text in column.rows(a, b)), default=1)
    return np.dtype(f"<U{max(longest, 1)}")


def _csv(file: BinaryIO, table: Table) -> None:
    text = io.TextIOWrapper(file, "utf-8", newline="")
    writer = csv.writer(text, quoting=csv.QUOTE_MINIMAL, lineterminator="\n")
    writer.writerow(cell for column in table.columns for cell in _header(column))
    for a, b in table.blocks(256):
        columns = [_cells(column, column.rows(a, b)) for column in table.columns]
        writer.writerows([cell for cells in row for cell in cells] for row in zip(*columns, strict=True))
    text.flush()
    text.detach()


def _header(column: Column) -> list[str]:
    return [f"{column.name}{i}" for i in range(column.width)] if column.width else [column.name]


def _cells(column: Column, values: np.ndarray | list[str]) -> list[list[str]]:
    """Texts by row; numbers with as many digits as tell them apart from the next ones of their dtype."""
    if column.dtype is None:
        return [[utf8(text)] for text in values]
    rows = np.asarray(values).reshape(len(values), -1)
    if column.dtype.kind in "iu":
        return [[str(value) for value in row] for row in rows.tolist()]
    digits = {2: "%.5g", 4: "%.9g"}.get(column.dtype.itemsize, "%.17g")
    return [[digits % value for value in row] for row in rows.tolist()]
