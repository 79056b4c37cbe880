"""Which student views are paired with which teacher views: view i of both shows the same crop of an image.

"different": all pairs but those (SwAV, DINO); "same": only those (iBOT's patches); "all": every pair (MSN).
"""

import torch
from torch import Tensor

PAIRS = {"different": 0, "same": 1, "all": 2}  # as the kernels know them


def is_pair(student: int, teacher: int, pairs: str) -> bool:
    """Whether two views, by their numbers, are compared."""
    return pairs == "all" or (student == teacher) == (pairs == "same")


def count(students: int, teachers: int, pairs: str) -> int:
    """How many pairs of views there are."""
    return sum(partners(view, teachers, pairs) for view in range(students))


def partners(view: int, teachers: int, pairs: str) -> int:
    """With how many teacher views a student view is paired."""
    same = int(view < teachers)
    return {"different": teachers - same, "same": same, "all": teachers}[pairs]


def one_over_pairs(weights: Tensor | None, images: int, pairs_of_views: int, like: Tensor) -> Tensor:
    """1 / (the weighted number of pairs of rows), 0-dim in the dtype of `like`, without waiting for the device."""
    if weights is None:
        return torch.full((), 1 / (images * pairs_of_views), dtype=like.dtype, device=like.device)
    return 1 / (weights.sum() * pairs_of_views)
