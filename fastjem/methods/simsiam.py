"""SimSiam: Chen and He 2021, arXiv 2011.10566."""

import torch
from torch import Tensor

import fastjem.functional as F
from fastjem.data.batch import Batch
from fastjem.data.views import Views
from fastjem.methods.defaults import Defaults, Preset
from fastjem.methods.protocol import About, Branch, Method, RunFacts
from fastjem.methods.symmetric import mean_over_pairs, of_large
from fastjem.nn.parts import MLP


class SimSiam(Method):
    """A predictor of the other view's projection, through which no gradient flows; no negatives, no momentum.

    `stop_gradient=False` is the paper's figure 2: the representation collapses. It is there to see the alarm.
    """

    about = About(
        "self-distillation",
        "predictor and stop-gradient: the two sides differ",
        "Chen and He 2021, arXiv 2011.10566",
    )
    views = Views(large=2, recipe="mocov2")
    combines = frozenset({"large_views", "small_views"})
    projector_options = ("hidden", "dim")
    asymmetric = True
    constant_rate = ("predictor",)
    small_widths = {"hidden": 4, "dim": 4, "bottleneck": 1}
    defaults = Defaults(
        "sgd",
        0.05,
        1e-4,
        warmup_epochs=0,
        short=("lars", 2.4),
        small=("adamw", 2e-3),
        source="section 3: SGD, 0.05 B/256, 1e-4, predictor's rate constant",
    )

    presets = {"cifar": Preset("solo-learn, scripts/pretrain/cifar/simsiam.yaml", Defaults("sgd", 0.5, 1e-5))}

    def __init__(
        self,
        width: int,
        run: RunFacts = RunFacts(),
        *,
        hidden: int = 2048,
        dim: int = 2048,
        bottleneck: int = 512,
        stop_gradient: bool = True,
        norm: str = "batch",
    ):
        super().__init__(width, run)
        widths = self.projector_widths(hidden, hidden, dim)
        self.projector = MLP(width, *widths, norm=norm, last_norm=True, last_affine=False)
        self.predictor = MLP(widths[-1], bottleneck, widths[-1], norm=norm)
        self.stop_gradient = stop_gradient

    def loss(self, student: Branch, teacher: Branch, batch: Batch, step: Tensor) -> Tensor:
        views = batch.views
        large = self.views.large
        z = student.project(views)
        predictions = student.predictor(z).chunk(len(views))
        if teacher.momentum:
            with torch.no_grad():
                targets = teacher.project(views[:large]).chunk(large)
        else:
            targets = of_large(z.detach() if self.stop_gradient else z, views, large)
        return mean_over_pairs(F.negative_cosine, predictions, targets)
