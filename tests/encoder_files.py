"""Encoders as they are exported, without the run: random weights, with statistics as of a trained one."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastjem import backbones, encoders
from fastjem.data.pixels import Pixels


def encoder_file(path: Path, name: str, pixels: Pixels, *, stem: str = "auto", pool: str | None = None, patch: int = 0):
    """An `encoder.safetensors` of timm's model, and the module in eval mode that it holds."""
    torch.manual_seed(7)
    module: Any = backbones.create(
        name, pixels.size, stem=stem, pool=pool, patch=patch, channels=pixels.channels
    )  # fmt: skip
    randomise(module)
    path.parent.mkdir(parents=True, exist_ok=True)
    encoders.save(module, str(path), encoders.metadata(name, stem, patch, pool, pixels))
    return module.eval()


def randomise(module: nn.Module) -> None:
    """Running means and variances that aren't those of a module that saw nothing."""
    for key, value in module.state_dict().items():
        if key.endswith(("running_mean", "running_var")):
            value.copy_(torch.rand_like(value) + 0.5)
