"""Recipes of augmentation as data: nothing here knows who draws the parameters or who moves the pixels.

Each recipe names its source. Crops are RandomResizedCrop (area uniform in `scale`, aspect log-uniform in 3/4..4/3, ten
tries, then the centre); jitter factors are (brightness, contrast, saturation, hue), hue in turns, applied in random
order. The order of all steps: crop, flip, jitter, grayscale, blur, solarize, normalise.
"""

from dataclasses import dataclass, replace

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LARGEST_WITHOUT_BLUR = 64  # at 64 pixels and less a blur removes what is left to see; CIFAR recipes leave it out


@dataclass(frozen=True)
class ViewSpec:
    """One view of an image. Probabilities are of the step being applied at all."""

    size: int = 224
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    bicubic: bool = False
    flip: float = 0.5
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    jitter_probability: float = 0.8
    grayscale: float = 0.2
    blur: float = 0.5
    sigma: tuple[float, float] = (0.1, 2.0)
    solarize: float = 0.0  # threshold 128
    mean: tuple[float, float, float] = MEAN
    std: tuple[float, float, float] = STD


@dataclass(frozen=True)
class Recipe:
    """`large[i]` is the i-th full-size view (the last one repeats); `small` is multi-crop's, where there is one."""

    large: tuple[ViewSpec, ...]
    small: ViewSpec | None = None


_BYOL = ViewSpec(bicubic=True, blur=1.0)
_DINO = replace(_BYOL, scale=(0.4, 1.0))
_SWAV = ViewSpec(scale=(0.14, 1.0), jitter=(0.8, 0.8, 0.8, 0.2), std=(0.228, 0.224, 0.225))

RECIPES: dict[str, Recipe] = {
    # Chen et al. 2020, in the torch form that lightly and solo-learn use: bilinear, normalised
    "simclr": Recipe((ViewSpec(jitter=(0.8, 0.8, 0.8, 0.2)),)),
    # Chen et al. 2020 (MoCo v2), main_moco.py --aug-plus
    "moco": Recipe((ViewSpec(scale=(0.2, 1.0), jitter=(0.4, 0.4, 0.4, 0.1)),)),
    # Grill et al. 2020, table 6; Barlow Twins and VICReg use the same
    "byol": Recipe((_BYOL, replace(_BYOL, blur=0.1, solarize=0.2))),
    # Caron et al. 2020, src/multicropdataset.py
    "swav": Recipe((_SWAV,), replace(_SWAV, scale=(0.05, 0.14))),
    # Caron et al. 2021, main_dino.py
    "dino": Recipe((_DINO, replace(_DINO, blur=0.1, solarize=0.2)), replace(_DINO, scale=(0.05, 0.4), blur=0.5)),
    # Baevski et al. 2022 for images, as MAE's: crop and flip alone
    "crop": Recipe((ViewSpec(scale=(0.2, 1.0), bicubic=True, jitter_probability=0, grayscale=0, blur=0),)),
}


@dataclass(frozen=True)
class Views:
    """What a method wants to see: how many views of which recipe, and the share of patches that a mask hides."""

    large: int = 2
    small: int = 0
    recipe: str = "simclr"
    mask: float = 0.0

    def specs(self, image_size: int, *, patch: int = 1, blur: bool | None = None) -> list[ViewSpec]:
        """The large views and then the small ones, 96/224 of the image size, rounded to whole patches."""
        recipe = RECIPES[self.recipe]
        if blur is None:
            blur = image_size > LARGEST_WITHOUT_BLUR
        specs = [replace(recipe.large[min(i, len(recipe.large) - 1)], size=image_size) for i in range(self.large)]
        if self.small:
            size = max(round(image_size * 96 / 224 / patch), 1) * patch
            specs += [replace(recipe.small or recipe.large[-1], size=size)] * self.small
        return specs if blur else [replace(spec, blur=0.0) for spec in specs]
