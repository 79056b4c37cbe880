"""The specification; conventions are in kernels/__init__.py."""

import torch
from torch import Tensor

from ..arithmetic import add_at, unit_rows, widen, widest

BANK = 8192  # rows of a bank whose similarities are in memory at a time


def about_their_mean(centroids: Tensor) -> tuple[Tensor, Tensor]:
    """(c - m [K, D], b [K]): x (c - m) + b is largest for the centroid c that is nearest to x.

    b = -(c - m) (c + m) / 2, m the mean of the centroids: x c - c^2 / 2, less what is the same for all c. Where rows
    are far from 0, that is a difference of large squares: in float32, at 1000 standard deviations, a row in six went
    to another centroid than its nearest.
    """
    wide = widest(centroids)
    mean = wide.mean(0).nan_to_num(0, 0, 0)  # one infinite centroid is nobody's nearest
    shifted = wide - mean
    bias = -0.5 * (shifted * (wide + mean)).sum(1)
    return shifted.to(centroids.dtype), bias.to(centroids.dtype)


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
    if spherical:
        scores = x @ centroids.T
    else:
        shifted, bias = about_their_mean(centroids)
        scores = x @ shifted.T + bias
    assignments = scores.argmax(1)
    inertia = (x - centroids[assignments]).square().sum()
    if not update:
        return assignments, x.new_empty(0), assignments.new_empty(0), inertia
    sums = add_at(torch.zeros_like(centroids, dtype=x.dtype), (assignments,), x)
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
