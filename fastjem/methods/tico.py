"""TiCo: Zhu et al. 2022, arXiv 2206.10698."""

import torch
from torch import Tensor

import fastjem.functional as F
from fastjem.data.batch import Batch
from fastjem.data.views import Views
from fastjem.methods import ranges
from fastjem.methods.defaults import Defaults
from fastjem.methods.protocol import About, Branch, Method, RunFacts
from fastjem.methods.symmetric import without_target
from fastjem.nn.parts import MLP, HeldMean


class TiCo(Method):
    """Views alike, and small along the directions in which the embeddings of earlier batches were large."""

    covariance: Tensor  # [D, D]

    about = About(
        "decorrelation", "a moving covariance pushes away from full directions", "Zhu et al. 2022, arXiv 2206.10698"
    )
    views = Views(large=2, recipe="byol")
    refuses = {
        "no_momentum_encoder": "isn't known to learn without its momentum encoder, whose side alone stays where it is",
    }
    combines = frozenset({"large_views", "small_views"})
    projector_options = ("hidden", "dim")
    momentum = ("encoder", "projector")
    small_widths = {"hidden": 4}
    defaults = Defaults(
        "lars",
        0.8,
        1.5e-6,
        momentum=0.99,
        small=("adamw", 1e-3),
        source="section 4.1: LARS, 3.2 at batch 4096, wd 1.5e-6; as BYOL",
    )

    def __init__(
        self,
        width: int,
        run: RunFacts = RunFacts(),
        *,
        hidden: int = 4096,
        dim: int = 256,
        beta: float = 0.9,
        rho: float = 8.0,
        norm: str = "batch",
    ):
        super().__init__(width, run)
        ranges.shares("tico", beta=beta)
        ranges.not_negative("tico", rho=rho)
        widths = self.projector_widths(hidden, dim)
        dim = widths[-1]
        self.projector = MLP(width, *widths, norm=norm)
        self.beta = beta
        self.rho = rho
        self.register_buffer("covariance", torch.zeros(dim, dim))
        self.held = HeldMean((dim, dim))

    def loss(self, student: Branch, teacher: Branch, batch: Batch, step: Tensor) -> Tensor:
        queries = without_target(batch.views)
        z = student.project(queries).chunk(len(queries))
        with torch.no_grad():
            target = teacher.project(batch.views[1:2])
        losses = []
        for query in z:
            loss, covariance = F.tico(
                query, target, self.covariance, beta=self.beta, rho=self.rho, group=self.run.group
            )
            self.held.hold(covariance, query.shape[0])
            losses.append(loss)
        return torch.stack(losses).mean()

    def step_ends(self, step: Tensor) -> None:
        # Each micro-batch held beta of the old covariance and 1 - beta of its own: their mean is the new one.
        self.held.move(self.covariance, 0.0, self.run.group)
