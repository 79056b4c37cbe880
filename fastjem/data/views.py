"""Recipes of augmentation as data: nothing here knows who draws the parameters or who moves the pixels.

Each recipe names its source. Crops are RandomResizedCrop (area uniform in `scale`, aspect log-uniform in `ratio`,
`tries` attempts, then the centre), where `ratio` is of a window's aspect to its view's: how much is stretched is the
same whatever the shape of views, and for squares `ratio` is the window's own aspect, width over height; jitter factors
are (brightness, contrast, saturation, hue), hue in turns, applied in random order. All steps in order: crop, flip,
jitter, grayscale, blur, solarize, normalise. Where a source flips last it is the same, as a flip can change places with
every step behind the crop. Blurs are Gaussians of the sigma drawn, cut off at three of it, where sources take Pillow's
three box blurs, 23 taps or 9.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastjem.data.size import Size, scaled, shorter
from fastjem.errors import UserError, nearest

MEAN = (0.485, 0.456, 0.406)  # of ImageNet; 1 is white
STD = (0.229, 0.224, 0.225)
OTHER_MEAN, OTHER_STD = 0.5, 0.25  # of every channel where they aren't red, green and blue: nobody's statistics
SMALL_SCALE = (0.05, 0.14)  # the area of a small view where a recipe has none: SwAV's
SMALL_VIEW = (96, 224)  # a small view's pixels for these of a large one
LARGEST_WITHOUT_BLUR = 64  # at 64 pixels and less a blur removes what is left to see; CIFAR recipes leave it out

Value = bool | int | float | str | Sequence


@dataclass(frozen=True)
class ViewSpec:
    """One view of an image. Probabilities are of the step being applied at all."""

    size: Size = 224  # pixels: the side of a square, or (height, width)
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    tries: int = 10
    bicubic: bool = False
    flip: float = 0.5
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    jitter_probability: float = 0.8
    grayscale: float = 0.2
    blur: float = 0.5
    sigma: tuple[float, float] = (0.1, 2.0)
    solarize: float = 0.0  # threshold 128
    mean: tuple[float, ...] = MEAN  # of each channel
    std: tuple[float, ...] = STD

    def with_channels(self, channels: int) -> "ViewSpec":
        """The same view of images of so many channels: where they aren't three, without the steps that need colours,
        and normalised by `OTHER_MEAN` and `OTHER_STD`, but where the recipe has one number for all three."""
        if channels == len(self.mean):
            return self
        mean = self.mean[0] if len(set(self.mean)) == 1 else OTHER_MEAN
        std = self.std[0] if len(set(self.std)) == 1 else OTHER_STD
        jitter = (*self.jitter[:2], 0.0, 0.0)
        return replace(self, mean=(mean,) * channels, std=(std,) * channels, jitter=jitter, grayscale=0.0)


@dataclass(frozen=True)
class MaskSpec:
    """The mask of one view."""

    view: int  # its number among the views
    grid: tuple[int, int]  # patches in its height and width
    share: float  # of its patches that is hidden; of "block" the largest one
    masking: str  # how it is drawn, a name in `fastjem.data.masking.MASKINGS`
    drops: bool = False  # the encoder is given the visible patches alone
    least: float = 0.0  # of "block": each image's share is uniform between this and `share`
    images: float = 1.0  # of "block": the share of images that have a mask at all


@dataclass(frozen=True)
class Recipe:
    """`large[i]` is the i-th full-size view (the last one repeats); `small` is multi-crop's, where there is one. Of a
    recipe without, small views are as the last large one, of an area in `SMALL_SCALE`.
    """

    large: tuple[ViewSpec, ...]
    small: ViewSpec | None = None


_BYOL = ViewSpec(bicubic=True, blur=1.0)
_BYOL_PAIR = (_BYOL, replace(_BYOL, blur=0.1, solarize=0.2))
_SWAV = ViewSpec(scale=(0.14, 1.0), jitter=(0.8, 0.8, 0.8, 0.2), std=(0.228, 0.224, 0.225))
_SIMCLR = ViewSpec(jitter=(0.8, 0.8, 0.8, 0.2))
_MSN = ViewSpec(scale=(0.3, 1.0), jitter=(0.4, 0.4, 0.4, 0.1))
_PATCH = ViewSpec(
    scale=(0.25, 0.25), ratio=(1.0, 1.0), jitter=(0.4, 0.4, 0.4, 0.2), blur=0.1, solarize=0.1, mean=(0.5,) * 3,
    std=(0.5,) * 3,
)  # fmt: skip
_LEJEPA = ViewSpec(scale=(0.3, 1.0), bicubic=True, solarize=0.2)
_PLAIN = ViewSpec(bicubic=True, jitter_probability=0.0, grayscale=0.0, blur=0.0)


def _dino(least: float, blurs: tuple[float, float, float], between: float) -> Recipe:
    """DINO and its kin: large views of an area from `between`, small ones up to it; the second is solarized."""
    first, second, small = (replace(_BYOL, blur=blur) for blur in blurs)
    large = (replace(first, scale=(between, 1.0)), replace(second, scale=(between, 1.0), solarize=0.2))
    return Recipe(large, replace(small, scale=(least, between)))


RECIPES: dict[str, Recipe] = {
    # Chen et al. 2020, in the torch form that lightly and solo-learn use: bilinear, normalised
    "simclr": Recipe((_SIMCLR,)),
    # Chen et al. 2020, google-research/simclr data_util.py: bicubic, up to 100 tries, neither mean nor deviation
    "simclr_tf": Recipe((replace(_SIMCLR, bicubic=True, tries=100, mean=(0.0,) * 3, std=(1.0,) * 3),)),
    # Chen et al. 2020 (MoCo v2), main_moco.py --aug-plus; SimSiam takes it too
    "mocov2": Recipe((ViewSpec(scale=(0.2, 1.0), jitter=(0.4, 0.4, 0.4, 0.1)),)),
    # Grill et al. 2020, table 6, by torchvision's definitions of the steps (the authors' code adds brightness)
    "byol": Recipe(_BYOL_PAIR),
    # Chen et al. 2021 (MoCo v3), main_moco.py with the flags of its ResNet-50; its vision transformers have "byol"
    "mocov3": Recipe(tuple(replace(view, scale=(0.2, 1.0)) for view in _BYOL_PAIR)),
    # Zbontar et al. 2021, main.py
    "barlow": Recipe(_BYOL_PAIR),
    # Bardes et al. 2022, augmentations.py
    "vicreg": Recipe(_BYOL_PAIR),
    # Caron et al. 2020, src/multicropdataset.py; the third deviation is theirs
    "swav": Recipe((_SWAV,), replace(_SWAV, scale=(0.05, 0.14))),
    # Caron et al. 2020, scripts/deepclusterv2_400ep_pretrain.sh
    "deepcluster": Recipe((replace(_SWAV, scale=(0.08, 1.0)),), replace(_SWAV, scale=(0.05, 0.14))),
    # Caron et al. 2021, main_dino.py
    "dino": _dino(0.05, (1.0, 0.1, 0.5), 0.4),
    # Zhou et al. 2022, the flags of iBOT's README
    "ibot": _dino(0.05, (1.0, 0.1, 0.5), 0.25),
    # Oquab et al. 2023 as its code ran: it passed the share that isn't blurred (facebookresearch/dinov3#286)
    "dinov2": _dino(0.05, (0.0, 0.9, 0.5), 0.32),
    # Oquab et al. 2023 as its code reads
    "dinov2_intended": _dino(0.05, (1.0, 0.1, 0.5), 0.32),
    # Assran et al. 2022, msn_vits16.yaml: colours at half of SimCLR's strength
    "msn": Recipe((_MSN,), replace(_MSN, scale=(0.05, 0.3))),
    # Zheng et al. 2021, data/augmentation.py: the student's view is changed as MoCo v2's, the target's cut and flipped
    "ressl": Recipe(
        (
            ViewSpec(scale=(0.2, 1.0), jitter=(0.4, 0.4, 0.4, 0.1)),
            ViewSpec(scale=(0.2, 1.0), jitter_probability=0.0, grayscale=0.0, blur=0.0),
        ),
        # Small views are queries, so they are changed as the student's view is.
        ViewSpec(scale=SMALL_SCALE, jitter=(0.4, 0.4, 0.4, 0.1)),
    ),
    # Ermolov et al. 2021, README's flags for ImageNet-100, and cfg.py's defaults, which are for CIFAR
    "wmse": Recipe((replace(_SIMCLR, blur=0.0),)),
    "wmse_cifar": Recipe((ViewSpec(scale=(0.2, 1.0), jitter=(0.4, 0.4, 0.4, 0.1), grayscale=0.1, blur=0.0),)),
    # Tong et al. 2023, dataset/datasets.py and aug.py: fixed-scale square patches
    "empssl": Recipe((_PATCH,)),
    # Balestriero and LeCun 2025, lejepa's README: one distribution of augmentations for all views
    "lejepa": Recipe((_LEJEPA,), replace(_LEJEPA, scale=(0.05, 0.3))),
    # Wu et al. 2026, appendix A.1: the same
    "visreg": Recipe((_LEJEPA,), replace(_LEJEPA, scale=(0.05, 0.3))),
    # Bardes et al. 2022 (VICRegL), main_vicregl.py
    "vicregl": Recipe(
        tuple(replace(view, scale=(0.4, 1.0)) for view in _BYOL_PAIR), replace(_BYOL, blur=0.5, scale=(0.08, 0.4))
    ),
    # Misra and van der Maaten 2020, section 3.1: the image is cut and its colours changed, the pieces' as well
    "pirl": Recipe((ViewSpec(scale=(0.2, 1.0), jitter=(0.4, 0.4, 0.4, 0.4), blur=0.0),)),
    # Darcet et al. 2025, default_pretrain_config.yaml
    "capi": Recipe((replace(_PLAIN, scale=(0.6, 1.0)),)),
    # He et al. 2022, main_pretrain.py
    "mae": Recipe((replace(_PLAIN, scale=(0.2, 1.0)),)),
    # Baevski et al. 2022, mae_image_dataset.py of fairseq's data2vec
    "data2vec": Recipe((replace(_PLAIN, scale=(0.2, 1.0)),)),
    # Radford et al. 2021, section 2.4: a random square crop is all; both images of a pair are cut alike in distribution
    "pairs": Recipe((replace(_PLAIN, scale=(0.5, 1.0), flip=0.0),)),
    # Assran et al. 2023, configs/in1k_vith14_ep300.yaml: bilinear, no flip, no colour
    "ijepa": Recipe((replace(_PLAIN, scale=(0.3, 1.0), bicubic=False, flip=0.0),)),
}


@dataclass(frozen=True)
class Views:
    """What a method wants to see: how many views of which recipe, and what a mask hides of the large ones."""

    large: int = 2
    small: int = 0
    recipe: str = "simclr"
    sources: int = 1  # of images: view i is cut from the image of source i % sources
    mask: float = 0.0  # the share of the patches that is hidden; of "block" the largest one
    masking: str = "even_block"  # how it is drawn, a name in `fastjem.data.masking.MASKINGS`
    drops: bool = False  # masked patches aren't replaced: the encoder is given the visible ones alone
    least_mask: float = 0.0  # of "block": each image's share is uniform between this and `mask`
    masked_images: float = 1.0  # of "block": the share of images that have a mask at all
    masked_views: tuple[int, ...] | None = None  # which of the large views have masks; None: all of them

    def specs(
        self, image_size: Size, *, patch: int = 1, blur: bool | None = None, changes: Mapping[str, Value] | None = None,
        channels: int = 3,
    ) -> list[ViewSpec]:  # fmt: skip
        """The large views and then the small ones, 96/224 of the image size, each side rounded to whole patches.

        Args:
            blur: None: as the recipe says, where the shorter side is above 64 pixels.
            changes: fields of all views, "large.NAME" of the large or "small.NAME" of the small ones alone:
                `{"flip": 0, "small.scale": "0.05,0.2"}`.
            channels: of the images, see `ViewSpec.with_channels`.

        Raises:
            UserError: for a recipe or field that isn't there, or a value that isn't one.
        """
        if self.recipe not in RECIPES:
            raise nearest("recipe", self.recipe, RECIPES)
        recipe = RECIPES[self.recipe]
        if blur is None:
            blur = shorter(image_size) > LARGEST_WITHOUT_BLUR
        specs = [replace(recipe.large[min(i, len(recipe.large) - 1)], size=image_size) for i in range(self.large)]
        if self.small:
            small = recipe.small or replace(recipe.large[-1], scale=SMALL_SCALE)
            specs += [replace(small, size=scaled(image_size, SMALL_VIEW, patch))] * self.small
        elif wrong := [key for key in changes or {} if key.startswith("small.")]:
            raise UserError(f"--view {wrong[0]}: there are no small views here (none at 64 pixels and less)")
        specs = [spec.with_channels(channels) for spec in specs]
        specs = specs if blur else [replace(spec, blur=0.0) for spec in specs]
        return [changed(spec, changes or {}, "large" if i < self.large else "small") for i, spec in enumerate(specs)]


def changed(spec: ViewSpec, changes: Mapping[str, Value], kind: str) -> ViewSpec:
    """The spec of a "large" or "small" view with the changes that concern it.

    Raises:
        UserError: for a field that isn't there, or a value that isn't one.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(ViewSpec) if field.name != "size"}
    defaults |= {"mean": spec.mean, "std": spec.std}  # a number each channel
    for key, value in changes.items():
        concerned, _, name = key.rpartition(".")  # "" concerns all views
        if concerned not in ("", "large", "small") or name not in defaults:
            raise nearest("field of a view", key, [f"{x}{name}" for x in ("", "large.", "small.") for name in defaults])
        new = _checked(name, value, defaults[name])
        if len(spec.mean) != 3 and ((name == "grayscale" and new) or (name == "jitter" and max(new[2:]))):
            needed = "grayscale" if name == "grayscale" else "jitter of saturation and hue (its last two numbers)"
            raise UserError(
                f"a view's {needed} needs red, green and blue, and these images have {len(spec.mean)} channels"
            )
        if concerned in ("", kind):
            spec = replace(spec, **{name: new})
    return spec


def _checked(name: str, value: Value, default: Any) -> Any:
    """The value of a field as its default is: a number, as many numbers, or a truth value."""
    try:
        new = _like(value, default)
        if isinstance(new, bool) or _sensible(name, new if isinstance(new, tuple) else (new,)):
            return new
    except (TypeError, ValueError):
        pass
    example = ",".join(map(str, default)) if isinstance(default, tuple) else default
    raise UserError(f"a view's {name} must be like {example}, got {value}")


def _like(value: Any, default: Any) -> Any:
    """`value`, perhaps a text such as "0.05,0.2", in the default's type. Raises TypeError or ValueError."""
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise TypeError
        return value
    if not isinstance(default, tuple):
        return _number_like(value, default)
    parts = value.split(",") if isinstance(value, str) else value
    numbers = tuple(_number_like(part, default[0]) for part in parts)
    if len(numbers) != len(default):
        raise ValueError
    return numbers


def _number_like(value: Any, default: float) -> float:
    """A finite number of the default's type: True is none, and 2.7 tries aren't 2."""
    number = type(default)(value)
    if isinstance(value, bool) or not math.isfinite(number) or float(number) != float(value):
        raise ValueError
    return number


def _sensible(name: str, numbers: tuple) -> bool:
    """Whether a field may have these numbers."""
    if name in ("flip", "jitter_probability", "grayscale", "blur", "solarize"):
        return 0 <= numbers[0] <= 1
    if name in ("scale", "ratio", "sigma"):
        return 0 < numbers[0] <= numbers[1] and (name != "scale" or numbers[1] <= 1)
    if name == "jitter":
        return min(numbers) >= 0 and numbers[3] <= 0.5
    return name == "mean" or min(numbers) > 0
