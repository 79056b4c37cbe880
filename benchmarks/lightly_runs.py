"""Whole runs as lightly's CIFAR-10 benchmark has them (lightly 1.6, docs/source/getting_started/benchmarks).

Its heads, losses, transforms without blur, optimiser and schedule, on an encoder that is given: of the heads only the
first layer's width follows the encoder. VICReg, which that benchmark hasn't got, is lightly's example of it. The loop
is plain PyTorch, without Lightning, and the loader's workers stay over epochs: both are faster than as it is there.
"""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

sys.path.insert(0, str(Path(__file__).parent))
from lightly_steps import copied_module


@dataclass
class Recipe:
    """One method: what it sees, its modules beside the encoder, its loss of the views."""

    transform: Callable[[int], Any]  # of an image size
    heads: Callable[[int], dict[str, nn.Module]]  # of the encoder's width
    loss: Callable[["Run", list[Tensor], int], Tensor]  # of the run, its views and the epoch
    criterion: Callable[[], nn.Module]
    momentum: tuple[str, ...] = ()  # what has a momentum copy
    scales: bool = True  # whether the learning rate grows with the batch
    adam: bool = False
    sgd: Mapping[str, float] = field(default_factory=lambda: {"momentum": 0.9, "weight_decay": 5e-4})


class Run:
    """Modules, optimiser and schedule of a run of so many epochs."""

    def __init__(self, recipe: Recipe, encoder: nn.Module, width: int, *, batch: int, epochs: int):
        self.recipe = recipe
        self.modules = nn.ModuleDict({"encoder": encoder, **recipe.heads(width)}).train()
        self.copies = nn.ModuleDict({name: copied_module(self.modules[name]) for name in recipe.momentum})
        self.copies.requires_grad_(False)
        self.criterion = recipe.criterion()
        parameters = self.modules.parameters()
        factor = batch / 128 if recipe.scales else 1.0
        if recipe.adam:
            self.optimizer: torch.optim.Optimizer = torch.optim.Adam(parameters, 1e-3 * factor, weight_decay=1e-6)
        else:
            self.optimizer = torch.optim.SGD(parameters, 6e-2 * factor, **recipe.sgd)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, epochs)

    def step(self, views: list[Tensor], epoch: int) -> None:
        from lightly.models.utils import update_momentum

        for name, module in self.copies.items():
            update_momentum(self.modules[name], module, m=0.99)
        loss = self.recipe.loss(self, views, epoch)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def project(self, view: Tensor) -> Tensor:
        return self.modules["head"](self.modules["encoder"](view))

    def predict(self, projection: Tensor) -> Tensor:
        return self.modules["predictor"](projection)

    @torch.no_grad()
    def project_momentum(self, view: Tensor) -> Tensor:
        return self.copies["head"](self.copies["encoder"](view))


def train(
    run: Run, folder: str, size: int, *, batch: int, epochs: int, workers: int, most_steps: int = 0
) -> tuple[float, int]:
    """(seconds, images) of a run on a folder of classes. most_steps: end after so many; 0: after the epochs."""
    from lightly.data import LightlyDataset

    begin = time.perf_counter()
    dataset = LightlyDataset(input_dir=folder, transform=run.recipe.transform(size))
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=batch, shuffle=True, drop_last=True, num_workers=workers, persistent_workers=workers > 0
    )
    steps = 0
    for epoch in range(epochs):
        for views, _, _ in loader:
            run.step(views, epoch)
            steps += 1
            if steps == most_steps:
                return time.perf_counter() - begin, steps * batch
        run.schedule.step()
    return time.perf_counter() - begin, steps * batch


def _pair(run: Run, views: list[Tensor], epoch: int) -> Tensor:
    return run.criterion(run.project(views[0]), run.project(views[1]))


def _moco(run: Run, views: list[Tensor], epoch: int) -> Tensor:
    def one_way(query: Tensor, key: Tensor) -> Tensor:
        order = torch.randperm(len(key))  # its batch shuffle, which undoes itself: on one device it changes nothing
        keys = run.project_momentum(key[order])[order.argsort()]
        return run.criterion(run.project(query), keys)

    return 0.5 * (one_way(views[0], views[1]) + one_way(views[1], views[0]))


def _byol(run: Run, views: list[Tensor], epoch: int) -> Tensor:
    predictions = [run.predict(run.project(view)) for view in views]
    targets = [run.project_momentum(view) for view in views]
    return 0.5 * (run.criterion(predictions[0], targets[1]) + run.criterion(predictions[1], targets[0]))


def _simsiam(run: Run, views: list[Tensor], epoch: int) -> Tensor:
    projections = [run.project(view) for view in views]
    predictions = [run.predict(z) for z in projections]
    losses = [run.criterion(projections[i].detach(), predictions[1 - i]) for i in (0, 1)]
    return 0.5 * (losses[0] + losses[1])


def _nnclr(run: Run, views: list[Tensor], epoch: int) -> Tensor:
    projections = [run.project(view) for view in views]
    predictions = [run.predict(z) for z in projections]
    bank = run.modules["bank"]
    neighbours = [bank(z.detach(), update=i == 1) for i, z in enumerate(projections)]
    losses = [run.criterion(neighbours[i], predictions[1 - i]) for i in (0, 1)]
    return 0.5 * (losses[0] + losses[1])


def _swav(run: Run, views: list[Tensor], epoch: int) -> Tensor:
    prototypes: Any = run.modules["prototypes"]
    prototypes.normalize()
    scores = [prototypes(normalize(run.project(view), dim=1)) for view in views]
    return run.criterion(scores[:2], scores[2:])


def _dino(run: Run, views: list[Tensor], epoch: int) -> Tensor:
    teacher = [run.project_momentum(view) for view in views[:2]]
    student = [run.project(view) for view in views]
    return run.criterion(teacher, student, epoch=epoch)


def _projection(*widths: int, last_norm: bool) -> nn.Module:
    """A two-layer head with batch norm, as the benchmark has it."""
    from lightly.models.modules import heads

    first, hidden, last = widths
    norm = nn.BatchNorm1d(last) if last_norm else None
    return heads.ProjectionHead(
        [(first, hidden, nn.BatchNorm1d(hidden), nn.ReLU(inplace=True)), (hidden, last, norm, None)]
    )


def recipes() -> dict[str, Recipe]:
    """By our names."""
    from lightly import loss, transforms
    from lightly.models import modules
    from lightly.models.modules import heads

    def simclr_views(size: int) -> Any:
        return transforms.SimCLRTransform(input_size=size, cj_strength=0.5, gaussian_blur=0.0)

    def byol_views(size: int) -> Any:
        return transforms.BYOLTransform(
            view_1_transform=transforms.BYOLView1Transform(input_size=size, gaussian_blur=0.0),
            view_2_transform=transforms.BYOLView2Transform(input_size=size, gaussian_blur=0.0),
        )

    def swav_views(size: int) -> Any:
        return transforms.SwaVTransform(
            crop_sizes=(size,), crop_counts=(2,), crop_min_scales=(0.14,), crop_max_scales=(1.0,), cj_strength=0.5,
            gaussian_blur=0.0,
        )  # fmt: skip

    def dino_views(size: int) -> Any:
        return transforms.DINOTransform(
            global_crop_size=size, n_local_views=0, cj_strength=0.5, gaussian_blur=(0.0, 0.0, 0.0)
        )

    def dino_head(width: int) -> nn.Module:
        head = heads.DINOProjectionHead(width, 2048, 256, 2048, batch_norm=True)
        layers = [(width, 2048, nn.BatchNorm1d(2048), nn.GELU()), (2048, 256, None, None)]
        head.layers = heads.ProjectionHead(layers).layers
        return head

    return {
        "simclr": Recipe(
            simclr_views, lambda width: {"head": heads.SimCLRProjectionHead(width, 512, 128)}, _pair, loss.NTXentLoss
        ),
        "moco": Recipe(
            simclr_views,
            lambda width: {"head": heads.MoCoProjectionHead(width, 512, 128)},
            _moco,
            lambda: loss.NTXentLoss(temperature=0.1, memory_bank_size=(4096, 128)),
            momentum=("encoder", "head"),
        ),
        "byol": Recipe(
            byol_views,
            lambda width: {
                "head": heads.BYOLProjectionHead(width, 1024, 256),
                "predictor": heads.BYOLPredictionHead(256, 1024, 256),
            },
            _byol,
            loss.NegativeCosineSimilarity,
            momentum=("encoder", "head"),
        ),
        "simsiam": Recipe(
            lambda size: transforms.SimSiamTransform(input_size=size, gaussian_blur=0.0),
            lambda width: {
                "head": _projection(width, 2048, 2048, last_norm=True),
                "predictor": heads.SimSiamPredictionHead(2048, 512, 2048),
            },
            _simsiam,
            loss.NegativeCosineSimilarity,
            scales=False,
        ),
        "swav": Recipe(
            swav_views,
            lambda width: {
                "head": heads.SwaVProjectionHead(width, 512, 128),
                "prototypes": modules.SwaVPrototypes(128, 512),
            },
            _swav,
            loss.SwaVLoss,
            adam=True,
        ),
        "dino": Recipe(
            dino_views,
            lambda width: {"head": dino_head(width)},
            _dino,
            lambda: loss.DINOLoss(output_dim=2048),
            momentum=("encoder", "head"),
        ),
        "barlow_twins": Recipe(
            byol_views,
            lambda width: {"head": _projection(width, 2048, 2048, last_norm=False)},
            _pair,
            loss.BarlowTwinsLoss,
        ),
        "vicreg": Recipe(
            lambda size: transforms.VICRegTransform(input_size=size, gaussian_blur=0.0),
            lambda width: {"head": heads.VICRegProjectionHead(width, 2048, 2048, num_layers=2)},
            _pair,
            loss.VICRegLoss,
            sgd={},  # as its example has it; with momentum it diverges here
        ),
        "nnclr": Recipe(
            simclr_views,
            lambda width: {
                "head": _projection(width, 2048, 256, last_norm=True),
                "predictor": heads.NNCLRPredictionHead(256, 4096, 256),
                "bank": modules.NNMemoryBankModule(size=(4096, 256)),
            },
            _nnclr,
            loss.NTXentLoss,
        ),
    }


METHODS: Sequence[str] = ("simclr", "moco", "byol", "simsiam", "swav", "dino", "barlow_twins", "vicreg", "nnclr")
