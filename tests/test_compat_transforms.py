"""Transforms under lightly's names: their arguments, and, where chance is taken out, their pixels."""

import importlib
import inspect

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("lightly.transforms", reason="lightly is not installed")
import lightly.transforms as theirs
from lightly.transforms.ijepa_transform import IJEPATransform

import fastjem.compat.lightly.transforms as ours
from fastjem.compat.views import Named, View

IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 48, 3)).astype(np.uint8)).resize(
    (96, 96), Image.Resampling.BICUBIC
)
STILL = {
    "cj_prob": 0.0, "random_gray_scale": 0.0, "gaussian_blur": 0.0, "min_scale": 1.0, "hf_prob": 0.0, "vf_prob": 0.0,
    "solarization_prob": 0.0, "solarize_prob": 0.0, "global_crop_scale": (1.0, 1.0), "local_crop_scale": (1.0, 1.0),
    "random_crop_scale": (1.0, 1.0), "focal_crop_scale": (1.0, 1.0), "crop_min_scales": (1.0, 1.0),
    "crop_max_scales": (1.0, 1.0), "crop_scale": (1.0, 1.0), "crop_min_scale": 1.0, "gaussian_blur_prob": 0.0,
    "gaussian_blur_probs": (0.0, 0.0), "solarize_probs": (0.0, 0.0), "global_gaussian_blur_prob": 0.0,
    "local_gaussian_blur_prob": 0.0, "local_solarize_prob": 0.0,
}  # fmt: skip
NAMED = sorted(
    name for name, value in vars(ours).items()
    if inspect.isclass(value) and issubclass(value, Named) and not name.startswith("_") and name != "Named"
)  # fmt: skip
SIZES = {"input_size": 40, "crop_size": 40, "global_crop_size": 40, "local_crop_size": 24, "random_size": 40,
         "focal_size": 24, "crop_sizes": (40, 24)}  # fmt: skip


def other_of(name: str):
    return IJEPATransform if name == "IJEPATransform" else getattr(theirs, name)


def still(name: str, **changes) -> tuple:
    """Ours and lightly's without chance, of small views."""
    parameters = inspect.signature(getattr(ours, name)).parameters
    given = {key: value for key, value in (STILL | SIZES | changes).items() if key in parameters}
    if name in ("DINOTransform", "IBOTTransform"):
        given["gaussian_blur"] = (0.0, 0.0, 0.0)
    return getattr(ours, name)(**given), other_of(name)(**given)


def views(transform) -> list[torch.Tensor]:
    with torch.random.fork_rng():
        found = transform(IMAGE)
    return found if isinstance(found, list) else [found]


def assert_near(found: list[torch.Tensor], expected: list[torch.Tensor], levels: float) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype == torch.float32
        difference = (a - b).abs()
        assert difference.max() <= levels / 255 / 0.22 + 1e-4, difference.max() * 255 * 0.22


@pytest.mark.parametrize("name", NAMED)
def test_arguments_are_lightlys(name):
    mine, other = (inspect.signature(x).parameters for x in (getattr(ours, name), other_of(name)))
    assert [(p.name, p.default) for p in mine.values()] == [(p.name, p.default) for p in other.values()]
    with pytest.raises(TypeError, match=rf"{name}: got an unexpected keyword argument 'siez'; it takes "):
        getattr(ours, name)(siez=32)


@pytest.mark.parametrize("name", [name for name in NAMED if not name.startswith("VICRegL")])
def test_the_whole_image_is_lightlys(name):
    mine, other = still(name)
    found, expected = views(mine), views(other)
    if "hf_prob" not in mine.arguments:  # those flip by chance: each is compared with the nearer of the two
        expected = [
            min((b, b.flip(-1)), key=lambda x: (a - x).abs().max()) for a, b in zip(found, expected, strict=True)
        ]
    random_of_wmse = name == "WMSETransform"
    assert_near(found, expected, 1.5 if random_of_wmse else 1.01)


@pytest.mark.parametrize(
    ("changes", "levels"),
    [
        ({"hf_prob": 1.0}, 1.01),
        ({"vf_prob": 1.0}, 1.01),
        ({"rr_prob": 1.0}, 1.01),
        ({"hf_prob": 1.0, "vf_prob": 1.0, "rr_prob": 1.0}, 1.01),
        ({"random_gray_scale": 1.0}, 1.6),
        ({"normalize": None}, 1.01),
        ({"normalize": {"mean": [0.5, 0.4, 0.3], "std": [0.3, 0.25, 0.22]}}, 1.01),
        ({"input_size": (32, 48)}, 1.01),
    ],
)
def test_steps_are_lightlys(changes, levels):
    assert_near(views(still("SimCLRTransform", **changes)[0]), views(still("SimCLRTransform", **changes)[1]), levels)


def test_solarizing_and_blurring_and_jitter():
    mine, other = still("BYOLView1Transform", solarization_prob=1.0)
    a, b = views(mine)[0], views(other)[0]
    # A level at the threshold goes the one way or the other.
    assert ((a - b).abs() < 2 / 255 / 0.22).float().mean() > 0.99
    mine, other = still("SimCLRTransform", gaussian_blur=1.0, sigmas=(1.5, 1.5))
    a, b = views(mine)[0], views(other)[0]
    assert (a - b).abs().mean() * 255 * 0.22 < 1.5
    assert (a - views(still("SimCLRTransform")[1])[0]).abs().mean() * 255 * 0.22 > 5
    mine, other = still("SimCLRTransform", cj_prob=1.0, cj_bright=0.0, cj_contrast=0.0, cj_sat=0.0, cj_hue=0.0)
    assert_near(views(mine), views(other), 1.6)


def test_what_is_drawn_is_spread_as_lightlys():
    """The mean brightness of views and its spread, over 200 of them, within what chance makes."""
    torch.manual_seed(0)
    np.random.seed(0)
    figures = []
    for module in (ours, theirs):
        transform = module.SimCLRViewTransform(input_size=16, normalize=None)
        means = torch.stack([transform(IMAGE).mean() for _ in range(200)])
        figures.append((means.mean(), means.std()))
    (mean, spread), (its_mean, its_spread) = figures
    assert (mean - its_mean).abs() < 4 * its_spread * (2 / 200) ** 0.5
    assert 0.75 < spread / its_spread < 1.33


def test_vicregls_grids_are_of_the_windows():
    torch.manual_seed(0)
    options = {"global_crop_size": 32, "local_crop_size": 16, "n_local_views": 3}
    found = ours.VICRegLTransform(**options)(IMAGE)
    expected = theirs.VICRegLTransform(**options)(IMAGE)
    assert [x.shape for x in found] == [x.shape for x in expected]
    whole = {"global_crop_scale": (1.0, 1.0), "local_crop_scale": (1.0, 1.0), "hf_prob": 0.0}
    for changes in ({}, {"hf_prob": 1.0}):
        mine, other = (x.VICRegLTransform(**(options | whole | changes))(IMAGE) for x in (ours, theirs))
        for i, (a, b) in enumerate(zip(mine[5:], other[5:], strict=True)):
            # lightly turns half of the small views upside down, whatever vf_prob says.
            torch.testing.assert_close(*((a, b) if i < 2 else (a[..., 0], b[..., 0])))


def test_seeds_and_workers():
    transform = ours.SimCLRTransform(input_size=24)
    torch.manual_seed(3)
    first = transform(IMAGE)
    second = transform(IMAGE)
    torch.manual_seed(3)
    again = transform(IMAGE)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], first[1]) and not torch.equal(first[0], second[0])
    as_tensor = torch.from_numpy(np.asarray(IMAGE).copy()).permute(2, 0, 1)
    for image in (np.asarray(IMAGE), as_tensor, IMAGE.convert("RGBA")):
        torch.manual_seed(3)
        assert all(torch.equal(a, b) for a, b in zip(first, transform(image), strict=True))
    gray = transform(IMAGE.convert("L"))
    assert gray[0].shape == (3, 24, 24)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: ours.SimCLRTransform(rr_prob=0.5, rr_degrees=30),
            r"SimCLRTransform: rr_degrees must be None.*, got 30",
        ),
        (
            lambda: ours.SimCLRTransform(rr_prob=0.5, input_size=(32, 48)),
            r"SimCLRTransform: with rr_prob, views must be",
        ),
        (lambda: ours.SimCLRTransform(cj_hue=0.7), "SimCLRTransform: a view's jitter must be like"),
        (lambda: ours.DINOTransform(gaussian_blur=(0.5, 0.5)), "DINOTransform: gaussian_blur must be three"),
        (lambda: ours.SwaVTransform(crop_sizes=(32,)), "SwaVTransform: crop_sizes, crop_min_scales"),
        (lambda: ours.SimCLRTransform(vf_prob=1.5), r"SimCLRTransform: vf_prob must be in \[0, 1\], got 1\.5"),
        (lambda: ours.FastSiamTransform(num_views=0), "FastSiamTransform: num_views must be at least 1, got 0"),
        (lambda: ours.MAETransform()(torch.zeros(3, 8, 8)), r"MAETransform: the image must be Pillow's.*float32"),
        (lambda: ours.VICRegLTransform()(None), r"VICRegLTransform: the image must be Pillow's, .*NoneType"),
        (lambda: ours.IJEPATransform()("a.png"), r"IJEPATransform: the image must be Pillow's, .*str"),
    ],
)
def test_what_cannot_be_done_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_every_transform_of_lightly_is_here_or_told():
    for name in dir(theirs):
        if (
            name.startswith("_")
            or inspect.ismodule(getattr(theirs, name))
            or name == "torchvision_transforms_v2_available"
        ):
            continue
        try:
            getattr(ours, name)
        except ImportError as error:
            assert "isn't in fastjem: " in str(error), name
    assert isinstance(ours.SimCLRTransform().transforms[0], View)
    assert (
        importlib.import_module("fastjem.compat.lightly.transforms.dino_transform").DINOTransform is ours.DINOTransform
    )
