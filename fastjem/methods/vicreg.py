"""VICReg: Bardes et al. 2022, arXiv 2105.04906."""

from torch import Tensor

import fastjem.functional as F
from fastjem.data.batch import Batch
from fastjem.data.views import Views
from fastjem.methods import ranges
from fastjem.methods.defaults import Defaults, Preset
from fastjem.methods.protocol import About, Branch, Method, RunFacts
from fastjem.methods.symmetric import symmetric
from fastjem.nn.parts import MLP


class VICReg(Method):
    """Views alike, every dimension's deviation at least one, no two dimensions correlated."""

    about = About("decorrelation", "variance kept above 1, covariance below", "Bardes et al. 2022, arXiv 2105.04906")
    views = Views(large=2, recipe="vicreg")
    combines = frozenset({"large_views", "small_views"})
    projector_options = ("hidden",)
    defaults = Defaults("lars", 0.57, 1e-6, small=("adamw", 2e-3), source="section 4.2: LARS, 1.6 at batch 2048, 1e-6")

    presets = {
        "cifar": Preset("solo-learn, scripts/pretrain/cifar/vicreg.yaml", Defaults("larc", 0.3, 1e-4), {"hidden": 2048})
    }

    def __init__(
        self,
        width: int,
        run: RunFacts = RunFacts(),
        *,
        hidden: int | None = None,
        invariance: float = 25.0,
        variance: float = 25.0,
        covariance: float = 1.0,
        norm: str = "batch",
    ):
        super().__init__(width, run)
        ranges.not_negative("vicreg", invariance=invariance, variance=variance, covariance=covariance)
        hidden = hidden or 4 * width  # the paper's 8192 for ResNet-50's 2048
        self.projector = MLP(width, *self.projector_widths(hidden, hidden, hidden), norm=norm, last_bias=False)
        self.invariance = invariance
        self.variance = variance
        self.covariance = covariance

    def loss(self, student: Branch, teacher: Branch, batch: Batch, step: Tensor) -> Tensor:
        def vicreg(z0: Tensor, z1: Tensor) -> Tensor:
            return F.vicreg(
                z0,
                z1,
                lambda_param=self.invariance,
                mu_param=self.variance,
                nu_param=self.covariance,
                group=self.run.group,
            )

        return symmetric(vicreg, student, teacher, batch.views, self.views.large)
