"""Images held in memory: what is read, what a budget refuses, and that views depend on nothing but their key."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from images import make_folder
from PIL import Image
from view_tables import pictures

import fastjem.functional as F
from fastjem.data.levels import Levels
from fastjem.data.loaders import Budget, Order, TorchLoader, choose, create
from fastjem.data.loaders.memory import ImageArray, MemoryLoader, are_small, size_in_memory
from fastjem.data.parameters import Parameters
from fastjem.data.size import Size, height_and_width
from fastjem.data.source import Levelled, Source, decode, open_source
from fastjem.data.views import Views, ViewSpec
from fastjem.errors import UserError

SPECS = [ViewSpec(size=12), ViewSpec(size=12, bicubic=True), ViewSpec(size=6)]


def test_a_folder_is_held_as_its_pixels(tmp_path):
    make_folder(tmp_path, images=10, classes=2, size=24)
    (tmp_path / "class1" / "broken.png").write_bytes(b"\x89PNG")
    array = ImageArray.from_source(open_source(tmp_path), size=24, threads=2)
    files = sorted(p for p in tmp_path.rglob("*.png") if p.name != "broken.png")
    assert len(array) == 10 and array.classes == ["class0", "class1"]
    for image, label, path in zip(array.images, array.labels, files, strict=True):
        assert np.array_equal(image.numpy(), np.asarray(Image.open(path))) and path.parent.name == f"class{label}"
    ((path, reason),) = array.unreadable
    assert path.endswith("broken.png") and reason
    Image.new("RGB", (50, 24), (0, 0, 255)).save(tmp_path / "class0" / "wide.png")
    small = ImageArray.from_source(open_source(tmp_path), size=16)
    assert small.images.shape == (11, 16, 16, 3) and (small.images == torch.tensor([0, 0, 255])).all(3).any()


def test_no_single_file_decides_about_the_size(tmp_path):
    make_folder(tmp_path, images=8, classes=2, size=30)
    Image.new("RGB", (4, 4)).save(tmp_path / "class0" / "0.png")
    Image.new("RGB", (900, 3)).save(tmp_path / "class0" / "1.png")
    (tmp_path / "class0" / "2.png").write_bytes(b"")
    source = open_source(tmp_path)
    order = Order(samples=len(source), batch=4, stop=1)
    loader = create("memory", source, [ViewSpec(size=28)], order, Budget())
    assert loader.array.images.shape == (10, 30, 30, 3)
    assert size_in_memory(source, [ViewSpec(size=14)]) == 16  # 8/7 of the views, where images are larger


@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "tif"])
def test_images_that_exif_turns_are_held_as_large_as_they_are_shown(tmp_path: Path, kind: str) -> None:
    """A header has the size before an image is turned, which would have been held with half of its sides."""
    exif = Image.Exif()
    exif[0x0112] = 6
    for i in range(4):
        pixels = np.random.default_rng(i).integers(0, 256, (32, 64, 3), np.uint8)  # shown with 64 rows
        Image.fromarray(pixels).save(tmp_path / f"{i}.{kind}", exif=exif)
    source = open_source(tmp_path)
    tall = [ViewSpec(size=(64, 32))]
    assert size_in_memory(source, tall) == (64, 32)
    assert are_small(source, tall, 1)
    assert not are_small(source, [ViewSpec(size=(32, 64))], 1)


def test_a_broken_file_is_replaced_by_the_next(tmp_path):
    """Also where a batch is as large as the data, and on every rank the same."""
    make_folder(tmp_path, images=8, classes=0, size=14)
    (tmp_path / "0003.png").write_bytes(b"")
    source = open_source(tmp_path)
    (crops,) = create("memory", source, SPECS, Order(samples=8, batch=8, stop=1, seed=2), Budget())
    assert sorted(crops.index.tolist()) == [0, 1, 2, 4, 4, 5, 6, 7]
    (theirs,) = create("torch", source, SPECS, Order(samples=8, batch=8, stop=1, seed=2), Budget())
    assert torch.equal(crops.index, theirs.index) and crops.unreadable == theirs.unreadable
    for one, other in zip(crops.views + crops.tables, theirs.views + theirs.tables, strict=True):
        assert (one.float() - other.float()).abs().max() <= 1
    index = []
    for rank in range(2):
        order = Order(samples=8, batch=8, stop=1, seed=2, ranks=2, rank=rank)
        (half,) = create("memory", source, SPECS, order, Budget())
        index.append(half.index)
    assert torch.equal(torch.cat(index), crops.index)


def test_a_budget_refuses_with_what_would_fit(tmp_path):
    make_folder(tmp_path, images=4, classes=0, size=24)
    with pytest.raises(UserError, match=r"4 images of 24 x 24 take .* GiB; 16 x 16 would fit"):
        ImageArray.from_source(open_source(tmp_path), size=24, budget=4 * 3 * 16 * 16)
    assert len(ImageArray.from_source(open_source(tmp_path), size=16, budget=4 * 3 * 16 * 16)) == 4


def test_arrays_and_files_of_arrays(tmp_path):
    images, labels = pictures(5, 8, 9), torch.arange(5)
    np.savez(tmp_path / "a.npz", images=images.numpy(), labels=labels.numpy()[:, None])
    np.save(tmp_path / "b.npy", images.permute(0, 3, 1, 2).numpy())
    a, b = ImageArray.from_npz(tmp_path / "a.npz"), ImageArray.from_npz(tmp_path / "b.npy")
    assert torch.equal(a.images, images) and torch.equal(b.images, images)
    assert torch.equal(a.labels, labels) and b.labels is None
    np.savez(tmp_path / "c.npz", pixels=images.numpy())
    with pytest.raises(UserError, match=r"must hold an array `images`.*pixels"):
        ImageArray.from_npz(tmp_path / "c.npz")
    with pytest.raises(ValueError, match=r"ImageArray: images must be .* got \(5, 8, 9, 3\) torch.float64"):
        ImageArray(images.double())
    with pytest.raises(ValueError, match=r"ImageArray: labels must be \[5\], got \(4,\)"):
        ImageArray(images, labels[:4])


def test_views_are_the_tables_carried_out():
    array, indices = ImageArray(pictures(6, 20, 24)), torch.tensor([3, 0, 3])
    drawn = list(torch.from_numpy(Parameters(SPECS)(3, 0, indices.numpy(), 20, 24)))
    views = array.views(indices, drawn, SPECS)
    assert [tuple(x.shape) for x in views] == [(3, 3, 12, 12)] * 2 + [(3, 3, 6, 6)]
    top, left, height, width = drawn[0][1, :4].int().tolist()
    window = array.images[:1, top : top + height, left : left + width].permute(0, 3, 1, 2)
    crop = torch.nn.functional.interpolate(window, (12, 12), mode="bilinear", antialias=True).permute(0, 2, 3, 1)
    expected = F.augment(crop, drawn[0][1:2], mean=SPECS[0].mean, std=SPECS[0].std)
    assert ((views[0][1] - expected[0]).abs() * 58).mean() < 0.3  # levels; a level's difference in the crop at most


def test_batches_ranks_and_resuming_leave_a_sample_its_views():
    array = ImageArray(pictures(9, 16, 16), torch.arange(9))

    def loaded(**options) -> dict[tuple[int, int], list[torch.Tensor]]:
        found, loader = {}, MemoryLoader(array, SPECS, Order(samples=9, seed=3, **options))
        for keys, crops in zip(loader.order, loader, strict=True):
            assert len(crops.views[0]) == len(keys) and not crops.unreadable
            for i, key in enumerate(keys):
                found[key] = [x[i] for x in (*crops.views, *crops.tables)]
        return found

    whole = loaded(batch=4, stop=2)  # an epoch: 8 of 9 images
    assert len(whole) == 8 and len({sample for _, sample in whole}) == 8
    parts = {
        **loaded(batch=4, start=1, stop=2),
        **loaded(batch=4, stop=1, ranks=2, rank=1),
        **loaded(batch=4, stop=1, ranks=2),
    }
    assert parts.keys() == whole.keys()
    halves = loaded(batch=2, stop=4)
    assert halves.keys() == whole.keys()
    for other in (parts, halves):
        assert all(torch.equal(a, b) for key in whole for a, b in zip(whole[key], other[key], strict=True))
    with pytest.raises(ValueError, match="MemoryLoader: batch must divide by 2 ranks and be at most 9 images, got 5"):
        MemoryLoader(array, SPECS, Order(samples=9, batch=5, stop=1, ranks=2))


def test_a_file_of_arrays_is_a_folder(tmp_path):
    """Every loader's views of it, its labels and names; what is wrong with one is said."""
    images, path = pictures(12, 16, 16), tmp_path / "a.npz"
    labels, names = np.array([2, 0, 0] * 4), np.array(["ant", "bee", "cat"])
    np.savez(path, images=images.numpy(), labels=labels, classes=names)
    folder = open_source(path)
    assert (len(folder), folder.classes, folder.labels.tolist()) == (12, ["ant", "cat"], [1, 0, 0] * 4)
    assert np.array_equal(np.asarray(decode(folder, 11)), images[11])
    order, specs = Order(samples=12, batch=4, seed=1, start=2, stop=5), [ViewSpec(size=16)]
    batches = []
    for name, memory in (("auto", 1), ("auto", 1e-9), ("torch", 1)):
        loader = create(name, folder, specs, order, Budget(memory=memory))
        assert ("held in memory" in loader.reads) == (memory == 1 and name == "auto")
        batches.append(list(loader))
    for one, other, third in zip(*batches, strict=True):
        assert torch.equal(other.views[0], third.views[0]) and torch.equal(one.tables[0], other.tables[0])
        assert (one.views[0].int() - other.views[0].int()).abs().max() <= 1
    np.savez(path, images=images.numpy()[:3])  # another version of the file is read again
    assert open_source(path).labels is None and len(open_source(path)) == 3
    for wrong, message in (
        ({"images": images.numpy(), "labels": labels[:3]}, r"labels must be \[12\] integers, got \(3,\) int64"),
        ({"images": images.numpy(), "labels": labels, "classes": names[:2]}, "labels must number the 2 classes"),
        ({"images": images.numpy() * 1j}, r"images must be .*, got \(12, 16, 16, 3\) complex128"),
    ):
        np.savez(path, **wrong)
        with pytest.raises(UserError, match=message):
            open_source(path)
    path.write_bytes(b"no archive")
    with pytest.raises(UserError, match=r"a.npz can't be read as .npz or .npy"):
        open_source(path)


def folder_of(path: Path, sizes: Sequence[tuple[int, int]]) -> Source:
    """PNG files of these widths and heights."""
    path.mkdir()
    rng = np.random.default_rng(0)
    for i, (width, height) in enumerate(sizes):
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path / f"{i:05d}.png")
    return open_source(path)


@pytest.mark.parametrize(
    ("sizes", "views", "held"),
    [
        ([(32, 32)] * 12, 32, True),
        ([(32, 32)] * 12, 28, True),  # 8/7 of the views
        ([(32, 32)] * 12, 27, False),  # larger than the views need: they would be shrunk
        ([(32, 32)] * 11 + [(32, 31)], 32, False),
        ([(32, 24)] * 12, 32, False),
        ([(97, 97)] * 12, 224, False),  # not small
    ],
)
def test_small_images_are_held_unasked(sizes, views, held, tmp_path):
    """With the same views as by Pillow; others are read as ever."""
    source = folder_of(tmp_path / "images", sizes)
    specs = Views(large=2, recipe="simclr").specs(views)
    order = Order(samples=12, batch=4, seed=1, stop=5)
    loader = create("auto", source, specs, order, Budget())
    assert ("held in memory" in loader.reads) == held
    for one, other in zip(loader, create("torch", source, specs, order, Budget()), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one.tables, other.tables, strict=True))
        assert torch.equal(one.index, other.index)
        for view, same in zip(one.views, other.views, strict=True):
            assert (view.int() - same.int()).abs().max() <= held  # Pillow rounds between its two passes


def test_one_image_of_another_size_among_small_ones(tmp_path, monkeypatch):
    """That nobody looked at before all are read: none is resized."""
    monkeypatch.setattr("fastjem.data.loaders.memory.SIZES", 4)
    source = folder_of(tmp_path / "images", [(32, 32)] * 10 + [(32, 40), (32, 32)])
    specs = [ViewSpec(size=32)]
    order = Order(samples=12, batch=4, stop=3)
    assert choose("auto", source, specs, Budget()) == "memory"
    assert isinstance(create("auto", source, specs, order, Budget()), TorchLoader)
    assert "held in memory" in create("memory", source, specs, order, Budget()).reads


def test_what_an_object_reads_is_not_held(tmp_path):
    """It may be another image each time."""
    folder = folder_of(tmp_path / "images", [(32, 32)] * 4)

    class Own:
        def __len__(self) -> int:
            return 4

        def read(self, i: int) -> bytes:
            return folder.read(i)

    assert choose("auto", open_source(Own()), [ViewSpec(size=32)], Budget()) == "torch"
    assert choose("auto", folder, [ViewSpec(size=32)], Budget(memory=1e-9)) == "torch"


@pytest.mark.parametrize(("channels", "size"), [(40, (16, 32)), (5, (3, 8)), (40, 32)])
def test_images_may_have_more_channels_than_rows(tmp_path: Path, channels: int, size: Size) -> None:
    """A source's images are [H, W, C] whatever the sides; which axis has the channels is asked of arrays of others."""
    tifffile = pytest.importorskip("tifffile")
    random = np.random.default_rng(0)
    for i in range(4):
        values = random.integers(0, 4096, (*height_and_width(size), channels)).astype(np.uint16)
        tifffile.imwrite(tmp_path / f"{i}.tif", values, photometric="minisblack", planarconfig="contig")
    source = Levelled(open_source(tmp_path), Levels(channels, "integer", (0, 4095)))
    array = ImageArray.from_source(source, size=size).to("cpu")
    assert array.images.shape == (4, *height_and_width(size), channels)
    assert np.array_equal(array.images[3].numpy(), np.asarray(decode(source, 3)))
