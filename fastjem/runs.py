"""A run folder, or an exported encoder, opened again."""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastjem import checkpoints, encoders, exports, fields, hub, reading
from fastjem.config import Config
from fastjem.data.pixels import Pixels
from fastjem.data.size import height_and_width
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
    def teacher(self) -> bool:
        """Whether both are momentum copies, the projector if the method has one of it."""
        return exports.is_teacher(self.metadata)

    @property
    def folder(self) -> Path:
        """Where figures of the encoder belong; of one on the hub, the current folder."""
        if hub.is_there(str(self.path)):
            return Path()
        if checkpoints.run_of(self.path) is not None:
            return self.path.parent
        return self.path if self.path.is_dir() else self.path.parent

    def digest(self) -> str:
        """A hash of the encoder's weights and of how its images become numbers."""
        about = {"module": type(self.encoder).__qualname__, **self.metadata}
        found = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
        for name, tensor in self.encoder.state_dict().items():
            found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        return found.hexdigest()[:32]


def open_run(path: str | os.PathLike[str], *, teacher: bool = False, encoder: nn.Module | None = None) -> Opened:
    """A run at its last checkpoint, one that was killed too, or what was exported.

    Args:
        path: of a run's folder, one of its checkpoints, an exported file or folder; or "hf-hub:USER/MODEL".
        teacher, encoder: see `fastjem.exports.open_encoder`.

    Raises:
        UserError: where there is no run, no checkpoint, or one whose encoder can't be built from its configuration.
    """
    text = _existing(path)
    path = Path(text)
    opened = exports.open_encoder(text, teacher=teacher, encoder=encoder)
    settings, state = opened.config, opened.state
    if settings is None or state is None:
        return Opened(path, opened.encoder, None, opened.pixels, None, opened.metadata)
    with reading.named(path):
        projector = _projector(settings, opened.encoder, state["model"], teacher=teacher)
    return Opened(path, opened.encoder, projector, opened.pixels, state["step"], opened.metadata, settings)


def load_encoder(path: str | os.PathLike[str], *, teacher: bool = False, encoder: nn.Module | None = None) -> nn.Module:
    """The encoder of a run folder, at its last checkpoint, or of an export, a file or a folder; in eval mode.

    `encoder(encoder.prepare(images))` are embeddings: `prepare` is `fastjem.data.pixels.Pixels.prepare` of the run,
    which takes paths, arrays or Pillow's images. A module of the user's own that has a `prepare` keeps that.

    Args:
        path: of the folder or the file; of one of a run's checkpoints, RUN/checkpoints/best.pt say; "hf-hub:USER/MODEL"
            of an exported folder on Hugging Face's hub.
        teacher: the momentum encoder of a run, in place of the trained one.
        encoder: the module that a run was begun with in place of a backbone's name; the weights are loaded into it.

    Raises:
        UserError: for what is no run and no encoder, a run without a momentum encoder, and weights that don't fit.
    """
    opened = open_run(path, teacher=teacher, encoder=encoder)
    if not hasattr(opened.encoder, "prepare"):
        opened.encoder.prepare = opened.pixels.prepare  # type: ignore[assignment]  # not a module, and no weights
    return opened.encoder


def _existing(path: str | os.PathLike[str]) -> str:
    try:
        text = os.fsdecode(path)
    except TypeError:
        raise UserError(f"a run is named by its path, got {fields.came(path)}") from None
    if not hub.is_there(text) and not os.path.exists(text):
        raise UserError(f"there is no run in {text or repr(text)}: no such file or folder")
    return text


def _projector(settings: Config, module: nn.Module, state: dict[str, Any], *, teacher: bool) -> nn.Module | None:
    """The method's projector with its weights, if it has one; a method of the user's own is not built again."""
    if settings.method not in METHODS:
        return None
    run = RunFacts(batch_norm=encoders.has_batch_norm(module), image_size=settings.size, channels=settings.channels)
    width = _width(module, settings)
    try:
        # Without memory, as somebody's file may name any width; the weights bring the projector's.
        with torch.device("meta"):
            method = create_method(METHODS[settings.method], width, run, settings)
    except UserError:
        raise
    except Exception as error:  # whatever a method's constructor may raise
        raise UserError(f"{settings.method} can't be built as the file says: {error}") from None
    heads = dict(method.named_children())
    if "projector" not in heads:
        return None
    projector = heads["projector"]
    copy = exports.below("teacher.projector.", state) if teacher else {}
    try:
        projector.load_state_dict(copy or exports.below("method.projector.", state), assign=True)
    except RuntimeError as error:
        raise UserError(f"the weights are no {settings.method}'s projector's: {error}") from None
    return projector.eval()


def _width(module: nn.Module, settings: Config) -> int:
    """D of an encoder's embeddings; of a module that doesn't say so, by computing some."""
    try:
        return encoders.wrap(module).width
    except ValueError:
        device = next((p.device for p in module.parameters()), torch.device("cpu"))
        images = torch.randn(2, settings.channels, *height_and_width(settings.size), device=device)
        return encoders.measured_width(module, images)
