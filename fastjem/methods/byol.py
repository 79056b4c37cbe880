"""BYOL: Grill et al. 2020, arXiv 2006.07733."""

import torch
from torch import Tensor

import fastjem.functional as F
from fastjem.data.batch import Batch
from fastjem.data.views import Views
from fastjem.methods.defaults import Defaults, Preset
from fastjem.methods.protocol import About, Branch, Method, RunFacts
from fastjem.methods.symmetric import mean_over_pairs, of_large
from fastjem.nn.parts import MLP


class BYOL(Method):
    """A predictor of the momentum encoder's projection of the other view; no negatives."""

    about = About(
        "self-distillation",
        "predictor and momentum encoder: the two sides differ",
        "Grill et al. 2020, arXiv 2006.07733",
    )
    views = Views(large=2, recipe="byol")
    combines = frozenset({"large_views", "small_views", "no_momentum_encoder"})
    projector_options = ("hidden", "dim")
    momentum = ("encoder", "projector")
    small_widths = {"hidden": 4}
    defaults = Defaults(
        "lars",
        0.8,
        1.5e-6,
        momentum=0.996,
        small=("adamw", 2e-3),
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
        widths = self.projector_widths(hidden, dim)
        self.projector = MLP(width, *widths, norm=norm)
        self.predictor = MLP(widths[-1], hidden, widths[-1], norm=norm)
        if run.momentum_encoder is False:
            # As SimSiam's: without a momentum encoder the predictor must keep up (table 21: by a higher rate).
            self.constant_rate = ("predictor",)
            self.asymmetric = True

    def loss(self, student: Branch, teacher: Branch, batch: Batch, step: Tensor) -> Tensor:
        views = batch.views
        large = self.views.large
        z = student.project(views)
        predictions = student.predictor(z).chunk(len(views))
        with torch.no_grad():
            targets = (
                teacher.project(views[:large]).chunk(large) if teacher.momentum else of_large(z.detach(), views, large)
            )
        # Of two views 2 - 2 cos both ways, which are added up
        return 4 + 4 * mean_over_pairs(F.negative_cosine, predictions, targets)
