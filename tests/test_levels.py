"""What values mean: one rule for a data set, and any number of channels from a file to the encoder."""

import io
import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from images import make_folder
from PIL import Image

import fastjem.functional as F
from fastjem.config import Config
from fastjem.data.batch import finish
from fastjem.data.levels import Levels, describe, levels_of, parsed_range, range_of, survey, to_levels
from fastjem.data.loaders import Budget, Order, create
from fastjem.data.parameters import Parameters
from fastjem.data.picture import Bands, shown, to_image
from fastjem.data.pixels import Pixels, whole_image, whole_images
from fastjem.data.source import Levelled, decode, open_source
from fastjem.data.views import Views, ViewSpec
from fastjem.errors import UserError
from fastjem.probes import embed
from fastjem.report.watch import SampleImages

pytest.importorskip("torchvision")


def ramp(low: float, high: float, kind: type, height: int = 12, width: int = 16) -> np.ndarray:
    return np.linspace(low, high, height * width).reshape(height, width).astype(kind)


def write(path: Path, values: np.ndarray) -> None:
    """A file of gray values: PNG of 16 bits, else TIFF."""
    if values.dtype == np.uint16:
        Image.fromarray(values).save(path.with_suffix(".png"))
    elif values.dtype == np.int16:  # Pillow writes no negative 16-bit numbers
        pytest.importorskip("tifffile").imwrite(path.with_suffix(".tif"), values)
    else:
        Image.fromarray(values).save(path.with_suffix(".tif"))


def rule(source: object, channels: int = 3, given: str = "auto") -> Levels:
    return levels_of(channels, parsed_range(given), survey(source, channels))


@pytest.mark.parametrize(
    "values, expected",
    [
        ([ramp(0, 4095, np.uint16)], (0, 4095)),  # 12 bits in 16
        ([ramp(0, 3000, np.uint16), ramp(0, 1024, np.uint16)], (0, 4095)),
        ([ramp(0, 255, np.uint16), ramp(0, 256, np.uint16)], (0, 1023)),
        ([ramp(0, 255, np.uint16)], (0, 255)),
        ([ramp(0, 65535, np.uint16)], (0, 65535)),
        ([ramp(-1000, 3000, np.int16), ramp(0, 90, np.int16)], (-1024, 4095)),
        ([ramp(0, 100000, np.int32)], (0, 2**18 - 1)),
        ([ramp(0, 1, np.float32)], (0, 1)),
        ([ramp(0, 0.3, np.float32), ramp(0, 200, np.float32)], (0, 255)),
        ([ramp(-1, 0.5, np.float32)], (-1, 1)),
        ([ramp(-3, 7.5, np.float32), ramp(0, 1, np.float32)], (-3, 7.5)),
        ([np.full((4, 4), np.nan, np.float32), ramp(0, 0.5, np.float32)], (0, 1)),
        ([np.full((4, 4), -5, np.float32)], (-5, 0)),
        ([ramp(0, 2.0**120, np.float32)], (0, 2.0**120)),
    ],
    ids=str,
)
def test_one_rule_for_a_data_set(tmp_path: Path, values: list[np.ndarray], expected: tuple[float, float]) -> None:
    for i, one in enumerate(values):
        write(tmp_path / f"{i}", one)
    source = open_source(tmp_path)
    found = rule(source)
    assert found.value_range == expected
    for i, one in enumerate(values):
        black, white = expected
        levels = np.nan_to_num((one.astype(np.float64) - black) * 255 / (white - black)).astype(np.float32)
        assert np.array_equal(np.asarray(decode(Levelled(source, found), i))[:, :, 0], levels)


def test_neighbours_of_255_and_256_are_equally_bright(tmp_path: Path) -> None:
    for i, largest in enumerate((255, 256)):
        write(tmp_path / f"{i}", np.full((4, 4), largest, np.uint16))
    source = open_source(tmp_path)
    one, other = (np.asarray(decode(Levelled(source, rule(source)), i)).mean() for i in range(2))
    assert abs(one - other) <= 1


def test_the_users_range_and_images_of_another_kind(tmp_path: Path) -> None:
    write(tmp_path / "0", ramp(0, 3000, np.uint16))
    Image.new("RGB", (16, 12), (200, 100, 0)).save(tmp_path / "1.png")
    source = open_source(tmp_path)
    levels = rule(source, given="1000,2000")
    assert levels == Levels(3, "integer", (1000, 2000))
    deep = np.asarray(decode(Levelled(source, levels), 0))
    expected = ((ramp(0, 3000, np.uint16) - 1000.0) / 1000 * 255).clip(0, 255)
    assert np.allclose(deep[:, :, 1], expected, rtol=1e-6, atol=0)
    assert np.asarray(decode(Levelled(source, levels), 1))[0, 0].tolist() == [200, 100, 0]
    said = describe(levels, survey(source))
    assert said == [
        "integers of more than 8 bits: black is 1000, white 2000 (--value-range LOW,HIGH); 0 to 3000 in the 1 looked "
        "at; 8-bit images beside them have their own, 0 to 255"
    ]
    (tmp_path / "0.png").unlink()
    levels = rule(open_source(tmp_path), given="100,200")  # 8-bit values are stretched where they are all there is
    assert decode(Levelled(open_source(tmp_path), levels), 0).getpixel((0, 0)) == (255, 0, 0)
    assert rule(open_source(tmp_path)) == Levels() and not describe(Levels(), survey(open_source(tmp_path)))
    for pair in ((0, 4095), [0.0, 4095.0], np.array([0, 4095])):
        assert parsed_range(Config(out="run", value_range=pair).value_range) == (0, 4095)
    for text in ("1", "2,1", "0,nan", "a,b", "0,1,2"):
        with pytest.raises(UserError, match=f"--value-range must be auto, or black and white as 0,4095, got {text}"):
            parsed_range(text)


def test_colours_of_16_bits_keep_all_of_them() -> None:
    """Pillow drops the lower 8 bits of such a PNG file, so that 12 bits would be nearly black."""
    from test_files import png

    values = np.random.default_rng(0).integers(0, 4096, (5, 6, 3))
    data = png(6, 5, 16, 2, b"".join(b"\0" + row.astype(">u2").tobytes() for row in values))
    expected = values * 255 / 4095
    found = np.asarray(to_image(data, Levels(3, "integer", (0, 4095))))
    assert found.dtype == np.float32 and np.allclose(found, expected, rtol=1e-6, atol=0)
    assert np.array_equal(np.asarray(to_image(data)), expected.round())  # for people, by what this image holds


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("bands, layout", [(2, "contig"), (4, "contig"), (5, "contig"), (5, "separate")])
def test_bands_of_a_tiff_file(dtype: type, bands: int, layout: str) -> None:
    tifffile = pytest.importorskip("tifffile")
    values = np.random.default_rng(0).integers(0, 256, (6, 7, bands)).astype(dtype)
    file = io.BytesIO()
    stored = values if layout == "contig" else np.moveaxis(values, 2, 0)
    tifffile.imwrite(file, stored, photometric="minisblack", planarconfig=layout)
    levels = Levels(bands, {"u": "integer", "f": "float"}[np.dtype(dtype).kind], (0, 255))
    image = to_image(file.getvalue(), Levels(bands) if dtype == np.uint8 else levels)
    assert image.size == (7, 6) and np.array_equal(np.asarray(image), values)
    if bands == 5:
        with pytest.raises(ValueError, match="5 channels, not the 3 of --channels"):
            to_image(file.getvalue(), Levels())


def test_a_deflated_tiff_file_holds_no_more_than_its_pixels() -> None:
    tifffile = pytest.importorskip("tifffile")
    values = np.random.default_rng(0).integers(0, 4096, (6, 7, 5), np.uint16)
    file = io.BytesIO()
    tifffile.imwrite(file, values, photometric="minisblack", planarconfig="contig", compression="zlib")
    levels = Levels(5, "integer", (0, 255))
    assert np.array_equal(np.asarray(to_image(file.getvalue(), levels)), values.clip(0, 255))
    with tifffile.TiffFile(io.BytesIO(file.getvalue())) as opened:
        tags = opened.pages.first.tags
        where, length = tags["StripOffsets"].valueoffset, tags["StripByteCounts"].valueoffset
        sizes = [tags[name].dtype.name for name in ("StripOffsets", "StripByteCounts")]
    data = bytearray(file.getvalue())
    bomb = zlib.compress(bytes(10**7))
    for at, number, size in zip((where, length), (len(data), len(bomb)), sizes, strict=True):
        data[at : at + (2 if size == "SHORT" else 4)] = number.to_bytes(2 if size == "SHORT" else 4, "little")
    with pytest.raises(ValueError, match="a part of the TIFF file holds more than its pixels"):
        to_image(bytes(data) + bomb, levels)


def test_a_resumed_run_keeps_its_rule(tmp_path: Path) -> None:
    """Though the images of today would make another."""
    from fastjem.prepare import Objects, levelled

    config = Config(data=str(deep_folder(tmp_path)), out="run")
    source, said = levelled(config, Objects(), None)
    assert source.levels == Levels(3, "integer", (0, 4095)) and "white 4095" in said[0]
    pixels = Pixels.of([ViewSpec()], Levels(3, "integer", (0, 16383)))
    assert levelled(config, Objects(), {"pixels": pixels.to_dict()})[0].levels == pixels.levels


def test_the_fourth_band_is_kept_or_said(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 256, (6, 7, 4), np.uint8)
    Image.fromarray(values).save(tmp_path / "a.tif")
    source = open_source(tmp_path)
    assert np.array_equal(np.asarray(decode(Levelled(source, Levels(4)), 0)), values)
    assert np.array_equal(np.asarray(decode(Levelled(source, Levels(3)), 0)), values[:, :, :3])
    assert describe(Levels(), survey(source)) == ["1 of 1 images have a fourth channel; --channels 4 keeps it"]


def test_gray_is_one_channel_of_any_picture() -> None:
    colours = np.random.default_rng(0).integers(0, 256, (6, 7, 3), np.uint8)
    weighed = colours @ [0.299, 0.587, 0.114]  # Pillow's weights
    gray = np.asarray(Image.fromarray(colours).convert("L"))
    assert np.abs(weighed - gray).max() <= 0.501
    for given in (colours, gray, gray[:, :, None], np.dstack([colours, gray])):
        image = to_image(given, Levels(1))
        expected = gray if given.shape[2:] in ((), (1,)) else weighed
        assert isinstance(image, Bands) and np.allclose(np.asarray(image)[:, :, 0], expected, rtol=1e-6, atol=0)
        assert np.asarray(shown(image)).shape == (6, 7, 3)
    with pytest.raises(ValueError, match="3 channels, not the 2 of --channels"):
        to_image(colours, Levels(2))
    with pytest.raises(TypeError, match="pixels must be integers or floats, got complex128"):
        to_image(colours * 1j)


def test_levels_of_every_type() -> None:
    for name in ("u1", "i1", "u2", "i2", ">u2", ">i2", "i4", "i8", "f2", "f4", "f8"):
        dtype = np.dtype(name)
        values = np.array([[-3, 0, 1, 50, 100, 120]]).clip(0 if dtype.kind == "u" else -3).astype(dtype)
        expected = ((values.astype(float) - 0) * 2.55).clip(0, 255)
        found = to_levels(values, 0, 100)
        assert found.dtype == np.float32 and np.allclose(found, expected, rtol=1e-6, atol=0)
        rounded = to_levels(values, 0, 100, floats=False)
        assert rounded.dtype == np.uint8 and np.array_equal(rounded, expected.round())
    assert to_levels(np.array([[np.nan, np.inf, -np.inf]]), -5, 5).tolist() == [[0, 0, 0]]
    assert to_levels(np.array([[True, False]]), 0, 255).tolist() == [[255, 0]]
    assert range_of("integer", 0, 2**31 - 1) == (0, 2**32 - 1)
    wide = range_of("float", -1.7e308, 1.7e308)
    assert to_levels(np.array([[-1.7e308, 0, 1.7e308]]), *wide).tolist() == [[0, 127.5, 255]]


@pytest.mark.parametrize("channels", [1, 2, 4, 5])
def test_each_channel_is_augmented_as_gray_is(channels: int) -> None:
    """A channel alone, three times, is a gray picture: the operator of colours makes the same of it, but for weights of
    red, green and blue whose sum is 0.9999. Contrast is around the mean of all channels, so here all have one mean."""
    spec = ViewSpec(size=16, jitter=(0.8, 0.8, 0, 0), jitter_probability=1, grayscale=0, blur=0.5, solarize=0.5)
    table = torch.from_numpy(Parameters([spec])(3, 1, range(24), 16, 16)[0])
    g = torch.Generator().manual_seed(0)
    one = torch.randint(40, 200, (24, 16, 16), generator=g, dtype=torch.uint8)
    crops = torch.stack([one.flip(1 + i % 2).roll(i, 2) for i in range(channels)], 3)
    mean, std = [0.1 * i for i in range(channels)], [0.2 + 0.1 * i for i in range(channels)]
    found = F.augment(crops, table, mean=mean, std=std)
    assert found.shape == (24, channels, 16, 16)
    for i in range(channels):
        gray = crops[..., i : i + 1].expand(-1, -1, -1, 3).contiguous()
        expected = F.augment(gray, table, mean=mean[i : i + 1] * 3, std=std[i : i + 1] * 3)[:, 0]
        close = (found[:, i] - expected).abs() < 2e-3 / std[i]
        assert close.float().mean() > 0.999  # where solarizing doesn't jump
    last = F.augment(crops, table, mean=mean, std=std, channels_last=True, dtype=torch.bfloat16)
    assert last.dtype == torch.bfloat16 and torch.equal(last, found.to(torch.bfloat16))


def deep_folder(root: Path, images: int = 12) -> Path:
    """12 bits in 16: two classes of waves."""
    for i in range(images):
        (root / f"class{i % 2}").mkdir(parents=True, exist_ok=True)
        y, x = np.mgrid[:24, :24]
        wave = np.sin(x / (2 + 3 * (i % 2)) + i) * np.cos(y / 5) * 1500 + 2000
        Image.fromarray(wave.astype(np.uint16)).save(root / f"class{i % 2}" / f"{i}.png")
    return root


@pytest.mark.parametrize("channels", [1, 3])
def test_loaders_agree_on_deep_images(tmp_path: Path, channels: int) -> None:
    source = open_source(deep_folder(tmp_path))
    source = Levelled(source, rule(source, channels))
    specs = Views(large=2).specs(21, channels=channels)  # held in memory at 24, as they are
    order = Order(samples=12, batch=4, seed=1, stop=3)
    names = ["torch", "memory", *(["dali-cpu"] if _has_dali() else [])]
    runs = [list(create(name, source, specs, order, Budget())) for name in names]
    for torchs, memorys, *dalis in zip(*runs, strict=True):
        assert torchs.views[0].shape == (4, 21, 21, channels) and torchs.views[0].dtype == torch.float32
        assert torchs.views[0].mean() > 90  # 8 without the rule
        for other in (memorys, *dalis):
            assert torch.equal(torchs.tables[0], other.tables[0]) and torch.equal(torchs.index, other.index)
        assert all(torch.equal(one, other) for one, other in zip(torchs.views, memorys.views, strict=True))
        for other in dalis:
            inner = (slice(None), slice(4, -4), slice(4, -4))  # DALI repeats the edge of a window
            assert (torchs.views[0][inner] - other.views[0][inner]).abs().max() <= 0.02


def test_dali_decodes_nothing_that_has_a_range(tmp_path: Path) -> None:
    """8-bit JPEG files between 60 and 160: Pillow's pixels, as DALI knows no range; and the windows are the same."""
    pytest.importorskip("nvidia.dali")
    folder = open_source(make_folder(tmp_path, 4, classes=0, kind="jpg"))
    source = Levelled(folder, rule(folder, given="60,160"))
    specs = [ViewSpec(size=16)]
    order = Order(samples=4, batch=4, stop=1)
    (one,), (other,) = (list(create(name, source, specs, order, Budget())) for name in ("torch", "dali-cpu"))
    inner = (slice(None), slice(4, -4), slice(4, -4))  # DALI repeats the edge of a window
    assert (one.views[0][inner].int() - other.views[0][inner].int()).abs().max() <= 1
    assert one.views[0].max() == 255


def _has_dali() -> bool:
    import importlib.util

    return importlib.util.find_spec("nvidia.dali") is not None


def test_training_and_evaluation_see_the_same_numbers(tmp_path: Path) -> None:
    """A view that is the whole image, and the whole image as evaluation normalises it."""
    source = open_source(deep_folder(tmp_path))
    levels = rule(source, given="0,8000")  # no image alone would be read so
    changes = {"flip": 0, "scale": "1,1", "ratio": "1,1", "jitter_probability": 0, "grayscale": 0}
    specs = Views(large=1).specs(24, changes=changes)
    pixels = Pixels.of(specs, levels)
    assert (pixels.channels, pixels.value_range, pixels.values) == (3, (0, 8000), "integer")
    assert Pixels.from_dict(json.loads(json.dumps(pixels.to_dict()))).levels == levels
    (crops,) = create("torch", Levelled(source, levels), specs, Order(samples=12, batch=12, stop=1), Budget())
    seen = finish(crops, specs, "cpu").views[0]
    images = whole_images(source, crops.index.tolist(), pixels)
    whole = torch.stack([images[i] for i in range(12)])
    assert torch.allclose(pixels.decoded.normalise(whole, "cpu"), seen, atol=1e-5)
    assert torch.equal(whole[0], whole_image(decode(Levelled(source, levels), int(crops.index[0])), 24))
    rows, _ = embed(torch.nn.Flatten(), source, pixels)
    assert torch.allclose(rows[crops.index], seen.flatten(1), atol=1e-5)
    encoder = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 24 * 24, 8))
    watched = SampleImages(Levelled(source, levels), pixels).embed(encoder)
    expected = torch.nn.functional.normalize(encoder(rows), dim=1)
    assert torch.allclose(watched, expected, atol=1e-5)


def test_views_of_other_channels_leave_colours_out() -> None:
    spec = Views(large=1).specs(32, channels=4)[0]
    assert (spec.mean, spec.std, spec.grayscale, spec.jitter[2:]) == ((0.5,) * 4, (0.25,) * 4, 0, (0, 0))
    assert Views(large=1, recipe="simclr_tf").specs(32, channels=1)[0].mean == (0.0,)
    assert Views(large=1).specs(32, channels=2, changes={"mean": "0.1,0.2"})[0].mean == (0.1, 0.2)
    for changes, message in (
        ({"grayscale": 0.2}, "a view's grayscale needs red, green and blue, and these images have 4 channels"),
        ({"jitter": "0.4,0.4,0.2,0.1"}, "a view's jitter of saturation and hue .* needs red, green and blue"),
        ({"mean": "0.5,0.5,0.5"}, "a view's mean must be like 0.5,0.5,0.5,0.5, got 0.5,0.5,0.5"),
    ):
        with pytest.raises(UserError, match=message):
            Views(large=1).specs(32, channels=4, changes=changes)
    assert Views(large=1).specs(32, channels=4, changes={"grayscale": 0})[0].grayscale == 0


@pytest.mark.parametrize("channels", [1, 4])
def test_from_pretraining_to_evaluation(tmp_path: Path, channels: int) -> None:
    """The run keeps its rule: its export and its evaluation read images of other values by it."""
    pytest.importorskip("timm")
    from fastjem.commands.evaluate import EvaluateOptions, evaluate
    from fastjem.run import pretrain
    from fastjem.runs import open_run

    if channels == 1:
        data = deep_folder(tmp_path / "images", 24)
    else:
        data = tmp_path / "images.npz"
        waves = np.sin(np.arange(24 * 24 * 24 * 4).reshape(24, 24, 24, 4) / 7).astype(np.float32)
        np.savez(data, images=waves, labels=np.arange(24) % 2)
    run = tmp_path / "run"
    pretrain(
        data=str(data), out=str(run), channels=channels, backbone="test_resnet", image_size=16, batch_size=8,
        max_steps=2, workers=0, report=False,
    )  # fmt: skip
    opened = open_run(run)
    assert opened.pixels.levels == Levels(channels, *(("integer", (0, 4095)) if channels == 1 else ("float", (-1, 1))))
    assert opened.encoder(torch.zeros(2, channels, 16, 16)).shape[0] == 2
    exported = open_run(run / "encoder.safetensors")
    assert exported.pixels == opened.pixels
    found = evaluate(EvaluateOptions(str(run / "encoder.safetensors"), train=str(data), workers=0))
    assert 0 <= found["features"]["encoder"]["knn"] <= 1 and found["train_images"] == 21


def test_an_array_says_where_its_channels_are(tmp_path: Path) -> None:
    for shape, expected in (
        ((2, 8, 9), (8, 9, 1)), ((2, 8, 9, 1), (8, 9, 1)), ((2, 5, 8, 9), (8, 9, 5)), ((2, 8, 9, 5), (8, 9, 5)),
        ((2, 3, 8, 9), (8, 9, 3)), ((2, 2, 8, 3), (2, 8, 3)),
    ):  # fmt: skip
        np.save(tmp_path / "a.npy", np.zeros(shape, np.float32))
        assert open_source(tmp_path / "a.npy").read(0).shape == expected
