"""Decoupled contrastive learning: Yeh et al. 2022, arXiv 2110.06848."""

from torch import Tensor

import fastjem.functional as F
from fastjem.data.batch import Batch
from fastjem.data.views import Views
from fastjem.methods import ranges
from fastjem.methods.defaults import Defaults, Preset
from fastjem.methods.protocol import About, Branch, Method, RunFacts
from fastjem.methods.symmetric import symmetric
from fastjem.nn.parts import MLP


class DCL(Method):
    """SimCLR whose positive isn't among the candidates, so that easy positives don't weaken the pull: small batches do.

    sigma: DCLW's: positives that are far apart weigh more, by a softmax of their cosines / sigma over the images of all
        ranks; 0 is DCL.
    """

    about = About("contrastive", "the other images of the batch push away", "Yeh et al. 2022, arXiv 2110.06848")
    views = Views(large=2, recipe="simclr")
    defaults = Defaults(
        "sgd",
        0.03,
        1e-4,
        short=("lars", 1.2),
        small=("adamw", 4e-3),
        source="section 4.1: SGD, 0.03 at batch 256, wd 1e-4",
    )
    presets = {"cifar": Preset("table 7: temperature 0.07", options={"temperature": 0.07})}

    def __init__(
        self,
        width: int,
        run: RunFacts = RunFacts(),
        *,
        hidden: int | None = None,
        dim: int = 128,
        temperature: float = 0.1,
        sigma: float = 0.0,
        norm: str = "batch",
    ):
        super().__init__(width, run)
        ranges.positive("dcl", temperature=temperature)
        ranges.not_negative("dcl", sigma=sigma)
        self.projector = MLP(width, hidden or width, dim, norm=norm, last_norm=True)
        self.temperature = temperature
        self.sigma = sigma

    def loss(self, student: Branch, teacher: Branch, batch: Batch, step: Tensor) -> Tensor:
        def dcl(z0: Tensor, z1: Tensor) -> Tensor:
            if self.sigma:
                return F.dclw(z0, z1, temperature=self.temperature, sigma=self.sigma, group=self.run.group)
            return F.dcl(z0, z1, temperature=self.temperature, group=self.run.group)

        return symmetric(dcl, student, teacher, batch.views)
