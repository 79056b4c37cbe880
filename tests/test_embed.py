"""Embeddings of many images: by four routes equal, in three formats, killed and gone on with; who is near."""

import csv
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from images import TINY, Own, make_folder

for package in ("timm", "torchvision", "safetensors", "tyro", "scipy"):
    pytest.importorskip(package)

import fastjem  # noqa: E402
from fastjem.cli import main  # noqa: E402
from fastjem.data.source import open_source  # noqa: E402
from fastjem.embeddings import files, near  # noqa: E402
from fastjem.embeddings.rows import Rows  # noqa: E402
from fastjem.errors import UserError  # noqa: E402

CPU = ["--device", "cpu", "--workers", "0"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Path:
    """A run that has hardly learned, and its 48 images of three classes."""
    folder = tmp_path_factory.mktemp("embedded")
    make_folder(folder / "images", 48)
    fastjem.pretrain(**TINY, data=folder / "images", out=folder / "run", max_steps=1)
    return folder


def test_routes_are_equal(root: Path, tmp_path: Path) -> None:
    """The command's three files, the function, and load_encoder with its own preparation."""
    encoder = fastjem.load_encoder(root / "run")
    paths = sorted((root / "images").rglob("*.png"))
    with torch.no_grad():
        expected = encoder(encoder.prepare(paths)).numpy()
    found = fastjem.embed(root / "run", workers=0, device="cpu")
    assert found.paths == [str(path) for path in paths] and found.images.tolist() == list(range(48))
    assert found.labels is not None and found.classes == ["class0", "class1", "class2"]
    assert [found.classes[label] for label in found.labels] == [path.parent.name for path in paths]
    np.testing.assert_array_equal(found.embeddings, expected)
    for ending in ("npz", "csv", "parquet"):
        out = tmp_path / f"e.{ending}"
        assert main(["embed", str(root / "run"), "--data", str(root / "images"), "--out", str(out), *CPU]) == 0
        assert not out.with_name(f"{out.name}.part").exists()
    with np.load(tmp_path / "e.npz") as arrays:
        np.testing.assert_array_equal(arrays["embedding"], expected)
        assert arrays["path"].tolist() == found.paths and arrays["label"].tolist() == found.labels.tolist()
        about = json.loads(str(arrays["metadata"]))
    with open(tmp_path / "e.csv", newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    assert header[:4] == ["index", "path", "label", "class"] and header[4] == "embedding0"
    np.testing.assert_array_equal(np.array([row[4:] for row in rows], np.float32), expected)
    assert about["encoder"]["backbone"] == "test_resnet" and about["encoder"]["pixels"]["size"] == 32
    assert about["data"] == str(root / "images") and about["classes"] == found.classes and about["step"] == 1
    assert json.loads((tmp_path / "e.csv.json").read_text()) == about
    pq = pytest.importorskip("pyarrow.parquet")
    table = pq.read_table(tmp_path / "e.parquet")
    assert str(table.schema.field("embedding").type).startswith(f"fixed_size_list<element: float>[{expected.shape[1]}]")
    np.testing.assert_array_equal(np.stack(table["embedding"].to_numpy()), expected)
    assert table["path"].to_pylist() == found.paths and table["class"].to_pylist()[0] == "class0"
    assert json.loads(table.schema.metadata[b"fastjem"]) == about


def test_half_an_export_and_sources(root: Path, tmp_path: Path) -> None:
    fastjem.export(root / "run", out=tmp_path / "export")
    usual = fastjem.embed(root / "run", workers=0, device="cpu")
    half = fastjem.embed(tmp_path / "export", data=root / "images", half=True, workers=0, device="cpu")
    assert half.embeddings.dtype == np.float16
    np.testing.assert_array_equal(half.embeddings, usual.embeddings.astype(np.float16))
    alone = fastjem.embed(tmp_path / "export/model.safetensors", data=root / "images", workers=0, device="cpu")
    np.testing.assert_array_equal(alone.embeddings, usual.embeddings)
    own = fastjem.embed(root / "run", source=Own(open_source(root / "images")), workers=0, device="cpu")
    assert own.labels is None and own.classes == [] and len(own.paths) == 32
    listed = tmp_path / "list.txt"
    listed.write_text("".join(f"{path}\n" for path in usual.paths[:5]))
    few = fastjem.embed(root / "run", data=[listed, root / "images"], workers=0, device="cpu")
    np.testing.assert_allclose(few.embeddings[:5], usual.embeddings[:5], rtol=1e-5, atol=1e-5)
    assert len(few.images) == 53


KILLED = """
import os, signal, sys
from fastjem.commands import embed
from fastjem.embeddings import rows
embed.SAVED_EVERY = 0.0
saved = rows.Rows.save
def save(self):
    saved(self)
    if self.done == 24:
        os.write(self.files["rows.bin"], b"what no state knows of")
        os.kill(os.getpid(), signal.SIGKILL)
rows.Rows.save = save
from fastjem.cli import main
main(sys.argv[1:])
"""


def test_killed_and_started_again(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """kill -9 behind a part, with half a write behind it; other options or images aren't mixed with it."""
    images = tmp_path / "images"
    shutil.copytree(root / "images", images)
    (images / "class1/0010.png").write_bytes(b"no image")
    words = ["embed", str(root / "run"), "--data", str(images), "--batch-size", "8", *CPU]
    assert main([*words, "--out", str(tmp_path / "whole.npz")]) == 0
    out = tmp_path / "e.npz"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    killed = subprocess.run([sys.executable, "-c", KILLED, *words, "--out", str(out)], env=environment, timeout=120)
    assert killed.returncode == -signal.SIGKILL and not out.exists()
    state = json.loads((tmp_path / "e.npz.part/state.json").read_text())
    assert state["done"] == 24
    capsys.readouterr()
    for other in (["--half"], ["--batch-size", "16"], ["--data", str(root / "images")]):
        assert main([*words, *other, "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert said.count("holds a part of other embeddings (not the same options)") == 2
    assert said.count("(not the same data)") == 1
    assert main([*words, "--out", str(out)]) == 0
    assert "24 of 48 images are embedded already" in capsys.readouterr().err
    assert out.read_bytes() == (tmp_path / "whole.npz").read_bytes()
    assert (tmp_path / "e.unreadable.csv").read_bytes() == (tmp_path / "whole.unreadable.csv").read_bytes()
    assert main([*words, "--out", str(out)]) == 2
    assert "is there already; --overwrite" in capsys.readouterr().err
    assert main([*words, "--half", "--overwrite", "--out", str(out)]) == 0
    with np.load(out) as arrays:
        assert arrays["embedding"].dtype == np.float16 and len(arrays["embedding"]) == 47


def test_rows_are_kept_refused_or_begun_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def rows(identity: str, **options: bool) -> Rows:
        return Rows(tmp_path, {"encoder": identity}, np.dtype(np.float32), **options)

    first = rows("a")
    first.add(np.ones((2, 3)), [0, 2], [(1, "b.png", "no image")])
    first.save()
    first.close()
    again = rows("a")
    assert (again.done, len(again), again.width) == (3, 2, 3) and again.unreadable() == [(1, "b.png", "no image")]
    again.close()
    with pytest.raises(UserError, match="not the same encoder"):
        rows("b")
    anew = rows("b", anew=True)
    assert anew.done == 0 and len(anew) == 0
    anew.close()
    full = rows("b", anew=True)

    def write(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(UserError, match="can't be written to: No space left"):
        patch.setattr(os, "write", write)
        full.add(np.ones((1, 3)), [0], [])
    full.close()
    (tmp_path / "state.json").write_text('{"identity": {}}')
    with pytest.raises(UserError, match=r"state.json is damaged"):
        rows("a")


def test_unreadable_images_and_odd_names(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [b"a,b.png", b'new\nline "quoted".png', b"undecodable\xff.png", "größer.png".encode()]
    images = tmp_path / "odd"
    images.mkdir()
    pixels = sorted((root / "images").rglob("*.png"))
    for name, path in zip(names, pixels, strict=False):
        (images / os.fsdecode(name)).write_bytes(path.read_bytes())
    (images / "broken.png").write_bytes(b"no image")
    for ending in (".csv", ".npz", ".parquet"):
        if ending == ".parquet":
            pytest.importorskip("pyarrow")
        out = tmp_path / f"e{ending}"
        found = fastjem.embed(root / "run", data=images, out=out, workers=0, device="cpu")
        assert [path for path, _ in found.unreadable] == [str(images / "broken.png")] and len(found.paths) == 4
        assert f"left out: {images / 'broken.png'} can't be read: " in capsys.readouterr().err
    assert {os.fsencode(path) for path in found.paths} == {os.path.join(os.fsencode(images), name) for name in names}
    shown = [path.replace(os.fsdecode(b"\xff"), "\\xff") for path in found.paths]
    with open(tmp_path / "e.csv", newline="", encoding="utf-8") as file:
        assert [row[1] for row in csv.reader(file)][1:] == shown
    with np.load(tmp_path / "e.npz") as arrays:
        assert arrays["path"].tolist() == found.paths and arrays["index"].tolist() == found.images.tolist()
    import pyarrow.parquet as pq

    assert pq.read_table(tmp_path / "e.parquet")["path"].to_pylist() == shown
    with open(tmp_path / "e.unreadable.csv", newline="") as file:
        header, row = csv.reader(file)
    assert header == ["index", "path", "reason"] and row[1] == str(images / "broken.png")


def test_pandas_reads_the_csv_back(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    values = np.array([[0.1, -1e-30], [3e38, np.nan]], np.float32)
    paths = ['a\r\n"b",c', "d\udcff"]
    table = files.Table(
        [
            files.Column("path", lambda a, b: paths[a:b]),
            files.Column("embedding", lambda a, b: values[a:b], values.dtype, 2),
        ],
        2,
        {},
    )
    files.write(tmp_path / "e.csv", table)
    frame = pandas.read_csv(tmp_path / "e.csv")
    assert frame["path"].tolist() == ['a\r\n"b",c', "d\\xff"]
    np.testing.assert_array_equal(frame[["embedding0", "embedding1"]].to_numpy(np.float32), values)


@pytest.mark.parametrize("faiss", [False, True])
def test_neighbors_are_those_of_all_products(faiss: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if faiss:
        pytest.importorskip("faiss")
    monkeypatch.setattr(near, "QUERIES", 17)
    rows = np.random.default_rng(0).normal(size=(60, 5)).astype(np.float32)
    unit = rows.astype(np.float64) / np.linalg.norm(rows, axis=1, keepdims=True)
    products = unit @ unit.T
    np.fill_diagonal(products, -2)
    expected = np.argsort(-products, axis=1)[:, :4]
    cosines, found = near.neighbors(rows, 4, faiss=faiss)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(cosines, np.take_along_axis(products, expected, 1), atol=1e-6)
    same = np.ones((5, 3), np.float32)  # a row of many equal ones may not find itself
    cosines, found = near.neighbors(same, 9, faiss=faiss)
    assert found.shape == (5, 4) and not (found == np.arange(5)[:, None]).any()
    assert all(len(set(row)) == 4 for row in found.tolist())
    rows[3, 0] = np.nan
    with pytest.raises(UserError, match="embeddings of 1 images aren't finite"):
        near.neighbors(rows, 4, faiss=faiss)


@pytest.mark.parametrize(("block", "pairs"), [(2048, 2**20), (7, 1)])
def test_duplicates_are_the_linked_groups(block: int, pairs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near, "BLOCK", block)
    monkeypatch.setattr(near, "PAIRS", pairs)
    random = np.random.default_rng(1)
    rows = random.normal(size=(40, 6)).astype(np.float32)
    for a, b in ((2, 31), (31, 9), (5, 6)):  # a chain, and a pair
        rows[b] = rows[a] * 3 + random.normal(size=6) * 0.02
    rows[20] = rows[5]
    unit = rows.astype(np.float64) / np.linalg.norm(rows, axis=1, keepdims=True)
    products = unit @ unit.T
    np.fill_diagonal(products, -2)
    found = near.duplicates(rows, 0.999)
    assert [group.rows.tolist() for group in found] == [[2, 9, 31], [5, 6, 20]]
    for group in found:
        np.testing.assert_allclose(group.cosines, products[group.rows].max(1), atol=1e-6)
    assert [group.rows.tolist() for group in near.duplicates(rows, 1.0)] == [[5, 20]]
    assert near.duplicates(rows[:5], 0.999) == []


def test_neighbors_and_duplicates_lie_beside_the_file(root: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    shutil.copytree(root / "images", images)
    shutil.copy(images / "class0/0000.png", images / "class2/copy.png")
    out = tmp_path / "e.npz"
    found = fastjem.embed(root / "run", data=images, out=out, neighbors=2, duplicates=1.0, workers=0, device="cpu")
    copies = [found.paths.index(str(images / name)) for name in ("class0/0000.png", "class2/copy.png")]
    assert found.duplicates is not None and found.neighbors is not None
    assert [group.rows.tolist() for group in found.duplicates] == [copies]
    assert found.neighbors[1][copies[0], 0] == copies[1] and found.neighbors[0][copies[0], 0] == pytest.approx(1)
    with np.load(tmp_path / "e.neighbors.npz") as arrays:
        np.testing.assert_array_equal(arrays["neighbor"], found.images[found.neighbors[1]])
        assert arrays["path"].tolist() == found.paths
    with np.load(tmp_path / "e.duplicates.npz") as arrays:
        assert arrays["group"].tolist() == [0, 0] and arrays["path"].tolist() == [found.paths[i] for i in copies]


def test_memory_stays_flat(tmp_path: Path) -> None:
    """Rows are mapped, and files are written a block at a time: of 32 MiB of rows few are ever in memory."""
    rows = Rows(tmp_path / "part", {}, np.dtype(np.float32))
    for i in range(4):
        rows.add(np.full((4096, 512), i), list(range(i * 4096, (i + 1) * 4096)), [])
    rows.close()
    values = rows.rows()
    table = files.Table([files.Column("embedding", lambda a, b: values[a:b], rows.dtype, 512)], len(rows), {})
    import tracemalloc

    for ending in (".npz", ".parquet"):
        if ending == ".parquet":
            pytest.importorskip("pyarrow")
        tracemalloc.start()
        files.write(tmp_path / f"e{ending}", table)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert most < 20 * 2**20
    with np.load(tmp_path / "e.npz") as arrays:
        np.testing.assert_array_equal(arrays["embedding"], values)


def test_mistakes(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(root / "run")
    for words, says in [
        ([], "needs --out FILE"),
        (["--out", "a.txt"], "--out must end in .parquet, .npz, .csv, got a.txt"),
        (["--out", "a.csv", "--duplicates", "2"], "--duplicates must be a cosine between 0 (none) and 1, got 2"),
        (["--out", "a.csv", "--data", str(tmp_path / "gone")], "gone"),
        (["--out", "/proc/nowhere/a.csv"], "--out"),
    ]:
        assert main(["embed", run, *words, *CPU]) == 2
        assert says in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    assert main(["embed", run, "--out", "a.parquet", *CPU]) == 2
    assert "Parquet needs the package pyarrow: pip install 'fastjem[tables]'" in capsys.readouterr().err
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "a.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"embed: none of the images in .* can be read; the first: .*a.png"):
        fastjem.embed(root / "run", data=broken, workers=0, device="cpu")
