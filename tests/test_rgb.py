"""Images as arrays, and windows of them, against Pillow's: equal to the last bit."""

import io
import warnings
from collections.abc import Iterator

import numpy as np
import pytest

pytest.importorskip("torchvision")
from PIL import Image

from fastjem.data.levels import Levels
from fastjem.data.loaders import rgb
from fastjem.data.picture import Bands, to_image

_C = pytest.importorskip("fastjem.kernels._C")
resize_window = pytest.importorskip("fastjem.kernels.augment.window").resize_window
ISAS = range(_C.isa() + 1)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[None]:
    best = _C.isa()
    _C.use_isa(request.param)
    yield
    _C.use_isa(best)


def picture(random: np.random.Generator, height: int, width: int) -> Image.Image:
    """Smooth, with fine detail and strong colours."""
    coarse = Image.fromarray(random.integers(0, 256, (7, 9, 3), np.uint8)).resize((width, height), 3)
    return Image.fromarray((np.asarray(coarse) + random.normal(0, 12, (height, width, 3))).clip(0, 255).astype("uint8"))


def encoded(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("bicubic", [False, True])
def test_windows_have_pillows_bits(isa: None, bicubic: bool) -> None:
    """Of one pixel and more, shrunk and enlarged, up to the image's last byte; levels of noise, and of black and white,
    whose sums are cut."""
    assert rgb.tall_first() is not None  # this Pillow is one of those that are known
    random = np.random.default_rng(0)
    mode = Image.Resampling.BICUBIC if bicubic else Image.Resampling.BILINEAR
    both_orders = set()
    for trial in range(300):
        rows, columns, down, across = (int(x) for x in np.exp(random.uniform(0, 5.5, 4)))
        image = random.integers(0, 256, (rows, columns, 3), np.uint8)
        if trial % 3 == 0:
            image = np.where(image < 128, 0, 255).astype(np.uint8)
        height, width = int(random.integers(1, rows + 1)), int(random.integers(1, columns + 1))
        top, left = int(random.integers(rows - height + 1)), int(random.integers(columns - width + 1))
        box = (left, top, left + width, top + height)
        held = np.full((down + 2, across, 3), 77, np.uint8)  # what is before and behind the result stays
        resize_window(image, box, bicubic, bool(rgb.tall_first()), held[1:-1])
        expected = np.asarray(Image.fromarray(image).crop(box).resize((across, down), mode))
        assert np.array_equal(held[1:-1], expected), (rows, columns, box, down, across)
        assert (held[[0, -1]] == 77).all()
        both_orders.add(height > down and height - down > 2 * (width - across))
    assert both_orders == {False, True}


def test_a_window_that_leaves_the_image_is_refused() -> None:
    image, out = np.zeros((4, 6, 3), np.uint8), np.zeros((2, 2, 3), np.uint8)
    for box in ((0, 0, 7, 4), (-1, 0, 3, 3), (0, 0, 6, 5), (2, 2, 2, 3), (3, 1, 2, 3)):
        with pytest.raises(ValueError, match="box must lie in the image of 6 x 4"):
            resize_window(image, box, False, True, out)
    for wrong in (image[:, ::2], image[..., :2], image.astype(np.int16), image[0], image[:0]):
        with pytest.raises(ValueError, match=r"image must be contiguous \[H, W, 3\] uint8"):
            resize_window(wrong, (0, 0, 1, 1), False, True, out)
        with pytest.raises(ValueError, match=r"out must be contiguous \[H, W, 3\] uint8"):
            resize_window(image, (0, 0, 1, 1), False, True, wrong)


@pytest.mark.parametrize("options", [
    {}, {"quality": 95, "subsampling": 0}, {"subsampling": 1}, {"progressive": True}, {"restart_marker_blocks": 3},
    {"optimize": True, "quality": 30},
])  # fmt: skip
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpeg_files_have_pillows_pixels(mode: str, options: dict) -> None:
    random = np.random.default_rng(1)
    for height, width in ((64, 80), (33, 57), (1, 1), (17, 3)):
        data = encoded(picture(random, height, width).convert(mode), **options)
        assert (rgb._plain_jpeg(data) is None) == (mode == "CMYK")
        found = rgb.to_pixels(data)
        assert np.array_equal(found, np.asarray(to_image(data))) and rgb.size_of(found) == (height, width)


def test_other_files_and_other_rules_are_pillows() -> None:
    image = picture(np.random.default_rng(2), 30, 41)
    for orientation in range(1, 9):
        exif = image.getexif()
        exif[0x0112] = orientation
        data = encoded(image, exif=exif)
        assert (rgb._plain_jpeg(data) is None) == (orientation > 1)
        assert np.array_equal(rgb.to_pixels(data), np.asarray(to_image(data)))
    for kind in ("PNG", "WEBP", "BMP"):
        assert np.array_equal(rgb.to_pixels(encoded(image, kind)), np.asarray(to_image(encoded(image, kind))))
    stretched, gray = Levels(3, "8-bit", (10.0, 200.0)), Levels(1, "8-bit", (0.0, 255.0))
    data = encoded(image)
    assert np.array_equal(rgb.to_pixels(data, stretched), np.asarray(to_image(data, stretched)))
    found = rgb.to_pixels(data, gray)
    assert isinstance(found, Bands)
    box = (3, 2, 30, 28)
    expected = np.asarray(to_image(data, gray).crop(box).resize((9, 9), Image.Resampling.BILINEAR))
    assert np.array_equal(rgb.window(found, box, (9, 9), False), expected)


def test_a_damaged_file_is_what_pillow_makes_of_it() -> None:
    """Read with the same pixels, or refused: 400 files, cut off, with flipped bytes, with bytes of others between."""
    random = np.random.default_rng(3)
    outcomes = {"read": 0, "refused": 0}

    def outcome(read) -> np.ndarray | None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return np.asarray(read(data))
        except Exception:
            return None

    for trial in range(400):
        image = picture(random, 40, 56)
        whole = encoded(image, quality=85, progressive=trial % 5 == 0)
        at = int(random.integers(len(whole)))
        if trial % 4 == 0:
            data = whole[:at]
        elif trial % 4 == 1:
            data = whole[:at] + bytes(int(random.integers(1, 30))) + whole[at:]
        elif trial % 4 == 2:
            data = whole[:at] + random.bytes(int(random.integers(1, 5))) + whole[at + 3 :]
        else:
            data = whole[:-2] + whole[int(random.integers(2, at + 3)) :]
        expected, found = outcome(to_image), outcome(rgb.to_pixels)
        assert (found is None) == (expected is None) and (found is None or np.array_equal(found, expected)), trial
        outcomes["refused" if found is None else "read"] += 1
    assert min(outcomes.values()) > 50


def test_a_pillow_that_resizes_otherwise_does_it_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    image = picture(np.random.default_rng(4), 50, 60)
    data = encoded(image, "PNG")
    assert isinstance(rgb.to_pixels(data), np.ndarray)
    rgb.tall_first.cache_clear()
    try:
        with monkeypatch.context() as patched:
            resized = Image.Image.resize
            patched.setattr(Image.Image, "resize", lambda self, *args, **options: resized(self, *args).transpose(0))
            assert rgb.tall_first() is None
            assert isinstance(rgb.to_pixels(data), Image.Image)
            box = (2, 3, 44, 40)
            assert np.array_equal(
                rgb.window(to_image(data), box, (12, 12), True), np.asarray(image.crop(box).resize((12, 12), 3))
            )
    finally:
        rgb.tall_first.cache_clear()
