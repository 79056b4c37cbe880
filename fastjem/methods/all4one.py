"""All4One: Estepa et al. 2023, arXiv 2303.09417."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

import fastjem.functional as F
from fastjem.collectives import of_global_batch
from fastjem.data.batch import Batch
from fastjem.data.views import Views
from fastjem.functional.precision import in_float32, without_autocast
from fastjem.methods import ranges
from fastjem.methods.defaults import Defaults, at_most
from fastjem.methods.protocol import About, Branch, Method, RunFacts
from fastjem.methods.reasons import OF_A_QUEUE
from fastjem.nn.parts import MLP, Queue, unit_keys


class All4One(Method):
    """Three losses: a view's positive is the nearest neighbour of the other among earlier images (NNCLR), or what a
    transformer makes of its five nearest ones, and features of two views are decorrelated (Barlow Twins').

    neighbours: that the transformer is given.
    """

    codes: Tensor  # [neighbours, D]: what tells the neighbours' ranks

    about = About(
        "contrastive, decorrelation", "the other images of the batch push away", "Estepa et al. 2023, arXiv 2303.09417"
    )
    views = Views(large=2, recipe="byol")
    refuses = {
        **OF_A_QUEUE,
        "large_views": "has three losses of exactly two views",
        "small_views": "has three losses of exactly two views",
    }
    projector_options = ("hidden", "dim")
    momentum = ("encoder", "projector")
    small_widths = {"hidden": 4, "predictor_hidden": 4}
    defaults = Defaults(
        "larc",
        1.0,
        1e-5,
        momentum=0.99,
        small=("adamw", 1e-3),
        source="solo-learn, cifar/all4one.yaml: LARC, 1.0 at batch 256, wd 1e-5; momentum encoder 0.99 to 1",
    )

    def __init__(
        self,
        width: int,
        run: RunFacts = RunFacts(),
        *,
        hidden: int = 2048,
        dim: int = 256,
        predictor_hidden: int = 4096,
        queue: int = 98304,
        neighbours: int = 5,
        layers: int = 3,
        heads: int = 8,
        dropout: float = 0.1,
        temperature: float = 0.2,
        centroid_temperature: float = 0.1,
        norm: str = "batch",
    ):
        super().__init__(width, run)
        ranges.positive("all4one", temperature=temperature, centroid_temperature=centroid_temperature)
        ranges.shares("all4one", dropout=dropout)
        widths = self.projector_widths(hidden, hidden, dim)
        dim = widths[-1]
        if dim % heads:
            raise ValueError(f"all4one: dim must be a multiple of its {heads} heads, got {dim}")
        self.projector = MLP(width, *widths, norm=norm, last_norm=True)
        self.predictor = MLP(dim, predictor_hidden, dim, norm=norm)
        self.centroid_predictor = MLP(dim, predictor_hidden, dim, norm=norm)
        layer = nn.TransformerEncoderLayer(dim, heads, 2 * dim, dropout, batch_first=True)
        self.transformer = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        length = max(at_most(queue, run.images, each=4), neighbours)
        self.queue = Queue(length, dim, held=run.images_per_step or length)
        self.register_buffer("codes", rank_codes(neighbours, dim), persistent=False)
        self.neighbours = neighbours
        self.temperature = temperature
        self.centroid_temperature = centroid_temperature

    def reset_parameters(self) -> None:
        self.codes.copy_(rank_codes(*self.codes.shape))

    def loss(self, student: Branch, teacher: Branch, batch: Batch, step: Tensor) -> dict[str, Tensor]:
        z0, z1 = student.project(batch.views).chunk(2)
        with torch.no_grad():
            t0, t1 = teacher.project(batch.views).chunk(2)
            keys = unit_keys(t0, self.run.group)
            earlier = self.queue.begin(keys).to(t0.dtype)
            self.queue.hold(keys)
            _, index = F.nearest_rows(torch.cat([t0, t1]), earlier, k=self.neighbours)
            near0, near1 = earlier[index].chunk(2)  # [B, neighbours, D]
        p0, p1 = student.predictor(torch.cat([z0, z1])).chunk(2)
        neighbour = self._contrast(near0[:, 0], p1, self.temperature) + self._contrast(
            near1[:, 0], p0, self.temperature
        )
        q0, q1 = student.centroid_predictor(torch.cat([z0, z1])).chunk(2)
        # What is made of the neighbours, and of the prediction with all neighbours but the last
        sets = [near0, near1, self._with_first(q0, near0), self._with_first(q1, near1)]
        centroids = student.transformer(torch.cat(sets) + self.codes.to(q0.dtype))[:, 0].chunk(4)
        centroid = self._contrast(centroids[0], centroids[3], self.centroid_temperature) + self._contrast(
            centroids[1], centroids[2], self.centroid_temperature
        )
        features = 5 * self._of_all_ranks(_apart, normalize(t0, dim=1), z1, normalize(t1, dim=1), z0)
        return {"neighbour": neighbour / 4, "centroid": centroid / 4, "features": 0.5 * features}

    def _with_first(self, prediction: Tensor, neighbours: Tensor) -> Tensor:
        return torch.cat([prediction[:, None], neighbours[:, :-1].to(prediction.dtype)], 1)

    def _contrast(self, target: Tensor, prediction: Tensor, temperature: float) -> Tensor:
        """Each target must find its prediction among those of all ranks' batch."""

        def contrast(target: Tensor, prediction: Tensor) -> Tensor:
            return F.info_nce(target, prediction, prediction, temperature=temperature, label_offset=0)

        return self._of_all_ranks(contrast, target, prediction)

    def _of_all_ranks(self, loss: Callable[..., Tensor], *rows: Tensor) -> Tensor:
        return of_global_batch(loss, self.run.group, [rows[0].shape[0]] * self.run.ranks, *rows)

    def step_ends(self, step: Tensor) -> None:
        self.queue.step_ends()


def _apart(t0: Tensor, z1: Tensor, t1: Tensor, z0: Tensor) -> Tensor:
    """How far the two cross-correlations [D, D] are from the identity: the root mean square on their diagonals, plus
    that beside them. Columns have length one."""
    on = []
    off = []
    for target, z in ((t0, z1), (t1, z0)):
        with without_autocast(z):
            correlation = normalize(in_float32(target), dim=0).T @ normalize(in_float32(z), dim=0)
        width = correlation.shape[0]
        diagonal = correlation.diagonal()
        on.append((diagonal - 1).square().mean())
        off.append((correlation.square().sum() - diagonal.square().sum()) / (width * (width - 1)))
    return (torch.stack(on).mean()).sqrt() + (torch.stack(off).mean()).sqrt()


def rank_codes(count: int, width: int) -> Tensor:
    """[count, width]: rows are waves along the width, sin d, cos d, sin(f d), cos(f d) ..., one for each rank.

    What solo-learn's `PositionalEncodingPermute1D(count)` adds to [B, count, width]: it takes the width for the
    positions and the ranks for the channels of Vaswani et al. 2017, section 3.5, f = 10,000 ** (-2 / channels).
    """
    channels = 2 * math.ceil(count / 2)
    frequencies = 10_000.0 ** (-torch.arange(0, channels, 2) / channels)
    angles = torch.arange(width)[:, None] * frequencies
    return torch.stack([angles.sin(), angles.cos()], 2).flatten(1)[:, :count].T.contiguous()
