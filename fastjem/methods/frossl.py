"""FroSSL: Skean et al. 2023, arXiv 2310.02903."""

from torch import Tensor

import fastjem.functional as F
from fastjem.collectives import of_global_batch
from fastjem.data.batch import Batch
from fastjem.data.views import Views
from fastjem.methods import ranges
from fastjem.methods.defaults import Defaults, Preset
from fastjem.methods.protocol import About, Branch, Method, RunFacts
from fastjem.methods.symmetric import symmetric
from fastjem.nn.parts import MLP


class FroSSL(Method):
    """Views alike, and the Frobenius norm of each view's covariance small, which spreads it over all directions."""

    about = About("decorrelation", "a small Frobenius norm of the covariance", "Skean et al. 2023, arXiv 2310.02903")
    views = Views(large=2, recipe="vicreg")
    combines = frozenset({"large_views", "small_views"})
    projector_options = ("hidden", "dim")
    small_widths = {"hidden": 4}
    defaults = Defaults(
        "larc", 0.3, 1e-4, small=("adamw", 1e-3), source="OFSkean/FroSSL, imagenet: LARC, 0.3 at batch 256, wd 1e-4"
    )
    presets = {
        "cifar": Preset(
            "OFSkean/FroSSL, scripts/pretrain/cifar/frossl.yaml",
            options={"invariance": 1.0},
            views={"recipe": "simclr"},
        )
    }

    def __init__(
        self,
        width: int,
        run: RunFacts = RunFacts(),
        *,
        hidden: int = 2048,
        dim: int = 1024,
        invariance: float = 2.0,
        norm: str = "batch",
    ):
        super().__init__(width, run)
        ranges.not_negative("frossl", invariance=invariance)
        self.projector = MLP(width, *self.projector_widths(hidden, hidden, dim), norm=norm)
        self.invariance = invariance

    def loss(self, student: Branch, teacher: Branch, batch: Batch, step: Tensor) -> Tensor:
        def frossl(z0: Tensor, z1: Tensor) -> Tensor:
            return F.frossl([z0, z1], invariance=self.invariance)

        def of_all_ranks(z0: Tensor, z1: Tensor) -> Tensor:
            return of_global_batch(frossl, self.run.group, [z0.shape[0]] * self.run.ranks, z0, z1)

        return symmetric(of_all_ranks, student, teacher, batch.views, self.views.large)
