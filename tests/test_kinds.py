"""The same images by every kind of source: the same views, labels, losses, whoever reads them."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from images import TINY, make_folder
from kinds import KINDS, opened, stored

from fastjem.commands.check_data import CheckDataOptions, check_data, render
from fastjem.data import loaders
from fastjem.data.fingerprint import difference, fingerprint
from fastjem.data.loaders import Budget, Order
from fastjem.data.source import Source, decode, decode_named, format_of, open_source, path_named, path_of
from fastjem.data.sources.folder import Folder
from fastjem.data.views import ViewSpec
from fastjem.errors import UserError

SPECS = [ViewSpec(size=24), ViewSpec(size=16, bicubic=True)]
TABLES = ("parquet", "arrow", "stream", "feather", "saved")
NUMBERED = ("shards", "pattern", "arrays")  # whose labels are numbers, and so are their classes


pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return open_source(make_folder(tmp_path_factory.mktemp("images"), 12, size=27))


def skip_without(kind: str) -> None:
    if kind in TABLES:
        pytest.importorskip("pyarrow")


@pytest.mark.parametrize("kind", KINDS)
def test_views_and_labels_are_the_folders(kind: str, folder: Source, tmp_path: Path) -> None:
    skip_without(kind)
    source = opened(kind, folder, tmp_path / "data")
    if kind == "text list":
        assert source.labels is None
    else:
        assert source.labels.tolist() == folder.labels.tolist()
        assert source.classes == (["0", "1", "2"] if kind in NUMBERED else folder.classes)
    order = Order(samples=12, batch=4, seed=3, stop=4)
    expected = list(loaders.create("torch", folder, SPECS, order, Budget()))
    for workers in (0, 2):
        for crops, other in zip(
            loaders.create("torch", source, SPECS, order, Budget(workers=workers)), expected, strict=True
        ):
            assert all(torch.equal(a, b) for a, b in zip(crops.views, other.views, strict=True))
            assert torch.equal(crops.index, other.index) and not crops.unreadable
            assert kind == "text list" or torch.equal(crops.labels, other.labels)


@pytest.mark.parametrize("kind", ["list", "shards", "parquet", "arrow"])
@pytest.mark.parametrize("name", ["dali-cpu", "memory"])
def test_dali_and_memory_read_them_too(kind: str, name: str, folder: Source, tmp_path: Path) -> None:
    skip_without(kind)
    if name == "dali-cpu":
        pytest.importorskip("nvidia.dali")
    source = opened(kind, folder, tmp_path / "data")
    order = Order(samples=12, batch=4, seed=3, stop=3)
    both = [list(loaders.create(name, one, SPECS, order, Budget(workers=1))) for one in (source, folder)]
    for crops, other in zip(*both, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(crops.views, other.views, strict=True))
        assert torch.equal(crops.labels, other.labels) and torch.equal(crops.index, other.index)


@pytest.mark.parametrize("kind", KINDS)
def test_images_are_found_by_their_names_and_in_other_processes(kind: str, folder: Source, tmp_path: Path) -> None:
    skip_without(kind)
    source = opened(kind, folder, tmp_path / "data")
    names = [source.name(i) for i in range(12)]
    assert len(set(names)) == 12
    for i in (0, 5, 11):
        found = decode_named(source.root, names[i])
        assert np.array_equal(np.asarray(found), np.asarray(decode(folder, i)))
        assert path_named(source.root, names[i]) == path_of(source, i)
    sent = pickle.dumps(source)
    again = pickle.loads(sent)
    assert np.array_equal(again.read(7), source.read(7)) and len(sent) < 4000
    assert difference(fingerprint(source), fingerprint(again)) == ""


def test_a_file_of_another_kind_is_told_which_are_read(folder: Source, tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(b"")
    with pytest.raises(UserError, match=r"a\.zip is a file, no folder; of files these are read: .*") as raised:
        open_source(tmp_path / "a.zip")
    for ending in str(raised.value).partition("read: ")[2].split():
        (tmp_path / f"a{ending}").write_bytes(b"")
        assert format_of(tmp_path / f"a{ending}") is not Folder
    with pytest.raises(UserError, match=r"b\.tar is not a folder, and no file is there"):
        open_source(tmp_path / "b.tar")


def test_what_an_image_is_called(folder: Source, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    expected = {
        "list": f"{folder.root}/class0/0003.png",
        "shards": "shards/train-000000.tar/0001.png",
        "pattern": "pattern/train-000000.tar/0001.png",
        "one tar": "one tar/a.tar/class0/0003.png",
        "parquet": "parquet/row 1",
        "stream": "stream/a.arrow/row 1",
    }
    for kind, path in expected.items():
        assert path_of(opened(kind, folder, tmp_path / kind), 1) == str(tmp_path / path)


@pytest.mark.parametrize("kind", ["list", "pattern", "parquet", "arrow", "arrays"])
def test_check_data_reads_all_of_them(kind: str, folder: Source, tmp_path: Path) -> None:
    skip_without(kind)
    found = check_data(CheckDataOptions(stored(kind, folder, tmp_path / "data"), workers=1))
    assert (found["files"], found["classes"], found["skipped"]) == (12, 3, [])
    if kind != "arrays":
        assert found["formats"] == {"PNG": 12} and found["bytes"] == sum(len(folder.read(i)) for i in range(12))
    assert "12 in 3 classes" in render(found)


@pytest.mark.parametrize("kind", ["shards", "parquet", "list"])
def test_a_run_and_what_is_resumed_of_it_have_the_folders_losses(
    kind: str, tmp_path: Path, one_thread: None, capsys: pytest.CaptureFixture[str]
) -> None:
    skip_without(kind)
    for package in ("timm", "torchvision", "safetensors"):
        pytest.importorskip(package)
    import fastjem

    folder = open_source(make_folder(tmp_path / "images", 32))
    losses = []
    for data, loader in ((folder.root, "auto"), (stored(kind, folder, tmp_path / "data"), "auto")):
        run = tmp_path / f"run{len(losses)}"
        fastjem.pretrain(**{**TINY, "report": True}, data=data, loader=loader, max_steps=3, out=str(run))
        assert fastjem.pretrain(out=str(run), resume=True, max_steps=5).steps == 5
        losses.append([json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()])
        page = (run / "report.html").read_text()
        assert page.count("data:image/png") > 10 and "not shown" not in page
    assert len(losses[0]) == 5 and losses[0] == losses[1]
