"""VISReg: Wu et al. 2026, arXiv 2606.02572."""

from torch import Tensor, nn

import fastjem.functional as F
from fastjem.data.batch import Batch
from fastjem.data.views import Views
from fastjem.methods import ranges
from fastjem.methods.defaults import Defaults, Preset
from fastjem.methods.protocol import About, Branch, Method, RunFacts
from fastjem.nn.parts import MLP


class VISReg(Method):
    """All views have the embedding of the large views' mean; mean, deviations and shape of the batch's distribution are
    held to a standard normal one, the shape by sorting random projections.
    """

    about = About("decorrelation", "scale and shape of a normal distribution", "Wu et al. 2026, arXiv 2606.02572")
    views = Views(large=4, small=6, recipe="visreg")
    combines = frozenset({"large_views"})
    projector_options = ("hidden", "dim")
    small_widths = {"hidden": 4}
    defaults = Defaults(
        "adamw",
        9e-4,
        0.05,
        warmup_epochs=1,
        drop_path=0.1,
        source="lightly's benchmark: AdamW, 9e-4, wd 0.05, 1 epoch warm-up",
    )
    presets = {"cifar": Preset("section 4: 0.6 for small data", options={"weight": 0.6}, views={"large": 2})}

    def __init__(
        self,
        width: int,
        run: RunFacts = RunFacts(),
        *,
        hidden: int = 2048,
        dim: int = 256,
        weight: float = 0.9,
        slices: int = 2048,
        scale: float = 1.0,
        shape: float = 1.0,
        center: float = 1.0,
        norm: str = "batch",
    ):
        super().__init__(width, run)
        ranges.shares("visreg", weight=weight)
        ranges.not_negative("visreg", scale=scale, shape=shape, center=center)
        self.projector = MLP(width, *self.projector_widths(hidden, hidden, dim), norm=norm, activation=nn.GELU)
        self.weights = {"lambda_param": weight, "scale": scale, "shape": shape, "center": center}
        self.slices = slices

    def loss(self, student: Branch, teacher: Branch, batch: Batch, step: Tensor) -> Tensor:
        z = student.project(batch.views).unflatten(0, (len(batch.views), -1))
        directions = F.random_directions(z.shape[2], self.slices, z, group=self.run.group)
        large = self.views.large
        return F.visreg(z[large:], z[:large], directions, **self.weights, group=self.run.group)
