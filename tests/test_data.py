"""Folders of any images, recipes as data, and parameters that depend on (seed, epoch, sample, view) alone."""

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from images import make_folder

pytest.importorskip("torchvision")
from PIL import Image

from fastjem.data.folder import ImageFolder, read_image
from fastjem.data.loader import ViewLoader
from fastjem.data.parameters import draw, generator
from fastjem.data.views import RECIPES, Views, ViewSpec
from fastjem.errors import UserError


def batches(folder: ImageFolder, **options) -> list:
    specs = Views(large=2, small=1, recipe="dino").specs(16)
    return list(ViewLoader(folder, specs, **{"batch": 8, "stop": 9, "seed": 3, **options}))


def test_views_depend_on_nothing_but_their_key(tmp_path: Path) -> None:
    folder = ImageFolder(make_folder(tmp_path, 32))
    whole = batches(folder)
    late = batches(folder, start=5, workers=1)
    for one, other in zip(whole[5:], late, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one.views, other.views, strict=True))
    ranks = [batches(folder, rank=rank, ranks=2) for rank in range(2)]
    for i, one in enumerate(whole):
        for view, pixels in enumerate(one.views):
            assert torch.equal(pixels, torch.cat([ranks[0][i].views[view], ranks[1][i].views[view]]))
    # another epoch and another seed are other views
    assert not torch.equal(whole[0].views[0], whole[4].views[0])
    assert not torch.equal(whole[0].views[0], batches(folder, seed=4)[0].views[0])
    assert [view.shape[-1] for view in whole[0].views] == [16, 16, 7]


def test_every_epoch_has_every_image_once(tmp_path: Path) -> None:
    loader = ViewLoader(ImageFolder(make_folder(tmp_path, 24)), [ViewSpec(size=8)], batch=8, stop=6, seed=1)
    keys = [key for batch in loader.loader.batch_sampler for key in batch]
    for epoch in range(2):
        assert sorted(sample for e, sample in keys if e == epoch) == list(range(24))
    assert [s for e, s in keys if e == 0] != [s for e, s in keys if e == 1]


def test_probabilities_and_ranges() -> None:
    spec = replace(RECIPES["byol"].large[1], size=224)
    drawn = [draw(spec, 400, 500, generator(0, 0, i, 1)) for i in range(4000)]
    for share, expected in (
        (np.mean([p.flip for p in drawn]), 0.5),
        (np.mean([bool(p.jitter) for p in drawn]), 0.8),
        (np.mean([p.grayscale for p in drawn]), 0.2),
        (np.mean([p.sigma is not None for p in drawn]), 0.1),
        (np.mean([p.solarize for p in drawn]), 0.2),
    ):
        assert abs(share - expected) < 4 * np.sqrt(expected * (1 - expected) / len(drawn))
    hues = [value for p in drawn for name, value in p.jitter if name == "hue"]
    assert -0.1 <= min(hues) < -0.09 and 0.09 < max(hues) <= 0.1
    assert len({tuple(name for name, _ in p.jitter) for p in drawn}) == 25  # 24 orders, and none
    areas = np.array([p.box[2] * p.box[3] for p in drawn]) / (400 * 500)
    assert areas.min() > 0.079 and areas.max() <= 1
    assert all(t + h <= 400 and left + w <= 500 for t, left, h, w in (p.box for p in drawn))


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "RGBA", "LA", "1", "I;16", "F"])
def test_any_mode_becomes_the_same_grey(mode: str, tmp_path: Path) -> None:
    grey = 200
    if mode == "I;16":
        image = Image.fromarray(np.full((9, 7), grey * 257, np.uint16))
    elif mode == "F":
        image = Image.fromarray(np.full((9, 7), grey, np.float32))
    else:
        image = Image.new("RGB", (7, 9), (grey,) * 3)
        image = image.quantize(4) if mode == "P" else image.convert(mode)
    ending = {"CMYK": "jpg", "F": "tiff"}.get(mode, "png")
    image.save(tmp_path / f"x.{ending}")
    pixels = np.asarray(read_image(str(tmp_path / f"x.{ending}")))
    assert pixels.shape == (9, 7, 3)
    if mode == "1":  # dithered: black and white
        assert set(np.unique(pixels)) <= {0, 255}
    else:
        assert np.abs(pixels.astype(int) - grey).max() <= 3


def test_exif_rotation(tmp_path: Path) -> None:
    image = Image.new("RGB", (20, 10))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "x.jpg", exif=exif)
    assert read_image(str(tmp_path / "x.jpg")).size == (10, 20)


def test_every_ending_and_no_other(tmp_path: Path) -> None:
    for i, ending in enumerate(("jpg", "JPEG", "png", "webp", "bmp", "tif", "TIFF")):
        Image.new("RGB", (8, 8), (i * 30,) * 3).save(tmp_path / f"{i}.{ending}")
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "._0.jpg").write_text("x")
    (tmp_path / "again").symlink_to(tmp_path)  # a loop
    folder = ImageFolder(tmp_path)
    assert len(folder) == 7 and folder.classes == [""]
    assert [folder.image(i).getpixel((0, 0))[0] // 28 for i in range(7)] == list(range(7))


def test_empty_and_missing_folders(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no images; files ending in .jpg .* .tiff"):
        ImageFolder(tmp_path)
    with pytest.raises(UserError, match="not a folder"):
        ImageFolder(tmp_path / "nowhere")


def test_broken_files_are_named_and_replaced(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, 12, classes=0)
    whole = (folder / "0003.png").read_bytes()
    (folder / "0003.png").write_bytes(whole[: len(whole) // 2])
    (folder / "0007.png").write_bytes(b"")
    (folder / "0011.png").write_text("no image at all")
    loader = ViewLoader(ImageFolder(folder), [ViewSpec(size=8)], batch=12, stop=1)
    (batch,) = loader
    assert batch.views[0].shape == (12, 3, 8, 8)
    assert sorted(Path(path).name for path, _ in batch.unreadable) == ["0003.png", "0007.png", "0011.png"]
    assert all(reason for _, reason in batch.unreadable)


def test_no_readable_file_at_all(tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_text("x")
    with pytest.raises(UserError, match="none of the files can be read"):
        list(ViewLoader(ImageFolder(tmp_path), [ViewSpec(size=8)], batch=2, stop=1))


@pytest.mark.slow
def test_a_hundred_thousand_files_are_listed_in_seconds(tmp_path: Path) -> None:
    for i in range(100):
        (tmp_path / f"{i:03}").mkdir()
        for j in range(1000):
            (tmp_path / f"{i:03}" / f"{j}.jpg").touch()
    begin = time.perf_counter()
    assert len(ImageFolder(tmp_path)) == 100_000
    assert time.perf_counter() - begin < 20  # 1 s on an idle machine


def test_knn() -> None:
    from fastjem.evaluate import knn

    bank = torch.tensor([[1.0, 0.1], [1.0, -0.1], [0.0, 2.0], [0.1, 3.0]])
    found = knn(bank, torch.tensor([0, 0, 1, 1]), torch.tensor([[5.0, 0.2], [0.3, 0.9]]), k=3)
    assert found.tolist() == [0, 1]
