"""An encoder in a folder that timm opens as it is, and fastjem, too: weights, `config.json`, a model card.

`config.json` is timm's: architecture, the arguments that make it, and in `pretrained_cfg` how an image is prepared, so
that `timm.data.create_transform(**timm.data.resolve_model_data_config(model))` gives what the encoder was trained on.
What only fastjem reads stands in it under one key. timm lacks some architectures, such as a ResNet's stem for small
images: whether it opens the folder, and gives the same embeddings then, is tried before the folder is there.
"""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastjem import __version__, backbones, card, config, encoders, exports, reading
from fastjem.data.pixels import Pixels
from fastjem.data.size import height_and_width
from fastjem.errors import UserError, first_line
from fastjem.printing import say
from fastjem.runs import Opened

CARD = "README.md"
ONNX = "model.onnx"
FILES = (exports.WEIGHTS, exports.DESCRIPTION, CARD, ONNX)
TOLERANCE = 1e-4  # of the largest value: other kernels may be chosen for the same convolution


@dataclass(frozen=True)
class Recipe:
    """How timm makes a module: the architecture's name, and its arguments beside it."""

    architecture: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Folder:
    """What was written, and why timm doesn't open it (empty: it does)."""

    files: list[Path]
    refused: str

    @property
    def path(self) -> Path:
        return self.files[0].parent


def write(
    opened: Opened,
    out: Path,
    *,
    place: str | None = None,
    license: str | None = None,
    onnx: Callable[[Path], object] | None = None,
) -> Folder:
    """Write the folder, each file whole or not at all; an export that is there already is replaced.

    Args:
        place: where the model card says that the encoder is, "hf-hub:USER/MODEL"; None: in the folder.
        license: of the weights, as the hub names it; None: the card has none.
        onnx: writes the encoder to a path that it is given; None: there is no such file.

    Raises:
        UserError: for a folder that holds anything else, or can't be written.
    """
    check(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with _beside(out) as made:
            encoders.save(opened.encoder, str(made / exports.WEIGHTS), opened.metadata)
            if onnx is not None:
                onnx(made / ONNX)
            told = card.facts(opened)
            refused = _described(opened, made, told)
            if refused:
                say(f"fastjem: timm won't open {out}, as {refused}; fastjem.load_encoder({str(out)!r}) does")
            text = _card(opened, told, refused, onnx is not None, place or out.name, license).text()
            (made / CARD).write_text(text, encoding="utf-8")
            return Folder(_moved(made, out), refused)
    except OSError as error:
        raise UserError(f"--out {out}: {reading.why_not(error)}") from None


def check(out: Path) -> None:
    """UserError for a place where no folder of an export may be written."""
    if (out / config.FILE).exists():
        raise UserError(f"--out {out} is a run's own folder; {out / 'export'}, say, is none")
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; a folder is written, or a file whose name ends in .safetensors")
    if out.is_dir() and any(out.iterdir()) and exports.of_folder(out) is None:
        raise UserError(f"--out {out} has files that are no export's; a new folder, or an earlier export, is written")


@contextlib.contextmanager
def _beside(out: Path) -> Iterator[Path]:
    """A folder that is gone in the end, on the same file system, in which what is written can be tried."""
    made = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".part", dir=out.parent))
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _moved(made: Path, out: Path) -> list[Path]:
    """The files in their place. What an earlier export had beside them isn't these weights': it goes."""
    out.mkdir(exist_ok=True)
    found = [name for name in FILES if (made / name).exists()]
    for name in set(FILES) - set(found):
        (out / name).unlink(missing_ok=True)
    for name in found:
        os.replace(made / name, out / name)
    return [out / name for name in found]


def _described(opened: Opened, folder: Path, told: dict[str, Any]) -> str:
    """Write `config.json` beside the weights; why timm doesn't open the folder, empty where it does."""
    recipe = recipe_of(opened)
    refused = recipe if isinstance(recipe, str) else ""
    if isinstance(recipe, Recipe):
        _write_config(opened, recipe, folder, told)
        refused = tried(folder, opened.encoder, opened.pixels)
    if refused:
        # An error of timm's says this name: it is the only text of the folder's that one shows.
        name = f"{_name(opened)} ({refused}; fastjem.load_encoder opens it)"
        _write_config(opened, Recipe(name, {}), folder, told)
    return refused


def recipe_of(opened: Opened) -> Recipe | str:
    """How timm makes the encoder; for one that it can't make, why, in words."""
    module = opened.encoder
    if "backbone" not in opened.metadata:
        made = getattr(module, "_model_args", None)  # of a model of timm's that the user made
        about = getattr(module, "pretrained_cfg", None)
        if not isinstance(made, dict) or not isinstance(about, dict) or not about.get("architecture"):
            return f"it is a module of its owner's, {type(module).__name__}"
        dropped = ("num_classes", "drop_path_rate", "drop_rate")
        return Recipe(about["architecture"], {name: value for name, value in made.items() if name not in dropped})
    if backbones.has_small_stem(module):
        return "no argument of timm's gives a ResNet the stem for small images"
    built = exports.Built.of(opened.metadata)
    name, arguments = backbones.arguments(
        built.backbone, built.image_size, patch=built.patch_size, pool=built.pool, channels=built.channels
    )
    about = cast(Any, module).pretrained_cfg
    if about.get("fixed_input_size"):
        # The grid of its positions, which timm takes from the registered size, and from ours without this.
        arguments.setdefault("img_size", list(about["input_size"][1:]))
    return Recipe(name, _accepted(name, arguments))


def _accepted(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Without the one argument that some models lack, see `backbones.arguments`."""
    import timm

    try:
        with torch.device("meta"):
            timm.create_model(name, num_classes=0, **arguments)
    except TypeError:
        return {name: value for name, value in arguments.items() if name != "dynamic_img_size"}
    return arguments


def _name(opened: Opened) -> str:
    return opened.metadata.get("backbone") or type(opened.encoder).__name__


def _write_config(opened: Opened, recipe: Recipe, folder: Path, told: dict[str, Any]) -> None:
    module = cast(Any, opened.encoder)
    described = {
        "architecture": recipe.architecture,
        "num_classes": 0,
        "num_features": getattr(module, "num_features", None),
        "global_pool": getattr(module, "global_pool", None),
        "model_args": recipe.arguments,
        "pretrained_cfg": pretrained_cfg(opened.pixels, module, recipe.arguments),
        exports.OURS: {
            "version": __version__,
            "teacher": opened.teacher,
            "pixels": opened.pixels.to_dict(),
            "run": told,
        },
    }
    if not isinstance(described["global_pool"], str):
        del described["global_pool"]
    (folder / exports.DESCRIPTION).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")


def pretrained_cfg(pixels: Pixels, module: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """timm's description of how an image is prepared, and of the layers that depend on channels and classes.

    timm gives the encoder `(x - mean) / std`, x the values of an 8-bit image / 255 and those of a tensor as they are.
    So an 8-bit image's black and white are part of mean and std here; values of other kinds come to timm as tensors,
    and are scaled onto 0 to 1 by whoever makes these.
    """
    about = getattr(module, "pretrained_cfg", None) or {}
    black, white = (value / 255 for value in pixels.value_range) if pixels.values == "8-bit" else (0.0, 1.0)
    sides = list(height_and_width(pixels.size))
    fixed = about.get("fixed_input_size") and not arguments.get("dynamic_img_size")
    return {
        "input_size": [pixels.channels, *sides],
        "fixed_input_size": bool(fixed) and list(arguments.get("img_size", sides)) == sides,
        "interpolation": pixels.interpolation,
        "crop_pct": 1.0,
        "crop_mode": "center",
        "mean": [black + mean * (white - black) for mean in pixels.mean],
        "std": [std * (white - black) for std in pixels.std],
        "num_classes": 0,
        "pool_size": None,
        "first_conv": about.get("first_conv"),
        "classifier": about.get("classifier"),
    }


def tried(folder: Path, module: nn.Module, pixels: Pixels, outputs: str = "embeddings") -> str:
    """Why timm doesn't open a folder, in words; empty where it does, prepares images of the same size, and gives the
    outputs of the module, which is in eval mode. outputs: what they are called."""
    import timm.data

    images = _noise(pixels)
    try:
        opened = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        found = _embedded(opened, images)
    except Exception as error:  # whatever a model's constructor may raise
        return f"it says: {first_line(error)}"
    if tuple(timm.data.resolve_model_data_config(opened)["input_size"]) != tuple(images.shape[1:]):
        return "it would prepare images of another size"
    return "" if _same(found, _embedded(module, images)) else f"its {outputs} would be others"


def torchvisions(opened: Opened) -> str:
    """The name of torchvision's model that takes the weights strictly, without a classifier (and with the small stem
    where they have it), and gives the encoder's embeddings; empty where there is none.
    """
    try:
        from torchvision import models
    except ImportError:
        return ""
    name = backbones.architecture(opened.metadata.get("backbone", ""))
    if opened.pixels.channels != 3 or name not in models.list_models(module=models):
        return ""
    model: Any = models.get_model(name)
    if not isinstance(getattr(model, "fc", None), nn.Linear):
        return ""
    model.fc = nn.Identity()
    if backbones.has_small_stem(opened.encoder):
        backbones.small_stem(model)
    images = _noise(opened.pixels)
    try:
        model.load_state_dict(opened.encoder.state_dict())
        found = _embedded(model.eval(), images)
    except (RuntimeError, ValueError):
        return ""
    return name if _same(found, _embedded(opened.encoder, images)) else ""


def _noise(pixels: Pixels) -> Tensor:
    random = torch.Generator().manual_seed(0)
    return torch.randn(2, pixels.channels, *height_and_width(pixels.size), generator=random)


@torch.no_grad()
def _embedded(module: nn.Module, images: Tensor) -> Tensor:
    device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    return module(images.to(device)).float().cpu()


def _same(found: Tensor, expected: Tensor) -> bool:
    """Whether embeddings differ by no more than float32 rounds."""
    if found.shape != expected.shape:
        return False
    return bool((found - expected).abs().max() <= TOLERANCE * expected.abs().max())  # NaN isn't


def _card(opened: Opened, told: dict[str, Any], refused: str, onnx: bool, place: str, license: str | None) -> card.Card:
    module = opened.encoder
    return card.Card(
        told,
        opened.pixels,
        backbone=_name(opened),
        width=getattr(module, "num_features", None),
        parameters=sum(parameter.numel() for parameter in module.parameters()),
        place=place,
        teacher=opened.teacher,
        refused=refused,
        torchvision=torchvisions(opened),
        small_stem=backbones.has_small_stem(module),
        own_module="backbone" not in opened.metadata,
        onnx=onnx,
        license=license,
    )


__all__ = ["FILES", "Folder", "Recipe", "check", "pretrained_cfg", "recipe_of", "torchvisions", "tried", "write"]
