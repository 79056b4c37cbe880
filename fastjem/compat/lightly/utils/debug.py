"""`lightly.utils.debug`: how far a representation has collapsed."""

from typing import Any

import torch
from torch import Tensor

from fastjem.compat.lightly.lookup import absent
from fastjem.functional import checks


@torch.no_grad()
def std_of_l2_normalized(z: Tensor) -> Tensor:
    """0-dim: the mean over dimensions of the standard deviation of rows [N, D] at unit length.

    1 / sqrt(D) for directions that are spread evenly, 0 for one alone.
    """
    checks.matrices("std_of_l2_normalized", "z must be [N, D]", z)
    return torch.nn.functional.normalize(z, dim=1).std(0).mean()


def __getattr__(name: str) -> Any:
    raise absent(__name__, name)
