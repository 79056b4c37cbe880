"""Mean and deviation by which a run's images are normalised, and images prepared for its encoder."""

import copy
import io
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from images import TINY, make_folder
from PIL import Image

import fastjem
from fastjem.config import Config, read
from fastjem.data import statistics
from fastjem.data.pixels import Pixels
from fastjem.data.source import decode, open_source
from fastjem.data.views import MEAN, STD
from fastjem.errors import UserError
from fastjem.runs import open_run


def test_what_is_measured_is_the_mean_over_images(tmp_path) -> None:
    """Of float64's mean and deviation; an image of four times the pixels counts no more than another."""
    small = make_folder(tmp_path / "all" / "a", 3, classes=0, size=8, seed=1)
    make_folder(tmp_path / "all" / "b", 2, classes=0, size=32, seed=2)
    (small / "broken.png").write_bytes(b"no image")
    source = open_source(tmp_path / "all")
    names = [i for i in range(len(source)) if "broken" not in source.name(i)]
    images = [np.asarray(decode(source, i), np.float64) / 255 for i in names]
    first = np.mean([image.mean((0, 1)) for image in images], axis=0)
    second = np.mean([(image**2).mean((0, 1)) for image in images], axis=0)
    mean, std, count = statistics.measured(source)
    assert count == 5
    np.testing.assert_allclose(mean, first, rtol=1e-12)
    np.testing.assert_allclose(std, np.sqrt(second - first**2), rtol=1e-9)


def test_a_constant_channel_has_a_deviation(tmp_path) -> None:
    pixels = np.zeros((4, 6, 6, 3), np.uint8)
    pixels[..., 1] = 255
    pixels[:2, ..., 2] = 255
    np.savez(tmp_path / "x.npz", images=pixels)
    mean, std, _ = statistics.measured(open_source(tmp_path / "x.npz"))
    assert mean == [0, 1, 0.5] and std == [1 / 255, 1 / 255, 0.5]


def test_channels_of_any_number_are_measured(tmp_path) -> None:
    """By the run's rule for values: 12 bits, white at 4095."""
    random = np.random.default_rng(0)
    images = random.integers(0, 4096, (20, 24, 24, 5), np.uint16)
    np.savez(tmp_path / "five.npz", images=images)
    out = tmp_path / "run"
    settings = {**TINY, "channels": 5, "value_range": "0,4095", "statistics": "measure", "batch_size": 10}
    fastjem.pretrain(data=str(tmp_path / "five.npz"), out=str(out), max_steps=1, **settings)
    pixels = open_run(out).pixels
    np.testing.assert_allclose(pixels.mean, (images / 4095).mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(pixels.std, (images / 4095).std((0, 1, 2)), rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "mean", "std"),
    [
        ({"mean": "0.5", "std": "0.25"}, (0.5,) * 3, (0.25,) * 3),
        ({"mean": (0.1, 0.2, 0.3)}, (0.1, 0.2, 0.3), STD),
        ({"std": "1,2,3"}, MEAN, (1, 2, 3)),
        ({"mean": "0.5", "statistics": "measure"}, (0.5,) * 3, None),
        ({"statistics": "measure"}, None, None),
        ({"statistics": "measure", "view": {"std": "1,1,1"}}, None, (1, 1, 1)),
    ],
)
def test_a_run_is_normalised_as_it_is_told(tmp_path, options, mean, std) -> None:
    """In its configuration, its export and its encoder's `prepare`; a resumed run measures nothing again."""
    data = make_folder(tmp_path / "data", 32)
    out = tmp_path / "run"
    measured = statistics.measured(open_source(data))
    fastjem.pretrain(data=str(data), out=str(out), max_steps=2, **TINY, **options)
    expected = tuple(mean or measured[0]), tuple(std or measured[1])
    for pixels in (read(out)[1], open_run(out).pixels, open_run(out / "encoder.safetensors").pixels):
        assert (pixels.mean, pixels.std) == expected
    for file in data.rglob("*.png"):  # the same names and sizes of other images would measure otherwise
        image = Image.open(file)
        Image.new("RGB", image.size, (9, 9, 9)).save(file)
    fastjem.pretrain(out=str(out), resume=True, max_steps=3, new_data=True)
    assert (open_run(out).pixels.mean, open_run(out).pixels.std) == expected


def test_measured_statistics_replace_those_of_given_weights(tmp_path) -> None:
    data = make_folder(tmp_path / "data", 32)
    fastjem.pretrain(data=str(data), out=str(tmp_path / "a"), max_steps=1, mean="0.3", std="0.7", **TINY)
    fastjem.pretrain(data=str(data), out=str(tmp_path / "b"), weights=str(tmp_path / "a"), max_steps=1, **TINY)
    assert open_run(tmp_path / "b").pixels.mean == (0.3,) * 3
    options = {**TINY, "statistics": "measure"}
    fastjem.pretrain(data=str(data), out=str(tmp_path / "c"), weights=str(tmp_path / "a"), max_steps=1, **options)
    assert list(open_run(tmp_path / "c").pixels.mean) == statistics.measured(open_source(data))[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mean": "0.5,0.5"}, "mean must be one number, or 3 as 0.5,0.4,... for the channels, from 0 to 1, where"),
        ({"mean": "123.675,116.28,103.53"}, "mean must be .* from 0 to 1, where black is 0 and white 1; got 123.675"),
        ({"mean": "-0.1"}, "mean must be .* got -0.1"),
        ({"mean": "nan"}, "mean must be one number"),
        ({"std": "0"}, "std must be one number, or 3 .* finite and above 0, .* got 0"),
        ({"std": "wide"}, "std must be one number"),
        ({"std": "0.5,0.5", "channels": 1}, "std must be one number finite and above 0"),
        ({"mean": "0.5", "view": {"mean": "0.4,0.4,0.4"}}, "mean and view mean=... say the same"),
        ({"statistics": "guess"}, "statistics must be .*published.*measure"),
    ],
)
def test_mistakes_are_told(tmp_path, options, message) -> None:
    with pytest.raises(UserError, match=message):
        fastjem.pretrain(data=str(make_folder(tmp_path / "data", 32)), out=str(tmp_path / "run"), **TINY, **options)
    assert not (tmp_path / "run").exists()


def test_none_of_the_images_can_be_measured(tmp_path) -> None:
    (tmp_path / "a.png").write_bytes(b"no image")
    said = r"--statistics measure: none of 1 images in .* can be read; the first: .*a\.png: cannot identify"
    with pytest.raises(UserError, match=said):
        statistics.measured(open_source(tmp_path))


def test_an_encoder_prepares_images_as_evaluation_does(tmp_path) -> None:
    """Whatever an image comes as: the same numbers as those that `fastjem evaluate` gives the encoder."""
    data = make_folder(tmp_path / "data", 32)
    fastjem.pretrain(data=str(data), out=str(tmp_path / "run"), max_steps=1, mean="0.4", **TINY)
    encoder = fastjem.load_encoder(tmp_path / "run")
    source = open_source(data)
    file = data / source.name(3)
    pixels = open_run(tmp_path / "run").pixels
    side = Image.open(file).resize((32, 32), Image.Resampling.BILINEAR)
    numbers = torch.from_numpy(np.array(side)).permute(2, 0, 1)[None] / 255
    expected = (numbers - torch.tensor(pixels.mean).view(3, 1, 1)) / torch.tensor(pixels.std).view(3, 1, 1)
    array = np.asarray(Image.open(file))
    for given in (file, str(file), file.read_bytes(), Image.open(file), array, [file], (file,)):
        torch.testing.assert_close(encoder.prepare(given), expected, rtol=0, atol=1e-6)
    both = encoder.prepare([file, data / source.name(7)])
    assert both.shape == (2, 3, 32, 32) and torch.equal(both[:1], encoder.prepare(file))
    assert encoder(both).shape[0] == 2
    for other in (copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
        assert torch.equal(other.prepare(file), encoder.prepare(file))
    assert not any("prepare" in name for name in encoder.state_dict())


def test_images_are_prepared_by_the_runs_levels_and_turned(tmp_path) -> None:
    values = np.random.default_rng(0).integers(0, 4096, (16, 16), np.uint16)
    gray = Pixels(16, (0.5,), (0.5,), channels=1, value_range=(0, 4095), values="integer")
    expected = torch.from_numpy(values / 4095 * 2 - 1).float()
    torch.testing.assert_close(gray.prepare(values)[0, 0], expected, rtol=0, atol=1e-6)
    turned = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    exif = turned.getexif()
    exif[0x0112] = 6
    file = io.BytesIO()
    turned.save(file, "PNG", exif=exif)
    colour = Pixels(4)
    upright = colour.prepare(np.rot90(np.asarray(turned), -1).copy())
    assert torch.equal(colour.prepare(file.getvalue()), upright)
    assert torch.equal(colour.prepare(Image.open(file)), upright)
    deep = replace(colour, value_range=(0, 4095), values="integer")
    with pytest.raises(UserError, match=r"keeps 8 bits of colours, .* other values \(integer\); give its path"):
        deep.prepare(Image.open(file))  # of a file of 16 bits it would be all but black
    assert torch.equal(deep.prepare(file.getvalue()), upright)
    assert torch.equal(gray.prepare(Image.fromarray(values))[0, 0], gray.prepare(values)[0, 0])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (7, "prepare: images must be a path, .* got int"),
        (torch.zeros(3, 4, 4), "prepare: images must be a path, .* got Tensor"),
        ([], "got an empty list"),
        ("missing.png", "prepare: missing.png can't be read: No such file"),
        (b"no image", "prepare: an image can't be read"),
        (np.zeros((2, 2, 2, 2, 3)), "prepare: an image can't be read: pixels must be"),
    ],
)
def test_what_is_no_image_is_told(given, message) -> None:
    with pytest.raises(UserError, match=message):
        Pixels(8).prepare(given)


def test_a_modules_own_prepare_stays(tmp_path) -> None:
    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = torch.nn.Linear(3 * 32 * 32, 16)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.body(images.flatten(1))

        def prepare(self) -> str:
            return "its own"

    data = make_folder(tmp_path / "data", 32)
    settings = {**TINY, "backbone": Encoder()}
    fastjem.pretrain(data=str(data), out=str(tmp_path / "run"), max_steps=1, **settings)
    assert fastjem.load_encoder(tmp_path / "run", encoder=Encoder()).prepare() == "its own"


def test_fields_take_lists() -> None:
    assert Config(out="run", mean=[0.5, 0.4, 0.3]).mean == "0.5,0.4,0.3"
