"""A source of one's own through every loader, and which images a batch says it has."""

import io
import pickle
import re
import sqlite3
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from images import make_folder
from PIL import Image

from fastjem.commands.check_data import CheckDataOptions, check_data
from fastjem.data import loaders, source
from fastjem.data.batch import Crops, finish
from fastjem.data.loaders import Budget, Order
from fastjem.data.loaders.torch import TorchLoader
from fastjem.data.source import NoneReadable, Source, decode, decode_named, open_source, path_of
from fastjem.data.sources.arrays import Arrays
from fastjem.data.views import ViewSpec
from fastjem.errors import UserError

SIZE = 27  # 8/7 of 24: in memory they stay as they are
SPECS = [ViewSpec(size=24), ViewSpec(size=16, bicubic=True)]


class Drawers:
    """What a user writes: JPEG files in a dict, and labels. A picture has one colour, which tells its number."""

    def __init__(self, images: int = 12, broken: tuple[int, ...] = ()):
        self.files = {i: self.file(i) for i in range(images)}
        self.labels = np.arange(images) % 3
        for i in broken:
            self.files[i] = self.files[i][: len(self.files[i]) // 2]

    def file(self, i: int) -> bytes:
        encoded = io.BytesIO()
        Image.new("RGB", (SIZE, SIZE), (20 * i, 20 * i, 20 * i)).save(encoded, "JPEG", quality=95)
        return encoded.getvalue()

    def __len__(self) -> int:
        return len(self.files)

    def read(self, i: int) -> bytes:
        return self.files[i]


class Viewed(Drawers):
    """The same as views of memory, as a database or a mapped file may give them."""

    def read(self, i: int) -> memoryview:
        return memoryview(self.files[i])


class Decoded(Drawers):
    """The same as pixels; one channel, as it is enough for gray."""

    def read(self, i: int) -> np.ndarray:
        return np.asarray(Image.open(io.BytesIO(self.files[i])).convert("L"))[:, :, None]


def shown(crops: Crops) -> list[int]:
    """The number of the image that each row shows, by its colour."""
    numbers = [(view.float().mean((1, 2, 3)) / 20).round().int().tolist() for view in crops.views]
    assert numbers[0] == numbers[1]
    return numbers[0]


def loaded(name: str, given: object, **order: int) -> Iterator[Crops]:
    opened = open_source(given)
    order = {"batch": 4, "seed": 3, "stop": 6, **order}
    return iter(loaders.create(name, opened, SPECS, Order(samples=len(opened), **order), Budget()))


@pytest.mark.parametrize("kind", [Drawers, Viewed, Decoded])
@pytest.mark.parametrize("name", ["torch", "memory", "dali-cpu"])
def test_an_object_with_len_and_read_is_a_source(name: str, kind: type[Drawers]) -> None:
    if name == "dali-cpu":
        pytest.importorskip("nvidia.dali")
    whole = list(loaded(name, kind()))
    assert len(whole) == 6 and not any(crops.unreadable for crops in whole)
    for crops in whole:
        assert crops.index.tolist() == shown(crops) and crops.index.dtype == torch.int64
        assert torch.equal(crops.labels, crops.index % 3)
    assert [crops.epoch for crops in whole] == [0, 0, 0, 1, 1, 1]
    assert sorted(i for crops in whole[:3] for i in shown(crops)) == list(range(12))
    torchs = list(loaded("torch", Drawers()))
    for crops, other in zip(whole, torchs, strict=True):
        assert torch.equal(crops.index, other.index)
        assert all(torch.equal(a, b) for a, b in zip(crops.tables, other.tables, strict=True))


@pytest.mark.parametrize("name", ["torch", "memory", "dali-cpu"])
def test_index_and_labels_are_of_the_image_that_is_there(name: str) -> None:
    """Images 5 and 11 can't be read: 6 and 0 stand in for them."""
    if name == "dali-cpu":
        pytest.importorskip("nvidia.dali")
    whole = list(loaded(name, Drawers(broken=(5, 11)), stop=3))
    for crops in whole:
        assert crops.index.tolist() == shown(crops)
        assert torch.equal(crops.labels, crops.index % 3)
    seen = sorted(i for crops in whole for i in crops.index.tolist())
    assert seen == sorted([0, 1, 2, 3, 4, 6, 6, 7, 8, 9, 10, 0])
    unreadable = {path for crops in whole for path, _ in crops.unreadable}
    assert unreadable == {"Drawers/5", "Drawers/11"}


def test_without_labels_a_batch_has_none() -> None:
    given = Drawers()
    del given.labels
    (crops,) = loaded("torch", given, stop=1)
    batch = finish(crops, SPECS, "cpu")
    assert crops.labels is None and batch.labels is None and batch.masks == {}
    assert torch.equal(batch.index, crops.index)
    (crops,) = loaded("torch", Drawers(), stop=1)
    assert torch.equal(finish(crops, SPECS, "cpu").labels, crops.index % 3)


def test_what_a_source_of_ones_own_may_say_of_itself() -> None:
    opened = open_source(Drawers())
    assert (opened.root, opened.name(3), path_of(opened, 3)) == ("Drawers", "3", "Drawers/3")
    assert opened.labels.tolist() == [0, 1, 2] * 4 and opened.classes == ["0", "1", "2"]
    assert not opened.decoded and open_source(Decoded()).decoded and open_source(opened) is opened
    given = Drawers()
    given.labels = [7, 7, 9] * 4
    given.root = "drawers of oak"
    given.name = lambda i: f"drawer {i}"
    opened = open_source(given)
    assert path_of(opened, 3) == "drawers of oak/drawer 3"
    assert opened.labels.tolist() == [0, 0, 1] * 4 and opened.classes == ["7", "9"]
    given.labels, given.classes = [1, 1, 0] * 4, ["oak", "elm"]
    assert open_source(given).labels.tolist() == [1, 1, 0] * 4 and open_source(given).classes == ["oak", "elm"]
    assert np.array_equal(np.asarray(decode(opened, 4)), np.asarray(decode(open_source(Drawers()), 4)))


def test_what_is_no_source() -> None:
    for given, message in (
        ([1, 2], r"a source of images has len\(\) and read\(i\), or is a path; got list"),
        (Drawers(0), "Drawers has no images"),
        (None, "got NoneType"),
    ):
        with pytest.raises(UserError, match=message):
            open_source(given)
    for labels, classes, message in (
        ([0, 1], None, r"Drawers: labels must be \[12\] integers, got \(2,\) int64"),
        ([0.5] * 12, None, "labels must be .* float64"),
        ([0, 1, 2] * 4, ["a", "b"], "labels must number the 2 classes"),
    ):
        given = Drawers()
        given.labels, given.classes = labels, classes
        with pytest.raises(UserError, match=message):
            open_source(given)
    with pytest.raises(NoneReadable, match=r"none of the files can be read; the first: Drawers/[0-9]+: Truncated"):
        list(loaded("torch", Drawers(broken=tuple(range(12)))))


def test_a_format_is_a_class_and_a_line(tmp_path: Path, monkeypatch) -> None:
    """A file of pickled bytes stands for any new format: no loader hears of it."""

    class Pickled(Drawers):
        decoded = False
        classes: list[str] = []  # noqa: RUF012

        def __init__(self, root: Path):
            self.root = str(root)
            self.files = pickle.loads(Path(root).read_bytes())
            self.labels = None

        def name(self, i: int) -> str:
            return f"{i}.jpg"

        @staticmethod
        def recognises(root: Path) -> bool:
            return root.suffix == ".pickle"

        @staticmethod
        def read_named(root: str, name: str) -> bytes:
            return pickle.loads(Path(root).read_bytes())[int(name.partition(".")[0])]

    path = tmp_path / "a.pickle"
    path.write_bytes(pickle.dumps(Drawers().files))
    monkeypatch.setattr(source, "SOURCES", {"pickled": Pickled, **source.SOURCES})
    assert isinstance(open_source(path), Pickled)
    for one, other in zip(loaded("torch", str(path)), loaded("torch", Drawers()), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one.views, other.views, strict=True))
    assert np.array_equal(np.asarray(decode_named(str(path), "3.jpg")), np.asarray(decode(open_source(path), 3)))


def test_images_are_found_by_their_names(tmp_path: Path) -> None:
    folder: Source = open_source(make_folder(tmp_path / "images", 6))
    np.savez(tmp_path / "a.npz", images=np.stack([np.asarray(decode(folder, i)) for i in range(6)]))
    arrays = open_source(tmp_path / "a.npz")
    for opened in (folder, arrays):
        for i in range(6):
            found = decode_named(opened.root, opened.name(i))
            assert np.array_equal(np.asarray(found), np.asarray(decode(folder, i)))
    assert len(pickle.dumps(arrays)) < 1000  # a worker that isn't a fork isn't sent the pixels
    assert isinstance(pickle.loads(pickle.dumps(arrays)), Arrays)


def test_an_order_is_its_seed_and_its_step() -> None:
    order = Order(samples=11, batch=4, seed=2, stop=6)
    batches = list(order)
    assert len(order) == len(batches) == 6 and list(replace(order, start=3)) == batches[3:]
    ranks = [list(replace(order, ranks=2, rank=rank)) for rank in range(2)]
    assert [one + other for one, other in zip(*ranks, strict=True)] == batches
    for epoch in range(3):
        keys = batches[2 * epoch] + batches[2 * epoch + 1]
        assert {key[0] for key in keys} == {epoch} and len({sample for _, sample in keys}) == 8


def test_the_page_on_adding_a_source_holds(tmp_path: Path, monkeypatch) -> None:
    """Its two examples as they stand there: crops of a database and of a .zip file are those of the folder."""
    page = (Path(__file__).parents[1] / "docs" / "adding-a-source.md").read_text()
    own, _, zipped, line = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    folder = open_source(make_folder(tmp_path / "images", 12))
    with sqlite3.connect("photos.db") as database, zipfile.ZipFile("photos.zip", "w") as archive:
        database.execute("CREATE TABLE photos (number INTEGER, file BLOB, label INTEGER)")
        for i in range(12):
            database.execute("INSERT INTO photos VALUES (?, ?, ?)", (i, folder.read(i), int(folder.labels[i])))
            archive.writestr(folder.name(i), folder.read(i))
    names = dict(vars(source))
    exec(own + zipped + line, names)
    monkeypatch.setattr(source, "SOURCES", names["SOURCES"])
    database, archive = open_source(names["Database"]("photos.db")), open_source("photos.zip")
    assert archive.classes == folder.classes and [archive.name(i) for i in range(12)] == [
        folder.name(i) for i in range(12)
    ]
    for opened in (database, archive):
        assert opened.labels.tolist() == folder.labels.tolist()
        loader = TorchLoader(opened, SPECS, Order(samples=12, batch=4, stop=3), Budget(workers=2))
        for crops, expected in zip(loader, loaded("torch", folder, seed=0, stop=3), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(crops.views, expected.views, strict=True))
            assert torch.equal(crops.labels, expected.labels)
    assert check_data(CheckDataOptions("photos.zip"))["skipped"] == []
    assert np.array_equal(np.asarray(decode_named("photos.zip", folder.name(5))), np.asarray(decode(folder, 5)))
