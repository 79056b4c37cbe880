"""An encoder with a linear head for classes: made, kept in a folder that timm opens, too, and opened again."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastjem import __version__, backbones, encoders, exports, portable, reading
from fastjem.checkpoints import write_atomically
from fastjem.data.pixels import Pixels
from fastjem.data.size import height_and_width
from fastjem.errors import UserError
from fastjem.printing import say
from fastjem.runs import Opened

STD = 2e-5  # of the head's first weights: all classes are equally likely at the start (He et al. 2022, MAE's code)


class Headed(nn.Module):
    """A module of the user's own [B, C, H, W] -> [B, D], and the head behind it."""

    def __init__(self, encoder: nn.Module, width: int, classes: int):
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.encoder(images))

    def get_classifier(self) -> nn.Module:
        """The head, as timm's models give theirs."""
        return self.head


def create(opened: Opened, classes: int, *, drop_path: float = 0.0, scratch: bool = False) -> nn.Module:
    """[B, C, H, W] -> logits [B, K]: a model of timm's with the encoder's weights and a head of its own, or `Headed`
    around a module of the user's.

    Args:
        opened: the encoder.
        classes: K.
        drop_path: the rate of stochastic depth.
        scratch: with random weights in place of the encoder's.

    Raises:
        UserError: for stochastic depth, or random weights, of a module of the user's own.
    """
    if "backbone" in opened.metadata:
        module = _of_timm(opened.metadata, classes, drop_path)
        if not scratch:
            module.load_state_dict(opened.encoder.state_dict(), strict=False)
    elif drop_path or scratch:
        option = "--scratch" if scratch else f"--drop-path {drop_path:g}"
        raise UserError(f"{option} is for an encoder that has a backbone's name, not for a module of your own")
    else:
        module = _around(opened.encoder, opened.pixels, classes)
    head = head_of(module)
    nn.init.trunc_normal_(head.weight, std=STD)
    nn.init.zeros_(head.bias)
    return module


def _of_timm(metadata: Mapping[str, str], classes: int, drop_path: float = 0.0) -> nn.Module:
    built = exports.Built.of(metadata)
    module = backbones.create(
        built.backbone, built.image_size, stem=built.stem, patch=built.patch_size, pool=built.pool,
        drop_path=drop_path, channels=built.channels,
    )  # fmt: skip
    cast(Any, module).reset_classifier(classes)
    return module


def _around(encoder: nn.Module, pixels: Pixels, classes: int) -> Headed:
    try:
        width = encoders.wrap(encoder).width
    except ValueError:
        width = encoders.measured_width(encoder, torch.randn(2, pixels.channels, *height_and_width(pixels.size)))
    return Headed(encoder, width, classes)


def head_of(module: nn.Module) -> nn.Linear:
    """The linear layer whose outputs are the logits."""
    head = cast(Any, module).get_classifier()
    if not isinstance(head, nn.Linear):
        raise UserError(f"{type(module).__name__}'s classifier is a {type(head).__name__}, and no linear layer")
    return head


def save(module: nn.Module, opened: Opened, folder: Path, classes: Sequence[str]) -> str:
    """Write the folder of a classifier; why timm doesn't open it, in words, empty where it does.

    `model.safetensors` has in its metadata what the encoder's export has, and the classes; `config.json` is timm's.

    Raises:
        OSError: where it can't be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    encoders.save(
        module, str(folder / exports.WEIGHTS), {**opened.metadata, exports.CLASSES: json.dumps(list(classes))}
    )
    recipe = f"it is a module of its owner's, {type(opened.encoder).__name__}"
    if "backbone" in opened.metadata:
        recipe = portable.recipe_of(opened)
    refused = recipe if isinstance(recipe, str) else ""
    if isinstance(recipe, portable.Recipe):
        _describe(folder, recipe, module, opened.pixels, classes)
        refused = portable.tried(folder, module.eval(), opened.pixels, "logits")
    if refused:  # the architecture's name is all that an error of timm's would show of the folder
        name = opened.metadata.get("backbone", type(opened.encoder).__name__)
        told = portable.Recipe(f"{name} ({refused}; fastjem.load_classifier opens it)", {})
        _describe(folder, told, module, opened.pixels, classes)
        say(f"fastjem: timm won't open {folder}, as {refused}; fastjem.load_classifier({str(folder)!r}) does")
    return refused


def _describe(folder: Path, recipe: portable.Recipe, module: nn.Module, pixels: Pixels, classes: Sequence[str]) -> None:
    """timm's `config.json`: how it makes the model, prepares an image, and what the classes are called."""
    named = {"num_classes": len(classes), "label_names": list(classes)}
    described = {
        "architecture": recipe.architecture,
        "num_features": getattr(module, "num_features", None),
        **named,
        "model_args": recipe.arguments,
        "pretrained_cfg": {**portable.pretrained_cfg(pixels, module, recipe.arguments), **named},
        exports.OURS: {"version": __version__, "pixels": pixels.to_dict()},
    }
    write_atomically(folder / exports.DESCRIPTION, (json.dumps(described, indent=2) + "\n").encode())


def load_classifier(path: str | os.PathLike[str], *, encoder: nn.Module | None = None) -> nn.Module:
    """The classifier in a folder that `fastjem finetune` wrote; in eval mode.

    `model(model.prepare(images))` are logits [B, K], `model.classes` the K names: `prepare` takes paths, files' bytes,
    arrays or Pillow's images.

    Args:
        path: of the folder.
        encoder: the module that the run was begun with in place of a backbone's name; the weights are loaded into it.

    Raises:
        UserError: for what is no folder of a classifier, and weights that don't fit.
    """
    from safetensors import SafetensorError, safe_open

    file = Path(os.fsdecode(path)) / exports.WEIGHTS
    if not file.is_file():
        raise UserError(
            f"there is no classifier in {os.fsdecode(path)}: it has no {exports.WEIGHTS}, as fastjem finetune writes it"
        )
    try:
        with safe_open(str(file), "pt") as opened, reading.named(file):
            about = opened.metadata() or {}
            classes = _classes(about)
            pixels = Pixels.from_metadata(about)
            if encoder is None:
                with torch.device("meta"):  # a name in somebody's file may be that of a model that takes all memory
                    outline = _of_timm(about, len(classes))
            else:
                outline = _around(encoder, pixels, len(classes))
            shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
            exports.compare(outline, shapes, "the weights don't fit")
            module = outline if encoder is not None else _of_timm(about, len(classes))
            module.load_state_dict({name: opened.get_tensor(name) for name in shapes})
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} is no safetensors file: {error}") from None
    made = cast(Any, module.eval())
    made.prepare = pixels.prepare
    made.classes = classes
    return made


def _classes(metadata: Mapping[str, str]) -> list[str]:
    """UserError where the file is an encoder's and names none."""
    if exports.CLASSES not in metadata:
        raise UserError("it names no classes: an encoder, which fastjem.load_encoder opens, and no classifier")
    found = reading.parsed(metadata[exports.CLASSES], exports.CLASSES)
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise UserError("classes in its metadata must be a list of names")
    return found


__all__ = ["Headed", "create", "head_of", "load_classifier", "save"]
