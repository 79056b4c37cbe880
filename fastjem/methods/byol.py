"""BYOL: Grill et al. 2020, arXiv 2006.07733."""

import torch
from torch import Tensor

import fastjem.functional as F
from fastjem.data.batch import Batch
from fastjem.data.views import Views
from fastjem.methods.defaults import Defaults, Preset
from fastjem.methods.protocol import About, Branch, Method, RunFacts
from fastjem.nn.parts import MLP


class BYOL(Method):
    """A predictor of the momentum encoder's projection of the other view; no negatives."""

    about = About(
        "self-distillation",
        "predictor and momentum encoder: the two sides differ",
        "Grill et al. 2020, arXiv 2006.07733",
    )
    views = Views(large=2, recipe="byol")
    momentum = ("encoder", "projector")
    defaults = Defaults(
        "lars",
        0.8,
        1.5e-6,
        momentum=0.996,
        small=("adamw", 1e-3),
        source="section 3.3: LARS, 3.2 at batch 4096, 1.5e-6; tau 0.996 to 1",
    )

    presets = {
        "cifar": Preset("solo-learn, scripts/pretrain/cifar/byol.yaml", Defaults("larc", 1.0, 1e-5, momentum=0.99))
    }

    def __init__(
        self,
        width: int,
        run: RunFacts = RunFacts(),
        *,
        hidden: int = 4096,
        dim: int = 256,
        norm: str = "batch",
    ):
        super().__init__(width, run)
        self.projector = MLP(width, hidden, dim, norm=norm)
        self.predictor = MLP(dim, hidden, dim, norm=norm)

    def loss(self, student: Branch, teacher: Branch, batch: Batch, step: Tensor) -> Tensor:
        p0, p1 = student.predictor(student.project(batch.views)).chunk(2)
        with torch.no_grad():
            z0, z1 = teacher.project(batch.views).chunk(2)
        # 2 - 2 cos, both ways
        return 4 + 2 * (F.negative_cosine(p0, z1) + F.negative_cosine(p1, z0))
