"""Rows and their nearest: spherical k-means (DeepCluster v2, SMoG), the k nearest rows, and their votes for classes."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastjem.collectives import Agreement, from_first_rank, stack_of_ranks, sum_over_ranks
from fastjem.functional import checks
from fastjem.functional.precision import in_float32, loss_dtype
from fastjem.kernels.arithmetic import UNIT_EPS, add_at, unit_rows, widest, widest_dtype
from fastjem.ops import transforms
from fastjem.ops.autograd import ops
from fastjem.ops.forward_mode import refuse_forward_mode

INITS = ("random", "k-means++")
BLOCK = 1 << 16  # rows that are widened at a time where k-means++ draws


class Clusters(NamedTuple):
    """What `kmeans` finds. Assignments are of this rank's rows, the rest is the same on every rank of the group."""

    centroids: Tensor  # [K, D] float32 (float64 for float64 rows), of unit length where they are spherical
    assignments: Tensor  # [N] int64, each row's nearest centroid
    counts: Tensor  # [K] int64, the rows of each
    inertia: Tensor  # 0-dim: the sum of the rows' squared distances to their centroids


@torch.no_grad()
def kmeans(
    x: Tensor,
    clusters: int | Tensor,
    *,
    iterations: int = 10,
    spherical: bool = True,
    init: str = "random",
    generator: torch.Generator | None = None,
    group: dist.ProcessGroup | None = None,
) -> Clusters:
    """Lloyd's k-means, spherical unless told otherwise: rows and centroids have unit length.

    An iteration assigns each row to its nearest centroid and makes centroids the (normalised) means of their rows; a
    last assignment follows. Memory is O(N + K D): the matrix of distances never exists. A centroid without rows stays
    where it is, as in the code of DeepCluster v2 (Caron et al. 2020, arXiv 2006.09882; main_deepclusterv2.py of SwAV's
    repository); so does one whose rows sum to 0, which that code makes 0. Of several nearest centroids a row takes the
    first. The same call gives the same bits.

    Args:
        x: [N, D], any floating-point dtype; widened a block at a time. Taken at unit length where `spherical`.
        clusters: K, or the first centroids [K, D] (normalised here where `spherical`).
        iterations: 0 only assigns.
        spherical: False: Euclidean k-means of the rows as they are.
        init: "random": K different rows; or "k-means++" (Arthur and Vassilvitskii 2007), which draws row after row with
            probabilities in proportion to the squared distance from those drawn before, in K passes.
        generator: of the draws; over ranks the first rank's counts.
        group: the process group whose ranks' rows are clustered together (a rank may have none).

    Returns:
        `Clusters`.

    Raises:
        ValueError: for other shapes, dtypes or options, and for more clusters than rows to draw them from.
    """
    op = "kmeans"
    if group is not None and torch.compiler.is_compiling():
        checks.fail(op, "with a group it runs outside of torch.compile", "a call within")
    with Agreement(op, group) as ranks:
        checks.matrices(op, "x must be [N, D]", x, may_be_empty=None if group is None else 0)
        iterations = checks.integer(op, "iterations", iterations, 0)
        if init not in INITS:
            checks.fail(op, f"init must be one of {', '.join(INITS)}", repr(init))
        if isinstance(clusters, Tensor) and clusters.dim():
            checks.matrices(op, f"clusters must be K or [K, {x.shape[1]}]", clusters)
            if clusters.shape[1] != x.shape[1]:
                checks.fail(op, f"clusters must be K or [K, {x.shape[1]}]", tuple(clusters.shape))
            checks.one_device(op, [x, clusters])
            count = clusters.shape[0]
        else:
            count = checks.integer(op, "clusters", clusters, 1)
        ranks.rows_of(x)
        ranks.alike(count, isinstance(clusters, Tensor), iterations, spherical, init)
    refuse_forward_mode(op, [x, clusters] if isinstance(clusters, Tensor) else [x])
    x = x.detach()
    if isinstance(clusters, Tensor) and clusters.dim():
        centroids = clusters.detach().to(loss_dtype(x))
        centroids = unit_rows(centroids)[0] if spherical else centroids
    else:
        rows = _Rows(x, spherical, [x.shape[0]] if group is None else ranks.sizes, group)
        if count > rows.total:
            checks.fail(op, "clusters must be at most the rows", f"{count} for {rows.total} rows")
        centroids = (rows.at_random if init == "random" else rows.far_apart)(count, generator)
    for _ in range(iterations):
        _, sums, counts, _ = _step(x, centroids, spherical, group)
        if spherical:
            norms = torch.linalg.vector_norm(sums, dim=1, keepdim=True)
            centroids = torch.where(norms <= UNIT_EPS, centroids, sums / norms)
        else:
            centroids = torch.where(counts[:, None] == 0, centroids, sums / counts[:, None])
    assignments, _, counts, inertia = _step(x, centroids, spherical, group)
    return Clusters(centroids, assignments, counts, inertia)


def _step(
    x: Tensor, centroids: Tensor, spherical: bool, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operator, its sums, counts and inertia those of all ranks: one collective."""
    if x.shape[0]:
        assignments, sums, counts, inertia = ops.kmeans_step(x, centroids, spherical, True)
    else:
        assignments = torch.empty(0, dtype=torch.int64, device=x.device)
        sums, counts, inertia = (
            torch.zeros_like(centroids),
            assignments.new_zeros(len(centroids)),
            centroids.new_zeros(()),
        )
    if group is None:
        return assignments, sums, counts, inertia
    packed = sum_over_ranks(torch.cat([widest(part).flatten() for part in (sums, counts, inertia)]), group)
    of_all = packed.split([sums.numel(), counts.numel(), 1])
    return assignments, of_all[0].view_as(sums).to(sums.dtype), of_all[1].long(), of_all[2][0].to(sums.dtype)


class _Rows:
    """The rows of all ranks, from which first centroids are drawn; every rank knows those that were."""

    def __init__(self, x: Tensor, spherical: bool, sizes: list[int], group: dist.ProcessGroup | None):
        self.x = x
        self.spherical = spherical
        self.group = group
        self.total = sum(sizes)
        self.begin = 0 if group is None else sum(sizes[: dist.get_rank(group)])

    def at_random(self, count: int, generator: torch.Generator | None) -> Tensor:
        """[K, D], of K different rows."""
        device = self.x.device if generator is None else generator.device
        drawn = torch.randperm(self.total, generator=generator, device=device)[:count].to(self.x.device)
        return self._rows(from_first_rank(drawn, self.group))

    def far_apart(self, count: int, generator: torch.Generator | None) -> Tensor:
        """[K, D], each drawn with a probability in proportion to its squared distance from those before it."""
        wide = widest_dtype(self.x.device)
        device = self.x.device if generator is None else generator.device
        draws = from_first_rank(
            torch.rand(count, generator=generator, device=device, dtype=wide).to(self.x.device), self.group
        )
        nearest = torch.ones(self.x.shape[0], dtype=wide, device=self.x.device)  # the first: each row alike
        centroids: list[Tensor] = []
        for draw in draws.unbind():
            centroids.append(self._rows(self._place(nearest, draw)[None])[0])
            distances = self._squared_distances(centroids[-1]).to(wide)
            nearest = distances if len(centroids) == 1 else torch.minimum(nearest, distances)
        return torch.stack(centroids)

    def _place(self, weights: Tensor, draw: Tensor) -> Tensor:
        """0-dim, the number of a row among those of all ranks: where the weights before it are `draw` of the total."""
        own = weights.sum() if len(weights) else weights.new_zeros(())
        totals = own[None] if self.group is None else stack_of_ranks(own, self.group)
        before = totals.cumsum(0) - totals
        me = 0 if self.group is None else dist.get_rank(self.group)
        left = draw * totals.sum() - before[me]  # what is left for this rank's rows
        place = torch.searchsorted(weights.cumsum(0), left[None], right=True)[0]
        # One rank's rows have the place; rounding may leave it to the rank after, or to none: then it is the last row.
        mine = (left >= 0) & (left < own) & (place < len(weights))
        place = torch.where(mine, self.begin + place, self.total)
        if self.group is not None:
            place = stack_of_ranks(place, self.group).amin()
        return place.clamp_max(self.total - 1)

    def _rows(self, drawn: Tensor) -> Tensor:
        """[n, D], the rows of these numbers [n], whichever rank has them."""
        place = drawn - self.begin
        mine = (place >= 0) & (place < self.x.shape[0])
        if self.x.shape[0]:
            rows = in_float32(self.x[place.clamp(0, self.x.shape[0] - 1)])
            rows = unit_rows(rows)[0] if self.spherical else rows
            rows = torch.where(mine[:, None], rows, 0)
        else:
            rows = self.x.new_zeros(len(drawn), self.x.shape[1], dtype=loss_dtype(self.x))
        return sum_over_ranks(rows, self.group)

    def _squared_distances(self, centroid: Tensor) -> Tensor:
        """[N], a block of rows at a time."""
        found = [centroid.new_empty(0)]
        for part in self.x.split(BLOCK):
            rows = unit_rows(in_float32(part))[0] if self.spherical else in_float32(part)
            found.append((rows - centroid).square().sum(1))
        return torch.cat(found)


def nearest_rows(query: Tensor, bank: Tensor, *, k: int) -> tuple[Tensor, Tensor]:
    """(cosines, indices), [N, k] each, of the k rows of a bank nearest to each query by cosine, nearest first.

    `topk(normalize(query) @ normalize(bank).T, k)`, without the matrix of similarities or a normalised bank in memory.
    Of equal ones the first comes first (on a GPU, whichever torch.topk puts there).

    Args:
        query: [N, D]; no gradients.
        bank: [M, D].
        k: at most M are returned.

    Returns:
        Cosines float32 (float64 for float64 inputs), indices int64.

    Raises:
        ValueError: for other shapes or dtypes, and a k below 1.
    """
    query, bank = _query_and_bank("nearest_rows", query, bank)
    return ops.nearest_k(query, bank, checks.integer("nearest_rows", "k", k, 1))


def _query_and_bank(op: str, query: Tensor, bank: Tensor) -> list[Tensor]:
    contract = "query must be [N, D], bank [M, D]"
    checks.matrices(op, contract, query, bank, same=False)
    if query.shape[1] != bank.shape[1]:
        checks.fail(op, contract, f"{tuple(query.shape)} and {tuple(bank.shape)}")
    refuse_forward_mode(op, (query, bank))
    return checks.common(query.detach(), bank.detach())


@torch.no_grad()
def knn_votes(
    query: Tensor, bank: Tensor, labels: Tensor, *, classes: int, k: int = 20, temperature: float | Tensor = 0.07
) -> Tensor:
    """[N, classes]: the k rows of the bank nearest to a query vote for their labels with exp(cosine / temperature).

    Each query's votes are divided by their sum: shares. The weighted kNN classifier of Wu et al. 2018 (arXiv
    1805.01978, section 3.4), as DINO evaluates with it; the class predicted is the `argmax(1)`.

    Args:
        query: [N, D]. Cosines: rows need not have unit length.
        bank: [M, D].
        labels: [M] int64, the bank's, in [0, classes).
        classes: how many there are.
        k: how many vote.
        temperature: a number or a 0-dim tensor.

    Returns:
        float32 (float64 for float64 inputs).

    Raises:
        ValueError: for other shapes, dtypes or options; on the CPU, for labels out of range (on a GPU these make the
            votes for the first or last class NaN).
    """
    op = "knn_votes"
    query, bank = _query_and_bank(op, query, bank)
    if not isinstance(labels, Tensor) or labels.shape != (bank.shape[0],) or labels.dtype != torch.int64:
        came = f"{checks.shape(labels)} {getattr(labels, 'dtype', '')}".strip()
        checks.fail(op, f"labels must be [{bank.shape[0]}] int64", came)
    checks.one_device(op, [bank, labels])
    classes = checks.integer(op, "classes", classes, 1)
    inside = (labels >= 0) & (labels < classes)
    hidden = torch.compiler.is_compiling() or transforms.active()  # nobody can look at a value
    if labels.is_cpu and not hidden and not inside.all():
        i = int(inside.logical_not().nonzero()[0, 0])
        checks.fail(op, f"labels must be in [0, {classes})", f"{labels[i].item()} at {i}")
    temperature = checks.positive(op, "temperature", temperature, query)
    cosines, index = ops.nearest_k(query, bank, checks.integer(op, "k", k, 1))
    # Less the largest, as exp(1 / temperature) overflows at small temperatures; shares are the same.
    weights = ((cosines - cosines[:, :1]) / temperature).exp().to(cosines.dtype)
    weights = weights / weights.sum(1, keepdim=True)
    row = torch.arange(cosines.shape[0], device=query.device)[:, None].expand_as(index)
    weights = torch.where(inside[index], weights, torch.nan)
    labels = labels.clamp(0, classes - 1)
    votes = weights.new_zeros(cosines.shape[0], classes)
    return add_at(votes, (row, labels[index]), weights)
