"""A run folder, or an exported encoder, opened again."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastjem import config, encoders, exports, fields, reading
from fastjem.config import Config
from fastjem.data.pixels import Pixels
from fastjem.errors import UserError
from fastjem.methods import METHODS, RunFacts
from fastjem.prepare import create_method


@dataclass
class Opened:
    """encoder and projector (None for an export) in eval mode; `metadata` is what an export holds."""

    path: Path
    encoder: nn.Module
    projector: nn.Module | None
    pixels: Pixels  # how the encoder's images become numbers
    step: int | None
    metadata: dict[str, str]
    config: Config | None = None

    @property
    def folder(self) -> Path:
        return self.path if self.path.is_dir() else self.path.parent


def open_run(path: str | os.PathLike[str]) -> Opened:
    """A run at its last checkpoint, one that was killed too, or an `encoder.safetensors`.

    Raises:
        UserError: where there is no run, no checkpoint, or one whose encoder can't be built from its configuration.
    """
    path = _existing(path)
    if path.is_file():
        encoder, about = exports.load(path)
        with reading.named(path):
            pixels = Pixels.from_metadata(about)
        return Opened(path, encoder, None, pixels, None, about)
    settings, pixels, pool = config.read(path)
    state = exports.last_checkpoint(path)
    about = encoders.metadata(settings.backbone, settings.stem, settings.patch_size, pool, pixels)
    built = exports.Built(
        settings.backbone, settings.image_size, settings.stem, settings.patch_size, pool, pixels.channels
    )
    with reading.named(path):
        module = built.of_run(state)
        projector = _projector(settings, module, state["model"])
    return Opened(path, module.eval(), projector, pixels, state["step"], about, settings)


def load_encoder(path: str | os.PathLike[str]) -> nn.Module:
    """The encoder of a run folder, at its last checkpoint, or of an `encoder.safetensors`; in eval mode."""
    return open_run(path).encoder


def _existing(path: str | os.PathLike[str]) -> Path:
    try:
        text = os.fsdecode(path)
    except TypeError:
        raise UserError(f"a run is named by its path, got {fields.came(path)}") from None
    if not text or not os.path.exists(text):
        raise UserError(f"there is no run in {text or repr(text)}: no such file or folder")
    return Path(text)


def _projector(settings: Config, module: nn.Module, state: dict[str, Any]) -> nn.Module | None:
    """The method's projector with its weights, if it has one; a method of the user's own is not built again."""
    if settings.method not in METHODS:
        return None
    run = RunFacts(
        batch_norm=encoders.has_batch_norm(module), image_size=settings.image_size, channels=settings.channels
    )
    try:
        # Without memory, as somebody's file may name any width; the weights bring the projector's.
        with torch.device("meta"):
            method = create_method(METHODS[settings.method], encoders.wrap(module).width, run, settings)
    except UserError:
        raise
    except Exception as error:  # whatever a method's constructor may raise
        raise UserError(f"{settings.method} can't be built as the file says: {error}") from None
    heads = dict(method.named_children())
    if "projector" not in heads:
        return None
    projector = heads["projector"]
    try:
        projector.load_state_dict(exports.below("method.projector.", state), assign=True)
    except RuntimeError as error:
        raise UserError(f"the weights are no {settings.method}'s projector's: {error}") from None
    return projector.eval()
