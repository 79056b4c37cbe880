"""A run folder, or an exported encoder, opened again."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from fastjem import checkpoints, config, encoders
from fastjem.build import create_method
from fastjem.config import Config
from fastjem.data.pixels import Pixels
from fastjem.errors import UserError
from fastjem.methods import METHODS, RunFacts


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


def open_run(path: str | Path) -> Opened:
    """A run at its last checkpoint, one that was killed too, or an `encoder.safetensors`.

    Raises:
        UserError: where there is no run, no checkpoint, or one whose encoder can't be built from its configuration.
    """
    path = Path(path)
    if path.is_file():
        encoder, about = encoders.load_with_metadata(str(path))
        return Opened(path, encoder, None, Pixels.from_metadata(about), None, about)
    settings, pixels, pool = config.read(path)
    state = checkpoints.load(path)
    if state is None:
        raise UserError(f"{path} has no checkpoint; fastjem pretrain --resume --out {path} goes on with it")
    about = encoders.metadata(settings.backbone, settings.stem, settings.patch_size, pool, pixels)
    module = encoders.create(
        settings.backbone, settings.image_size, stem=settings.stem, patch=settings.patch_size, pool=pool,
        channels=pixels.channels,
    )  # fmt: skip
    try:
        module.load_state_dict(_below("encoder.backbone.", state["model"]))
        projector = _projector(settings, module, state["model"])
    except RuntimeError:
        raise UserError(f"the weights in {path} are no {settings.backbone}'s (a module of your own?)") from None
    return Opened(path, module.eval(), projector, pixels, state["step"], about, settings)


def _projector(settings: Config, module: nn.Module, state: dict[str, Any]) -> nn.Module | None:
    """The method's projector with its weights, if it has one; a method of the user's own is not built again."""
    if settings.method not in METHODS:
        return None
    run = RunFacts(
        batch_norm=encoders.has_batch_norm(module), image_size=settings.image_size, channels=settings.channels
    )
    method = create_method(METHODS[settings.method], encoders.wrap(module).width, run, settings)
    heads = dict(method.named_children())
    if "projector" not in heads:
        return None
    projector = heads["projector"]
    projector.load_state_dict(_below("method.projector.", state))
    return projector.eval()


def _below(prefix: str, state: dict[str, Any]) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
