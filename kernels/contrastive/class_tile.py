"""The supervised contrastive loss with options, on the CPU, whose similarities fit one tile: losses and derivatives.

With hardness the operators of `visible.py` go over the pairs five times: everything, and the negatives with two
factors, there and back. A row of a tile in the cache gives its loss and its derivatives at once.
"""

import torch
from torch import Tensor

from .. import _C
from ..native import CODES, address

# Similarities that are kept until backward: 16 MiB of float32. At 2 x 1024 rows of 128 the five passes over tiles that
# hold none take more than twice torch.compile's time, which keeps several such matrices.
MOST_PAIRS = 1 << 22


def fits(rows: int, columns: int) -> bool:
    return 0 < rows * columns <= MOST_PAIRS


def losses(
    rows: Tensor,  # [M, D], float32 or float64, dense
    count: int,  # of anchors, the first rows
    labels: Tensor,  # [M] int64, dense
    factor: float,  # a logit is a similarity times it
    hardness: float,
    wanted: bool,
) -> tuple[Tensor, Tensor] | None:
    """[N] float64, the anchors' losses, and their derivatives by the logits [N, M] if `wanted`.

    A row whose class nobody else has counts as 0. None where a loss isn't finite.
    """
    similarities = torch.mm(rows[:count], rows.T)
    result = torch.empty(count, dtype=torch.float64)
    found = _C.class_tile_losses(
        *(CODES[rows.dtype], address(similarities), *similarities.shape, factor, hardness),
        *(address(labels), address(result), wanted, torch.get_num_threads()),
    )
    return (result, similarities) if found else None
