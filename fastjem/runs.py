"""A run folder, or an exported encoder, opened again."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from fastjem import checkpoints, encoders
from fastjem.errors import UserError
from fastjem.methods import METHODS
from fastjem.pretrain import Config, build_method


@dataclass
class Opened:
    """encoder and projector (None for an export) in eval mode; `metadata` is what an export holds."""

    path: Path
    encoder: nn.Module
    projector: nn.Module | None
    image_size: int
    step: int | None
    metadata: dict[str, str]
    config: Config | None = None

    @property
    def folder(self) -> Path:
        return self.path if self.path.is_dir() else self.path.parent


def metadata(config: Config) -> dict[str, str]:
    """What `fastjem.load_encoder` needs beside the weights."""
    return {"backbone": config.backbone, "image_size": str(config.image_size), "stem": config.stem,
            "patch_size": str(config.patch_size), "pool": getattr(METHODS[config.method], "pool", "")}  # fmt: skip


def open_run(path: str | Path) -> Opened:
    """A run at its last checkpoint, one that was killed too, or an `encoder.safetensors`.

    Raises:
        UserError: where there is no run, no checkpoint, or one whose encoder can't be built from its configuration.
    """
    path = Path(path)
    if path.is_file():
        encoder, about = encoders.load_with_metadata(str(path))
        return Opened(path, encoder, None, int(about["image_size"]), None, about)
    if not (path / "config.yaml").exists():
        raise UserError(f"there is no run in {path} (a run folder has a config.yaml)")
    known = {f.name for f in dataclasses.fields(Config)}
    config = Config(**{k: v for k, v in json.loads((path / "config.yaml").read_text()).items() if k in known})
    state = checkpoints.load(path)
    if state is None:
        raise UserError(f"{path} has no checkpoint; fastjem pretrain --resume --out {path} goes on with it")
    about = metadata(config)
    encoder = encoders.create(config.backbone, config.image_size, stem=config.stem, patch=config.patch_size,
                              pool=about["pool"] or None)  # fmt: skip
    try:
        encoder.load_state_dict(_below("encoder.", state["model"]))
        method = build_method(config, getattr(encoder, "num_features", 0), 0, 1, 1, None)
        projector = getattr(method, "projector", None)
        if projector is not None:
            projector.load_state_dict(_below("method.projector.", state["model"]))
    except RuntimeError:
        raise UserError(f"the weights in {path} are no {config.backbone}'s (a module of your own?)") from None
    return Opened(path, encoder.eval(), projector and projector.eval(), config.image_size, state["step"], about, config)


def _below(prefix: str, state: dict[str, Any]) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
