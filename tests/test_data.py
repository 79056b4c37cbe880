"""Folders of any images, recipes as data, and parameters that depend on (seed, epoch, sample, view) alone."""

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from images import make_folder

from fastjem.kernels.augment import columns as column

pytest.importorskip("torchvision")
from PIL import Image

from fastjem.data import shapes
from fastjem.data.batch import finish
from fastjem.data.loaders import Budget, Order
from fastjem.data.loaders.torch import TorchLoader, crop
from fastjem.data.parameters import Parameters
from fastjem.data.philox import philox
from fastjem.data.source import Source, decode, open_source, to_image
from fastjem.data.views import RECIPES, Views, ViewSpec
from fastjem.errors import UserError


def loaded(source: Source, specs: list[ViewSpec], workers: int = 0, **order) -> TorchLoader:
    return TorchLoader(source, specs, Order(samples=len(source), **order), Budget(workers=workers))


def batches(source: Source, **options) -> list:
    specs = Views(large=2, small=1, recipe="dino").specs(16)
    return list(loaded(source, specs, **{"batch": 8, "stop": 9, "seed": 3, **options}))


def test_views_depend_on_nothing_but_their_key(tmp_path: Path) -> None:
    folder = open_source(make_folder(tmp_path, 32))
    whole = batches(folder)
    late = batches(folder, start=5, workers=1)
    for one, other in zip(whole[5:], late, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one.views, other.views, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(one.tables, other.tables, strict=True))
    ranks = [batches(folder, rank=rank, ranks=2) for rank in range(2)]
    for i, one in enumerate(whole):
        for view, pixels in enumerate(one.views):
            assert torch.equal(pixels, torch.cat([ranks[0][i].views[view], ranks[1][i].views[view]]))
    # another epoch and another seed are other views
    assert not torch.equal(whole[0].views[0], whole[4].views[0])
    assert not torch.equal(whole[0].views[0], batches(folder, seed=4)[0].views[0])
    assert [tuple(view.shape) for view in whole[0].views] == [(8, 16, 16, 3), (8, 16, 16, 3), (8, 7, 7, 3)]


def test_every_epoch_has_every_image_once(tmp_path: Path) -> None:
    loader = loaded(open_source(make_folder(tmp_path, 24)), [ViewSpec(size=8)], batch=8, stop=6, seed=1)
    keys = [key for batch in loader.loader.sampler for key in batch]
    for epoch in range(2):
        assert sorted(sample for e, sample in keys if e == epoch) == list(range(24))
    assert [s for e, s in keys if e == 0] != [s for e, s in keys if e == 1]


def test_philox_is_philox() -> None:
    """The known answers of Random123, Philox4x32-10."""
    for counter, seed, expected in (
        (0, 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (2**32 - 1, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ):
        found = philox([np.array([counter])] * 4, seed)[:, 0]
        assert (found * 2**32 - 0.5).astype(np.uint64).tolist() == list(expected)


N = 20_000


def within(share: float, expected: float) -> bool:
    """Four standard deviations of a share of N."""
    return abs(share - expected) <= 4 * np.sqrt(expected * (1 - expected) / N)


@pytest.mark.parametrize("recipe", RECIPES)
def test_probabilities_and_ranges(recipe: str) -> None:
    specs = Views(large=2, small=1, recipe=recipe).specs(224)
    for spec, p in zip(specs, Parameters(specs)(5, 2, np.arange(N), 400, 500), strict=True):
        jittered = (p[:, column.BRIGHTNESS : column.ORDER] != [1, 1, 1, 0]).any(1)
        for found, expected in (
            (p[:, column.FLIP], spec.flip),
            (jittered, spec.jitter_probability),
            (p[:, column.GRAYSCALE], spec.grayscale),
            (p[:, column.SIGMA] > 0, spec.blur),
            (p[:, column.SOLARIZE], spec.solarize),
        ):
            assert within(found.mean(), expected)
        on = p[jittered]
        for i, strength in enumerate(spec.jitter if len(on) else ()):  # uniform over its range: ends and mean
            centre, drawn = (0 if i == 3 else 1), on[:, column.BRIGHTNESS + i]
            assert np.abs(drawn - centre).max() <= strength + 1e-6
            assert drawn.min() < centre - 0.99 * strength and drawn.max() > centre + 0.99 * strength
            assert abs(drawn.mean() - centre) < 4 * strength / np.sqrt(3 * len(on))
        if len(on):
            assert all(within(share, 1 / 24) for share in np.bincount(p[:, column.ORDER].astype(int)) / N)
        sigmas = p[p[:, column.SIGMA] > 0, column.SIGMA]
        assert not len(sigmas) or (0.1 <= sigmas.min() < 0.12 and 1.98 < sigmas.max() <= 2)


def test_windows_are_torchvisions() -> None:
    """Distributions of area, aspect and place against RandomResizedCrop's, and the fallback of a long image."""
    from scipy.stats import ks_2samp
    from torchvision.transforms.v2 import RandomResizedCrop

    torch.manual_seed(0)
    spec, image = ViewSpec(scale=(0.08, 1.0)), torch.empty(3, 400, 500)
    draw = RandomResizedCrop(224, spec.scale, spec.ratio).make_params
    theirs = np.array(
        [[p[k] for k in ("top", "left", "height", "width")] for p in (draw([image]) for _ in range(4000))]
    )
    ours = Parameters([spec])(0, 0, np.arange(N), 400, 500)[0, :, : column.WIDTH + 1]
    for figure in (lambda x: x[:, 2] * x[:, 3], lambda x: x[:, 3] / x[:, 2], lambda x: x[:, 0], lambda x: x[:, 1]):
        assert ks_2samp(figure(ours), figure(theirs)).pvalue > 1e-4
    assert (ours[:, 0] + ours[:, 2] <= 400).all() and (ours[:, 1] + ours[:, 3] <= 500).all() and ours[:, 2:].min() > 0
    long = Parameters([replace(spec, scale=(1.0, 1.0))])(0, 0, np.arange(4), [40, 400, 100, 1], [400, 40, 100, 1])[0]
    boxes = long[:, : column.WIDTH + 1].astype(int).tolist()
    assert boxes[:2] == [[0, 173, 40, 53], [173, 0, 53, 40]] and boxes[3] == [0, 0, 1, 1]


def test_a_table_is_its_key_s() -> None:
    specs = Views(large=2, small=1, recipe="dino").specs(96)
    draw, samples = Parameters(specs), np.array([7, 2**33 + 1, 0])
    table = draw(3, 9, samples, [50, 60, 70], [80, 40, 70])
    for i, sample in enumerate(samples):
        alone = draw(3, 9, sample, (50, 60, 70)[i], (80, 40, 70)[i])
        assert np.array_equal(alone[:, 0], table[:, i])
    assert not np.array_equal(table, draw(4, 9, samples, [50, 60, 70], [80, 40, 70]))
    assert not np.array_equal(table, draw(3, 8, samples, [50, 60, 70], [80, 40, 70]))
    assert len(np.unique(table[:, :, column.FLIP :].reshape(9, -1), axis=0)) == 9


@pytest.mark.parametrize("bicubic", [False, True])
def test_a_crop_is_torchvisions(bicubic: bool) -> None:
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.v2 import functional as V

    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8))
    spec = ViewSpec(size=24, bicubic=bicubic)
    for row in Parameters([spec])(0, 0, np.arange(8), 60, 90)[0]:
        mode = InterpolationMode.BICUBIC if bicubic else InterpolationMode.BILINEAR
        expected = V.resized_crop(image, *(int(x) for x in row[: column.WIDTH + 1]), [24, 24], mode, antialias=True)
        assert np.array_equal(crop(image, spec, row), np.asarray(expected))


def test_views_reach_the_encoder_normalised(tmp_path: Path) -> None:
    """Without any colour step the views are the crops, by the recipe's mean and deviation."""
    changes = {"jitter_probability": 0, "grayscale": 0, "flip": 0, "large.solarize": 0, "blur": 0, "small.std": "1,1,1"}
    specs = Views(large=2, small=1, recipe="dino").specs(16, changes=changes)
    (batch,) = loaded(open_source(make_folder(tmp_path, 4)), specs, batch=4, stop=1)
    for spec, pixels, view in zip(specs, batch.views, finish(batch, specs, "cpu").views, strict=True):
        mean, std = (torch.tensor(x).view(3, 1, 1) for x in (spec.mean, spec.std))
        assert torch.allclose(view, (pixels.permute(0, 3, 1, 2) / 255 - mean) / std, atol=1e-5)
    assert specs[2].std == (1, 1, 1) != specs[0].std


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"flop": 0.1}, "no field of a view 'flop'; did you mean .*flip"),
        ({"tiny.flip": 0}, "no field of a view 'tiny.flip'"),
        ({"size": 3}, "no field of a view 'size'"),
        ({"scale": 0.3}, "a view's scale must be like 0.08,1.0, got 0.3"),
        ({"scale": "0.5,0.1"}, "scale must be like"),
        ({"flip": 1.5}, "flip must be like 0.5, got 1.5"),
        ({"bicubic": 1}, "bicubic must be like False"),
        ({"jitter": "a,b,c,d"}, "jitter must be like"),
    ],
)
def test_changes_that_make_no_sense(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Views().specs(32, changes=changes)
    with pytest.raises(UserError, match=r"no recipe 'dinov3'; did you mean dinov2"):
        Views(recipe="dinov3").specs(32)


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
    pixels = np.asarray(to_image((tmp_path / f"x.{ending}").read_bytes()))
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
    assert to_image((tmp_path / "x.jpg").read_bytes()).size == (10, 20)


def test_every_ending_and_no_other(tmp_path: Path) -> None:
    for i, ending in enumerate(("jpg", "JPEG", "png", "webp", "bmp", "tif", "TIFF")):
        Image.new("RGB", (8, 8), (i * 30,) * 3).save(tmp_path / f"{i}.{ending}")
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "._0.jpg").write_text("x")
    (tmp_path / "again").symlink_to(tmp_path)  # a loop
    folder = open_source(tmp_path)
    assert len(folder) == 7 and folder.labels is None
    assert [decode(folder, i).getpixel((0, 0))[0] // 28 for i in range(7)] == list(range(7))


def test_empty_and_missing_folders(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no images; files ending in .jpg .* .tiff"):
        open_source(tmp_path)
    with pytest.raises(UserError, match="not a folder"):
        open_source(tmp_path / "nowhere")


def test_broken_files_are_named_and_replaced(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, 12, classes=0)
    whole = (folder / "0003.png").read_bytes()
    (folder / "0003.png").write_bytes(whole[: len(whole) // 2])
    (folder / "0007.png").write_bytes(b"")
    (folder / "0011.png").write_text("no image at all")
    loader = loaded(open_source(folder), [ViewSpec(size=8)], batch=12, stop=1)
    (batch,) = loader
    assert batch.views[0].shape == (12, 8, 8, 3)
    assert sorted(Path(path).name for path, _ in batch.unreadable) == ["0003.png", "0007.png", "0011.png"]
    assert all(reason for _, reason in batch.unreadable)


def test_a_batch_holds_few_large_images_at_a_time(tmp_path: Path, monkeypatch) -> None:
    """The same batch, in parts: 256 photographs of 12 megapixels would take 12 GiB together."""
    folder = make_folder(tmp_path, 9, classes=0)
    (folder / "0003.png").write_bytes(b"")
    (whole,) = batches(open_source(folder), batch=9, stop=1)
    monkeypatch.setattr("fastjem.data.loaders.torch.HELD", 2 * 24 * 24 * 3)
    (parts,) = batches(open_source(folder), batch=9, stop=1)
    assert torch.equal(whole.index, parts.index) and whole.unreadable == parts.unreadable
    for one, other in zip(whole.views + whole.tables, parts.views + parts.tables, strict=True):
        assert torch.equal(one, other)


def test_no_readable_file_at_all(tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_text("x")
    with pytest.raises(UserError, match="none of the files can be read"):
        list(loaded(open_source(tmp_path), [ViewSpec(size=8)], batch=2, stop=1))


@pytest.mark.exhaustive
def test_a_hundred_thousand_files_are_listed_in_seconds(tmp_path: Path) -> None:
    for i in range(100):
        (tmp_path / f"{i:03}").mkdir()
        for j in range(1000):
            (tmp_path / f"{i:03}" / f"{j}.jpg").touch()
    begin = time.perf_counter()
    assert len(open_source(tmp_path)) == 100_000
    assert time.perf_counter() - begin < 20  # 1 s on an idle machine


def test_knn() -> None:
    from fastjem.probes import knn

    bank = torch.tensor([[1.0, 0.1], [1.0, -0.1], [0.0, 2.0], [0.1, 3.0]])
    found = knn(bank, torch.tensor([0, 0, 1, 1]), torch.tensor([[5.0, 0.2], [0.3, 0.9]]), k=3)
    assert found.tolist() == [0, 1]


def test_no_place_for_the_embedded_data_set_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"can't be written \(Not a directory\): XDG_CACHE_HOME"):
        shapes.folder()
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: Path("").expanduser() / Path("~nobody-of-that-name").expanduser())
    with pytest.raises(UserError, match="can't be written"):
        shapes.folder()
