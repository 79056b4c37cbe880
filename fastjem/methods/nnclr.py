"""NNCLR: Dwibedi et al. 2021, arXiv 2104.14548."""

import torch
from torch import Tensor

import fastjem.functional as F
from fastjem.data.batch import Batch
from fastjem.data.views import Views
from fastjem.methods import ranges
from fastjem.methods.defaults import Defaults, Preset, at_most
from fastjem.methods.protocol import About, Branch, Method, RunFacts
from fastjem.nn.parts import MLP, Queue, unit_keys


class NNCLR(Method):
    """A view's positive is no other view of its image but the nearest neighbour of that view among earlier images."""

    about = About("contrastive", "the other images of the batch push away", "Dwibedi et al. 2021, arXiv 2104.14548")
    views = Views(large=2, recipe="simclr")
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
        self.projector = MLP(width, hidden, hidden, dim, norm=norm, last_norm=True)
        self.predictor = MLP(dim, predictor_hidden, dim, norm=norm)
        length = at_most(queue, run.images, each=4)
        self.queue = Queue(length, dim, held=run.images_per_step or length)
        self.temperature = temperature

    def loss(self, student: Branch, teacher: Branch, batch: Batch, step: Tensor) -> Tensor:
        z = student.project(batch.views)
        p0, p1 = student.predictor(z).chunk(2)
        z0, z1 = (teacher.project(batch.views) if teacher.momentum else z).detach().chunk(2)
        with torch.no_grad():
            keys = unit_keys(z0, self.run.group)
            support = self.queue.begin(keys)
            self.queue.hold(keys)
        return F.nnclr(z0, z1, p0, p1, support, temperature=self.temperature, group=self.run.group)

    def step_ends(self, step: Tensor) -> None:
        self.queue.step_ends()
