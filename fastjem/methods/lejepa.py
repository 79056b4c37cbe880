"""LeJEPA: Balestriero and LeCun 2025, arXiv 2511.08544."""

from torch import Tensor

import fastjem.functional as F
from fastjem.data.batch import Batch
from fastjem.data.views import Views
from fastjem.methods import ranges
from fastjem.methods.defaults import Defaults, Preset
from fastjem.methods.protocol import About, Branch, Method, RunFacts
from fastjem.nn.parts import MLP


class LeJEPA(Method):
    """All views have the embedding of the large views' mean, and SIGReg makes the batch's embeddings a standard normal
    distribution: no momentum encoder, no stop-gradient, one weight.
    """

    about = About(
        "decorrelation", "SIGReg: embeddings are normally distributed", "Balestriero and LeCun 2025, arXiv 2511.08544"
    )
    views = Views(large=2, small=6, recipe="lejepa")
    combines = frozenset({"large_views"})
    projector_options = ("hidden", "dim")
    small_widths = {"hidden": 4}
    defaults = Defaults(
        "adamw",
        5e-4,
        0.05,
        warmup_epochs=1,
        drop_path=0.1,
        source="README: AdamW, 5e-4, wd 0.05 (ViT; ResNet: 5e-4), 1 epoch warm-up",
    )
    presets = {
        "cifar": Preset(
            # Its weight is 10, of a statistic that isn't multiplied by the batch's 256, beside the squared distance of
            # two views, which is 4 times that from their mean.
            "eb_jepa, sigreg.yaml: LARC, 0.3 at batch 256, wd 1e-4",
            Defaults("larc", 0.3, 1e-4),
            {"dim": 128, "weight": 0.01},
        )
    }

    def __init__(
        self,
        width: int,
        run: RunFacts = RunFacts(),
        *,
        hidden: int = 2048,
        dim: int = 64,
        weight: float = 0.05,
        slices: int = 1024,
        knots: int = 17,
        t_max: float = 3.0,
        norm: str = "batch",
    ):
        super().__init__(width, run)
        ranges.shares("lejepa", weight=weight)
        ranges.positive("lejepa", t_max=t_max)
        self.projector = MLP(width, *self.projector_widths(hidden, hidden, dim), norm=norm)
        self.weight = weight
        self.slices = slices
        self.knots = knots
        self.t_max = t_max

    def loss(self, student: Branch, teacher: Branch, batch: Batch, step: Tensor) -> Tensor:
        z = student.project(batch.views).unflatten(0, (len(batch.views), -1))
        directions = F.random_directions(z.shape[2], self.slices, z, group=self.run.group)
        return F.lejepa(
            z[self.views.large :],
            z[: self.views.large],
            directions,
            lambda_param=self.weight,
            knots=self.knots,
            t_max=self.t_max,
            group=self.run.group,
        )
