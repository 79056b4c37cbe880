"""Nearest rows and k-means on the CPU: torch.mm makes a tile of similarities, C++ picks and adds.

The tiles are the contrastive engine's: nothing of N x M or N x K lives longer than one.
"""

import torch
from torch import Tensor

from .. import _C, tiling
from ..contrastive import cpu_engine
from ..native import CODES, address, address_of_row
from .reference import about_their_mean


def kmeans_step(
    features: Tensor, centroids: Tensor, spherical: bool, update: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A block of rows at a time: assigned, and added to their centroids' sums while they are in the cache."""
    n, d = features.shape
    clusters = len(centroids)
    centroids, _ = cpu_engine.unit_rows(centroids, False)
    dtype = centroids.dtype
    compared, bias = (centroids, None) if spherical else about_their_mean(centroids)
    assignments = torch.full((n,), -1, dtype=torch.int64)
    sums = torch.zeros(clusters if update else 0, d, dtype=torch.float64)
    counts = torch.zeros(clusters if update else 0, dtype=torch.int64)
    height = min(tiling.CPU_TILE, n)
    width = min(tiling.CPU_TILE, clusters)
    memory = torch.empty(height * width, dtype=dtype)
    unit_memory = torch.empty(height, d, dtype=dtype)
    inertia = 0.0
    for row in range(0, n, height):
        rows, _ = cpu_engine.unit_rows(features[row : row + height], spherical, out=unit_memory)
        best = torch.full((len(rows),), -torch.inf, dtype=dtype)
        for column in range(0, clusters, width):
            tile = compared[column : column + width]
            scores = memory[: len(rows) * len(tile)].view(len(rows), len(tile))
            if bias is None:
                torch.mm(rows, tile.T, out=scores)
            else:
                torch.addmm(bias[column : column + width], rows, tile.T, out=scores)
            _C.similarity_best(
                CODES[dtype],
                address(scores),
                *scores.shape,
                len(tile),
                column,
                address(best),
                address_of_row(assignments, row),
                torch.get_num_threads(),
            )
        inertia += _C.add_assigned(
            CODES[dtype],
            address(rows),
            *rows.shape,
            address_of_row(assignments, row),
            address(centroids),
            address(sums),
            address(counts),
            torch.get_num_threads(),
        )
    total = torch.full((), inertia, dtype=dtype)
    return assignments, sums.to(dtype) if update else centroids.new_empty(0), counts, total


def nearest_k(query: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    k = min(k, len(bank))
    unit_query, _ = cpu_engine.unit_rows(query, True)
    values = torch.empty(len(unit_query), k, dtype=unit_query.dtype)
    index = torch.empty(len(unit_query), k, dtype=torch.int64)
    threads = torch.get_num_threads()
    for tile, _ in cpu_engine.bank_tiles(unit_query, bank):
        _C.nearest(
            *tile.arguments(),
            tile.column,
            k,
            address_of_row(values, tile.row),
            address_of_row(index, tile.row),
            min(tile.column, k),
            threads,
        )
    _C.nearest_sorted(CODES[values.dtype], len(values), k, address(values), address(index), threads)
    return values, index
