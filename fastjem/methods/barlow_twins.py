"""Barlow Twins: Zbontar et al. 2021, arXiv 2103.03230."""

from torch import Tensor

import fastjem.functional as F
from fastjem.data.batch import Batch
from fastjem.data.views import Views
from fastjem.methods import ranges
from fastjem.methods.defaults import Defaults, Preset
from fastjem.methods.protocol import About, Branch, Method, RunFacts
from fastjem.methods.symmetric import symmetric
from fastjem.nn.parts import MLP


class BarlowTwins(Method):
    """The cross-correlation of the two views' dimensions, drawn to the identity."""

    about = About("decorrelation", "cross-correlation near the identity", "Zbontar et al. 2021, arXiv 2103.03230")
    views = Views(large=2, recipe="barlow")
    combines = frozenset({"large_views", "small_views"})
    projector_options = ("hidden",)
    defaults = Defaults(
        "lars",
        0.57,
        1.5e-6,
        small=("adamw", 2e-3),
        source="section 2.2: LARS, 1.6 at batch 2048, 1.5e-6; loss times 0.024 in main.py",
    )

    presets = {
        "cifar": Preset(
            "solo-learn, scripts/pretrain/cifar/barlow.yaml",
            Defaults("larc", 0.3, 1e-4),
            {"hidden": 2048, "scale": 0.1},
        )
    }

    def __init__(
        self,
        width: int,
        run: RunFacts = RunFacts(),
        *,
        hidden: int | None = None,
        lambda_param: float = 0.0051,
        scale: float = 0.024,
        norm: str = "batch",
    ):
        super().__init__(width, run)
        ranges.not_negative("barlow_twins", lambda_param=lambda_param, scale=scale)
        hidden = hidden or 4 * width  # the paper's 8192 for ResNet-50's 2048
        self.projector = MLP(width, *self.projector_widths(hidden, hidden, hidden), norm=norm, last_bias=False)
        self.lambda_param = lambda_param
        self.scale = scale

    def loss(self, student: Branch, teacher: Branch, batch: Batch, step: Tensor) -> Tensor:
        def barlow_twins(z0: Tensor, z1: Tensor) -> Tensor:
            return F.barlow_twins(z0, z1, lambda_param=self.lambda_param, group=self.run.group)

        return self.scale * symmetric(barlow_twins, student, teacher, batch.views, self.views.large)
