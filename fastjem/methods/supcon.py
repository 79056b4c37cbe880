"""Supervised contrastive learning: Khosla et al. 2020, arXiv 2004.11362."""

from torch import Tensor

import fastjem.functional as F
from fastjem.data.batch import Batch
from fastjem.data.views import Views
from fastjem.methods import ranges
from fastjem.methods.defaults import Defaults, Preset
from fastjem.methods.protocol import About, Branch, Method, RunFacts
from fastjem.nn.parts import MLP


class SupCon(Method):
    """Each view must find the other views of its class, the folder its image is in, among all views of the batch."""

    about = About(
        "contrastive, supervised", "images of other classes push away", "Khosla et al. 2020, arXiv 2004.11362"
    )
    views = Views(large=2, recipe="mocov2")
    combines = frozenset({"large_views"})
    refuses = {"small_views": "takes every view as a target of the others, which a small one can't be"}
    projector_options = ("hidden", "dim")
    needs_labels = True
    defaults = Defaults(
        "sgd",
        0.05,
        1e-4,
        short=("lars", 1.2),
        small=("adamw", 4e-3),
        source="SupContrast, main_supcon.py: SGD, 0.05 at batch 256, wd 1e-4",
    )
    presets = {
        "cifar": Preset(
            "SupContrast, README: 0.5 at batch 1024, temperature 0.1",
            Defaults("sgd", 0.125, 1e-4),
            {"temperature": 0.1},
        )
    }

    def __init__(
        self,
        width: int,
        run: RunFacts = RunFacts(),
        *,
        hidden: int | None = None,
        dim: int = 128,
        temperature: float = 0.07,
        norm: str = "none",
    ):
        super().__init__(width, run)
        ranges.positive("supcon", temperature=temperature)
        self.projector = MLP(width, *self.projector_widths(hidden or width, dim), norm=norm)
        self.temperature = temperature

    def loss(self, student: Branch, teacher: Branch, batch: Batch, step: Tensor) -> Tensor:
        z = student.project(batch.views).unflatten(0, (len(batch.views), -1))
        return F.supcon(z, batch.labels, temperature=self.temperature, group=self.run.group)
