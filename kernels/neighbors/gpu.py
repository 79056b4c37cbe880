"""Nearest rows and k-means on a GPU. Many nearest are torch's products and top-k, a block of the bank at a time."""

import torch
from torch import Tensor

from .. import launch
from ..arithmetic import unit_rows, widen
from . import nearest
from .kmeans import kmeans_step
from .reference import BANK

__all__ = ["kmeans_step", "nearest_k"]


def nearest_k(query: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Which of several equal cosines is first is up to torch.topk where k is above nearest.MOST."""
    few = min(k, len(bank))
    if few <= nearest.MOST and query.dtype == bank.dtype != torch.float64 and query.dtype in launch.DTYPES:
        return nearest.nearest_k(query, bank, few)
    unit = unit_rows(widen(query))[0]
    cosines = unit.new_empty(len(unit), 0)
    index = torch.empty(len(unit), 0, dtype=torch.int64, device=unit.device)
    for start in range(0, len(bank), BANK):
        of_part = unit @ unit_rows(widen(bank[start : start + BANK]))[0].T
        best, place = of_part.topk(min(k, of_part.shape[1]), dim=1)
        cosines, kept = torch.cat([cosines, best], 1).topk(min(k, cosines.shape[1] + best.shape[1]), dim=1)
        index = torch.cat([index, place + start], 1).gather(1, kept)
    return cosines, index
