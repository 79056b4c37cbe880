"""The same images stored in every way that `--data` takes."""

import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from fastjem.data.source import Source, decode, open_source

KINDS = (
    "list", "text list", "shards", "pattern", "one tar", "parquet", "arrow", "stream", "feather", "saved", "arrays",
)  # fmt: skip


def write_tar(path: Path, members: Iterable[tuple[str, Any]]) -> Path:
    """A tar file of (name, bytes) and of (name, TarInfo) for what is no file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            if isinstance(content, tarfile.TarInfo):
                archive.addfile(content)
                continue
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tuple[str, tarfile.TarInfo]:
    member = tarfile.TarInfo(name)
    member.type = kind
    member.linkname = target
    return name, member


def samples(folder: Source, numbers: Iterable[int]) -> list[tuple[str, bytes]]:
    """The members of a shard: 0003.png, 0003.cls."""
    return [
        member
        for i in numbers
        for member in ((f"{i:04}.png", folder.read(i)), (f"{i:04}.cls", str(int(folder.labels[i])).encode()))
    ]


def table(folder: Source) -> Any:
    """What `datasets` makes of it: a column of {bytes, path} and one of class labels."""
    import pyarrow as pa

    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    images = [{"bytes": folder.read(i), "path": None} for i in range(len(folder))]
    said = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": folder.classes}}
    columns = {"image": pa.array(images, kind), "label": pa.array(folder.labels)}
    return pa.table(columns).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": said}})})


def stored(kind: str, folder: Source, at: Path) -> str:
    """What `--data` is, for the images of a folder stored otherwise."""
    at.mkdir(parents=True, exist_ok=True)
    count = len(folder)
    if kind in ("list", "text list"):
        rows = [f"{folder.root}/{folder.name(i)}" for i in range(count)]
        if kind == "text list":
            (at / "a.txt").write_text("# all of them\n\n" + "\n".join(rows) + "\n")
            return str(at / "a.txt")
        rows = [f"{row},{folder.classes[folder.labels[i]]}" for i, row in enumerate(rows)]
        (at / "a.csv").write_text("path,label\n" + "\n".join(rows) + "\n")
        return str(at / "a.csv")
    if kind in ("shards", "pattern"):
        for shard in range(3):
            numbers = range(shard * count // 3, (shard + 1) * count // 3)
            write_tar(at / f"train-{shard:06}.tar", samples(folder, numbers))
        return str(at if kind == "shards" else at / "train-{000000..000002}.tar")
    if kind == "one tar":
        return str(write_tar(at / "a.tar", [(folder.name(i), folder.read(i)) for i in range(count)]))
    if kind == "arrays":
        images = np.stack([np.asarray(decode(folder, i)) for i in range(count)])
        np.savez(at / "a.npz", images=images, labels=folder.labels)
        return str(at / "a.npz")
    return _table(kind, folder, at)


def _table(kind: str, folder: Source, at: Path) -> str:
    import pyarrow as pa
    import pyarrow.feather
    import pyarrow.parquet

    whole = table(folder)
    if kind == "parquet":
        (at / "data").mkdir()
        half = len(folder) // 2
        for part, rows in enumerate((whole[:half], whole[half:])):
            pa.parquet.write_table(rows, at / "data" / f"train-{part:05}-of-00002.parquet", row_group_size=5)
        return str(at)
    if kind == "feather":
        pa.feather.write_feather(whole, str(at / "a.feather"))  # compressed
        return str(at / "a.feather")
    if kind == "saved":
        (at / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))
    name = "data-00000-of-00001.arrow" if kind == "saved" else "a.arrow"
    write = pa.ipc.new_file if kind == "arrow" else pa.ipc.new_stream
    with pa.OSFile(str(at / name), "wb") as file, write(file, whole.schema) as writer:
        writer.write_table(whole, max_chunksize=5)
    return str(at if kind == "saved" else at / name)


def opened(kind: str, folder: Source, at: Path) -> Source:
    return open_source(stored(kind, folder, at))
