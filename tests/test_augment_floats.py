"""augment and crop_resize on float32 levels and on any number of channels: against torchvision on floats, against plain
formulas, and against the specification in float64."""

import itertools

import pytest
import torch
from conftest import INTERPRETING
from torch import Tensor
from view_tables import neutral, pictures, torchvisions, view_table

import fastjem.functional as F
from fastjem.kernels.augment import columns as table
from fastjem.kernels.augment.reference import blur_matrix

augment = pytest.mark.parametrize("op", ["augment"])
crop = pytest.mark.parametrize("op", ["crop_resize"])
FINE = 2e-3  # of a level: float32 has 1.5e-5 near 255, and a blur adds 21 values a direction


def levels(channels: int) -> dict:
    """Options with which the result is in levels."""
    return {"mean": (0.0,) * channels, "std": (1 / 255,) * channels}


def fractions(count: int, height: int, width: int, channels: int = 3, seed: int = 0) -> Tensor:
    """[B, H, W, C] float32: `pictures` with fractions of levels, and black and white themselves."""
    several = [pictures(count, height, width, seed + i) for i in range(-(-channels // 3))]
    x = torch.cat(several, 3)[..., :channels].float()
    g = torch.Generator().manual_seed(seed)
    return (x + torch.rand(x.shape, generator=g) - 0.5).clamp(0, 255)


STEPS = [
    ("flip", [1]),
    ("solarize", [1]),
    ("grayscale", [1]),
    ("brightness", [0, 0.3, 1.7]),
    ("contrast", [0, 0.3, 1.7]),
    ("saturation", [0, 0.3, 1.7]),
    ("hue", [-0.5, -0.21, 0.05, 0.3, 0.5]),
    ("sigma", [0.1, 0.34, 1.1, 2.0, 5.5]),
]


@augment
@pytest.mark.parametrize("step, values", STEPS, ids=[step for step, _ in STEPS])
def test_each_step_is_torchvisions_on_floats(op, step, values, implementation):
    parameters = neutral(len(values))
    parameters[:, getattr(table, step.upper())] = torch.tensor(values)
    images = fractions(len(values), 27, 34)
    ours = F.augment(images.to(implementation.device), parameters.to(implementation.device), **levels(3)).cpu()
    theirs = torch.stack([torchvisions(*pair) for pair in zip(images, parameters, strict=True)])
    off = (ours - theirs).abs()
    if step == "solarize":  # it jumps at its threshold, where the last digit of a float may lie on either side
        assert (off > FINE).float().mean() < 1e-3
        off = off[(images.permute(0, 3, 1, 2) - 128).abs() > FINE]
    assert off.max() < (2e-2 if step == "hue" else FINE)  # torchvision's sixths of a turn are floats of its own


@augment
def test_all_orders_are_torchvisions_on_floats(op, implementation):
    """Of the same steps in every order, without solarizing, which may jump."""
    images, parameters = fractions(24, 15, 30), view_table(24, seed=3, solarize=0)
    ours = F.augment(images.to(implementation.device), parameters.to(implementation.device), **levels(3)).cpu()
    theirs = torch.stack([torchvisions(*pair) for pair in zip(images, parameters, strict=True)])
    off = (ours - theirs).abs()
    assert off.max() < 0.25 and (off > 2e-2).float().mean() < 1e-3  # hue jumps where two channels are all but equal
    other = view_table(24, seed=3, solarize=0)
    other[:, table.ORDER] = (other[:, table.ORDER] + 7) % 24
    elsewhere = F.augment(images.to(implementation.device), other.to(implementation.device), **levels(3)).cpu()
    assert ((elsewhere - ours).abs().amax((1, 2, 3)) > 1).sum() > 8  # in another order it is another image


@augment
@pytest.mark.parametrize("floats", [False, True], ids=["uint8", "float32"])
@pytest.mark.parametrize("channels", [1, 2, 5])
def test_each_step_of_any_channels(op, channels, floats, implementation):
    """By formulas that are written here: what needs red, green and blue does nothing."""
    x = fractions(6, 16, 18, channels, seed=4)
    images = x if floats else x.to(torch.uint8)
    wide = images.permute(0, 3, 1, 2).double()

    def found(**columns: float) -> Tensor:
        parameters = neutral(6)
        for name, value in columns.items():
            parameters[:, getattr(table, name.upper())] = value
        y = F.augment(images.to(implementation.device), parameters.to(implementation.device), **levels(channels))
        return y.cpu().double()

    def off(y: Tensor, expected: Tensor) -> float:
        return float((y - expected).abs().max())

    def contrast(y: Tensor, factor: float) -> Tensor:
        mean = y.flatten(1).mean(1).view(-1, 1, 1, 1)  # of all channels together
        return (y * factor + mean * (1 - factor)).clamp(0, 255)

    assert off(found(), wide) < FINE
    assert off(found(flip=1), wide.flip(3)) < FINE
    assert off(found(brightness=1.6), (1.6 * wide).clamp(0, 255)) < FINE
    assert off(found(contrast=0.4), contrast(wide, 0.4)) < FINE
    assert off(found(saturation=0.1, hue=0.3, grayscale=1), wide) < FINE
    both = {"brightness": 1.5, "contrast": 1.7, "saturation": 0.2}
    first = table.ORDERS.index((2, 0, 3, 1))
    assert off(found(**both, order=first), contrast((1.5 * wide).clamp(0, 255), 1.7)) < FINE
    last = table.ORDERS.index((1, 3, 2, 0))
    assert off(found(**both, order=last), (1.5 * contrast(wide, 1.7)).clamp(0, 255)) < FINE
    down, across = (blur_matrix(torch.full((6,), 1.3).double(), size)[:, None] for size in (16, 18))
    assert off(found(sigma=1.3), down @ wide @ across.mT) < FINE
    inverted = torch.where(wide >= 128, 255 - wide, wide)
    assert off(found(solarize=1), inverted) < FINE


SHAPES = [(2, 1, 1, 3), (24, 9, 21, 3), (3, 33, 40, 1), (1, 12, 131, 5), (5, 9, 8, 4), (2, 6, 7, 17)]
# The interpreter takes a minute for the large ones.
LARGE = [pytest.mark.exhaustive] if INTERPRETING else []
VALUES = [
    pytest.param(shape, floats, dtype, marks=LARGE if floats != (dtype == torch.bfloat16) and shape[1] > 8 else ())
    for shape, floats, dtype in itertools.product(SHAPES, [False, True], [torch.float32, torch.bfloat16])
]


@augment
@pytest.mark.parametrize("shape, floats, dtype", VALUES, ids=str)
def test_value_and_layouts_of_any_channels(op, shape, floats, dtype, implementation, poisoned):
    """Of everything at once against the specification in float64; solarizing at 127.5 doesn't jump there."""
    images, parameters = fractions(*shape, seed=1), view_table(shape[0], seed=shape[0] + 1)
    images = images if floats else images.to(torch.uint8)
    channels = shape[3]
    normal = {"mean": [0.4 + 0.01 * c for c in range(channels)], "std": [0.2 + 0.02 * c for c in range(channels)]}
    expected = F.augment(images, parameters.double(), dtype=torch.float64, threshold=127.5, **normal)
    half, interpreted = dtype != torch.float32, implementation.name == "triton" and implementation.device == "cpu"
    tolerance = torch.finfo(dtype).eps * expected.abs() * (0.5001 if half and not interpreted else 1)
    tolerance += 1e-4 if half else 3e-5
    x, p = images.to(implementation.device), parameters.to(implementation.device)
    planes = x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    for some, last in ((x, True), (planes, False)):
        y = F.augment(some, p, dtype=dtype, channels_last=last, threshold=127.5, **normal)
        assert y.dtype == dtype and y.shape == (shape[0], channels, *shape[1:3])
        assert y.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
        assert ((y.cpu().double() - expected).abs() <= tolerance).all()


@augment
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_floats_of_whole_levels_are_uint8s(op, channels, implementation):
    images, parameters = fractions(6, 12, 20, channels).to(torch.uint8), view_table(6, seed=8)
    x, p = images.to(implementation.device), parameters.to(implementation.device)
    assert torch.equal(F.augment(x, p, **levels(channels)), F.augment(x.float(), p, **levels(channels)))


@augment
@pytest.mark.parametrize("channels", [2, 3])
def test_floats_beyond_black_and_white(op, channels, implementation):
    """Are black and white from the first step on; NaN is black."""
    images, parameters = fractions(4, 10, 12, channels), view_table(4, seed=9)
    near = images.clone()
    given = [float("nan"), float("inf"), -float("inf"), -3.0, 255.5, 1e30]
    for i, (wild, tame) in enumerate(zip(given, (0, 255, 0, 0, 255, 255), strict=True)):
        images[:, i, i], near[:, i, i] = wild, tame
    p = parameters.to(implementation.device)
    a, b = (F.augment(x.to(implementation.device), p, **levels(channels)) for x in (images, near))
    assert torch.equal(a, b) and not a.isnan().any()


@augment
def test_an_image_of_many_channels_alone_has_the_bits_it_has_in_a_batch(op, implementation):
    images, p = fractions(7, 16, 18, 5).to(implementation.device), view_table(7, seed=5).to(implementation.device)
    together = F.augment(images, p, **levels(5))
    assert torch.equal(together, F.augment(images, p, **levels(5)))
    if implementation.name != "reference":  # torch's sums depend on the number of threads
        assert torch.equal(together[4:5], F.augment(images[4:5], p[4:5], **levels(5)))


@augment
@pytest.mark.parametrize("channels", [3, 5])
def test_floats_compile_in_one_graph(op, channels, implementation):
    images, p = fractions(3, 8, 18, channels).to(implementation.device), view_table(3).to(implementation.device)
    torch._dynamo.reset()
    step = torch.compile(lambda x, q: F.augment(x, q, **levels(channels)) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(step(images, p), F.augment(images, p, **levels(channels)) + 1)


def resized(window: Tensor, size: int, bicubic: bool) -> Tensor:
    """[h, w, C] -> [size, size, C] in float64, by torch."""
    x = window.double().permute(2, 0, 1)[None]
    mode = "bicubic" if bicubic else "bilinear"
    return torch.nn.functional.interpolate(x, (size, size), mode=mode, antialias=True)[0].permute(1, 2, 0)


@crop
@pytest.mark.parametrize("bicubic", [False, True], ids=["bilinear", "bicubic"])
@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("height, width, size", [(40, 53, 24), (32, 32, 32), (9, 14, 31), (1, 1, 3), (70, 3, 5)])
def test_the_values_of_a_window_of_floats(op, channels, height, width, size, bicubic, implementation, poisoned):
    """torch's in float64, rounded nowhere; bicubic ones may go beyond the image's values."""
    images = fractions(3, height, width, channels, seed=2)
    few = 3 if implementation.name == "triton" and implementation.device == "cpu" else 8
    indices = torch.tensor([2, 0, 1, 1, 2, 0, 0, 2])[:few]
    p = view_table(few, seed=4, height=height, width=width)
    p[0, : table.WIDTH + 1] = torch.tensor([0, 0, height, width])
    ours = F.crop_resize(*(x.to(implementation.device) for x in (images, indices, p)), size=size, bicubic=bicubic)
    assert ours.shape == (few, size, size, channels) and ours.dtype == torch.float32
    for view, index, (top, left, h, w) in zip(ours.cpu(), indices, p[:, :4].int().tolist(), strict=True):
        expected = resized(images[index, top : top + h, left : left + w], size, bicubic)
        assert (view.double() - expected).abs().max() < 1e-3


@crop
def test_bicubic_floats_go_beyond_the_image(op, implementation):
    """As torch's do: what is cut off before a view is augmented isn't cut off between the two axes."""
    images = torch.zeros(1, 12, 12, 2)
    images[:, :, 6:] = 255
    p = neutral(1)
    p[0, : table.WIDTH + 1] = torch.tensor([0, 0, 12, 12])
    indices = torch.zeros(1, dtype=torch.int64)
    ours = F.crop_resize(*(x.to(implementation.device) for x in (images, indices, p)), size=24, bicubic=True).cpu()
    assert ours.min() < -5 and ours.max() > 260
    assert (ours[0].double() - resized(images[0], 24, True)).abs().max() < 1e-3


@crop
@pytest.mark.parametrize("channels", [1, 2, 4, 5])
def test_windows_of_uint8_are_each_channels_own(op, channels, implementation):
    images = fractions(4, 20, 18, channels, seed=6).to(torch.uint8)
    indices, p = torch.tensor([2, 0, 2]), view_table(3, seed=4, height=20, width=18)
    x, i, p = (y.to(implementation.device) for y in (images, indices, p))
    found = F.crop_resize(x, i, p, size=7, bicubic=True)
    assert found.shape == (3, 7, 7, channels) and found.dtype == torch.uint8
    for c in range(channels):
        gray = x[..., c : c + 1].expand(-1, -1, -1, 3).contiguous()
        assert torch.equal(found[..., c], F.crop_resize(gray, i, p, size=7, bicubic=True)[..., 0])
