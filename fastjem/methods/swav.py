"""SwAV: Caron et al. 2020, arXiv 2006.09882."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import normalize

import fastjem.functional as F
from fastjem.data.views import Views
from fastjem.methods._parts import SHORT, Defaults, Parts, Prototypes, Queue, at_most, frozen, mlp, unit_keys


class SwAV(nn.Module):
    """Every view predicts the Sinkhorn codes of the two large views, never its own.

    `queue` > 0 keeps that many projections of each large view, which take part in Sinkhorn only (the paper's 3840 for
    batches that are small beside the prototypes). `epsilon` None is the paper's 0.05, and 0.03 in a run of less than
    10,000 steps, whose codes would otherwise become uniform before the encoder knows anything (docs/log.md).
    """

    family, prevents_collapse = "clustering", "Sinkhorn's codes use all prototypes equally"
    views = Views(large=2, small=6, recipe="swav")
    ema: tuple[str, ...] = ()
    defaults = Defaults("lars", 1.2, 1e-6, source="main_swav.py: base_lr 4.8, final_lr 0.0048, wd 1e-6, batch 4096")

    def __init__(
        self,
        width: int,
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
        images: int = 0,
        steps_per_epoch: int = 1,
        steps: int = 0,
        group: dist.ProcessGroup | None = None,
    ):
        super().__init__()
        self.projector = mlp(width, hidden or width, dim, norm=norm)
        prototypes = at_most(prototypes, images, each=16)
        self.prototypes = Prototypes(dim, prototypes, frozen(frozen_epochs, steps_per_epoch, steps))
        self.queues = nn.ModuleList(Queue(queue, dim) for _ in range(2 if queue else 0))
        self.epsilon = (0.03 if 0 < steps < SHORT else 0.05) if epsilon is None else epsilon
        self.temperature, self.iterations, self.group = temperature, iterations, group

    def loss(self, student: Parts, teacher: Parts, views: list[Tensor], step: Tensor) -> Tensor:
        z = normalize(student.project(views), dim=1)
        scores = student.prototypes(z, step).chunk(len(views))
        with torch.no_grad():
            if teacher is student:
                keys, targets = z.chunk(len(views))[:2], [s.detach() for s in scores[:2]]
            else:
                keys = normalize(teacher.project(views[:2]), dim=1).chunk(2)
                targets = [teacher.prototypes(key, step) for key in keys]
            bias = []
            for i, target in enumerate(targets):
                if self.queues:
                    # Every rank holds the whole queue and brings its share of it to the common Sinkhorn.
                    rank, ranks = (0, 1) if self.group is None else (self.group.rank(), self.group.size())
                    rows = self.queues[i].rows[rank::ranks]
                    target = torch.cat([target, teacher.prototypes(rows, step).to(target.dtype)])
                bias.append(F.sinkhorn_bias(target, epsilon=self.epsilon, iterations=self.iterations, group=self.group))
            for queue, key in zip(self.queues, keys, strict=False):
                queue.push(unit_keys(key, self.group))
            student.seen["codes"] = targets[0] / self.epsilon + bias[0]
        return F.prototype_cross_entropy(
            list(scores),
            targets,
            student_temperature=self.temperature,
            teacher_temperature=self.epsilon,
            teacher_bias=torch.stack(bias),
        )
