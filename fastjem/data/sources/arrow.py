"""Arrow and Parquet files opened for reading at random, by pyarrow: columns that lie in mapped memory."""

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

from fastjem.data import cache, copies
from fastjem.errors import UserError
from fastjem.printing import say
from fastjem.reading import why_not

TABLES = (".parquet", ".arrow", ".feather")
VERSION = 1  # of the converted files
BYTES, ROWS = 2**26, 10_000  # of a batch of a converted file, at most


def pyarrow() -> Any:
    """The library with the parts that are used; UserError where it isn't installed."""
    try:
        import pyarrow
        import pyarrow.compute
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError:
        raise UserError("pyarrow, which reads tables, isn't installed: pip install 'fastjem[tables]'") from None
    return pyarrow


def schema_of(path: str) -> Any:
    """A file's columns with their types and metadata; UserError for a file that is none of a table."""
    pa = pyarrow()
    with _named(path):
        if path.lower().endswith(".parquet"):
            return pa.parquet.read_schema(path)
        with pa.memory_map(path) as file:
            return _reader(file).schema


@contextlib.contextmanager
def _named(path: str) -> Iterator[None]:
    """What pyarrow says of a file is told with its name."""
    try:
        yield
    except (OSError, pyarrow().ArrowException) as error:
        if isinstance(error, OSError) and error.errno:
            raise UserError(f"{path} can't be read: {why_not(error)}") from None
        raise UserError(f"{path} can't be read as a table: {str(error).partition(chr(10))[0]}") from None


def _reader(file: Any) -> Any:
    """Of Arrow's file format, or of its stream format, in which `datasets` writes."""
    pa = pyarrow()
    try:
        return pa.ipc.open_file(file)
    except pa.ArrowInvalid:
        file.seek(0)
        return pa.ipc.open_stream(file)


def _batches(reader: Any) -> Iterator[Any]:
    if hasattr(reader, "num_record_batches"):
        yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
    else:
        yield from reader


def opened(path: str, columns: Sequence[str]) -> list[Any]:
    """A file's batches of these columns, in mapped memory: nothing of them is copied.

    A Parquet file, and an Arrow file that is compressed, is first written anew as an uncompressed Arrow file, once, in
    the cache folder.

    Raises:
        UserError: for a file that can't be read, or can't be written anew.
    """
    if not path.lower().endswith(".parquet"):
        with _named(path):
            batches = _mapped(path, columns)
        if batches is not None:
            return batches
    return _converted(path, columns)


def _mapped(path: str, columns: Sequence[str]) -> list[Any] | None:
    """None for a file that is compressed."""
    pa = pyarrow()
    buffer = pa.memory_map(path).read_buffer()
    found = []
    for batch in _batches(_reader(pa.BufferReader(buffer))):
        part = _checked(batch, columns)
        if not found and not _within(part, buffer):
            return None
        if part.num_rows:
            found.append(part)
    return found


def _checked(batch: Any, columns: Sequence[str]) -> Any:
    """These columns of a batch; ArrowInvalid for a damaged one.

    pyarrow believes what a file says of where its values begin, and reading outside of it ends the process. What is
    looked at are a few bytes of each row, and text.
    """
    part = batch.select(list(columns))
    part.validate(full=True)
    return part


def _within(batch: Any, buffer: Any) -> bool:
    """Whether a batch's values lie in the buffer that it was read from, and not where they were decompressed to."""
    values = [one for column in batch.columns for one in _decoded(column).buffers() if one is not None and one.size]
    return all(buffer.address <= one.address < buffer.address + buffer.size for one in values)


def _decoded(column: Any) -> Any:
    return column.indices if pyarrow().types.is_dictionary(column.type) else column


def _converted(path: str, columns: Sequence[str]) -> list[Any]:
    pa = pyarrow()
    try:
        found = os.stat(path)
        changed = 0 if copies.is_copy(path) else found.st_mtime_ns  # a copy's says when it was used
        key = f"{VERSION}\0{os.path.abspath(path)}\0{found.st_size}\0{changed}\0" + "\0".join(columns)
        place = cache.folder() / f"table-{hashlib.sha256(key.encode('utf-8', 'surrogatepass')).hexdigest()[:24]}.arrow"
        with cache.alone(place):
            if place.exists():
                try:
                    return _mapped(str(place), columns) or []
                except (OSError, pa.ArrowException):  # it is broken, and made anew
                    place.unlink()
            _convert(path, columns, str(place))
    except (OSError, RuntimeError) as error:  # the latter of an account without a home
        why = why_not(error) if isinstance(error, OSError) else error
        raise UserError(
            f"{path} is read at random from an uncompressed copy, which can't be written in the cache folder ({why}): "
            "FASTJEM_CACHE says where it may be"
        ) from None
    return _mapped(str(place), columns) or []


def _convert(path: str, columns: Sequence[str], place: str) -> None:
    pa = pyarrow()
    with _named(path):
        schema, size, batches = _read(path, columns)
    say(f"fastjem: {path}: an uncompressed copy of its images is written, once: {size / 1e9:.2f} GB in {place}")
    free = shutil.disk_usage(os.path.dirname(place)).free
    if size > free:
        raise UserError(
            f"{path}: its uncompressed copy takes {size / 1e9:.1f} GB, and in {os.path.dirname(place)} there are "
            f"{free / 1e9:.1f}: FASTJEM_CACHE says where it may be"
        )
    schema = pa.schema([_plain(field) for field in schema])
    with cache.written(place) as file, pa.ipc.new_file(file, schema) as writer:
        waiting: list[Any] = []
        while True:
            with _named(path):
                batch = next(batches, None)
            if batch is not None:
                arrays = [_values(column).cast(field.type) for column, field in zip(batch.columns, schema, strict=True)]
                waiting.append(pa.record_batch(arrays, schema=schema))
            full = sum(one.nbytes for one in waiting) >= BYTES or sum(one.num_rows for one in waiting) >= ROWS
            if waiting and (full or batch is None):
                for whole in pa.Table.from_batches(waiting).combine_chunks().to_batches():
                    writer.write_batch(whole)
                waiting = []
            if batch is None:
                return


def _plain(field: Any) -> Any:
    """Of a dictionary its values: each batch would have another dictionary."""
    return field.with_type(field.type.value_type) if pyarrow().types.is_dictionary(field.type) else field


def _values(column: Any) -> Any:
    return column.dictionary_decode() if pyarrow().types.is_dictionary(column.type) else column


def _read(path: str, columns: Sequence[str]) -> tuple[Any, int, Iterator[Any]]:
    """(columns, expected bytes, batches of a few rows), of which one is held at a time."""
    pa = pyarrow()
    if path.lower().endswith(".parquet"):
        file = pa.parquet.ParquetFile(path, memory_map=True)
        groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
        chunks = [group.column(k) for group in groups for k in range(group.num_columns)]
        size = sum(one.total_uncompressed_size for one in chunks if one.path_in_schema.split(".")[0] in columns)
        schema = pa.schema([file.schema_arrow.field(name) for name in columns])
        return schema, size, (one.select(list(columns)) for one in file.iter_batches(64, columns=list(columns)))
    reader = _reader(pa.memory_map(path))
    schema = pa.schema([reader.schema.field(name) for name in columns])
    return schema, os.path.getsize(path), (_checked(one, columns) for one in _batches(reader))
