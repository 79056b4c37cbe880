"""MoCo v2: He et al. 2020, arXiv 1911.05722; Chen et al. 2020, arXiv 2003.04297."""

import torch
from torch import Tensor

import fastjem.functional as F
from fastjem.data.batch import Batch
from fastjem.data.views import Views
from fastjem.methods import ranges
from fastjem.methods.defaults import Defaults, Preset, at_most
from fastjem.methods.protocol import About, Branch, Method, RunFacts
from fastjem.methods.reasons import OF_A_QUEUE
from fastjem.methods.symmetric import without_target
from fastjem.nn.parts import MLP, Queue, unit_keys


class MoCo(Method):
    """The momentum encoder's key of the same image against a queue of keys of earlier batches.

    No shuffling batch norm: keys and queries of one batch share no statistics, as the encoders are called apart.
    """

    about = About(
        "contrastive",
        "a queue of earlier images pushes away",
        "He et al. 2020, arXiv 1911.05722; Chen et al. 2020, arXiv 2003.04297",
    )
    views = Views(large=2, recipe="mocov2")
    refuses = OF_A_QUEUE
    combines = frozenset({"large_views", "small_views"})
    projector_options = ("hidden", "dim")
    momentum = ("encoder", "projector")
    defaults = Defaults(
        "sgd",
        0.03,
        1e-4,
        momentum=0.999,
        final_momentum=0.999,
        warmup_epochs=0,
        least_momentum=0.99,
        short=("lars", 1.2),
        small=("adamw", 2e-3),
        source="main_moco.py --mlp --moco-t 0.2 --aug-plus --cos",
    )

    presets = {
        "cifar": Preset(
            "solo-learn, scripts/pretrain/cifar/mocov2plus.yaml",
            Defaults("sgd", 0.3, 1e-4, momentum=0.99, final_momentum=0.999, least_momentum=0.99),
            {"hidden": 2048, "dim": 256, "queue": 32768},
        )
    }

    def __init__(
        self,
        width: int,
        run: RunFacts = RunFacts(),
        *,
        hidden: int | None = None,
        dim: int = 128,
        queue: int = 65536,
        temperature: float = 0.2,
        norm: str = "none",
    ):
        super().__init__(width, run)
        ranges.positive("moco", temperature=temperature)
        widths = self.projector_widths(hidden or width, dim)
        self.projector = MLP(width, *widths, norm=norm)
        length = at_most(queue, run.images, each=4)
        self.queue = Queue(length, widths[-1], held=run.images_per_step or length)
        self.temperature = temperature

    def loss(self, student: Branch, teacher: Branch, batch: Batch, step: Tensor) -> Tensor:
        queries = without_target(batch.views)
        query = student.project(queries)
        with torch.no_grad():
            key = teacher.project(batch.views[1:2])
            keys = unit_keys(key, self.run.group)
            negatives = self.queue.begin(keys).to(query.dtype)
            self.queue.hold(keys)
        return F.info_nce(query, key.repeat(len(queries), 1), negatives, temperature=self.temperature)

    def step_ends(self, step: Tensor) -> None:
        self.queue.step_ends()
