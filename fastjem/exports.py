"""Encoders that were trained, built again and given their weights: from `encoder.safetensors`, or from a checkpoint."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastjem import checkpoints, reading
from fastjem.data.pixels import METADATA, Pixels
from fastjem.encoders import STEMS, architecture, create, metadata
from fastjem.errors import UserError

CONFIG = "config.yaml"  # of a run, in its folder


def load(path: str | os.PathLike[str]) -> tuple[nn.Module, dict[str, str]]:
    """(the encoder in eval mode, what `metadata` says of it).

    Raises:
        UserError: for a file that isn't there, isn't safetensors, or doesn't say how its encoder is built.
    """
    from safetensors import SafetensorError, safe_open

    if not os.path.isfile(path):
        what = "is a folder; fastjem.load_encoder opens a run" if os.path.isdir(path) else "is no file"
        raise UserError(f"{path} {what}" if os.path.exists(path) else f"there is no file {path}")
    try:
        with safe_open(path, "pt") as file, reading.named(path):
            built = Built.of(file.metadata() or {})
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            built.must_fit(shapes)
            state = {name: file.get_tensor(name) for name in shapes}
            module = built.with_weights(state)
            return module.eval(), file.metadata()
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is no safetensors file: {error}") from None


@dataclass(frozen=True)
class Opened:
    """An encoder in eval mode, and how its images become numbers."""

    encoder: nn.Module
    pixels: Pixels


def open_file(path: str | os.PathLike[str]) -> Opened:
    """An `encoder.safetensors`; UserError as `load` raises it."""
    encoder, about = load(path)
    with reading.named(path):
        return Opened(encoder, Pixels.from_metadata(about))


def open_folder(path: str | os.PathLike[str]) -> Opened:
    """The encoder of a run folder at its last checkpoint, whatever method trained it.

    Raises:
        UserError: for a folder that is no run's, one without a checkpoint, and what can't be built as it says.
    """
    folder = Path(path)
    file = folder / CONFIG
    try:
        settings = reading.json_object(file)
    except reading.Missing:
        raise UserError(f"there is no run in {folder} (a run folder has a {CONFIG})") from None
    state = last_checkpoint(folder)
    with reading.named(file):
        lacking = [name for name in ("backbone", "image_size", "stem", "patch_size", "pixels") if name not in settings]
        if lacking:
            raise UserError(f"it lacks {', '.join(lacking)}")
        pixels = Pixels.from_dict(settings["pixels"])
        names = [str(settings[name]) for name in ("backbone", "stem", "patch_size")]
        about = metadata(names[0], names[1], 0, settings.get("pool"), pixels) | {"patch_size": names[2]}
        return Opened(Built.of(about).of_run(state).eval(), pixels)


def last_checkpoint(folder: Path) -> dict[str, Any]:
    """The state at the last checkpoint of a run's folder; a UserError where it has none."""
    state = checkpoints.load(folder)
    if state is None:
        raise UserError(f"{folder} has no checkpoint; fastjem pretrain --resume --out {folder} goes on with it")
    return state


def below(prefix: str, state: Mapping[str, Any]) -> dict[str, Any]:
    """What a state has of one part, by the names within it."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


@dataclass(frozen=True)
class Built:
    """How an encoder that was trained is built again: what `create` is given."""

    backbone: str
    image_size: int
    stem: str = "auto"
    patch_size: int = 0
    pool: str | None = None
    channels: int = 3

    @classmethod
    def of(cls, metadata: Mapping[str, str]) -> "Built":
        """What the function `metadata` wrote; UserError for anything else."""
        if "backbone" not in metadata:
            raise UserError("it names no backbone: its weights only fit into the module that they came from")
        numbers = {}
        for name, least in (("image_size", 1), ("patch_size", 0)):
            text = metadata.get(name, "")
            if not re.fullmatch("[0-9]{1,5}", text) or int(text) < least:
                raise UserError(f"{name} in its metadata must be a number of pixels, got {text[:40]!r}")
            numbers[name] = int(text)
        stem = metadata.get("stem", "")
        if stem not in STEMS:
            raise UserError(f"stem in its metadata must be one of {', '.join(STEMS)}, got {stem[:40]!r}")
        # Earlier versions took a tag of pretrained weights with the name, and ignored it.
        backbone = architecture(metadata["backbone"])
        channels = Pixels.from_metadata(metadata).channels if METADATA in metadata else 3
        return cls(backbone, stem=stem, pool=metadata.get("pool") or None, channels=channels, **numbers)

    def create(self) -> nn.Module:
        """The module with random weights."""
        try:
            return create(
                self.backbone, self.image_size, stem=self.stem, patch=self.patch_size, pool=self.pool,
                channels=self.channels,
            )  # fmt: skip
        except UserError:
            raise
        except Exception as error:  # whatever a model's constructor may raise
            raise UserError(f"{self.backbone} can't be built as the file says: {error}") from None

    def must_fit(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """UserError where weights of these shapes, by name, aren't this encoder's.

        The module is built without any memory for its weights first: a name in somebody's file may be that of a model
        that takes all there is.
        """
        with torch.device("meta"):
            expected = {name: tuple(tensor.shape) for name, tensor in self.create().state_dict().items()}
        if expected == dict(shapes):
            return
        wrong = [name for name in expected if shapes.get(name) != expected[name]]
        wrong += [name for name in shapes if name not in expected]
        has, wants = (str(found.get(wrong[0], "nothing")) for found in (shapes, expected))
        raise UserError(
            f"the weights are no {self.backbone}'s (a module of your own?): {wrong[0]} is {has} where {wants} is needed"
        )

    def with_weights(self, state: Mapping[str, Tensor]) -> nn.Module:
        """The module with weights of which `must_fit` has seen the shapes."""
        module = self.create()
        try:
            module.load_state_dict(dict(state))
        except RuntimeError as error:
            raise UserError(f"the weights are no {self.backbone}'s: {error}") from None
        return module

    def of_run(self, state: Mapping[str, Any]) -> nn.Module:
        """The module with the weights of a run's checkpoint."""
        weights = below("encoder.backbone.", state["model"])
        self.must_fit({name: tuple(tensor.shape) for name, tensor in weights.items()})
        return self.with_weights(weights)
