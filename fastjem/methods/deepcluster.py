"""DeepCluster v2: Caron et al. 2020, arXiv 2006.09882, appendix A.5 and main_deepclusterv2.py."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

import fastjem.functional as F
from fastjem.collectives import gather_rows
from fastjem.data.batch import Batch
from fastjem.data.views import Views
from fastjem.methods import ranges
from fastjem.methods.defaults import Defaults, Preset, at_most
from fastjem.methods.protocol import About, Branch, Method, RunFacts
from fastjem.methods.prototypes import cross_entropy_of_labels
from fastjem.nn.parts import MLP
from fastjem.nn.sample_memory import SampleMemory

NO_CLUSTER = -100  # of an image that hasn't been seen: it counts in no loss


class DeepCluster(Method):
    """Between epochs spherical k-means clusters what the last epoch left of each image; in the epoch every view
    predicts its image's cluster, by each of several clusterings. The first epoch only fills the memory.

    heads: how many clusterings. prototypes: clusters of each.
    """

    centroids: Tensor  # [heads, K, D]
    assignments: Tensor  # [heads, images] int64
    memories: Any  # a ModuleList of SampleMemory

    about = About("clustering", "clusters are made anew each epoch", "Caron et al. 2020, arXiv 2006.09882")
    views = Views(large=2, small=4, recipe="deepcluster")
    combines = frozenset({"large_views"})
    projector_options = ("hidden", "dim")
    small_widths = {"hidden": 4}
    defaults = Defaults(
        "lars", 1.2, 1e-6, small=("adamw", 1e-3), source="deepclusterv2_400ep: LARS, 4.8 at batch 4096, wd 1e-6"
    )
    presets = {
        "cifar": Preset(
            "solo-learn, scripts/pretrain/cifar/deepclusterv2.yaml",
            Defaults("larc", 0.6, 1e-6),
            views={"recipe": "simclr", "small": 0},
        )
    }

    def __init__(
        self,
        width: int,
        run: RunFacts = RunFacts(),
        *,
        hidden: int = 2048,
        dim: int = 128,
        heads: int = 3,
        prototypes: int = 3000,
        temperature: float = 0.1,
        iterations: int = 10,
        norm: str = "batch",
    ):
        super().__init__(width, run)
        ranges.positive("deepcluster", temperature=temperature)
        widths = self.projector_widths(hidden, dim)
        dim = widths[-1]
        self.projector = MLP(width, *widths, norm=norm)
        count = at_most(prototypes, run.images, each=16)
        images = max(run.images, 1)
        held = run.images_per_step // run.ranks or images
        self.memories = nn.ModuleList(SampleMemory(images, dim, held) for _ in range(self.views.large))
        self.register_buffer("centroids", normalize(torch.randn(heads, count, dim), dim=2))
        self.register_buffer("assignments", torch.full((heads, images), NO_CLUSTER))
        self.temperature = temperature
        self.iterations = iterations

    def loss(self, student: Branch, teacher: Branch, batch: Batch, step: Tensor) -> Tensor:
        views = batch.views
        z = normalize(student.project(views), dim=1)
        for memory, view in zip(self.memories, z.chunk(len(views)), strict=False):
            memory.hold(batch.index, view)
        labels = self.assignments[:, batch.index]  # [heads, B]
        losses = []
        for centroids, cluster in zip(self.centroids, labels, strict=True):
            known = (cluster != NO_CLUSTER).to(torch.float32).repeat(len(views))
            # Images of no cluster have weight 0; where there is no other (the first epoch), the loss is 0.
            weights = torch.where(known.sum() > 0, known, 1.0)
            own = cluster.clamp(min=0).repeat(len(views))
            loss = cross_entropy_of_labels(z, centroids, own, self.temperature, weights)
            losses.append(loss * (known.sum() > 0).to(loss.dtype))
        return torch.stack(losses).mean()

    def step_ends(self, step: Tensor) -> None:
        for memory in self.memories:
            memory.step_ends(self.run.group)

    @torch.no_grad()
    def epoch_begins(self, epoch: int) -> None:
        """Cluster the memory: each head that of another large view, as the official code takes them in turn.

        Images that no epoch has come to (those that a last batch would have been too small for) have no cluster. Until
        as many have been seen as there are clusters, heads stay as they are.
        """
        if epoch == 0:
            return
        group = self.run.group
        for head in range(len(self.centroids)):
            memory = self.memories[head % len(self.memories)]
            seen = memory.seen()
            rows = memory.rows[:-1] if len(seen) == memory.images else memory.rows[seen]
            generator = torch.Generator(rows.device).manual_seed(self.run.seed * 1_000_003 + epoch * 101 + head)
            clusters = len(self.centroids[head])
            if len(rows) < clusters and len(seen) < memory.images:
                continue
            shards = [len(part) for part in torch.arange(len(rows)).tensor_split(self.run.ranks)]
            own = rows if group is None else rows.tensor_split(self.run.ranks)[group.rank()]
            found = F.kmeans(own, clusters, iterations=self.iterations, generator=generator, group=group)
            assignments = found.assignments
            if group is not None:
                assignments, _ = gather_rows(assignments, group, shards)
            self.centroids[head] = found.centroids
            self.assignments[head].fill_(NO_CLUSTER)
            self.assignments[head, seen] = assignments
