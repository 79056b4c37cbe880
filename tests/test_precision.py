"""Images that aren't 8-bit in three channels keep their values' precision, from a file to the encoder."""

import importlib.util
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from broken import broken_off, rows
from images import TINY
from PIL import Image

import fastjem
from fastjem.data import statistics
from fastjem.data.batch import finish
from fastjem.data.levels import Levels, levels_of, survey
from fastjem.data.loaders import Budget, Order, choose, create
from fastjem.data.loaders.memory import ImageArray, middle
from fastjem.data.picture import Bands
from fastjem.data.pixels import METADATA, Pixels, whole_image
from fastjem.data.source import Levelled, Source, decode, open_source
from fastjem.data.views import Views
from fastjem.errors import UserError
from fastjem.kernels.augment import reference

V = pytest.importorskip("torchvision.transforms.v2.functional")
DALI = ["dali-cpu"] if importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.dali") else []
UNCHANGED = {"flip": 0, "scale": "1,1", "ratio": "1,1", "jitter_probability": 0, "blur": 0}


def low_bits(root: Path, images: int = 12, side: int = 24) -> Path:
    """16-bit gray PNG files, two classes of waves in the lowest 6 bits: of 256 levels each has one or two."""
    y, x = np.mgrid[:side, :side]
    for i in range(images):
        wave = np.sin((x if i % 2 else y) * (0.6 + 0.05 * i)) * 31 + 32
        values = (32768 + wave).astype(np.uint16)
        values[0, 0], values[0, 1] = 0, 65535  # so that the range that is found is all 16 bits
        (root / f"class{i % 2}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(values).save(root / f"class{i % 2}" / f"{i:02}.png")
    return root


def five_bands(path: Path, images: int = 12, side: int = 24) -> Path:
    """Floats of 5 channels around 0.5 that vary by 1/1000: a quarter of a level."""
    waves = np.sin(np.arange(images * side * side * 5).reshape(images, side, side, 5) / 7)
    values = (0.5 + waves / 1000).astype(np.float32)
    values[:, 0, 0], values[:, 0, 1] = 0, 1
    if path.suffix == ".npz":
        np.savez(path, images=values, labels=np.arange(images) % 2)
        return path
    tifffile = pytest.importorskip("tifffile")
    for i, image in enumerate(values):
        (path / f"class{i % 2}").mkdir(parents=True, exist_ok=True)
        tifffile.imwrite(path / f"class{i % 2}" / f"{i:02}.tif", image, photometric="minisblack", planarconfig="contig")
    return path


def levelled(data: Path, channels: int) -> Levelled:
    source = open_source(data)
    return Levelled(source, levels_of(channels, None, survey(source, channels)))


def stored(source: Source, i: int, channels: int) -> np.ndarray:
    """[H, W, C] float64 from 0 to 1, without this package's decoding."""
    data = source.read(i)
    if isinstance(data, bytes) and data.startswith(b"\x89PNG"):
        gray = np.asarray(Image.open(io.BytesIO(data))).astype(np.float64) / 65535
        return np.repeat(gray[:, :, None], channels, 2)
    if isinstance(data, bytes):
        data = pytest.importorskip("tifffile").imread(io.BytesIO(data))
    return np.asarray(data, np.float64)


DATA = [("png", 1), ("png", 3), ("npz", 5), ("tif", 5)]


@pytest.fixture(params=DATA, ids=lambda param: f"{param[0]}-{param[1]}")
def given(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, int]:
    kind, channels = request.param
    if kind == "png":
        return low_bits(tmp_path / "images"), channels
    return five_bands(tmp_path / ("images.npz" if kind == "npz" else "images")), channels


@pytest.mark.parametrize("loader", ["torch", "memory", *DALI])
def test_views_have_all_that_the_values_tell(loader: str, given: tuple[Path, int]) -> None:
    """Whole images, unchanged: their values to float32's digits, where 8-bit levels have one number or two."""
    data, channels = given
    source = levelled(data, channels)
    changes = UNCHANGED | ({"grayscale": 0} if channels == 3 else {})
    specs = Views(large=1).specs(24, channels=channels, changes=changes)
    (crops,) = create(loader, source, specs, Order(samples=12, batch=12, stop=1), Budget())
    assert crops.views[0].dtype == torch.float32
    views = finish(crops, specs, "cpu").views[0].double()
    mean, std = (torch.tensor(x).double().view(-1, 1, 1) for x in (specs[0].mean, specs[0].std))
    for view, i in zip(views, crops.index.tolist(), strict=True):
        values = torch.from_numpy(stored(source, i, channels)).permute(2, 0, 1)
        assert (view - (values - mean) / std).abs().max() < 1e-5
        for seen, there in zip(view[:, 1:], values[:, 1:], strict=True):
            assert len((255 * there).round().unique()) <= 2 and len(seen.unique()) > 4


def test_the_loaders_views_are_float64s_in_every_step(given: tuple[Path, int]) -> None:
    """Windows, colours and blur of a recipe: torch and memory to the bit, and the specification in float64."""
    data, channels = given
    source = levelled(data, channels)
    specs = Views(large=2, recipe="byol").specs(21, channels=channels, blur=True)
    order = Order(samples=12, batch=6, seed=3, stop=3)
    budget = Budget()
    held = [list(create(name, source, specs, order, budget)) for name in ("torch", "memory")]
    for one, other in zip(*held, strict=True):
        assert torch.equal(one.index, other.index)
        assert all(torch.equal(a, b) for a, b in zip(one.views + one.tables, other.views + other.tables, strict=True))
        for view, table, spec, crop in zip(finish(one, specs, "cpu").views, one.tables, specs, one.views, strict=True):
            wide = table.double()
            images = np.stack([stored(source, i, channels) for i in one.index.tolist()]) * 255
            true = reference.crop_resize(
                torch.from_numpy(images).float(), torch.arange(6), wide, (21, 21), spec.bicubic
            )  # fmt: skip
            assert (crop - true).abs().max() < 1e-3
            expected = reference.augment(
                true, wide, list(spec.mean), list(spec.std), torch.float64, False, False, 128.0
            )  # fmt: skip
            off = (view - expected).abs()
            assert off.flatten(1).quantile(0.999, 1).max() < 1e-3 / min(spec.std)  # solarizing jumps, at 128
    if DALI:
        for one, other in zip(held[0], create("dali-cpu", source, specs, order, budget), strict=True):
            assert torch.equal(one.index, other.index)
            inner = (slice(None), slice(4, -4), slice(4, -4))  # DALI repeats the edge of a window
            for a, b in zip(one.views, other.views, strict=True):
                assert (a[inner] - b[inner]).abs().max() < 0.02


def test_whole_images_are_float64s(given: tuple[Path, int]) -> None:
    """As evaluation sees them, smaller and larger; and the square that memory holds of an image of another size."""
    data, channels = given
    source = levelled(data, channels)
    for side in (10, 24, 33):
        found = whole_image(decode(source, 2), side)
        true = torch.from_numpy(stored(source, 2, channels)).permute(2, 0, 1) * 255
        true = torch.nn.functional.interpolate(true[None], (side, side), mode="bilinear", antialias=True)[0]
        assert found.dtype == torch.float32 and (found - true).abs().max() < 1e-3
    image = decode(source, 2)
    assert isinstance(image, Bands)
    wide = Bands(np.concatenate([image.values, image.values[:, :6]], 1), image.channels)
    square = torch.from_numpy(np.array(wide)).double().permute(2, 0, 1)[None, :, :, 3:27]
    true = torch.nn.functional.interpolate(square, (12, 12), mode="bicubic", antialias=True)[0].permute(1, 2, 0)
    found = middle(wide, 12)
    off = np.abs(found - true.numpy())[:, 2:-2]  # Pillow's filter reaches over the sides of what it is to resize
    assert found.dtype == np.float32 and off.max() < 1e-3


def test_what_is_measured_is_the_values_own(given: tuple[Path, int]) -> None:
    data, channels = given
    source = levelled(data, channels)
    values = np.stack([stored(source, i, channels) for i in range(12)])
    mean, std, count = statistics.measured(source)
    assert count == 12 and len(mean) == len(std) == channels
    np.testing.assert_allclose(mean, values.mean((0, 1, 2)), rtol=1e-7)
    np.testing.assert_allclose(std, np.maximum(values.std((0, 1, 2)), 1 / 255), rtol=1e-5)


def test_memory_counts_four_bytes_a_value(given: tuple[Path, int]) -> None:
    data, channels = given
    source = levelled(data, channels)
    needed = 12 * 24 * 24 * channels * 4
    assert ImageArray.from_source(source, size=24, budget=needed).images.dtype == torch.float32
    with pytest.raises(UserError, match=r"12 images of 24 x 24 take .* GiB; 23 x 23 would fit"):
        ImageArray.from_source(source, size=24, budget=needed - 1)
    specs = Views(large=1).specs(24, channels=channels)
    held = [choose("auto", source, specs, Budget(memory=needed * share / 2**30)) for share in (1.01, 0.99)]
    assert held == ["memory", "torch"]


def test_gray_of_many_bits_is_held_once_for_its_three_colours(tmp_path: Path) -> None:
    image = decode(levelled(low_bits(tmp_path), 3), 0)
    assert isinstance(image, Bands) and image.values.shape == (24, 24, 1) and np.asarray(image).shape == (24, 24, 3)


def test_pictures_of_8_bits_beside_deep_ones_are_floats_too(tmp_path: Path) -> None:
    """One rule for a data set, so that a batch has one dtype."""
    low_bits(tmp_path, 4)
    colours = np.random.default_rng(0).integers(0, 256, (24, 24, 3), np.uint8)
    Image.fromarray(colours).save(tmp_path / "class0" / "a.png")
    source = levelled(tmp_path, 3)
    images = [decode(source, i) for i in range(5)]
    assert all(isinstance(image, Bands) for image in images)
    assert any(np.array_equal(np.asarray(image), colours) for image in images)


def test_normalised_floats() -> None:
    """By the range of the values; beyond it they are black or white."""
    images = torch.rand(4, 5, 9, 8) * 4095
    images[0, 0, 0, :3] = torch.tensor([-7.0, 5000.0, float("nan")])
    pixels = Pixels(8, (0.1, 0.2, 0.3, 0.4, 0.5), (1, 2, 3, 4, 5), 5, (0, 4095), "integer")
    mean, std = (torch.tensor(x).view(5, 1, 1).double() for x in (pixels.mean, pixels.std))
    expected = (images.double().nan_to_num(0).clamp(0, 4095) / 4095 - mean) / std
    for last in (False, True):
        found = pixels.normalise(images, "cpu", channels_last=last)
        assert found.dtype == torch.float32 and (found - expected).abs().max() < 1e-6
        assert found.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def test_what_was_saved_before_is_read() -> None:
    """The pixels of a run of a time when images of 16 bits became 8-bit levels: the same rule for values."""
    written = (
        '{"size": 24, "mean": [0.5], "std": [0.25], "channels": 1, "value_range": [0.0, 65535.0], "values": "integer"}'
    )
    pixels = Pixels.from_metadata({METADATA: written})
    assert pixels == Pixels(24, (0.5,), (0.25,), 1, (0, 65535), "integer")
    assert pixels.levels == Levels(1, "integer", (0, 65535)) and json.loads(pixels.to_metadata()[METADATA])


RUNS = [("tif", 5, "torch"), ("png", 1, "memory"), *(("png", channels, "dali-cpu") for channels in (1, 3) if DALI)]


@pytest.mark.parametrize("kind, channels, loader", RUNS)
def test_a_run_and_what_is_made_of_it(kind: str, channels: int, loader: str, tmp_path: Path, capsys) -> None:
    """Pretrain, resume, evaluate, report, check-data; one that was broken off has the losses of one that wasn't."""
    pytest.importorskip("timm")
    from fastjem.cli import main
    from fastjem.commands.evaluate import EvaluateOptions, evaluate
    from fastjem.runs import open_run

    out = tmp_path
    data = low_bits(out / "images") if kind == "png" else five_bands(out / "images")
    common = {**TINY, "batch_size": 6, "channels": channels, "image_size": 16, "loader": loader, "data": str(data)}
    common |= {"max_steps": 5, "checkpoint_steps": 2}
    fastjem.pretrain(out=str(out / "whole"), **common)
    broken_off(3, out=str(out / "cut"), **common)
    fastjem.pretrain(out=str(out / "cut"), resume=True, **common)
    assert rows(out / "cut") == rows(out / "whole") and len(rows(out / "cut")) == 5
    pixels = open_run(out / "whole").pixels
    assert pixels.levels == Levels(channels, *(("integer", (0, 65535)) if kind == "png" else ("float", (0, 1))))
    found = evaluate(EvaluateOptions(str(out / "whole" / "encoder.safetensors"), train=str(data), workers=0))
    assert 0 <= found["features"]["encoder"]["knn"] <= 1
    main(["report", str(out / "whole")])
    assert (out / "whole" / "report.html").stat().st_size > 1000
    capsys.readouterr()
    assert main(["check-data", str(data), "--channels", str(channels), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["channels"] == channels and said["files"] == 12 and said["outside"] == 0
    encoder = fastjem.load_encoder(out / "whole" / "encoder.safetensors")
    source = levelled(data, channels)
    prepared = encoder.prepare(source.read(3))
    expected = pixels.decoded.normalise(whole_image(decode(source, 3), 16)[None], "cpu")
    assert torch.equal(prepared, expected) and len(prepared[0, 0, 1:].unique()) > 4
