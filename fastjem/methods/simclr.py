"""SimCLR: Chen et al. 2020, arXiv 2002.05709."""

from torch import Tensor

import fastjem.functional as F
from fastjem.data.batch import Batch
from fastjem.data.views import Views
from fastjem.methods import ranges
from fastjem.methods.defaults import FAST, Defaults, Preset
from fastjem.methods.protocol import About, Branch, Method, RunFacts
from fastjem.methods.symmetric import against_queue, made_queue, symmetric
from fastjem.nn.parts import MLP


class SimCLR(Method):
    """Each view must find the other view of its image among all views of the batch.

    queue: with more than 0 the others are that many views of earlier batches in place of this one's, as with a memory
        bank in lightly's `NTXentLoss`; at most one for 4 images of the data.
    """

    about = About("contrastive", "the other images of the batch push away", "Chen et al. 2020, arXiv 2002.05709")
    views = Views(large=2, recipe="simclr")
    combines = frozenset({"large_views", "small_views"})
    projector_options = ("hidden", "dim")
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
        ),
        "fast": FAST,
    }

    def __init__(
        self,
        width: int,
        run: RunFacts = RunFacts(),
        *,
        hidden: int | None = None,
        dim: int = 128,
        temperature: float = 0.1,
        queue: int = 0,
        norm: str = "batch",
    ):
        super().__init__(width, run)
        ranges.positive("simclr", temperature=temperature)
        widths = self.projector_widths(hidden or width, dim)
        self.projector = MLP(width, *widths, norm=norm, last_norm=True)
        self.queue = made_queue(queue, widths[-1], run)
        self.temperature = temperature

    def loss(self, student: Branch, teacher: Branch, batch: Batch, step: Tensor) -> Tensor:
        def nt_xent(z0: Tensor, z1: Tensor) -> Tensor:
            return F.nt_xent(z0, z1, temperature=self.temperature, group=self.run.group)

        def info_nce(query: Tensor, key: Tensor, negatives: Tensor) -> Tensor:
            return F.info_nce(query, key, negatives, temperature=self.temperature)

        sides = (student, teacher, batch.views, self.views.large)
        if self.queue is None:
            return symmetric(nt_xent, *sides)
        return against_queue(info_nce, self.queue, *sides, self.run.group)

    def step_ends(self, step: Tensor) -> None:
        if self.queue is not None:
            self.queue.step_ends()
