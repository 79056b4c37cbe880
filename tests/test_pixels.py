"""How pixels become numbers, and whole images."""

import numpy as np
import pytest
import torch
from images import make_folder
from PIL import Image

from fastjem.data.pixels import Pixels, covering, whole_image, whole_images
from fastjem.data.size import as_size
from fastjem.data.source import decode, open_source
from fastjem.data.views import MEAN, STD, Views
from fastjem.errors import UserError


@pytest.mark.parametrize("size", [(40, 53), (53, 40), (24, 24), (24, 31), (7, 90), (1, 1), (300, 201)])
def test_whole_images_are_torchvisions(size: tuple[int, int]) -> None:
    V = pytest.importorskip("torchvision.transforms.v2.functional")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8))
    for side in (24, 25):
        expected = V.pil_to_tensor(V.center_crop(V.resize(image, [side]), [side, side]))
        assert torch.equal(whole_image(image, side), expected)


@pytest.mark.parametrize("size", [(40, 53), (53, 40), (24, 24), (24, 48), (37, 75), (75, 37), (300, 201), (16, 90)])
@pytest.mark.parametrize("wanted", [(24, 24), (24, 48), (48, 24), (25, 31)])
def test_the_middle_of_an_image_is_timms(size: tuple[int, int], wanted: tuple[int, int]) -> None:
    """What its transform for evaluation makes of an image, of squares and of other rectangles, bit for bit."""
    data = pytest.importorskip("timm.data")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8))
    transform = data.create_transform(
        (3, *wanted), interpolation="bilinear", crop_pct=1.0, crop_mode="center", normalize=False
    )
    assert torch.equal(whole_image(image, as_size(*wanted)), transform(image))
    height, width = covering(*size, as_size(*wanted))
    assert height >= wanted[0] and width >= wanted[1] and (height == wanted[0] or width == wanted[1])


@pytest.mark.parametrize("size", [(20, 400), (700, 30), (1, 40), (100, 3)])
def test_a_long_image_is_cut_before_it_is_resized(size: tuple[int, int]) -> None:
    """The same picture, but for rounding; the whole of 5000 x 1 pixels resized to 224 would have 250 million."""
    V = pytest.importorskip("torchvision.transforms.v2.functional")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8))
    for side in (8, 25):
        expected = V.pil_to_tensor(V.center_crop(V.resize(image, [side]), [side, side]))
        assert (whole_image(image, side).int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize("size", [(20_000, 1), (1, 20_000), (65_535, 2)])
def test_a_long_image_costs_no_more_than_a_square_one(size: tuple[int, int], monkeypatch) -> None:
    made = []
    resize = Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda *args: (made.append(args[1]), resize(*args))[1])
    assert whole_image(Image.new("RGB", size, (1, 2, 3)), 224)[:, 0, 0].tolist() == [1, 2, 3]
    assert made == [(224, 224)]
    made.clear()
    assert whole_image(Image.new("RGB", size, (1, 2, 3)), (112, 224)).shape == (3, 112, 224)
    assert made == [(224, 112)]


def test_the_chosen_images_of_a_source(tmp_path) -> None:
    folder = make_folder(tmp_path, 5, size=20)
    source = open_source(folder)
    images = whole_images(source, [4, 1], Pixels(16))
    assert len(images) == 2 and torch.equal(images[1], whole_image(decode(source, 1), 16))
    (folder / source.name(4)).write_bytes(b"")
    with pytest.raises(UserError, match=rf"{source.name(4)} can't be read"):
        images[0]


def test_numbers_are_the_recipes() -> None:
    changes = {"mean": "0.5,0.4,0.3", "std": "0.02,0.03,0.04", "small.std": "1,1,1"}
    pixels = Pixels.of(Views(large=2, small=2, recipe="dino").specs(32, changes=changes))
    assert pixels == Pixels(32, (0.5, 0.4, 0.3), (0.02, 0.03, 0.04))
    images = torch.randint(0, 256, (4, 3, 9, 8), dtype=torch.uint8)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (pixels.mean, pixels.std))
    for last in (False, True):
        found = pixels.normalise(images, "cpu", channels_last=last)
        assert torch.allclose(found, (images / 255 - mean) / std, atol=1e-5, rtol=1e-5)
        assert found.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    assert Pixels(32) == Pixels(32, MEAN, STD)


def test_other_ranges_and_channels() -> None:
    images = torch.randint(0, 256, (4, 3, 9, 8), dtype=torch.uint8)
    ranged = Pixels(32, (0.1, 0.2, 0.3), (1, 2, 3), value_range=(10, 90))
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (ranged.mean, ranged.std))
    assert torch.allclose(ranged.normalise(images, "cpu"), ((images - 10.0) / 80 - mean) / std, atol=1e-5)
    gray = Pixels(32, (0.4,), (0.2,), channels=1)
    expected = (images[:, :1] / 255 - 0.4) / 0.2
    assert torch.allclose(gray.normalise(images[:, :1], "cpu"), expected, atol=1e-5)
    with pytest.raises(ValueError, match=r"images must be \[B, 1, H, W\] uint8 or float32, got \(4, 3, 9, 8\)"):
        gray.normalise(images, "cpu")
    with pytest.raises(ValueError, match="mean and std must have 1 numbers each"):
        Pixels(32, channels=1)


def test_files_give_them_back() -> None:
    pixels = Pixels(48, (0.5, 0.4, 0.3), (0.02, 0.03, 1 / 3), value_range=(0, 4095))
    assert Pixels.from_dict(pixels.to_dict()) == pixels
    written = {"backbone": "resnet18", **pixels.to_metadata()}
    assert all(isinstance(value, str) for value in written.values()) and Pixels.from_metadata(written) == pixels
    with pytest.raises(UserError, match="doesn't say how its encoder takes pixels"):
        Pixels.from_metadata({"backbone": "resnet18"})
    assert pixels.to_dict()["interpolation"] == "bilinear"
    with pytest.raises(UserError, match="interpolation must be bilinear, got 'bicubic'"):
        Pixels.from_dict({**pixels.to_dict(), "interpolation": "bicubic"})
