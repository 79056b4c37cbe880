"""SMoG: Pang et al. 2022, arXiv 2207.06167."""

import torch
from torch import Tensor
from torch.distributed.nn.functional import all_reduce
from torch.nn.functional import normalize

import fastjem.functional as F
from fastjem.data.batch import Batch
from fastjem.data.views import Views
from fastjem.kernels.arithmetic import add_at
from fastjem.methods import ranges
from fastjem.methods.defaults import Defaults, at_most
from fastjem.methods.protocol import About, Branch, Method, RunFacts
from fastjem.methods.prototypes import cross_entropy_of_labels
from fastjem.methods.symmetric import without_target
from fastjem.nn.parts import MLP, Queue, unit_keys


class SMoG(Method):
    """A view predicts the group of the other view; groups are features that follow, in every step, what is assigned to
    them, and are clustered anew from a queue of features before each epoch.

    beta: how much of a group stays where features are assigned to it in a step.
    """

    groups: Tensor  # [K, D], of unit length
    held: Tensor  # [K, D], the sum of the features that a step assigned to each group
    counts: Tensor  # [K]

    about = About("clustering", "groups are clustered anew each epoch", "Pang et al. 2022, arXiv 2207.06167")
    views = Views(large=2, recipe="byol")
    refuses = {
        "no_momentum_encoder": "isn't known to learn without its momentum encoder, whose features choose the groups",
    }
    combines = frozenset({"large_views", "small_views"})
    projector_options = ("hidden", "dim")
    momentum = ("encoder", "projector")
    small_widths = {"hidden": 4}
    defaults = Defaults(
        "lars",
        1.2,
        1e-6,
        momentum=0.999,
        small=("adamw", 1e-3),
        source="section 4.1: LARS, 4.8 at batch 4096, wd 1e-6; m 0.999",
    )

    def __init__(
        self,
        width: int,
        run: RunFacts = RunFacts(),
        *,
        hidden: int = 2048,
        dim: int = 128,
        groups: int = 3000,
        beta: float = 0.99,
        temperature: float = 0.1,
        queue: int = 76800,
        norm: str = "batch",
    ):
        super().__init__(width, run)
        ranges.positive("smog", temperature=temperature)
        ranges.shares("smog", beta=beta)
        widths = self.projector_widths(hidden, dim)
        dim = widths[-1]
        self.projector = MLP(width, *widths, norm=norm, last_norm=True, last_affine=False)
        self.predictor = MLP(dim, hidden, dim, norm=norm)
        count = at_most(groups, run.images, each=16)
        length = max(at_most(queue, run.images, each=1), count)
        self.queue = Queue(length, dim, held=run.images_per_step or length)
        self.register_buffer("groups", normalize(torch.randn(count, dim), dim=1))
        self.register_buffer("held", torch.zeros(count, dim), persistent=False)
        self.register_buffer("counts", torch.zeros(count), persistent=False)
        self.beta = beta
        self.temperature = temperature

    def loss(self, student: Branch, teacher: Branch, batch: Batch, step: Tensor) -> Tensor:
        queries = without_target(batch.views)
        rows = student.project(queries)
        prediction = normalize(student.predictor(rows), dim=1)
        z = rows[: len(batch.index)]  # groups are made of the first view's
        with torch.no_grad():
            target = normalize(teacher.project(batch.views[1:2]), dim=1)
            _, assigned = F.nearest_rows(target, self.groups.to(target.dtype), k=1)
            self.queue.hold(unit_keys(z, self.run.group))
        # The loss reaches the features that groups are made of through the groups, too: they are synchronous.
        sums, counts = self._assigned(normalize(z, dim=1).to(self.groups.dtype))
        groups = self._moved(sums, counts)
        self.held += sums.detach()
        self.counts += counts
        labels = assigned[:, 0].repeat(len(queries))
        return cross_entropy_of_labels(prediction, groups, labels, self.temperature)

    def _assigned(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Over all ranks, of features [B, D] of unit length: the sum [K, D] and number [K] of each group's.

        The sums have a gradient for this rank's features, to which all ranks' losses contribute.
        """
        group = F.nearest_rows(x.detach(), self.groups, k=1)[1][:, 0]
        ones = torch.ones_like(x[:, :1])
        both = torch.zeros_like(torch.cat([self.groups, self.counts[:, None]], 1))
        both = add_at(both, (group,), torch.cat([x, ones], 1))
        if self.run.group is not None:
            both = all_reduce(both, group=self.run.group)
        return both[:, :-1], both[:, -1].detach()

    def _moved(self, sums: Tensor, counts: Tensor) -> Tensor:
        """[K, D]: each group moved by 1 - beta towards the mean of its features; one without any stays."""
        means = sums / counts.clamp(min=1)[:, None]
        moved = normalize(self.beta * self.groups + (1 - self.beta) * means, dim=1)
        return torch.where(counts[:, None] > 0, moved, self.groups)

    @torch.no_grad()
    def step_ends(self, step: Tensor) -> None:
        self.groups.copy_(self._moved(self.held, self.counts))
        self.held.zero_()
        self.counts.zero_()
        self.queue.step_ends()

    @torch.no_grad()
    def epoch_begins(self, epoch: int) -> None:
        """Cluster the features that the queue has; groups stay where those are fewer."""
        if epoch == 0:
            return
        generator = torch.Generator(self.groups.device).manual_seed(self.run.seed * 1_000_003 + epoch)
        # Every rank has the whole queue and makes the same of it. Rows beyond are still the random ones it began with.
        rows = self.queue.rows[: int(self.queue.came)]
        if len(rows) < len(self.groups):
            return
        found = F.kmeans(rows, len(self.groups), generator=generator)
        self.groups.copy_(found.centroids)
