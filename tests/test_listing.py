"""Lists of files: which column is which, labels, paths that lead elsewhere, and what in a list is wrong."""

import os
from pathlib import Path

import numpy as np
import pytest
from images import TINY, make_folder

from fastjem.data.fingerprint import difference, fingerprint
from fastjem.data.loaders import Budget, Order
from fastjem.data.loaders.torch import TorchLoader
from fastjem.data.source import Source, open_source, path_of
from fastjem.data.sources.listing import Listing
from fastjem.data.views import ViewSpec
from fastjem.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Source:
    return open_source(make_folder(tmp_path / "images", 6))


def written(tmp_path: Path, name: str, text: str) -> Path:
    (tmp_path / "lists").mkdir(exist_ok=True)
    (tmp_path / "lists" / name).write_text(text)
    return tmp_path / "lists" / name


def names(source: Source) -> list[str]:
    return [source.name(i) for i in range(len(source))]


def test_lines_of_a_text(folder: Source, tmp_path: Path) -> None:
    absolute = f"{folder.root}/class0/0000.png"
    path = written(
        tmp_path, "a.txt", f"\ufeff# images\n\n  ../images/class1/0001.png\r\n{absolute}\n../images/a # b.png\n"
    )
    source = open_source(path)
    assert isinstance(source, Listing) and source.labels is None and source.classes == []
    assert names(source) == ["../images/class1/0001.png", absolute, "../images/a # b.png"]
    assert source.read(0) == (tmp_path / "images/class1/0001.png").read_bytes()
    assert path_of(source, 0) == f"{tmp_path}/lists/../images/class1/0001.png" and path_of(source, 1) == absolute
    with pytest.raises(FileNotFoundError):  # it is no error of the list
        source.read(2)
    (crops,) = TorchLoader(source, [ViewSpec(size=16)], Order(samples=3, batch=3, stop=1), Budget())
    assert sorted(crops.index.tolist()) == [0, 0, 1]
    assert crops.unreadable == [(f"{tmp_path}/lists/../images/a # b.png", "No such file or directory")]


def test_a_relative_list_in_the_working_folder(folder: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("images/class0/0003.png\n")
    source = open_source("a.txt")
    assert path_of(source, 0) == "images/class0/0003.png" and source.read(0) == folder.read(1)


@pytest.mark.parametrize(
    ("name", "text", "expected", "classes", "labels"),
    [
        ("a.csv", "Path,Label\nb.png,oak\na.png,elm\n", ["b.png", "a.png"], ["elm", "oak"], [1, 0]),
        ("a.tsv", "id\tfile_name\ttarget\n1\ta b.png\t10\n2\tc.png\t9\n", ["a b.png", "c.png"], ["9", "10"], [1, 0]),
        ("a.csv", 'FilePath,class_name,x\n"a,1.png",10,\nc.png,9a,\n\n', ["a,1.png", "c.png"], ["10", "9a"], [0, 1]),
        ("a.csv", "image\na.png\n", ["a.png"], [], None),
        (
            "a.csv",
            '\ufeffno;Path ; label\r\n1;a,1.png;10\r\n2;"b;2.png";9\r\n;;\r\n',
            ["a,1.png", "b;2.png"],
            ["9", "10"],
            [1, 0],
        ),
        ("a.csv", "path\tlabel\na.png\telm\n \t\n", ["a.png"], ["elm"], [0]),
        ("a.csv?image=raw&label=kind", "path,raw,label,kind\na,b,c,d\n", ["b"], ["d"], [0]),
        ("a.csv?label=fine", "path,fine,label\na,b,c\n", ["a"], ["b"], [0]),
    ],
)
def test_columns(
    name: str, text: str, expected: list[str], classes: list[str], labels: list[int] | None, tmp_path: Path
) -> None:
    path = written(tmp_path, name.partition("?")[0], text)
    source = open_source(path.with_name(name))
    assert names(source) == expected and source.classes == classes
    assert (None if source.labels is None else source.labels.tolist()) == labels


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "a.csv",
            "id,photo\n1,a.png\n",
            r"which column has the paths\? its columns are id, photo; \?image=NAME behind",
        ),
        (
            "a.csv",
            "path,file\na,b\n",
            r"which column is the image\? its columns are path, file; \?image=path behind it",
        ),
        (
            "a.csv",
            "path,label,class\na,b,c\n",
            r"which column is the label\? .* path, label, class; \?label=label behind it",
        ),
        ("a.csv?label=kind", "path,label\na,b\n", r"a.csv has no column kind: its columns are path, label"),
        ("a.csv?kind=label", "path,label\na,b\n", r"\?kind= is no option of it; there are \?image=, \?label="),
        ("a.csv", "path,label\na.png,1\nb.png,\n", "line 3: b.png has no label"),
        ("a.csv", "path,label\na.png,1\nb.png\n", "line 3: b.png has no label"),
        ("a.csv", "path,label\n,1\n", "line 2: there is no path"),
        ("a.csv", "", r"which column has the paths\? its columns are ;"),
        ("a.csv", "path\n", "names no images"),
        ("a.txt", "# nothing\n\n", "names no images"),
        ("a.txt?label=kind", "a.png\n", "has no columns: each of its lines is a path"),
    ],
)
def test_what_is_wrong_with_a_list(name: str, text: str, message: str, tmp_path: Path) -> None:
    path = written(tmp_path, name.partition("?")[0], text)
    with pytest.raises(UserError, match=message):
        open_source(path.with_name(name))


def test_bytes_that_are_no_text_are_names_too(tmp_path: Path) -> None:
    make_folder(tmp_path, 1, classes=0)
    os.rename(os.fsencode(tmp_path / "0000.png"), os.fsencode(tmp_path) + b"/\xff.png")
    (tmp_path / "a.txt").write_bytes(b"\xff.png\n")
    assert len(open_source(tmp_path / "a.txt").read(0)) > 100


@pytest.mark.parametrize("order", ["utf-16-le", "utf-16-be"])
def test_excels_unicode_text(order: str, tmp_path: Path) -> None:
    """UTF-16 with its mark."""
    (tmp_path / "a.csv").write_bytes("\ufeffpath\tlabel\r\nä.png\telm\r\nb.png\toak\r\n".encode(order))
    source = open_source(tmp_path / "a.csv")
    assert names(source) == ["ä.png", "b.png"] and source.classes == ["elm", "oak"]
    (tmp_path / "a.txt").write_bytes("\ufeffä.png\r\nb.png\r\n".encode(order))
    assert names(open_source(tmp_path / "a.txt")) == ["ä.png", "b.png"]
    (tmp_path / "c.csv").write_bytes("\ufeffpath\n".encode(order) + b"\x00")
    with pytest.raises(UserError, match=r"c\.csv (can't be read as a list|names no images)"):
        open_source(tmp_path / "c.csv")


def test_a_fingerprint_notices_other_files(folder: Source, tmp_path: Path) -> None:
    path = written(tmp_path, "a.csv", "path,label\n../images/class0/0000.png,1\n../images/class0/0003.png,2\n")
    before = fingerprint(open_source(path))
    image = tmp_path / "images" / "class0" / "0003.png"
    image.write_bytes(image.read_bytes() + b"0")
    assert "larger or smaller" in difference(before, fingerprint(open_source(path)))


def test_a_run_knows_its_columns(
    folder: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    """Relative names with columns behind them are found by another command from another folder."""
    for package in ("timm", "torchvision", "safetensors"):
        pytest.importorskip(package)
    import fastjem
    from fastjem.commands.evaluate import EvaluateOptions, evaluate
    from fastjem.commands.views import ViewsOptions, draw_views
    from fastjem.report.run import read

    make_folder(tmp_path / "images", 32)
    whole = open_source(tmp_path / "images")
    rows = [f"../images/{whole.name(i)},{i},{whole.classes[whole.labels[i]]}" for i in range(32)]
    written(tmp_path, "a.csv", "\n".join(["path,label,kind", *rows]) + "\n")
    monkeypatch.chdir(tmp_path)
    fastjem.pretrain(**{**TINY, "report": True}, data="lists/a.csv?label=kind", max_steps=2, out="run")
    page = (tmp_path / "run" / "report.html").read_text()
    assert "class2" in page and page.count("data:image/png") > 10 and "not shown" not in page
    passed_on = read(tmp_path / "run")  # somebody else's page: nothing is opened but below the list's folder
    assert passed_on.embeddings.hidden == {f"../images/{whole.name(i)}" for i in range(32)}
    with np.load(tmp_path / "run" / "embeddings.npz") as file:
        arrays = dict(file)
    files = [*[f"{whole.root}/{whole.name(i)}" for i in range(31)], "nowhere/0.png"]
    for root, before in (
        (f"{tmp_path}/nowhere.txt", ""),
        (f"{tmp_path}/nowhere:1,{tmp_path}/nothing.csv:1", "nowhere/"),
    ):
        arrays |= {"root": np.array(root), "files": np.array([before + name for name in files])}
        (tmp_path / "sent").mkdir(exist_ok=True)
        for name in ("config.yaml", "metrics.jsonl"):
            (tmp_path / "sent" / name).write_bytes((tmp_path / "run" / name).read_bytes())
        np.savez(tmp_path / "sent" / "embeddings.npz", **arrays)
        # names that lead out of data that aren't there
        assert read(tmp_path / "sent").embeddings.hidden == {before + name for name in files[:-1]}
    monkeypatch.chdir(tmp_path / "lists")
    assert evaluate(EvaluateOptions("../run"))["classes"] == 3
    assert fastjem.pretrain(out="../run", resume=True, max_steps=3).steps == 3
    assert draw_views(ViewsOptions(data="a.csv?label=kind", out="views.png", image_size=32)).stat().st_size > 1000
    assert np.array_equal(open_source("a.csv?label=kind").labels, whole.labels)
