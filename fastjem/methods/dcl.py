"""Decoupled contrastive learning: Yeh et al. 2022, arXiv 2110.06848."""

from torch import Tensor
from torch.nn.functional import normalize

import fastjem.functional as F
from fastjem.collectives import gather_rows
from fastjem.data.batch import Batch
from fastjem.data.views import Views
from fastjem.functional.precision import in_float32, without_autocast
from fastjem.methods import ranges
from fastjem.methods.defaults import FAST, Defaults, Preset
from fastjem.methods.protocol import About, Branch, Method, RunFacts
from fastjem.methods.symmetric import against_queue, made_queue, symmetric
from fastjem.nn.parts import MLP


class DCL(Method):
    """SimCLR whose positive isn't among the candidates, so that easy positives don't weaken the pull: small batches do.

    sigma: DCLW's: positives that are far apart weigh more, by a softmax of their cosines / sigma over the images of all
        ranks; 0 is DCL.
    queue: with more than 0 the other images are that many views of earlier batches; at most one for 4 images of the
        data.
    """

    about = About("contrastive", "the other images of the batch push away", "Yeh et al. 2022, arXiv 2110.06848")
    views = Views(large=2, recipe="simclr")
    combines = frozenset({"large_views", "small_views"})
    projector_options = ("hidden", "dim")
    defaults = Defaults(
        "sgd",
        0.03,
        1e-4,
        short=("lars", 1.2),
        small=("adamw", 4e-3),
        source="section 4.1: SGD, 0.03 at batch 256, wd 1e-4",
    )
    presets = {
        "cifar": Preset("table 7: temperature 0.07", options={"temperature": 0.07}),
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
        sigma: float = 0.0,
        queue: int = 0,
        norm: str = "batch",
    ):
        super().__init__(width, run)
        ranges.positive("dcl", temperature=temperature)
        ranges.not_negative("dcl", sigma=sigma)
        widths = self.projector_widths(hidden or width, dim)
        self.projector = MLP(width, *widths, norm=norm, last_norm=True)
        self.queue = made_queue(queue, widths[-1], run)
        self.temperature = temperature
        self.sigma = sigma

    def loss(self, student: Branch, teacher: Branch, batch: Batch, step: Tensor) -> Tensor:
        def dcl(z0: Tensor, z1: Tensor) -> Tensor:
            if self.sigma:
                return F.dclw(z0, z1, temperature=self.temperature, sigma=self.sigma, group=self.run.group)
            return F.dcl(z0, z1, temperature=self.temperature, group=self.run.group)

        sides = (student, teacher, batch.views, self.views.large)
        if self.queue is None:
            return symmetric(dcl, *sides)
        return against_queue(self._of_earlier, self.queue, *sides, self.run.group)

    def _of_earlier(self, query: Tensor, key: Tensor, negatives: Tensor) -> Tensor:
        """DCL, or DCLW, of rows [B, D] against earlier rows [K, D]."""
        with without_autocast(query):
            query, key = (normalize(in_float32(x), dim=1) for x in (query, key))
            cosines = (query * key).sum(1)
            of_others = (query @ negatives.to(query.dtype).T / self.temperature).logsumexp(1)
        if not self.sigma:
            return (of_others - cosines / self.temperature).mean()
        everything, first = cosines.detach(), 0
        if self.run.group is not None:
            everything, first = gather_rows(everything, self.run.group, [cosines.shape[0]] * self.run.ranks)
        shares = (everything / self.sigma).softmax(0)[first : first + cosines.shape[0]]
        weights = 2 - everything.shape[0] * shares
        return (of_others - weights * cosines / self.temperature).mean()

    def step_ends(self, step: Tensor) -> None:
        if self.queue is not None:
            self.queue.step_ends()
