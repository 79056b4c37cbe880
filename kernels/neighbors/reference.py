"""The specification; conventions are in kernels/__init__.py."""

import torch
from torch import Tensor

from ..arithmetic import unit_rows, widen

BANK = 8192  # rows of a bank whose similarities are in memory at a time


def kmeans_step(
    features: Tensor,  # [N, D]
    centroids: Tensor,  # [K, D]
    spherical: bool,
    update: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Assignments [N] to the nearest centroid, their rows' sums [K, D] and counts [K], and the inertia, 0-dim.

    Spherical: rows are taken at unit length, and the nearest centroid is that of the largest product. Otherwise it is
    that of the least distance. Of several the first one; NaN counts as the nearest, as in torch.argmax. The inertia is
    the sum over rows of their squared distances to their centroids. Without `update` there are no sums and counts
    (they are empty).
    """
    x = widen(features)
    centroids = widen(centroids)
    if spherical:
        x, _ = unit_rows(x)
    scores = x @ centroids.T
    if not spherical:
        scores = scores - 0.5 * centroids.square().sum(1)
    assignments = scores.argmax(1)
    inertia = (x - centroids[assignments]).square().sum()
    if not update:
        return assignments, x.new_empty(0), assignments.new_empty(0), inertia
    # index_put_ sorts on CUDA, where index_add_ and scatter_add_ would add in an order of their own.
    sums = torch.zeros_like(centroids, dtype=x.dtype).index_put((assignments,), x, accumulate=True)
    ones = torch.ones_like(assignments)
    counts = ones.new_zeros(centroids.shape[0]).index_put((assignments,), ones, accumulate=True)
    return assignments, sums, counts, inertia


def nearest_k(
    query: Tensor,  # [N, D]
    bank: Tensor,  # [M, D]
    k: int,
) -> tuple[Tensor, Tensor]:
    """Cosines and indices, [N, min(k, M)] each, of the rows of the bank nearest to each query, nearest first.

    `topk(normalize(query) @ normalize(bank).T, k)`; of equal ones the first, and NaN counts as the nearest.
    """
    unit = unit_rows(widen(query))[0]
    cosines = unit.new_empty(unit.shape[0], 0)
    index = torch.empty(unit.shape[0], 0, dtype=torch.int64, device=unit.device)
    start = 0
    for part in bank.split(BANK):
        of_part = unit @ unit_rows(widen(part))[0].T
        places = torch.arange(start, start + part.shape[0], device=unit.device).expand_as(of_part)
        cosines, order = torch.cat([cosines, of_part], 1).sort(dim=1, descending=True, stable=True)
        cosines = cosines[:, :k]
        index = torch.cat([index, places], 1).gather(1, order[:, :k])
        start += part.shape[0]
    return cosines.contiguous(), index
