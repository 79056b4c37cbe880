"""Encoders with given weights: what a run may begin with, and what isn't trained, the teacher of distillation or of
Gram anchoring.
"""

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from fastjem import encoders, exports, hub
from fastjem.config import Config
from fastjem.data.pixels import Pixels
from fastjem.encoders import Encoder, Features
from fastjem.errors import UserError

PLACES = ("timm", "hf-hub", "hf_hub", "local-dir")  # from where timm takes weights


@dataclass(frozen=True)
class Weights:
    """An encoder with its weights, how its images are normalised, and where it comes from."""

    module: nn.Module
    mean: tuple[float, ...]
    std: tuple[float, ...]
    backbone: str  # its architecture's name
    pixels: Pixels | None = None  # of one of ours
    built: exports.Built | None = None  # how one of ours is made
    config: Config | None = None  # of a run
    state: Mapping[str, Any] | None = None  # of a run, at its last checkpoint


def open_weights(name: str, *, teacher: bool = False) -> Weights:
    """The encoder of a run folder or of an export, or timm's: "timm/MODEL.TAG", "hf-hub:USER/MODEL",
    "local-dir:FOLDER". An export in such a place is opened as one: its images are prepared as its run's, and timm may
    lack its stem.

    teacher: a run's momentum encoder, in place of the trained one.

    Raises:
        UserError: for a name that is none of these, or weights that can't be had; it says why.
    """
    place = _export_at(name) if names_a_place(name) else None
    if place is not None or os.path.exists(name):
        name = place or name
        opened = exports.open_encoder(name, teacher=teacher)
        pixels = opened.pixels
        built = exports.Built.of(opened.metadata)
        found = opened.encoder, pixels.mean, pixels.std, built.backbone
        return Weights(*found, pixels, built, opened.config, opened.state)
    if teacher:
        raise UserError(f"{name or repr(name)}: a run's folder alone has a momentum encoder")
    if not names_a_place(name):
        raise UserError(
            f"{name or repr(name)} names no encoder with weights: a run folder, an export, "
            "timm/MODEL.TAG, hf-hub:USER/MODEL or local-dir:FOLDER does"
        )
    return _from_timm(name.removeprefix("timm/"))


def names_a_place(name: str) -> bool:
    """Whether timm takes weights from where the name says: "timm/...", "hf-hub:...", "local-dir:..."."""
    place = name.partition("/")[0] if name.startswith("timm/") else name.partition(":")[0]
    return place in PLACES and place != name


def _export_at(name: str) -> str | None:
    """The path of what `fastjem export` wrote and a name leads to; None for what is timm's."""
    if name.startswith("local-dir:"):
        folder = name.partition(":")[2]
        return folder if exports.of_folder(folder) else None
    if not hub.is_there(name):
        return None
    try:
        folder = hub.fetch(name, exports.DESCRIPTION)
    except UserError:  # timm says what is wrong
        return None
    if exports.of_folder(folder) is None:
        return None
    return str(hub.fetch(name, exports.DESCRIPTION, exports.WEIGHTS))


def _from_timm(name: str) -> Weights:
    import timm

    local = name.startswith("local-dir:")
    with contextlib.nullcontext(True) if local else hub.in_reach() as in_reach:
        try:
            try:  # a transformer takes images of any size then, by positions that are resampled to their patches
                module: Any = timm.create_model(name, pretrained=True, num_classes=0, dynamic_img_size=True)
            except TypeError:  # it has no such option
                module = timm.create_model(name, pretrained=True, num_classes=0)
        except Exception as error:  # whatever timm, huggingface_hub and the network may raise
            line = (str(error).splitlines() or [type(error).__name__])[0]
            if not in_reach:
                line = f"{hub.NOT_IN_REACH}, and they aren't in its cache; local-dir:FOLDER takes a copy"
            raise UserError(f"the weights of {name} can't be had: {line}") from None
    about = module.pretrained_cfg
    return Weights(module, tuple(about["mean"]), tuple(about["std"]), about["architecture"])


class Given(nn.Module):
    """A frozen encoder in eval mode. Its weights are no part of a state: whoever resumes opens them again.

    Args:
        name, teacher: see `open_weights`. While modules are made without memory, on the meta device, it isn't opened.
        size: pixels of the shorter side of the images that it is given, to which others are resized, of the longer one
            whole patches; None: as they come.
    """

    def __init__(self, name: str, size: int | None = None, *, teacher: bool = False):
        super().__init__()
        self.size = size
        self.width = 1  # D of its embeddings
        self.held: tuple[Encoder, ...] = ()  # not registered, so that no state and no optimizer has its weights
        self.normalisation: tuple[tuple, Tensor, Tensor] | None = None  # the last one, by what it is made of
        if torch.get_default_device().type != "meta":
            opened = open_weights(name, teacher=teacher)
            encoder = encoders.wrap(opened.module.requires_grad_(False).eval())
            self.held = (encoder,)
            self.width = encoder.width
            self.mean = opened.mean
            self.std = opened.std

    @property
    def encoder(self) -> Encoder:
        return self.held[0]

    def _apply(self, fn: Any, recurse: bool = True) -> "Given":
        """What moves a module to a device, or to another dtype."""
        super()._apply(fn, recurse)
        for encoder in self.held:
            encoder._apply(fn, recurse)
        return self

    @torch.no_grad()
    def forward(self, images: Tensor, mean: Sequence[float], std: Sequence[float], layers: int = 0) -> Features:
        """Features of images [N, C, H, W] that were normalised by `mean` and `std`, as another encoder's are."""
        if (self.mean, self.std) != (tuple(mean), tuple(std)):
            scale, shift = self._from(images, tuple(mean), tuple(std))
            images = images * scale + shift
        if self.size is not None and min(images.shape[2:]) != self.size:
            images = interpolate(images, self._sides(images, self.size), mode="bicubic", antialias=True)
        return self.encoder(images, layers=layers)

    def _sides(self, images: Tensor, size: int) -> list[int]:
        """Height and width of images that are resized so that their shorter side has `size` pixels."""
        shorter = min(images.shape[2:])
        patch = self.encoder.patch
        longer = (max(round(side * size / shorter / patch), 1) * patch for side in images.shape[2:])
        return [size if side == shorter else long for side, long in zip(images.shape[2:], longer, strict=True)]

    def _from(self, images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[Tensor, Tensor]:
        """(scale, shift) [C, 1, 1] from one normalisation to its own; kept, as making them waits for the device."""
        key = (mean, std, images.dtype, images.device)
        if self.normalisation is None or self.normalisation[0] != key:
            scale = [theirs / ours for theirs, ours in zip(std, self.std, strict=True)]
            shift = [(theirs - ours) / s for theirs, ours, s in zip(mean, self.mean, self.std, strict=True)]
            made = (torch.tensor(x, dtype=images.dtype, device=images.device)[:, None, None] for x in (scale, shift))
            self.normalisation = (key, *made)  # type: ignore[assignment]
        return self.normalisation[1], self.normalisation[2]  # type: ignore[index]
