"""Whole runs as stable-pretraining's CIFAR-10 benchmarks have them (0.1.8, benchmarks/cifar10 of its repository).

Its module, forward functions, losses, views, LARS and schedule under Lightning's trainer, on an encoder that is given:
of the projector only the first layer's width follows the encoder; as there, the learning rate doesn't follow the batch.
Training is in float32, and without what costs time and teaches the encoder nothing: validation, probes, loggers, and
the callbacks that the package adds to every trainer. The loader's workers stay over epochs, its data module's default.
"""

import functools
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastjem.data.pixels import Pixels


@functools.cache
def scratch() -> tempfile.TemporaryDirectory[str]:
    """A folder that ends with the process."""
    return tempfile.TemporaryDirectory()


def package() -> Any:
    """stable_pretraining, silent; it and what it imports write to `scratch`, not to the home folder."""
    os.environ["MPLCONFIGDIR"] = scratch().name
    import stable_pretraining

    stable_pretraining.set(verbose="ERROR", cache_dir=scratch().name)
    import stable_pretraining.forward  # this one doesn't come by itself when it is asked for

    return stable_pretraining


@dataclass
class Recipe:
    """What distinguishes a method: its forward function, the loss by the name that this looks for, its projections."""

    forward: Callable[..., dict[str, Any]]
    loss: dict[str, nn.Module]
    projections: int  # their width


def recipes() -> dict[str, Recipe]:
    """By our names."""
    spt = package()
    nt_xent = spt.losses.NTXEntLoss(temperature=0.5)
    vicreg = spt.losses.VICRegLoss(sim_coeff=25.0, std_coeff=25.0, cov_coeff=1.0)
    return {
        "simclr": Recipe(spt.forward.simclr, {"simclr_loss": nt_xent}, projections=256),
        "vicreg": Recipe(spt.forward.vicreg, {"vicreg_loss": vicreg}, projections=2048),
    }


METHODS: Sequence[str] = ("simclr", "vicreg")


def pixels(size: int) -> Pixels:
    """Images as its encoders are given them: the benchmarks normalise by CIFAR-10's own statistics."""
    return Pixels(size, **package().data.static.CIFAR10)


def views(size: int) -> Any:
    """Two views, drawn alike for both methods."""
    data = package().data
    transforms = data.transforms
    view = transforms.Compose(
        transforms.RGB(),
        transforms.RandomResizedCrop((size, size), scale=(0.08, 1.0)),
        transforms.RandomHorizontalFlip(p=0.5),
        transforms.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, p=0.8),
        transforms.RandomGrayscale(p=0.2),
        transforms.ToImage(**data.static.CIFAR10),
    )
    return transforms.MultiViewTransform([view, view])


def module_of(recipe: Recipe, encoder: nn.Module, width: int) -> Any:
    """Its Lightning module of an encoder whose embeddings are so wide."""
    projector = nn.Sequential(
        *(nn.Linear(width, 2048), nn.BatchNorm1d(2048), nn.ReLU(inplace=True)),
        *(nn.Linear(2048, 2048), nn.BatchNorm1d(2048), nn.ReLU(inplace=True)),
        nn.Linear(2048, recipe.projections),
    )
    optim = {
        "optimizer": {"type": "LARS", "lr": 5, "weight_decay": 1e-6},
        "scheduler": {"type": "LinearWarmupCosineAnnealing"},
    }
    return package().Module(backbone=encoder, projector=projector, forward=recipe.forward, optim=optim, **recipe.loss)


def train(
    module: Any, folder: str, size: int, *, batch: int, epochs: int, workers: int, most_steps: int = 0
) -> tuple[float, int]:
    """(seconds, images) of fitting to a folder of classes. most_steps: end after so many; 0: after the epochs."""
    spt = package()
    import lightning
    from torchvision.datasets import ImageFolder

    dataset = spt.data.FromTorchDataset(ImageFolder(folder), names=["image", "label"], transform=views(size))
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=batch, shuffle=True, drop_last=True, num_workers=workers, persistent_workers=workers > 0
    )
    trainer = lightning.Trainer(
        accelerator="cpu", devices=1, precision="32-true", max_epochs=epochs, max_steps=most_steps or -1,
        num_sanity_val_steps=0, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=scratch().name,
    )  # fmt: skip
    # The module logs its learning rate through this callback at each step, so it stays.
    needed = spt.callbacks.registry.ModuleRegistryCallback
    trainer.callbacks = [callback for callback in trainer.callbacks if isinstance(callback, needed)]
    begin = time.perf_counter()
    trainer.fit(module, loader)
    return time.perf_counter() - begin, trainer.global_step * batch
