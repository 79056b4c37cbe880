"""Encoders as they are exported, without the run: random weights, with statistics as of a trained one."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastjem import backbones, encoders
from fastjem.data.pixels import Pixels
from fastjem.data.size import height_and_width


def encoder_file(path: Path, name: str, pixels: Pixels, *, stem: str = "auto", pool: str | None = None, patch: int = 0):
    """An `encoder.safetensors` of timm's model, and the module in eval mode that it holds."""
    torch.manual_seed(7)
    module: Any = backbones.create(
        name, pixels.size, stem=stem, pool=pool, patch=patch, channels=pixels.channels
    )  # fmt: skip
    randomise(module, torch.randn(4, pixels.channels, *height_and_width(pixels.size)))
    path.parent.mkdir(parents=True, exist_ok=True)
    encoders.save(module, str(path), encoders.metadata(name, stem, patch, pool, pixels))
    return module.eval()


@torch.no_grad()
def randomise(module: nn.Module, images: torch.Tensor) -> None:
    """Batch norms as of a trained module: weights that aren't zero, and the statistics of images [B, C, H, W]."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.weight.copy_(torch.rand_like(part.weight) + 0.5)
            part.momentum = None  # the mean of all batches
    module.train()(images)
