"""Tables of images: which column is which, rows without an image, copies of what can't be read at random."""

import errno
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from images import make_folder
from kinds import table

pa = pytest.importorskip("pyarrow")
import pyarrow.feather  # noqa: E402
import pyarrow.parquet  # noqa: E402, F401

from fastjem.data.fingerprint import difference, fingerprint  # noqa: E402
from fastjem.data.loaders import Budget, Order  # noqa: E402
from fastjem.data.loaders.torch import TorchLoader  # noqa: E402
from fastjem.data.source import Source, decode_named, open_source, path_of  # noqa: E402
from fastjem.data.sources import arrow  # noqa: E402
from fastjem.data.sources.table import Table  # noqa: E402
from fastjem.data.views import ViewSpec  # noqa: E402
from fastjem.errors import UserError  # noqa: E402

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def folder(tmp_path: Path) -> Source:
    return open_source(make_folder(tmp_path / "images", 6))


def write(path: Path, columns: dict[str, Any] | Any, features: dict[str, Any] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = pa.table(columns) if isinstance(columns, dict) else columns
    if features:
        whole = whole.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    if path.suffix == ".parquet":
        pa.parquet.write_table(whole, path)
        return path
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, whole.schema) as writer:
        writer.write_table(whole, max_chunksize=4)
    return path


def images(folder: Source, kind: Any = None) -> Any:
    return pa.array([folder.read(i) for i in range(6)], kind or pa.binary())


def both(folder: Source, paths: list[str | None], nobody: tuple[int, ...] = ()) -> Any:
    """Images as `datasets` has them, {bytes, path}."""
    rows = [{"bytes": None if i in nobody else folder.read(i), "path": paths[i]} for i in range(6)]
    return pa.array(rows, pa.struct({"bytes": pa.binary(), "path": pa.string()}))


LABELS: dict[str, tuple[Callable[[], Any], list[str], list[int]]] = {
    "integers": (lambda: pa.array([7, 7, 12, 12, 7, 7], pa.int16()), ["7", "12"], [0, 0, 1, 1, 0, 0]),
    "names": (lambda: pa.array(["oak", "elm"] * 3), ["elm", "oak"], [1, 0] * 3),
    "a dictionary": (lambda: pa.array(["oak", "elm"] * 3).dictionary_encode(), ["elm", "oak"], [1, 0] * 3),
    "views": (lambda: pa.array(["oak", "elm"] * 3, pa.string_view()), ["elm", "oak"], [1, 0] * 3),
    "truth": (lambda: pa.array([True, False] * 3), ["0", "1"], [1, 0] * 3),
}


@pytest.mark.parametrize("ending", ["parquet", "arrow"])
@pytest.mark.parametrize("kind", LABELS)
def test_labels(kind: str, ending: str, folder: Source, tmp_path: Path) -> None:
    make, classes, labels = LABELS[kind]
    other = {"names": pa.large_binary(), "views": pa.binary_view()}.get(kind)
    source = open_source(
        write(tmp_path / f"a.{ending}", {"x": [0.5] * 6, "photo": images(folder, other), "Label": make()})
    )
    assert isinstance(source, Table) and source.classes == classes and source.labels.tolist() == labels
    assert [source.read(i) for i in range(6)] == [folder.read(i) for i in range(6)]
    assert source.name(4) == "row 4" and path_of(source, 4) == f"{tmp_path}/a.{ending}/row 4"


def test_columns_are_found_by_what_datasets_says_or_are_named(folder: Source, tmp_path: Path) -> None:
    image = images(folder)
    other = pa.array([b"%d" % i for i in range(6)])
    kinds, fine = pa.array([1, 0] * 3), pa.array([0, 1, 2] * 2)
    said = {"b": {"_type": "Image"}, "kind": {"_type": "ClassLabel", "names": ["elm", "oak"]}}
    columns = {"a": other, "b": both(folder, [None] * 6), "kind": kinds, "fine": fine}
    source = open_source(write(tmp_path / "1.arrow", columns, said))
    assert (
        source.read(3) == folder.read(3) and source.classes == ["elm", "oak"] and source.labels.tolist() == [1, 0] * 3
    )
    path = write(tmp_path / "2.parquet", {"a": other, "b": image, "kind": kinds, "fine": fine})
    for options, message in (
        ("", r"which column has the images\? its columns are a, b, kind, fine; \?image=NAME behind it says so"),
        ("?image=c", "2.parquet has no column c: its columns are a, b, kind, fine"),
        ("?image=fine", "column fine must hold images' bytes, their paths or both, got int64"),
        ("?image=b&label=a", "column a must hold integers or names, got binary"),
    ):
        with pytest.raises(UserError, match=message):
            open_source(f"{path}{options}")
    source = open_source(f"{path}?image=b&label=fine")
    assert source.read(3) == folder.read(3) and source.labels.tolist() == [0, 1, 2] * 2
    assert np.array_equal(
        np.asarray(decode_named(source.root, "row 3")), np.asarray(decode_named(folder.root, folder.name(3)))
    )
    assert open_source(f"{path}?image=b").labels is None
    many = {name: {"_type": "ClassLabel", "names": list("abc")} for name in ("fine", "coarse")}
    path = write(tmp_path / "3.arrow", {"b": image, "fine": fine, "coarse": kinds}, many)
    with pytest.raises(UserError, match=r"which column is the label\? its columns are fine, coarse"):
        open_source(path)
    assert open_source(f"{path}?label=coarse").labels.tolist() == [1, 0] * 3
    with pytest.raises(UserError, match=r"which column has the images\? its columns are x;"):
        open_source(write(tmp_path / "4.arrow", {"x": kinds}))


def test_labels_that_are_missing(folder: Source, tmp_path: Path) -> None:
    image = images(folder)
    said = {"label": {"_type": "ClassLabel", "names": ["elm", "oak"]}}
    unknown = open_source(write(tmp_path / "1.arrow", {"image": image, "label": pa.array([-1] * 6)}, said))
    assert unknown.labels is None and unknown.classes == []
    for number, (labels, features, message) in enumerate(
        (
            ([1, 0, 1, 0, None, 1], None, "label: row 4 has no label"),
            ([1, 0, 1, 0, 2, 1], said, "label: row 4 is 2, none of the 2 classes"),
            ([1, 0, 1, -1, 0, 1], said, "label: row 3 is -1, none of the 2 classes"),
        )
    ):
        for ending in ("arrow", "parquet"):
            path = write(tmp_path / f"{number}.{ending}", {"image": image, "label": pa.array(labels)}, features)
            with pytest.raises(UserError, match=message):
                open_source(path)


@pytest.mark.parametrize("ending", ["parquet", "arrow"])
def test_rows_without_an_image_are_skipped_by_name(
    ending: str, folder: Source, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = pa.array([folder.read(0), None, b"", folder.read(3), folder.read(4), folder.read(5)], pa.binary())
    path = write(tmp_path / f"a.{ending}", {"image": image})
    source = open_source(path)
    assert f"{path}: 1 rows have no image; others stand in for them" in capsys.readouterr().err
    with pytest.raises(ValueError, match="the row has no image"):
        source.read(1)
    (crops,) = TorchLoader(source, [ViewSpec(size=16)], Order(samples=6, batch=6, stop=1), Budget())
    assert sorted(crops.index.tolist()) == [0, 3, 3, 3, 4, 5]  # image i is row i
    assert {one for one, _ in crops.unreadable} == {f"{path}/row 1", f"{path}/row 2"}


def test_paths_are_names_and_lead_to_files(folder: Source, tmp_path: Path) -> None:
    names = [folder.name(i) for i in range(6)]
    path = write(tmp_path / "images" / "a.arrow", {"image": both(folder, names, nobody=(2, 4))})
    source = open_source(path)
    assert [source.name(i) for i in range(6)] == names and path_of(source, 3) == f"{path}/{names[3]}"
    assert [source.read(i) for i in range(6)] == [folder.read(i) for i in range(6)]  # of rows 2 and 4 from their files
    assert decode_named(str(path), names[3]).size == (24, 24)
    with pytest.raises(ValueError, match="its row has no bytes"):  # a report opens no file that a table names
        decode_named(str(path), names[4])
    for number, paths in enumerate(
        ([*names[:5], None], [*names[:5], names[0]], [*names[:5], "/etc/a"], [*names[:5], "../a"])
    ):
        source = open_source(write(tmp_path / f"{number}.arrow", {"image": both(folder, paths)}))
        assert source.name(3) == "row 3" and source.read(3) == folder.read(3)
    by_path = open_source(write(tmp_path / "images" / "b.parquet", {"path": pa.array(names), "label": [0, 1] * 3}))
    assert by_path.read(5) == folder.read(5)


def test_a_folder_that_is_called_as_a_file_and_several_whose_images_are_beside_them(tmp_path: Path) -> None:
    for part in ("a", "b"):
        one = open_source(make_folder(tmp_path / part, 2, classes=0, seed=ord(part)))
        write(tmp_path / part / "paths.parquet", {"image": pa.array([one.name(0), one.name(1)])})
        write(tmp_path / "whole.parquet" / f"{part}.parquet", {"image": pa.array([one.read(0)])})
    source = open_source(f"{tmp_path}/{{a,b}}/paths.parquet")
    assert [source.read(i) for i in (1, 2)] == [
        (tmp_path / "a/0001.png").read_bytes(), (tmp_path / "b/0000.png").read_bytes(),
    ]  # fmt: skip
    source = open_source(tmp_path / "whole.parquet")  # as Spark writes one
    assert isinstance(source, Table) and [source.read(0), source.read(1)] == [
        (tmp_path / part / "0000.png").read_bytes() for part in ("a", "b")
    ]


def test_a_copy_is_made_once_and_anew_when_it_doesnt_fit(
    folder: Source, tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "a.parquet", {"image": images(folder), "other": pa.array([b"x" * 10**6] * 6)})
    made = f"{path}: an uncompressed copy of its images is written, once"
    first = fingerprint(open_source(f"{path}?image=image"))
    assert made in capsys.readouterr().err
    (copy,) = cache.iterdir()
    assert copy.stat().st_size < 100_000  # the other columns aren't in it
    assert fingerprint(open_source(f"{path}?image=image")) == first and made not in capsys.readouterr().err
    for broken in (b"", b"x" * 100, copy.read_bytes()[:-10]):
        copy.write_bytes(broken)
        left = cache / f".{copy.name}.left.part"
        left.write_bytes(b"of a process that was killed")
        os.utime(left, (0, time.time() - 3700))
        assert open_source(f"{path}?image=image").read(3) == folder.read(3) and made in capsys.readouterr().err
    assert list(cache.iterdir()) == [copy]
    copy.unlink()
    written = cache / f".{copy.name}.now.part"
    written.write_bytes(b"of another machine, which has no lock here")
    mask = os.umask(0o077)
    try:
        open_source(f"{path}?image=image")
    finally:
        os.umask(mask)
    assert set(cache.iterdir()) == {copy, written} and copy.stat().st_mode & 0o777 == 0o600  # it has their images
    write(path, {"image": images(folder).slice(0, 5)})
    source = open_source(path)
    assert made in capsys.readouterr().err and len(source) == 5
    assert "5 images, and held 6" in difference(first, fingerprint(source))


def test_large_tables_are_copied_in_pieces(folder: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrow, "ROWS", 2)
    path = tmp_path / "a.feather"
    pa.feather.write_feather(
        pa.table({"image": images(folder), "label": LABELS["a dictionary"][0]()}), str(path), chunksize=1
    )
    source = open_source(path)
    assert [len(chunk) for chunk in source.chunks] == [2, 2, 2] and source.labels.tolist() == [1, 0] * 3
    assert [source.read(i) for i in range(6)] == [folder.read(i) for i in range(6)]


def test_a_full_disk_is_said_and_leaves_nothing(
    folder: Source, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.parquet", {"image": images(folder)})

    class Full(io.FileIO):
        def write(self, data: Any) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    kept = arrow.cache.open if hasattr(arrow.cache, "open") else open
    part = arrow.cache.PART
    monkeypatch.setattr(
        arrow.cache, "open", lambda *a: Full(*a) if str(a[0]).endswith(part) else kept(*a), raising=False
    )
    with pytest.raises(UserError, match=r"a.parquet is read at random .* \(No space left on device\): FASTJEM_CACHE"):
        open_source(path)
    assert list(cache.iterdir()) == []
    monkeypatch.undo()
    monkeypatch.setenv("FASTJEM_CACHE", str(cache))
    monkeypatch.setattr(arrow.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 10})())
    with pytest.raises(UserError, match=r"its uncompressed copy takes .* FASTJEM_CACHE says where it may be"):
        open_source(path)
    monkeypatch.undo()
    monkeypatch.setenv("FASTJEM_CACHE", str(path / "below a file"))
    with pytest.raises(UserError, match=r"can't be written in the cache folder \(Not a directory\)"):
        open_source(path)


def test_what_is_no_table(folder: Source, tmp_path: Path) -> None:
    whole = write(tmp_path / "a.arrow", {"image": images(folder)}).read_bytes()
    for name, content in (
        ("b.arrow", b""), ("b.arrow", b"x" * 100), ("c.arrow", whole[:300]), ("b.parquet", b""), ("b.parquet", whole),
        ("b.feather", b"FEA1" + bytes(100) + b"FEA1"),
    ):  # fmt: skip
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=rf"{name} can't be read as a table: "):
            open_source(tmp_path / name)
    with pytest.raises(UserError, match=r"d\.arrow has no rows"):
        open_source(write(tmp_path / "d.arrow", {"image": images(folder).slice(0, 0)}))


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_a_table_whose_values_would_lie_elsewhere_is_refused(
    compression: str | None, folder: Source, tmp_path: Path
) -> None:
    """In another process, as reading one ended that."""
    lengths = [1000 + i for i in range(6)]
    ends = np.cumsum([0, *lengths]).astype("<i4")
    values = pa.array([b"x" * length for length in lengths])
    broken = pa.Array.from_buffers(
        pa.binary(),
        6,
        [None, pa.py_buffer(np.where(np.arange(7) == 3, 2**31 - 5, ends).astype("<i4")), values.buffers()[2]],
    )
    path = tmp_path / "a.arrow"
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with (
        pa.OSFile(str(path), "wb") as file,
        pa.ipc.new_file(file, pa.schema({"image": pa.binary()}), options=options) as w,
    ):
        w.write_batch(pa.record_batch({"image": broken}))
    code = "import sys; from fastjem.data.source import *; s = open_source(sys.argv[1]); list(map(s.read, range(6)))"
    said = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert said.returncode == 1 and f"UserError: {path} can't be read as a table: " in said.stderr


def test_a_table_that_shrinks_raises_and_doesnt_end_the_process(folder: Source, tmp_path: Path) -> None:
    path = write(tmp_path / "a.arrow", {"image": images(folder)})
    source = open_source(path)
    with open(path, "r+b") as file:
        file.truncate(64)
    with pytest.raises(OSError, match=r"a.arrow has changed since it was opened"):
        source.read(5)


def test_folders_and_their_parts(folder: Source, tmp_path: Path) -> None:
    whole = table(folder)
    for part in ("train", "test"):
        for number, rows in enumerate((whole[:4], whole[4:])):
            write(tmp_path / "hub" / "data" / f"{part}-{number:05}-of-00002.parquet", rows)
            write(tmp_path / "saved" / part / f"data-{number:05}-of-00002.arrow", rows)
        said = {"_data_files": [{"filename": f"data-{number:05}-of-00002.arrow"} for number in (1, 0)]}
        (tmp_path / "saved" / part / "state.json").write_text(json.dumps(said))
        write(tmp_path / "saved" / part / "cache-1.arrow", whole)
    (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    (tmp_path / "hub" / "README.md").write_text("beside it")
    with pytest.raises(UserError, match=r"has several parts, test, train: --data .*saved/test names one"):
        open_source(tmp_path / "saved")
    saved = open_source(tmp_path / "saved" / "train")  # in the order that state.json says
    assert [saved.read(i) for i in range(6)] == [folder.read(i) for i in (4, 5, 0, 1, 2, 3)]
    with pytest.raises(
        UserError, match=r"has several parts, test, train: --data '.*hub/data/train\*.parquet' names one"
    ):
        open_source(tmp_path / "hub")
    for name in ("hub/data/train*.parquet", "hub/data/train-{00000..00001}-of-00002.parquet"):
        source = open_source(tmp_path / name)
        assert source.labels.tolist() == folder.labels.tolist() and source.read(5) == folder.read(5)
        assert path_of(source, 5) == f"{tmp_path}/hub/data/row 5"
    for part in ("0000", "0001", "cache-2"):
        write(tmp_path / "plain" / f"{part}.parquet", whole[:2])
    assert len(open_source(tmp_path / "plain")) == 4
    make_folder(tmp_path / "hub" / "more", 2, classes=1)
    assert len(open_source(tmp_path / "hub")) == 2  # a folder of images, with tables that aren't taken
    write(tmp_path / "plain" / "0002.parquet", {"image": images(folder), "label": pa.array(["elm"] * 6)})
    with pytest.raises(
        UserError, match=r"0002.parquet: column image must be struct<.*> as in the first file, got binary"
    ):
        open_source(tmp_path / "plain")


def test_without_pyarrow_a_line_says_what_to_install(folder: Source, tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"image": images(folder)})
    code = (
        "import sys; sys.modules['pyarrow'] = None\nfrom fastjem.data.source import open_source\n"
        f"print(len(open_source({str(tmp_path / 'images')!r})))\nopen_source({str(path)!r})"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert found.stdout == "6\n"
    last = "fastjem.errors.UserError: pyarrow, which reads tables, isn't installed: pip install 'fastjem[tables]'"
    assert found.stderr.splitlines()[-1] == last
