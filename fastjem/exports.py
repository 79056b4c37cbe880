"""Encoders that were trained, built again and given their weights: from a checkpoint, or from what `fastjem export`
wrote, a file or a folder."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastjem import checkpoints, config, hub, reading
from fastjem.backbones import STEMS, architecture, create
from fastjem.config import Config
from fastjem.data.pixels import METADATA, Pixels
from fastjem.data.size import Size, from_text, shorter
from fastjem.encoders import metadata
from fastjem.errors import UserError

WEIGHTS = "model.safetensors"  # of an exported folder, by the name that timm looks for
DESCRIPTION = "config.json"  # of an exported folder: timm's, with what is fastjem's under the key OURS
OURS = "fastjem"
CLASSES = "classes"  # the key in the metadata of a classifier's weights, which fastjem finetune writes
TEACHER = "teacher"  # the key in an export's metadata where its weights are the momentum encoder's: "true"


@dataclass(frozen=True)
class Opened:
    """An encoder in eval mode, how its images become numbers, and what its export says or would say of it."""

    encoder: nn.Module
    pixels: Pixels
    metadata: dict[str, str]
    config: Config | None = None  # of a run
    state: Mapping[str, Any] | None = None  # of a run, at its last checkpoint

    @property
    def teacher(self) -> bool:
        """Whether this is a momentum encoder."""
        return is_teacher(self.metadata)


def is_teacher(metadata: Mapping[str, str]) -> bool:
    """Whether an export's metadata say that it is a momentum encoder."""
    return metadata.get(TEACHER) == "true"


def open_encoder(path: str | os.PathLike[str], *, teacher: bool = False, encoder: nn.Module | None = None) -> Opened:
    """The encoder of a run folder at its last checkpoint, whatever method trained it, or of what `fastjem export`
    wrote, a file or a folder.

    Args:
        path: of the folder or the file; of one of a run's checkpoints, RUN/checkpoints/best.pt say; "hf-hub:USER/MODEL"
            of an exported folder on Hugging Face's hub.
        teacher: the momentum encoder of a run, in place of the trained one.
        encoder: the module that a run was begun with in place of a backbone's name; the weights are loaded into it.

    Raises:
        UserError: for a folder that is no run's, one without a checkpoint or without a momentum encoder, a file that is
            no encoder's, and what can't be built as it says.
    """
    if isinstance(path, str) and hub.is_there(path):
        file = hub.fetch(path, WEIGHTS) / WEIGHTS
    elif (run := checkpoints.run_of(Path(path))) is not None:
        return open_folder(run, teacher=teacher, encoder=encoder, checkpoint=Path(path))
    elif not os.path.isdir(path):
        file = Path(path)
    elif is_exported(path):
        file = Path(path) / WEIGHTS
    else:
        return open_folder(Path(path), teacher=teacher, encoder=encoder)
    opened = open_file(file, encoder=encoder)
    if teacher and not opened.teacher:
        has = "holds one encoder, the trained one; a run's folder has its momentum encoder"
        raise UserError(f"--teacher: {path} {has}")
    return opened


def is_exported(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder is one of weights, and no run's."""
    return (Path(folder) / WEIGHTS).is_file() and not (Path(folder) / config.FILE).exists()


def of_folder(folder: str | os.PathLike[str]) -> dict[str, Any] | None:
    """What `fastjem export` wrote of an encoder into a folder, beside what is timm's; None: the folder isn't its."""
    try:
        found = reading.json_object(Path(folder) / DESCRIPTION).get(OURS)
    except UserError:
        return None
    return found if isinstance(found, dict) else None


def open_file(path: str | os.PathLike[str], *, encoder: nn.Module | None = None) -> Opened:
    """An `encoder.safetensors`, see `open_encoder`.

    Raises:
        UserError: for a file that isn't there, isn't safetensors, or doesn't say how its encoder is built or takes
            pixels.
    """
    from safetensors import SafetensorError, safe_open

    if not os.path.isfile(path):
        raise UserError(f"{path} is no file" if os.path.exists(path) else f"there is no file {path}")
    try:
        with safe_open(path, "pt") as file, reading.named(path):
            about = file.metadata() or {}
            if CLASSES in about:
                raise UserError("it is a classifier of fastjem finetune, which fastjem.load_classifier opens")
            module = Built.of(about) if encoder is None else Own(encoder)
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            module.must_fit(shapes)
            state = {name: file.get_tensor(name) for name in shapes}
            return Opened(module.with_weights(state).eval(), Pixels.from_metadata(about), about)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is no safetensors file: {error}") from None


def open_folder(
    folder: Path, *, teacher: bool = False, encoder: nn.Module | None = None, checkpoint: Path | None = None
) -> Opened:
    """A run's folder, see `open_encoder`; at its last checkpoint, or the one that is given."""
    settings, pixels, pool = config.read(folder)
    state = last_checkpoint(folder) if checkpoint is None else checkpoints.read(checkpoint)
    if encoder is None and "encoder" in state.get("objects", ()):
        raise UserError(
            f"the run in {folder} was begun with an encoder of its owner's; give it again from Python: "
            f"fastjem.load_encoder(path, encoder=...)"
        )
    prefix = "teacher.encoder.backbone." if teacher else "encoder.backbone."
    weights = below(prefix, state["model"])
    if teacher and not weights:
        raise UserError(f"--teacher: the run in {folder} has no momentum encoder, as {settings.method} was trained")
    about = pixels.to_metadata()
    module: Built | Own
    if encoder is not None:
        module = Own(encoder)
    else:
        names = settings.backbone, settings.size, settings.stem, settings.patch_size
        module = Built(*names, pool, pixels.channels)
        about = metadata(settings.backbone, settings.stem, settings.patch_size, pool, pixels)
    with reading.named(folder):
        module.must_fit({name: tuple(tensor.shape) for name, tensor in weights.items()})
        built = module.with_weights(weights).eval()
    return Opened(built, pixels, {**about, **({TEACHER: "true"} if teacher else {})}, settings, state)


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
    image_size: Size
    stem: str = "auto"
    patch_size: int = 0
    pool: str | None = None
    channels: int = 3

    @classmethod
    def of(cls, metadata: Mapping[str, str]) -> "Built":
        """What the function `metadata` wrote; UserError for anything else."""
        if "backbone" not in metadata:
            raise UserError(
                "it names no backbone: its weights only fit into the module that they came from, which "
                "fastjem.load_encoder(path, encoder=...) takes"
            )
        text = metadata.get("image_size", "")
        size = from_text(text) if re.fullmatch("[0-9]{1,5}(x[0-9]{1,5})?", text) else None
        if size is None or shorter(size) < 1:
            must_be = "must be a number of pixels, or height x width"
            raise UserError(f"image_size in its metadata {must_be}, got {text[:40]!r}")
        patch = metadata.get("patch_size", "")
        if not re.fullmatch("[0-9]{1,5}", patch):
            raise UserError(f"patch_size in its metadata must be a number of pixels, got {patch[:40]!r}")
        stem = metadata.get("stem", "")
        if stem not in STEMS:
            raise UserError(f"stem in its metadata must be one of {', '.join(STEMS)}, got {stem[:40]!r}")
        # Earlier versions took a tag of pretrained weights with the name, and ignored it.
        backbone = architecture(metadata["backbone"])
        channels = Pixels.from_metadata(metadata).channels if METADATA in metadata else 3
        return cls(backbone, size, stem, int(patch), metadata.get("pool") or None, channels)

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
            module = self.create()
        compare(module, shapes, f"the weights are no {self.backbone}'s (a module of your own?)")

    def with_weights(self, state: Mapping[str, Tensor]) -> nn.Module:
        """The module with weights of which `must_fit` has seen the shapes."""
        module = self.create()
        try:
            module.load_state_dict(dict(state))
        except RuntimeError as error:
            raise UserError(f"the weights are no {self.backbone}'s: {error}") from None
        return module


@dataclass(frozen=True)
class Own:
    """A module of the user's own in place of one that is built."""

    module: nn.Module

    def must_fit(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """UserError where weights of these shapes, by name, aren't the module's."""
        compare(self.module, shapes, f"the weights don't fit the {type(self.module).__name__} that was given")

    def with_weights(self, state: Mapping[str, Tensor]) -> nn.Module:
        """The module itself, with weights of which `must_fit` has seen the shapes."""
        self.module.load_state_dict(dict(state))
        return self.module


def compare(module: nn.Module, shapes: Mapping[str, tuple[int, ...]], what: str) -> None:
    """UserError that begins with `what` and names the first tensor, where these shapes aren't those of the module."""
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    if expected == dict(shapes):
        return
    wrong = [name for name in expected if shapes.get(name) != expected[name]]
    wrong += [name for name in shapes if name not in expected]
    has, wants = (str(found.get(wrong[0], "nothing")) for found in (shapes, expected))
    raise UserError(f"{what}: {wrong[0]} is {has} where {wants} is needed")
