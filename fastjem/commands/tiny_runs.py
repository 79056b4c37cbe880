"""Runs that are next to nothing but their steps: for every method the smallest encoder, narrow heads and a few images.

`fastjem bench --steps` times them, and tests of all methods have their options.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastjem import backbones, encoders
from fastjem import config as configuration
from fastjem.build import Training, build
from fastjem.data.batch import Batch, Crops, finish
from fastjem.data.pixels import Pixels
from fastjem.data.sources.pairs import Pairs
from fastjem.data.upload import uploaded
from fastjem.methods import METHODS, needs_patches
from fastjem.prepare import Objects
from fastjem.ranks import Ranks

BATCH, SIZE, PATCH = 8, 32, 8
BLOCKS = 2  # of a vision transformer
# Heads and banks as narrow as the methods take them.
SMALL: dict[str, dict[str, Any]] = {
    "simclr": {"hidden": 16, "dim": 8},
    "moco": {"hidden": 16, "dim": 8, "queue": 24},
    "byol": {"hidden": 16, "dim": 8},
    "simsiam": {"hidden": 16, "dim": 16, "bottleneck": 8},
    "swav": {"hidden": 16, "dim": 8, "prototypes": 12, "frozen_epochs": 0},
    "dino": {"hidden": 16, "bottleneck": 8, "prototypes": 12, "frozen_epochs": 0},
    "barlow_twins": {"hidden": 16},
    "vicreg": {"hidden": 16},
    "data2vec": {"layers": 1},
    "dcl": {"hidden": 16, "dim": 8},
    "supcon": {"hidden": 16, "dim": 8},
    "clip": {"dim": 8},
    "siglip": {"dim": 8},
    "distill": {},
    "mocov3": {"hidden": 16, "dim": 8},
    "nnclr": {"hidden": 16, "dim": 8, "predictor_hidden": 16, "queue": 24},
    "ressl": {"hidden": 16, "dim": 8, "queue": 24},
    "tico": {"hidden": 16, "dim": 8},
    "wmse": {"hidden": 16, "dim": 2, "whitening_size": 8},
    "mmcr": {"hidden": 16, "dim": 8},
    "frossl": {"hidden": 16, "dim": 8},
    "empssl": {"hidden": 16, "dim": 8},
    "lejepa": {"hidden": 16, "dim": 8, "slices": 16},
    "visreg": {"hidden": 16, "dim": 8, "slices": 16},
    "ijepa": {"predictor_width": 16, "predictor_depth": 1, "predictor_heads": 2},
    "mae": {"decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2},
    "ibot": {"hidden": 16, "bottleneck": 8, "prototypes": 12, "frozen_epochs": 0},
    "dinov2": {"hidden": 16, "bottleneck": 8, "prototypes": 12, "frozen_epochs": 0},
    "dinov3": {"hidden": 16, "bottleneck": 8, "prototypes": 12, "patch_prototypes": 10},
    "simdino": {"hidden": 16, "dim": 8},
    "simdinov2": {"hidden": 16, "dim": 8},
    "msn": {"hidden": 16, "dim": 8, "prototypes": 12},
    "pmsn": {"hidden": 16, "dim": 8, "prototypes": 12},
    "deepcluster": {"hidden": 16, "dim": 8, "prototypes": 4},
    "smog": {"hidden": 16, "dim": 8, "groups": 6, "queue": 24},
    "pirl": {"dim": 8},
    "vicregl": {"hidden": 16, "local_hidden": 8, "local_dim": 8},
    "all4one": {"hidden": 16, "dim": 8, "predictor_hidden": 16, "queue": 24, "heads": 2, "layers": 1},
    "capi": {"clusters": 8, "predictor_width": 16, "predictor_depth": 1},
}


class Tiny(nn.Sequential):
    """[B, 3, H, W] -> [B, width]: an encoder that isn't timm's, of four tensors."""

    def __init__(self, width: int = 12):
        super().__init__(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, width), nn.LayerNorm(width), nn.GELU())


class Noise:
    """A source of images of random pixels, in three classes."""

    root = "noise"
    decoded = True
    labels: np.ndarray | None
    classes: list[str]

    def __init__(self, images: int = 4 * BATCH):
        side = SIZE * 8 // 7
        self.pixels = np.random.default_rng(0).integers(0, 256, (images, side, side, 3), dtype=np.uint8)
        self.labels = np.arange(images) % 3
        self.classes = ["a", "b", "c"]

    def __len__(self) -> int:
        return len(self.pixels)

    def name(self, i: int) -> str:
        return f"image {i}"

    def read(self, i: int) -> np.ndarray:
        return self.pixels[i]


class TinyMaps(nn.Conv2d):
    """The same of two tensors, with a feature map [B, width, H / 8, W / 8], as timm's ResNets have one."""

    def __init__(self, width: int = 12):
        super().__init__(3, width, PATCH, PATCH)
        self.num_features = width

    def forward_features(self, images: Tensor) -> Tensor:
        return super().forward(images)

    def forward_head(self, features: Tensor) -> Tensor:
        return features.mean((2, 3))

    def forward(self, images: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.forward_head(self.forward_features(images))


def encoder_for(name: str) -> nn.Module:
    """The smallest that the method takes.

    Raises:
        ImportError: where that is a vision transformer, which is timm's, and timm isn't installed.
    """
    method = METHODS[name]
    if not needs_patches(method):
        return TinyMaps() if name == "vicregl" else Tiny()
    import timm

    kind, options = backbones.arguments("test_vit", SIZE, patch=PATCH, pool=method.pool)
    return timm.create_model(kind, num_classes=0, embed_dim=16, depth=BLOCKS, **options)


@contextmanager
def tiny_run(name: str, device: torch.device, **fields: Any) -> Iterator[tuple[Training, Batch]]:
    """A run of the method, ready to go, and a batch of it on the device.

    Args:
        fields: of the run's `Config`, in place of those here.

    Raises:
        ImportError: as `encoder_for`.
    """
    sources = METHODS[name].views.sources
    with tempfile.TemporaryDirectory(prefix="fastjem-bench-") as folder:
        objects = Objects(encoder_for(name), source=Noise() if sources == 1 else Pairs([Noise()] * sources))
        config = configuration.from_fields(
            {
                "method": name,
                "out": f"{folder}/run",
                "image_size": SIZE,
                "batch_size": BATCH,
                "max_steps": 1_000_000,
                "optimizer": "adamw",
                "clip": 1.0,
                "device": device.type,
                "loader": "memory" if sources == 1 else "torch",
                "workers": 0,
                "options": {**SMALL[name], **_given(name, folder)},
                "cuda_graph": "on",
                **fields,
            }
        )
        training = build(config, Ranks(0, 1, device), objects, Path(config.out), None)
        training.model.train()
        training.step.method.epoch_begins(0)
        yield training, finished(training, crops_of(training))


def _given(name: str, folder: str) -> dict[str, str]:
    """The file of an encoder to be distilled."""
    if name != "distill":
        return {}
    import timm  # noqa: F401

    path = f"{folder}/given.safetensors"
    module = backbones.create("test_resnet", SIZE)
    encoders.save(module, path, encoders.metadata("test_resnet", "auto", 0, None, Pixels(SIZE)))
    return {"given": path}


def crops_of(training: Training) -> Crops:
    """The loader's first batch, on the device."""
    return next(uploaded(iter(training.loader), training.ranks.device))


def finished(training: Training, crops: Crops, step: int = 0) -> Batch:
    """The batch as that step of the run has it."""
    stage, seed = training.stage, training.config.seed
    return finish(crops, stage.specs, training.ranks.device, masks=stage.masks, seed=seed, step=step, **training.layout)
