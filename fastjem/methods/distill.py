"""Distillation from a given encoder: its features are the targets (Romero et al. 2015, arXiv 1412.6550)."""

from torch import Tensor

import fastjem.functional as F
from fastjem.data.batch import Batch
from fastjem.data.views import Views
from fastjem.given import Given
from fastjem.methods.defaults import Defaults
from fastjem.methods.protocol import About, Branch, Method, RunFacts
from fastjem.methods.reasons import OF_EACH_VIEW
from fastjem.nn.parts import MLP


class Distill(Method):
    """The student predicts, by a head that is dropped afterwards, what a frozen encoder with given weights makes of the
    same view.

    given: a run folder, an export, or timm's weights: see `fastjem.given.open_weights`.
    loss: "cosine", or "mse" between features of length one (twice as much).
    teacher: of a run that is given, its momentum encoder in place of the trained one.
    layers: of the head; 1 is linear.
    size: pixels of the shorter side of the given encoder's images, 0 as they come.
    """

    about = About("distillation", "the targets are given", "of features: Romero et al. 2015, arXiv 1412.6550")
    views = Views(large=1, recipe="simclr")
    mean_over_images = True
    refuses = {
        **OF_EACH_VIEW,
        "projector": "predicts given features, of their width: --options layers, hidden",
    }
    defaults = Defaults("adamw", 5e-4, 0.05, clip=3.0, warmup_epochs=5, source="no paper's: AdamW, as ViTs take it")

    def __init__(
        self,
        width: int,
        run: RunFacts = RunFacts(),
        *,
        given: str = "",
        teacher: bool = False,
        loss: str = "cosine",
        layers: int = 1,
        hidden: int = 2048,
        size: int = 0,
    ):
        super().__init__(width, run)
        if loss not in ("cosine", "mse"):
            raise ValueError(f"distill: loss must be cosine or mse, got {loss!r}")
        self.given = Given(given, size or None, teacher=teacher)
        self.predictor = MLP(width, *[hidden] * (layers - 1), self.given.width, norm="batch")
        self.factor = 2.0 if loss == "mse" else 1.0

    def loss(self, student: Branch, teacher: Branch, batch: Batch, step: Tensor) -> Tensor:
        images = batch.views[0]
        target = student.constant(lambda some: self.given(some, self.mean, self.std), [images]).pooled
        prediction = student.predictor(student.encode([images]).pooled)
        student.note(projection=prediction.detach())
        return self.factor * (1 + F.negative_cosine(prediction, target))
