"""NNCLR: Dwibedi et al. 2021, arXiv 2104.14548."""

import torch
from torch import Tensor

import fastjem.functional as F
from fastjem.data.batch import Batch
from fastjem.data.views import Views
from fastjem.methods import ranges
from fastjem.methods.defaults import Defaults, Preset, at_most
from fastjem.methods.protocol import About, Branch, Method, RunFacts
from fastjem.methods.symmetric import mean_over_pairs, of_large
from fastjem.nn.parts import MLP, Queue, unit_keys


class NNCLR(Method):
    """A view's positive is no other view of its image but the nearest neighbour of that view among earlier images."""

    about = About("contrastive", "the other images of the batch push away", "Dwibedi et al. 2021, arXiv 2104.14548")
    views = Views(large=2, recipe="simclr")
    combines = frozenset({"large_views", "small_views"})
    projector_options = ("hidden", "dim")
    small_widths = {"hidden": 4, "predictor_hidden": 4}
    defaults = Defaults(
        "lars", 1.2, 1e-6, small=("adamw", 4e-3), source="section 4.1: LARS, 4.8 at batch 4096, wd 1e-6"
    )
    presets = {
        "cifar": Preset(
            "solo-learn, scripts/pretrain/cifar/nnclr.yaml",
            Defaults("larc", 0.4, 1e-5),
            {"temperature": 0.2, "queue": 65536},
        )
    }

    def __init__(
        self,
        width: int,
        run: RunFacts = RunFacts(),
        *,
        hidden: int = 2048,
        dim: int = 256,
        predictor_hidden: int = 4096,
        queue: int = 98304,
        temperature: float = 0.1,
        norm: str = "batch",
    ):
        super().__init__(width, run)
        ranges.positive("nnclr", temperature=temperature)
        widths = self.projector_widths(hidden, hidden, dim)
        dim = widths[-1]
        self.projector = MLP(width, *widths, norm=norm, last_norm=True)
        self.predictor = MLP(dim, predictor_hidden, dim, norm=norm)
        length = at_most(queue, run.images, each=4)
        self.queue = Queue(length, dim, held=run.images_per_step or length)
        self.temperature = temperature

    def loss(self, student: Branch, teacher: Branch, batch: Batch, step: Tensor) -> Tensor:
        views = batch.views
        large = self.views.large
        z = student.project(views)
        predictions = student.predictor(z).chunk(len(views))
        with torch.no_grad():
            sought = (
                teacher.project(views[:large]).chunk(large) if teacher.momentum else of_large(z.detach(), views, large)
            )
            keys = unit_keys(sought[0], self.run.group)
            support = self.queue.begin(keys).to(z.dtype)
            self.queue.hold(keys)
            rows = support[F.nearest_neighbors(torch.cat(list(sought)), support)]

        def contrast(prediction: Tensor, neighbour: Tensor) -> Tensor:
            return F.nt_xent(neighbour, prediction, temperature=self.temperature, group=self.run.group)

        return mean_over_pairs(contrast, predictions, rows.chunk(large))

    def step_ends(self, step: Tensor) -> None:
        self.queue.step_ends()
