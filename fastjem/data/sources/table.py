"""Tables with a column of images: Parquet, Arrow and Feather files, and what Hugging Face's `datasets` saves."""

import bisect
import functools
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastjem.data import remote
from fastjem.data.copies import Copies
from fastjem.data.files import ENDINGS, LARGEST_FILE, read_file, too_large
from fastjem.data.sources import naming
from fastjem.data.sources.arrow import TABLES, opened, pyarrow, schema_of
from fastjem.data.sources.labels import IMAGES, LABELS, column, shown
from fastjem.data.sources.shards import holds_files, is_shown
from fastjem.errors import UserError
from fastjem.reading import json_object

MOST_NAMED = 1_000_000  # rows of a table whose images may be called by their paths
SPLITS = {"train", "training", "test", "testing", "validation", "valid", "val", "dev", "eval"}
NUMBERED = re.compile(r"(-\d+-of-\d+|[-_.]?\d+)$")


class Table:
    """The images in a column of tables: one file, a folder of them or a pattern, read at random in place.

    The column has image files' bytes, or the {bytes, path} of Hugging Face's `Image`; where a row has a path alone that
    file is read. It is found by the tables' metadata, else it is the only one of such a type; another column may have
    labels, integers or names (`labels.LABELS`, or a `ClassLabel`). `a.parquet?image=photo&label=kind` names them.

    Image i is row i. A row without an image raises in `read`, so that another stands in for it. Images are called by
    their paths where all have one and these are different and lead nowhere else, else by their rows.

    Arrow files are mapped: one that shrinks while it is read would end the process, so its size is looked at before
    each read. Parquet files are read from a copy (`arrow.opened`).

    Raises:
        UserError: without pyarrow, for tables that can't be read or have no such column, and for rows without a label.
    """

    decoded = False

    def __init__(self, root: str | os.PathLike[str]):
        self.root = os.fspath(root)
        self.path, options = naming.split_columns(self.root)
        self.files = table_files(self.path)  # local paths, of files in a store those of copies
        schema = schema_of(self.files[0])
        features = _features(schema)
        self.image = image_column(self.path, schema, features, options.get("image"))
        label = label_column(self.path, schema, features, options.get("label"), self.image)
        wanted = [self.image] if label is None else [self.image, label]
        self.sizes = {path: os.path.getsize(path) for path in self.files}
        self.chunks: list[Any] = []
        self.file_of: list[str] = []  # of each chunk
        self.rows: list[int] = []  # of each file
        labels: list[Any] = []
        for path in self.files:
            _check_columns(path, schema, wanted)
            batches = opened(path, wanted)
            self.chunks += [batch.column(0) for batch in batches]
            self.file_of += [path] * len(batches)
            self.rows.append(sum(batch.num_rows for batch in batches))
            labels += [batch.column(1) for batch in batches] if label is not None else []
        self.starts = [0, *np.cumsum([len(chunk) for chunk in self.chunks]).tolist()]
        if not self.starts[-1]:
            raise UserError(f"{self.path} has no rows")
        self.labels: np.ndarray | None = None
        self.classes: list[str] = []
        if label is not None:
            names = features.get(label, {}).get("names")
            self.labels, self.classes = numbered(f"{self.path}: {label}", labels, names)
        self.named = self._paths_are_names()
        lacking = sum(_without(chunk) for chunk in self.chunks)
        self.notices = [f"{self.path}: {lacking} rows have no image; others stand in for them"] if lacking else []

    @staticmethod
    def recognises(root: Path) -> bool:
        path = naming.split_options(root)[0]
        if os.path.isdir(path):
            return holds_files(path, TABLES) or _is_of_parts(path) or _has_data_alone(path)
        return path.lower().endswith(TABLES) and (os.path.isfile(path) or naming.is_pattern(path))

    @staticmethod
    def read_named(root: str, name: str) -> bytes:
        """The image of that name; of one that is in a file of its own nothing, as its path may lead anywhere."""
        path = naming.split_options(root)[0]
        version = () if remote.is_remote(root) else tuple(os.stat(one).st_mtime_ns for one in table_files(path))
        table = _source(root, version)
        data, _ = table.cell(table.find(name))
        if data is None:
            raise ValueError("its row has no bytes")
        return data

    @staticmethod
    def path_named(root: str, name: str) -> str:
        """photos.parquet/row 17."""
        return os.path.join(naming.folder_of(root), name)

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (self.root, self.sizes)

    def __len__(self) -> int:
        return self.starts[-1]

    def name(self, i: int) -> str:
        return self._path(i) if self.named else f"row {i}"

    def find(self, name: str) -> int:
        """The row whose image is called so; KeyError where there is none."""
        if not self.named:
            row = int(name.removeprefix("row "))
            if not 0 <= row < len(self):
                raise KeyError(name)
            return row
        for start, chunk in zip(self.starts, self.chunks, strict=False):
            at = pyarrow().compute.index(plain(_field(chunk, "path")), name).as_py()
            if at >= 0:
                return start + at
        raise KeyError(name)

    def hash_names(self, into: Any) -> None:
        into.update(f"{self.rows}\0".encode())
        for i in range(len(self)) if self.named else ():
            into.update(self.name(i).encode("utf-8", "surrogatepass") + b"\0")

    def read(self, i: int) -> bytes:
        """The image's file.

        Raises:
            OSError: for a table that isn't what it was, and for an image that is larger than `LARGEST_FILE`.
            ValueError: for a row without an image.
        """
        path = self.file_of[self._place(i)[0]]
        if os.path.getsize(path) != self.sizes[path]:
            raise OSError(f"{path} has changed since it was opened")
        data, beside = self.cell(i)
        if data is not None:
            return data
        if not beside:
            raise ValueError("the row has no image")
        return read_file(os.path.join(os.path.dirname(path), beside))

    def cell(self, i: int) -> tuple[bytes | None, str | None]:
        """(a file's bytes, its path) of row i."""
        number, row = self._place(i)
        cell = self.chunks[number][row]
        if not cell.is_valid:
            return None, None
        if pyarrow().types.is_struct(cell.type):
            fields = {name: cell[name] for name in _names(cell.type)}
            path = fields["path"].as_py() if "path" in fields else None
            return _bytes(fields["bytes"]), path
        return (None, cell.as_py()) if is_text(cell.type) else (_bytes(cell), None)

    def _place(self, i: int) -> tuple[int, int]:
        """(chunk, row of it) of row i."""
        number = bisect.bisect_right(self.starts, i) - 1
        return number, i - self.starts[number]

    def _path(self, i: int) -> str:
        number, row = self._place(i)
        return self.chunks[number][row]["path"].as_py()

    def _paths_are_names(self) -> bool:
        if len(self) > MOST_NAMED or "path" not in _names(self.chunks[0].type):
            return False
        pa = pyarrow()
        paths = pa.chunked_array([plain(_field(chunk, "path")) for chunk in self.chunks])
        if paths.null_count or not is_text(paths.type):
            return False
        elsewhere = pa.compute.match_substring_regex(paths, r"^$|^[/\\]|^[A-Za-z]:|(^|[/\\])\.\.([/\\]|$)|\x00")
        return not pa.compute.any(elsewhere).as_py() and pa.compute.count_distinct(paths).as_py() == len(paths)


def _again(root: str, sizes: dict[str, int]) -> Table:
    """The table in another process."""
    table = Table(root)
    if table.sizes != sizes:
        raise UserError(f"{root} has changed since the run began")
    return table


@functools.lru_cache(maxsize=4)
def _source(root: str, version: tuple[int, ...]) -> Table:
    """Opened once a process for each version of its files."""
    return Table(root)


def _bytes(cell: Any) -> bytes | None:
    if not cell.is_valid:
        return None
    data = cell.as_buffer()
    if data.size > LARGEST_FILE:
        raise too_large()
    return data.to_pybytes()


def _names(kind: Any) -> list[str]:
    """Of a struct's fields."""
    return [kind.field(i).name for i in range(kind.num_fields)] if pyarrow().types.is_struct(kind) else []


def _field(chunk: Any, name: str) -> Any:
    """A field of a struct, null where the struct is."""
    return pyarrow().compute.struct_field(chunk, name)


def _without(chunk: Any) -> int:
    """Rows with neither bytes nor a path."""
    names = _names(chunk.type)
    if not names:
        return chunk.null_count
    empty = _field(chunk, "bytes").is_null()
    if "path" in names and empty.true_count:
        empty = pyarrow().compute.and_(empty, _field(chunk, "path").is_null())
    return empty.true_count


def plain(values: Any) -> Any:
    """The values of a dictionary, and text in one piece: not all of pyarrow's functions take them otherwise."""
    types = pyarrow().types
    values = values.dictionary_decode() if types.is_dictionary(values.type) else values
    return values.cast(pyarrow().large_string()) if is_text(values.type) else values


def is_text(kind: Any) -> bool:
    types = pyarrow().types
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def is_image(kind: Any) -> bool:
    """Whether a type may hold files' bytes: binary, or a struct with such a field `bytes`."""
    types = pyarrow().types
    if types.is_struct(kind):
        return any(kind.field(i).name == "bytes" and is_image(kind.field(i).type) for i in range(kind.num_fields))
    return types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)


def is_label(kind: Any) -> bool:
    types = pyarrow().types
    kind = kind.value_type if types.is_dictionary(kind) else kind
    return types.is_integer(kind) or types.is_boolean(kind) or is_text(kind)


def _features(schema: Any) -> dict[str, Any]:
    """What `datasets` says of the columns."""
    try:
        found = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, TypeError, RecursionError):
        return {}
    return {name: one for name, one in found.items() if isinstance(one, dict)} if isinstance(found, dict) else {}


def image_column(root: str, schema: Any, features: dict[str, Any], named: str | None) -> str:
    """The column of images; UserError where there is none, or several could be it."""
    if named is not None:
        column(root, schema.names, "image", named, ())
        kind = schema.field(named).type
        if not (is_image(kind) or is_text(kind)):
            raise UserError(f"{root}: column {named} must hold images' bytes, their paths or both, got {kind}")
        return named
    found = [name for name in schema.names if is_image(schema.field(name).type)]
    marked = [name for name in found if features.get(name, {}).get("_type") == "Image"]
    if len(only := marked or found) == 1:
        return only[0]
    texts = [name for name in schema.names if is_text(schema.field(name).type)]
    usual = column(root, found or texts, "image", None, IMAGES)
    if usual is None:
        raise UserError(f"{root}: which column has the images? {shown(schema.names)}; ?image=NAME behind it says so")
    return usual


def label_column(root: str, schema: Any, features: dict[str, Any], named: str | None, image: str) -> str | None:
    """The column of labels, if there is one; UserError where several could be it."""
    if named is not None:
        column(root, schema.names, "label", named, ())
        if not is_label(schema.field(named).type):
            raise UserError(f"{root}: column {named} must hold integers or names, got {schema.field(named).type}")
        return named
    fit = [name for name in schema.names if name != image and is_label(schema.field(name).type)]
    classes = [name for name in fit if features.get(name, {}).get("_type") == "ClassLabel"]
    if len(classes) == 1:
        return classes[0]
    usual = column(root, classes or fit, "label", None, LABELS)
    if usual is None and classes:
        raise UserError(f"{root}: which column is the label? {shown(classes)}; ?label=NAME behind it says so")
    return usual


def numbered(what: str, chunks: Sequence[Any], names: Any) -> tuple[np.ndarray | None, list[str]]:
    """([N] int32 labels, the classes that they number) of a column; none where `datasets` says that nobody knows them.

    Raises:
        UserError: for a row without a label, or one that isn't among the `names` that it should number.
    """
    pa = pyarrow()
    values = pa.chunked_array([plain(chunk) for chunk in chunks])
    if values.null_count:
        raise UserError(f"{what}: row {pa.compute.index(values.is_null(), True).as_py()} has no label")
    if pa.types.is_boolean(values.type):
        values = values.cast(pa.int8())
    if isinstance(names, list) and names and pa.types.is_integer(values.type):
        labels = values.to_numpy().astype(np.int64)
        unknown = np.flatnonzero((labels < 0) | (labels >= len(names)))
        if len(unknown) == len(labels) and (labels == -1).all():
            return None, []
        if len(unknown):
            raise UserError(f"{what}: row {unknown[0]} is {labels[unknown[0]]}, none of the {len(names)} classes")
        return labels.astype(np.int32), [str(name) for name in names]
    classes = pa.compute.unique(values)
    classes = classes.take(pa.compute.sort_indices(classes))
    labels = pa.compute.index_in(values, value_set=classes).to_numpy()
    return labels.astype(np.int32), [str(name) for name in classes.to_pylist()]


def _check_columns(path: str, first: Any, names: Sequence[str]) -> None:
    """UserError where a file's columns aren't those of the first one."""
    schema = schema_of(path)
    for name in names:
        there = schema.field(name).type if name in schema.names else None
        if there != first.field(name).type:
            raise UserError(f"{path}: column {name} must be {first.field(name).type} as in the first file, got {there}")


def _is_of_parts(path: str) -> bool:
    """Whether a folder is what `datasets` makes of several parts."""
    return os.path.isfile(os.path.join(path, "dataset_dict.json"))


def _has_data_alone(path: str) -> bool:
    """Whether a folder is one of a hub's, whose tables are in its only folder, `data`."""
    if not holds_files(os.path.join(path, "data"), TABLES):
        return False
    with os.scandir(path) as entries:
        shown = [one for one in entries if not one.name.startswith(".")]
    return not any(one.name != "data" if one.is_dir() else one.name.lower().endswith(ENDINGS) for one in shown)


def _copied(root: str) -> list[str]:
    """Of what a URL, a pattern or a folder in a store names."""
    if root.lower().endswith(TABLES) or naming.is_pattern(root):
        urls = naming.expand(root)
    else:
        urls = [url for url in remote.within(root) if is_shown(os.path.basename(url), TABLES)]
    return Copies.of(root, urls).keep_all(root)


def table_files(path: str) -> list[str]:
    """The tables that a path or a pattern names, in order; of a folder the one part of a data set that is in it.

    Raises:
        UserError: for a folder of several parts, with their names.
    """
    if remote.is_remote(path):
        return _copied(path)
    if not os.path.isdir(path):
        return naming.expand(path)
    if os.path.isfile(saved := os.path.join(path, "state.json")):
        files = json_object(saved).get("_data_files")
        given = [one.get("filename") for one in files if isinstance(one, dict)] if isinstance(files, list) else []
        found = [name for name in given if isinstance(name, str) and os.path.basename(name) == name]
        if not found or len(found) < len(given):
            raise UserError(f"{saved} must list the tables beside it under _data_files")
        return [os.path.join(path, name) for name in found]
    if _is_of_parts(path):
        parts = sorted(one for one in os.listdir(path) if os.path.isfile(os.path.join(path, one, "state.json")))
        example = os.path.join(path, parts[0] if parts else "")
        raise UserError(f"{path} has several parts, {', '.join(parts)}: --data {example} names one")
    folder = path if holds_files(path, TABLES) else os.path.join(path, "data")
    names = sorted(
        name for name in os.listdir(folder) if name.lower().endswith(TABLES) and not name.startswith((".", "cache-"))
    )
    parts = list(dict.fromkeys(NUMBERED.sub("", os.path.splitext(name)[0]) for name in names))
    if len(parts) > 1 and any(re.split(r"[-_.]", part)[-1].lower() in SPLITS for part in parts):
        ending = os.path.splitext(names[0])[1]
        chosen = next((part for part in parts if "train" in part.lower()), parts[0])
        example = os.path.join(folder, f"{chosen}*{ending}")
        raise UserError(f"{folder} has several parts, {', '.join(parts)}: --data '{example}' names one")
    if not names:
        raise UserError(f"{folder} has no tables but cache-*")
    return [os.path.join(folder, name) for name in names]
