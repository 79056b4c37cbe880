"""SwAV: Caron et al. 2020, arXiv 2006.09882."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, normalize

import fastjem.functional as F
from fastjem.data.batch import Batch
from fastjem.data.views import Views
from fastjem.methods import ranges
from fastjem.methods.defaults import SHORT, Defaults, Preset, at_most, frozen_steps
from fastjem.methods.protocol import About, Branch, Codes, Method, RunFacts
from fastjem.methods.prototypes import features_scores_fit
from fastjem.nn.parts import MLP, Prototypes, Queue, unit_keys


class SwAV(Method):
    """Every view predicts the Sinkhorn codes of the large views, never its own.

    `queue` > 0 keeps that many projections of each large view, which take part in Sinkhorn only (the paper's 3840 for
    batches that are small beside the prototypes). `epsilon` None is the paper's 0.05, and 0.03 in a run of less than
    10,000 steps, whose codes would otherwise become uniform before the encoder knows anything (docs/log.md).
    """

    about = About("clustering", "Sinkhorn's codes use all prototypes equally", "Caron et al. 2020, arXiv 2006.09882")
    views = Views(large=2, small=6, recipe="swav")
    combines = frozenset({"large_views"})
    projector_options = ("hidden", "dim")
    queues: Any  # a ModuleList of Queue
    defaults = Defaults(
        "lars",
        1.2,
        1e-6,
        small=("adamw", 4e-3),
        source="main_swav.py: base_lr 4.8, final_lr 0.0048, wd 1e-6, batch 4096",
    )

    presets = {
        "cifar": Preset(
            "solo-learn, scripts/pretrain/cifar/swav.yaml",
            Defaults("larc", 0.6, 1e-6),
            {"hidden": 2048, "queue": 3840, "frozen_epochs": 2},
            {"recipe": "simclr", "small": 0},
        )
    }

    def __init__(
        self,
        width: int,
        run: RunFacts = RunFacts(),
        *,
        hidden: int | None = None,
        dim: int = 128,
        prototypes: int = 3000,
        temperature: float = 0.1,
        epsilon: float | None = None,
        iterations: int = 3,
        queue: int = 0,
        frozen_epochs: float = 1,
        norm: str = "batch",
    ):
        super().__init__(width, run)
        ranges.positive("swav", temperature=temperature)
        if epsilon is not None:
            ranges.positive("swav", epsilon=epsilon)
        ranges.not_negative("swav", frozen_epochs=frozen_epochs)
        widths = self.projector_widths(hidden or width, dim)
        dim = widths[-1]
        self.projector = MLP(width, *widths, norm=norm)
        prototypes = at_most(prototypes, run.images, each=16)
        frozen = frozen_steps(frozen_epochs, run.steps_per_epoch, run.steps)
        self.prototypes = Prototypes(dim, prototypes, frozen)
        held = run.images_per_step or queue
        self.queues = nn.ModuleList(Queue(queue, dim, held=held) for _ in range(self.views.large if queue else 0))
        self.epsilon = (0.03 if 0 < run.steps < SHORT else 0.05) if epsilon is None else epsilon
        self.temperature = temperature
        self.iterations = iterations

    def loss(self, student: Branch, teacher: Branch, batch: Batch, step: Tensor) -> Tensor:
        views = batch.views
        large = self.views.large
        z = normalize(student.project(views), dim=1)
        prototypes = student.prototypes.unit_weight(step)
        with torch.no_grad():
            if teacher.momentum:
                keys = normalize(teacher.project(views[:large]), dim=1).chunk(large)
                constants = teacher.prototypes.unit_weight(step)
            else:
                keys = z.detach().chunk(len(views))[:large]
                constants = prototypes.detach()
        fit = features_scores_fit(z.chunk(len(views)), keys, len(prototypes))
        scores = linear(z, prototypes).chunk(len(views)) if fit else ()
        with torch.no_grad():
            known = [view.detach() for view in scores[:large]] if not teacher.momentum else []
            targets = known or [linear(key, constants) for key in keys]
            held = [unit_keys(key, self.run.group) for key in keys] if self.queues else []
            bias = torch.stack([self._bias(view, targets[view], constants, held) for view in range(large)])
            for queue, new in zip(self.queues, held, strict=True):
                queue.hold(new)
            student.note(codes=Codes(keys[0], constants, bias[0], self.epsilon))
        options = {
            "student_temperature": self.temperature,
            "teacher_temperature": self.epsilon,
            "teacher_bias": bias,
        }
        if fit:
            return F.prototype_cross_entropy(scores, targets, **options)
        return F.prototype_head_cross_entropy(z.chunk(len(views)), keys, prototypes, constants, **options)

    def _bias(self, view: int, scores: Tensor, prototypes: Tensor, keys: list[Tensor]) -> Tensor:
        """The prototypes' log-potentials [K] of a large view's scores [B, K], its queue's beside them.

        keys: all ranks' of this step, a view, copies of which a queue begins with.
        """
        if self.queues:
            # Every rank holds the whole queue and brings its share of it to the common Sinkhorn.
            group = self.run.group
            rank, ranks = (0, 1) if group is None else (group.rank(), group.size())
            rows = self.queues[view].begin(keys[view])[rank::ranks]
            both = [scores, linear(rows, prototypes).to(scores.dtype)]
            return F.sinkhorn_bias(both, epsilon=self.epsilon, iterations=self.iterations, group=group)
        return F.sinkhorn_bias(scores, epsilon=self.epsilon, iterations=self.iterations, group=self.run.group)

    def step_ends(self, step: Tensor) -> None:
        for queue in self.queues:
            queue.step_ends()
