"""SimCLR: Chen et al. 2020, arXiv 2002.05709."""

from torch import Tensor

import fastjem.functional as F
from fastjem.data.batch import Batch
from fastjem.data.views import Views
from fastjem.methods import ranges
from fastjem.methods.defaults import Defaults, Preset
from fastjem.methods.protocol import About, Branch, Method, RunFacts
from fastjem.methods.symmetric import symmetric
from fastjem.nn.parts import MLP


class SimCLR(Method):
    """Each view must find the other view of its image among all views of the batch."""

    about = About("contrastive", "the other images of the batch push away", "Chen et al. 2020, arXiv 2002.05709")
    views = Views(large=2, recipe="simclr")
    defaults = Defaults(
        "lars",
        1.2,
        1e-6,
        small=("adamw", 4e-3),
        source="B.1: LARS, 0.075 sqrt(B), which is 4.8 at 4096; weight decay 1e-6",
    )

    presets = {
        "cifar": Preset(
            "solo-learn, scripts/pretrain/cifar/simclr.yaml",
            Defaults("larc", 0.4, 1e-4),
            {"hidden": 2048, "dim": 256, "temperature": 0.2, "norm": "none"},
        )
    }

    def __init__(
        self,
        width: int,
        run: RunFacts = RunFacts(),
        *,
        hidden: int | None = None,
        dim: int = 128,
        temperature: float = 0.1,
        norm: str = "batch",
    ):
        super().__init__(width, run)
        ranges.positive("simclr", temperature=temperature)
        self.projector = MLP(width, hidden or width, dim, norm=norm, last_norm=True)
        self.temperature = temperature

    def loss(self, student: Branch, teacher: Branch, batch: Batch, step: Tensor) -> Tensor:
        def nt_xent(z0: Tensor, z1: Tensor) -> Tensor:
            return F.nt_xent(z0, z1, temperature=self.temperature, group=self.run.group)

        return symmetric(nt_xent, student, teacher, batch.views)
