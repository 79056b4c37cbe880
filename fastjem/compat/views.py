"""Transforms of one image, as lightly's are called, made by our augmentation: what a Dataset applies in its workers.

Parameters are drawn by `fastjem.data.parameters` from a seed of torch's generator, so that workers differ and
`torch.manual_seed` repeats them; windows are cut and resized, and colours changed, as the `torch` loader and `finish`
do it. A flip upside down and a turn by 90 degrees come last, where they can change places with every other step.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import fastjem.functional as F
from fastjem.data.loaders import rgb
from fastjem.data.parameters import Parameters
from fastjem.data.picture import to_rgb
from fastjem.data.size import height_and_width
from fastjem.data.views import ViewSpec, changed
from fastjem.functional import checks
from fastjem.kernels.augment import columns as column

IMAGENET_NORMALIZE = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


class Named:
    """A class whose arguments are a table, name -> default, in the order in which they may be given without names."""

    arguments: ClassVar[Mapping[str, Any]] = {}

    def __init_subclass__(cls) -> None:
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        parameters = [inspect.Parameter(name, kind, default=default) for name, default in cls.arguments.items()]
        cls.__signature__ = inspect.Signature(parameters)

    def options(self, args: tuple, given: dict[str, Any]) -> dict[str, Any]:
        """All arguments by their names. Raises TypeError for others than there are."""
        signature: inspect.Signature = type(self).__signature__  # pyright: ignore[reportAttributeAccessIssue]
        try:
            bound = signature.bind(*args, **given)
        except TypeError as error:
            raise TypeError(f"{type(self).__name__}: {error}; it takes {', '.join(self.arguments)}") from None
        bound.apply_defaults()
        return dict(bound.arguments)


class View:
    """One view of an image: [H, W, 3] -> [3, height, width] float32.

    Args:
        spec: what is drawn and done.
        vertical: how probable it is that the view is turned upside down.
        quarter: how probable a turn by 90 degrees is, of square views.
        who: the transform that errors name.
    """

    def __init__(self, spec: ViewSpec, vertical: float = 0.0, quarter: float = 0.0, who: str = "View"):
        self.who = who
        self.spec = spec
        self.vertical = vertical
        self.quarter = quarter
        self.parameters = Parameters([spec])

    def __call__(self, image: Image.Image | np.ndarray | Tensor) -> Tensor:
        """image: of Pillow; or uint8, [H, W, 3] of numpy or [3, H, W] of torch."""
        return self.cut(image)[0]

    def cut(self, image: Image.Image | np.ndarray | Tensor) -> tuple[Tensor, np.ndarray, bool]:
        """And the row of the augmentation table, and whether it was turned upside down."""
        pixels = as_pixels(self.who, image)
        height, width = rgb.size_of(pixels)
        seed = int(torch.randint(2**62, ()))
        row = self.parameters(seed, 0, [0], [height], [width])[0, 0]
        top, left, h, w = (int(x) for x in row[column.TOP : column.WIDTH + 1])
        size = height_and_width(self.spec.size)
        window = rgb.window(pixels, (left, top, left + w, top + h), size, self.spec.bicubic)
        table = torch.from_numpy(row)[None]
        view = F.augment(torch.from_numpy(window.copy())[None], table, mean=self.spec.mean, std=self.spec.std)[0]
        upside_down, turned = torch.rand(2).tolist()
        if upside_down < self.vertical:
            view = view.flip(1)
        if turned < self.quarter:
            view = view.rot90(1, (1, 2))
        return view.contiguous(), row, upside_down < self.vertical


def as_pixels(who: str, image: Image.Image | np.ndarray | Tensor) -> rgb.Pixels:
    """An image as `rgb.window` takes it."""
    if isinstance(image, Image.Image):
        image = to_rgb(image)
        return image if rgb.tall_first() is None else np.asarray(image)
    values = image.permute(1, 2, 0).numpy() if isinstance(image, Tensor) and image.dim() == 3 else image
    if not isinstance(values, np.ndarray) or values.dtype != np.uint8 or values.ndim != 3 or values.shape[2] != 3:
        contract = "the image must be Pillow's, or uint8: [H, W, 3] of numpy or [3, H, W] of torch"
        came = getattr(image, "shape", type(image).__name__)
        checks.fail(who, contract, f"{came} {getattr(image, 'dtype', '')}".strip())
    values = np.ascontiguousarray(values)
    return Image.fromarray(values) if rgb.tall_first() is None else values


class MultiViewTransform:
    """Several views of an image, a list of them; `transforms` are functions of an image each, as lightly's are."""

    def __init__(self, transforms: Sequence[Callable[[Any], Any]]):
        self.transforms = list(transforms)

    def __call__(self, image: Any) -> list[Any]:
        return [transform(image) for transform in self.transforms]


ONE_NAME = {  # of lightly's arguments, where transforms call one thing differently
    "crop_size": "input_size",
    "solarization_prob": "solarize",
    "solarize_prob": "solarize",
    "gaussian_blur_prob": "gaussian_blur",
    "gaussian_blur_sigmas": "sigmas",
}


def view_of(who: str, options: Mapping[str, Any], *, bicubic: bool = False) -> View:
    """The view that lightly's arguments, as one of its transforms for a single view has them, describe.

    Raises:
        ValueError: for numbers out of their range, and for what isn't done here.
    """
    given = {ONE_NAME.get(name, name): value for name, value in options.items()}
    size = given["input_size"]
    size = tuple(size) if isinstance(size, Sequence) else size
    height, width = height_and_width(size)
    least, most = given.get("crop_scale") or (
        given.get("crop_min_scale", given.get("min_scale")), given.get("crop_max_scale", 1.0)
    )  # fmt: skip
    strength = given.get("cj_strength", 1.0)
    jitter = [strength * given.get(f"cj_{name}", 0.0) for name in ("bright", "contrast", "sat", "hue")]
    normalize = given.get("normalize") or {"mean": (0.0,) * 3, "std": (1.0,) * 3}
    quarter = given.get("rr_prob", 0.0)
    if quarter and given.get("rr_degrees") is not None:
        came = f"{given['rr_degrees']}; put torchvision's RandomRotation in front of the transform instead"
        checks.fail(who, "rr_degrees must be None, turns by 90 degrees", came)
    if quarter and height != width:
        checks.fail(who, "with rr_prob, views must be squares", f"{height} x {width}")
    try:
        spec = changed(
            replace(ViewSpec(), size=size if height != width else height),
            {
                "scale": (least, most),
                "ratio": (3 / 4 * height / width, 4 / 3 * height / width),  # lightly's is of the window itself
                "bicubic": bicubic,
                "flip": given.get("hf_prob", 0.5),
                "jitter": jitter,
                "jitter_probability": given.get("cj_prob", 0.0),
                "grayscale": given.get("random_gray_scale", 0.0),
                "blur": given.get("gaussian_blur", 0.0),
                "sigma": given.get("sigmas", (0.1, 2.0)),
                "solarize": given.get("solarize", 0.0),
                "mean": tuple(normalize["mean"]),
                "std": tuple(normalize["std"]),
            },
            "large",
        )
    except ValueError as error:
        raise ValueError(f"{who}: {error}") from None
    vertical, quarter = (
        checks.host_number(who, name, given.get(name, 0.0), low=0, high=1, inclusive=True)
        for name in ("vf_prob", "rr_prob")
    )
    return View(spec, vertical, quarter, who)
