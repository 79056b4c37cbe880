"""`lightly.transforms`: recipes by lightly's names and arguments, made by our augmentation (`fastjem.compat.views`).

What differs: a blur is a true Gaussian, where lightly's is Pillow's three box blurs; nothing is rounded between steps;
VICReg's views are blurred before they are solarized, and W-MSE's are cut before their colours change; an argument is
meant for every view (lightly's DINO and iBOT leave `cj_strength` out of the second, MSN and VICRegL the jitter's
single strengths out of the small ones, and VICRegL turns half of its small ones upside down whatever `vf_prob` says).
"""

from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from fastjem.compat.lightly.lookup import absent
from fastjem.compat.views import IMAGENET_NORMALIZE, MultiViewTransform, Named, View, view_of
from fastjem.functional import checks
from fastjem.kernels.augment import columns as column

_END = {"normalize": IMAGENET_NORMALIZE}
_ROTATION = {"rr_prob": 0.0, "rr_degrees": None}


def _jitter(strength: float, bright: float, contrast: float, sat: float, hue: float, prob: float = 0.8) -> dict:
    numbers = {"cj_bright": bright, "cj_contrast": contrast, "cj_sat": sat, "cj_hue": hue}
    return {"cj_prob": prob, "cj_strength": strength, **numbers}


def _arguments(jitter: dict, least: float, blur: float, **between: Any) -> dict:
    """Those that SimCLR's transform has; `between` are those that others have beside them, before the sigmas."""
    size = {"input_size": 224, **jitter, "min_scale": least, "random_gray_scale": 0.2, "gaussian_blur": blur}
    return {**size, **between, "sigmas": (0.1, 2), "vf_prob": 0.0, "hf_prob": 0.5, **_ROTATION, **_END}


class _One(Named, View):
    """A transform for a single view."""

    bicubic = False

    def __init__(self, *args: Any, **given: Any):
        view = view_of(type(self).__name__, self.options(args, given), bicubic=self.bicubic)
        super().__init__(view.spec, view.vertical, view.quarter, view.who)


class _Alike(Named, MultiViewTransform):
    """Several views of one distribution: two, or as many as the argument `number` says."""

    number = ""
    bicubic = False

    def __init__(self, *args: Any, **given: Any):
        who = type(self).__name__
        options = self.options(args, given)
        count = checks.integer(who, self.number, options.pop(self.number), 1) if self.number else 2
        super().__init__([view_of(who, options, bicubic=self.bicubic)] * count)


class _MultiCrop(Named, MultiViewTransform):
    """Views of two sizes, of which the arguments are pairs."""

    pairs: tuple[tuple[str, str], ...] = ()  # (argument of a single view, argument here)

    def __init__(self, *args: Any, **given: Any):
        who = type(self).__name__
        options = self.options(args, given)
        counts = options.pop("crop_counts")
        of_both = {name: options.pop(pair) for name, pair in self.pairs}
        if any(len(pair) != len(counts) for pair in of_both.values()):
            names = ", ".join(pair for _, pair in self.pairs)
            checks.fail(who, f"{names} must be as many as crop_counts", [len(pair) for pair in of_both.values()])
        views = []
        for i, count in enumerate(counts):
            view = view_of(who, options | {name: pair[i] for name, pair in of_both.items()})
            views += [view] * checks.integer(who, "crop_counts", count, 0)
        super().__init__(views)


_SIMCLR = _arguments(_jitter(1.0, 0.8, 0.8, 0.8, 0.2), 0.08, 0.5)
_MOCO = _arguments(_jitter(1.0, 0.4, 0.4, 0.4, 0.1), 0.2, 0.5)


class SimCLRViewTransform(_One):
    arguments = _SIMCLR


class SimCLRTransform(_Alike):
    arguments = _SIMCLR


class MoCoV1Transform(SimCLRTransform):
    arguments = _arguments(_jitter(1.0, 0.4, 0.4, 0.4, 0.4), 0.2, 0.0)


class MoCoV2Transform(SimCLRTransform):
    arguments = _MOCO


class DenseCLTransform(MoCoV2Transform):
    arguments = _MOCO


class SimSiamViewTransform(_One):
    arguments = _MOCO


class SimSiamTransform(_Alike):
    arguments = _MOCO


class FastSiamTransform(_Alike):
    number = "num_views"
    arguments = MappingProxyType({"num_views": 4, **_MOCO})


class BYOLView1Transform(_One):
    arguments = _arguments(_jitter(1.0, 0.4, 0.4, 0.2, 0.1), 0.08, 1.0, solarization_prob=0.0)


class BYOLView2Transform(_One):
    arguments = _arguments(_jitter(1.0, 0.4, 0.4, 0.2, 0.1), 0.08, 0.1, solarization_prob=0.2)


class BYOLTransform(MultiViewTransform):
    def __init__(self, view_1_transform: Any = None, view_2_transform: Any = None):
        super().__init__([view_1_transform or BYOLView1Transform(), view_2_transform or BYOLView2Transform()])


class TiCoView1Transform(BYOLView1Transform):
    arguments = BYOLView1Transform.arguments


class TiCoView2Transform(BYOLView2Transform):
    arguments = BYOLView2Transform.arguments


class TiCoTransform(BYOLTransform):
    pass


class MMCRTransform(_Alike):
    number = "k"
    arguments = MappingProxyType({"k": 8, **BYOLView1Transform.arguments})


def _vicreg(least_sigma: float) -> dict:
    jitter = {"input_size": 224, **_jitter(0.5, 0.8, 0.8, 0.4, 0.2), "min_scale": 0.08, "random_gray_scale": 0.2}
    blur = {"solarize_prob": 0.1, "gaussian_blur": 0.5, "sigmas": (least_sigma, 2)}
    return {**jitter, **blur, "vf_prob": 0.0, "hf_prob": 0.5, **_ROTATION, **_END}


class VICRegViewTransform(_One):
    arguments = _vicreg(0.2)


class VICRegTransform(_Alike):
    arguments = _vicreg(0.1)


class WMSETransform(_Alike):
    number = "num_samples"
    bicubic = True
    arguments = MappingProxyType({
        "num_samples": 2, "input_size": 224, "cj_prob": 0.8, "cj_bright": 0.4, "cj_contrast": 0.4, "cj_sat": 0.4,
        "cj_hue": 0.1, "min_scale": 0.2, "random_gray_scale": 0.1, "hf_prob": 0.5, "gaussian_blur": 0.5,
        "sigmas": (0.1, 2.0), **_END,
    })  # fmt: skip


class MAETransform(Named, MultiViewTransform):
    arguments = MappingProxyType({"input_size": 224, "min_scale": 0.2, **_END})

    def __init__(self, *args: Any, **given: Any):
        super().__init__([view_of(type(self).__name__, self.options(args, given), bicubic=True)])


class AIMTransform(MAETransform):
    arguments = MappingProxyType({"input_size": 224, "min_scale": 0.4, **_END})


class CAPITransform(MAETransform):
    arguments = MappingProxyType({"input_size": 224, "min_scale": 0.6, **_END})


class IJEPATransform(_One):
    """One view, not a list of it, as lightly's is."""

    bicubic = True
    arguments = MappingProxyType({"input_size": 224, "min_scale": 0.2, **_END})


def _dino(between: float, views: int, flips: dict) -> dict:
    large = {"global_crop_size": 224, "global_crop_scale": (between, 1.0)}
    small = {"local_crop_size": 96, "local_crop_scale": (0.05, between), "n_local_views": views}
    blur = {"random_gray_scale": 0.2, "gaussian_blur": (1.0, 0.1, 0.5), "sigmas": (0.1, 2), "solarization_prob": 0.2}
    return {**large, **small, **flips, **_jitter(0.5, 0.8, 0.8, 0.4, 0.2), **blur, **_END}


def _dino_view(flips: dict) -> dict:
    blur = {"random_gray_scale": 0.2, "gaussian_blur": 1.0, "sigmas": (0.1, 2), "solarization_prob": 0.2}
    size = {"crop_size": 224, "crop_scale": (0.4, 1.0)}
    return {**size, **flips, **_jitter(0.5, 0.8, 0.8, 0.4, 0.2), **blur, **_END}


_FLIPS = {"hf_prob": 0.5, "vf_prob": 0, "rr_prob": 0, "rr_degrees": None}


class DINOViewTransform(_One):
    bicubic = True
    arguments = _dino_view(_FLIPS)


class DINOTransform(Named, MultiViewTransform):
    arguments = _dino(0.4, 6, _FLIPS)

    def __init__(self, *args: Any, **given: Any):
        who = type(self).__name__
        options = self.options(args, given)
        sizes = {name: options.pop(name) for name in ("global_crop_size", "local_crop_size")}
        scales = {name: options.pop(name) for name in ("global_crop_scale", "local_crop_scale")}
        count = checks.integer(who, "n_local_views", options.pop("n_local_views"), 0)
        blurs = options.pop("gaussian_blur")
        if len(blurs) != 3:
            checks.fail(who, "gaussian_blur must be three probabilities: of both large views and the small ones", blurs)
        solarized = options.pop("solarization_prob")
        views = []
        for i, kind in enumerate(("global", "global", "local")):
            of_view = {"input_size": sizes[f"{kind}_crop_size"], "crop_scale": scales[f"{kind}_crop_scale"]}
            of_view |= {"gaussian_blur": blurs[i], "solarize": solarized if i == 1 else 0.0}
            views.append(view_of(who, options | of_view, bicubic=True))
        super().__init__([*views[:2], *views[2:] * count])


class IBOTViewTransform(_One):
    bicubic = True
    arguments = _dino_view({"hf_prob": 0.5})


class IBOTTransform(DINOTransform):
    arguments = _dino(0.25, 10, {"hf_prob": 0.5})


def _msn(size: dict) -> dict:
    blur = {"gaussian_blur": 0.5, "sigmas": (0.1, 2), "random_gray_scale": 0.2, "hf_prob": 0.5, "vf_prob": 0.0}
    return {**size, **_jitter(1.0, 0.8, 0.8, 0.8, 0.2), **blur, **_END}


class MSNViewTransform(_One):
    arguments = _msn({"crop_size": 224, "crop_scale": (0.3, 1.0)})


class MSNTransform(Named, MultiViewTransform):
    arguments = _msn(
        {
            "random_size": 224,
            "focal_size": 96,
            "random_views": 2,
            "focal_views": 10,
            "random_crop_scale": (0.3, 1.0),
            "focal_crop_scale": (0.05, 0.3),
        }
    )

    def __init__(self, *args: Any, **given: Any):
        who = type(self).__name__
        options = self.options(args, given)
        views = []
        for kind in ("random", "focal"):
            size = {"input_size": options[f"{kind}_size"], "crop_scale": options[f"{kind}_crop_scale"]}
            count = checks.integer(who, f"{kind}_views", options[f"{kind}_views"], 0)
            views += [view_of(who, options | size)] * count
        super().__init__(views)


_CROPS = {
    "crop_sizes": (224, 96), "crop_counts": (2, 6), "crop_min_scales": (0.14, 0.05), "crop_max_scales": (1.0, 0.14)
}  # fmt: skip
_SIZES = (
    ("input_size", "crop_sizes"), ("crop_min_scale", "crop_min_scales"), ("crop_max_scale", "crop_max_scales")
)  # fmt: skip


class SwaVTransform(_MultiCrop):
    pairs = _SIZES
    arguments = MappingProxyType({
        **_CROPS, "hf_prob": 0.5, "vf_prob": 0.0, **_ROTATION, **_jitter(1.0, 0.8, 0.8, 0.8, 0.2),
        "random_gray_scale": 0.2, "gaussian_blur": 0.5, "sigmas": (0.1, 2), **_END,
    })  # fmt: skip


class SmoGViewTransform(_One):
    arguments = MappingProxyType({
        "crop_size": 224, "crop_min_scale": 0.2, "crop_max_scale": 1.0, "gaussian_blur_prob": 0.5, "sigmas": (0.1, 2),
        "solarize_prob": 0.0, "hf_prob": 0.5, **_jitter(0.5, 0.8, 0.8, 0.4, 0.2, prob=1.0), "random_gray_scale": 0.2,
        **_END,
    })  # fmt: skip


class SMoGTransform(_MultiCrop):
    pairs = (*_SIZES, ("gaussian_blur", "gaussian_blur_probs"), ("solarize", "solarize_probs"))
    arguments = MappingProxyType({
        "crop_sizes": (224, 96), "crop_counts": (4, 4), "crop_min_scales": (0.2, 0.05), "crop_max_scales": (1.0, 0.2),
        "gaussian_blur_probs": (0.5, 0.1), "gaussian_blur_sigmas": (0.1, 2), "solarize_probs": (0.0, 0.2),
        "hf_prob": 0.5, **_jitter(0.5, 0.8, 0.8, 0.4, 0.2, prob=1.0), "random_gray_scale": 0.2, **_END,
    })  # fmt: skip


class VICRegLTransform(Named):
    """The views, and behind them their grids [n, n, 2]: where in the image, (x, y) in pixels, the places lie."""

    arguments = MappingProxyType({
        "global_crop_size": 224, "local_crop_size": 96, "n_global_views": 2, "n_local_views": 6,
        "global_crop_scale": (0.2, 1.0), "local_crop_scale": (0.05, 0.2), "global_grid_size": 7, "local_grid_size": 3,
        "global_gaussian_blur_prob": 0.5, "local_gaussian_blur_prob": 0.1, "global_gaussian_blur_sigmas": (0.1, 2),
        "local_gaussian_blur_sigmas": (0.1, 2), "global_solarize_prob": 0.0, "local_solarize_prob": 0.2,
        "hf_prob": 0.5, "vf_prob": 0.0, **_jitter(0.5, 0.8, 0.8, 0.4, 0.2, prob=1.0), "random_gray_scale": 0.2, **_END,
    })  # fmt: skip

    def __init__(self, *args: Any, **given: Any):
        who = type(self).__name__
        options = self.options(args, given)
        self.views: list[tuple[View, int]] = []  # and the side of its grid
        for kind in ("global", "local"):
            of_kind = {
                "input_size": options[f"{kind}_crop_size"],
                "crop_scale": options[f"{kind}_crop_scale"],
                "gaussian_blur": options[f"{kind}_gaussian_blur_prob"],
                "sigmas": options[f"{kind}_gaussian_blur_sigmas"],
                "solarize": options[f"{kind}_solarize_prob"],
            }
            side = checks.integer(who, f"{kind}_grid_size", options[f"{kind}_grid_size"], 1)
            count = checks.integer(who, f"n_{kind}_views", options[f"n_{kind}_views"], 0)
            shared = {name: value for name, value in options.items() if not name.startswith(("global_", "local_"))}
            self.views += [(view_of(who, shared | of_kind), side)] * count

    def __call__(self, image: Any) -> list[Tensor]:
        cut = [(view.cut(image), side) for view, side in self.views]
        return [view for (view, _, _), _ in cut] + [_grid(row, turned, side) for (_, row, turned), side in cut]


def _grid(row: Any, upside_down: bool, side: int) -> Tensor:
    """lightly's: `side` places from the window's edge to its other edge, and half a cell further."""
    top, left, height, width = (float(x) for x in row[column.TOP : column.WIDTH + 1])
    x = torch.linspace(left, left + width, side) + width / side / 2
    y = torch.linspace(top, top + height, side) + height / side / 2
    x = x.flip(0) if row[column.FLIP] else x
    y = y.flip(0) if upside_down else y
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)


def __getattr__(name: str) -> Any:
    raise absent(__name__, name)
