"""SimSiam: Chen and He 2021, arXiv 2011.10566."""

import torch
from torch import Tensor

import fastjem.functional as F
from fastjem.data.batch import Batch
from fastjem.data.views import Views
from fastjem.methods.defaults import Defaults, Preset
from fastjem.methods.protocol import About, Branch, Method, RunFacts
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
    asymmetric = True
    constant_rate = ("predictor",)
    defaults = Defaults(
        "sgd",
        0.05,
        1e-4,
        warmup_epochs=0,
        short=("lars", 2.4),
        small=("adamw", 1e-3),
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
        self.projector = MLP(width, hidden, hidden, dim, norm=norm, last_norm=True, last_affine=False)
        self.predictor = MLP(dim, bottleneck, dim, norm=norm)
        self.stop_gradient = stop_gradient

    def loss(self, student: Branch, teacher: Branch, batch: Batch, step: Tensor) -> Tensor:
        z = student.project(batch.views)
        p0, p1 = student.predictor(z).chunk(2)
        if teacher.momentum:
            with torch.no_grad():
                z = teacher.project(batch.views)
        z0, z1 = (z.detach() if self.stop_gradient else z).chunk(2)
        return (F.negative_cosine(p0, z1) + F.negative_cosine(p1, z0)) / 2
