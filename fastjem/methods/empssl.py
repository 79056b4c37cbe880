"""EMP-SSL: Tong et al. 2023, arXiv 2304.03977."""

from torch import Tensor
from torch.nn.functional import normalize

import fastjem.functional as F
from fastjem.collectives import of_global_batch
from fastjem.data.batch import Batch
from fastjem.data.views import Views
from fastjem.methods import ranges
from fastjem.methods.defaults import Defaults
from fastjem.methods.protocol import About, Branch, Method, RunFacts
from fastjem.nn.parts import MLP


class EMPSSL(Method):
    """Many patches of an image have the embedding of their mean, each patch's batch as large a coding rate as it can.

    It is made for few epochs: each shows an image as `views.large` patches.
    """

    about = About("decorrelation", "the total coding rate is large", "Tong et al. 2023, arXiv 2304.03977")
    views = Views(large=20, recipe="empssl")
    combines = frozenset({"large_views"})
    refuses = {"small_views": "has small pieces of an image as its views already: --large-views says how many"}
    projector_options = ("hidden", "dim")
    small_widths = {"hidden": 4}
    defaults = Defaults(
        "larc",
        0.3 * 256 / 100,
        1e-4,
        warmup_epochs=0,
        small=("adamw", 1e-3),
        source="main.py: LARC, 0.3 at batch 100, wd 1e-4",
    )

    def __init__(
        self,
        width: int,
        run: RunFacts = RunFacts(),
        *,
        hidden: int = 4096,
        dim: int = 1024,
        invariance: float = 200.0,
        eps: float = 0.2,
        norm: str = "batch",
    ):
        super().__init__(width, run)
        ranges.not_negative("empssl", invariance=invariance)
        ranges.positive("empssl", eps=eps)
        self.projector = MLP(width, *self.projector_widths(hidden, hidden, dim), norm=norm)
        self.invariance = invariance
        self.eps = eps

    def loss(self, student: Branch, teacher: Branch, batch: Batch, step: Tensor) -> Tensor:
        z = normalize(student.project(batch.views), dim=1).unflatten(0, (len(batch.views), -1))

        def emp_ssl(images: Tensor) -> Tensor:
            return F.emp_ssl(images.transpose(0, 1), eps=self.eps, invariance=self.invariance)

        return of_global_batch(emp_ssl, self.run.group, [z.shape[1]] * self.run.ranks, z.transpose(0, 1))
