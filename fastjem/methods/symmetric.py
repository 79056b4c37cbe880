"""What losses of two views have in common when either side may have a momentum encoder."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastjem.methods.protocol import Branch


def symmetric(
    loss: Callable[[Tensor, Tensor], Tensor], student: Branch, teacher: Branch, views: Sequence[Tensor]
) -> Tensor:
    """The loss of the two views' projections; with a momentum encoder, the mean of both directions against its own."""
    z0, z1 = student.project(views).chunk(2)
    if not teacher.momentum:
        return loss(z0, z1)
    with torch.no_grad():
        t0, t1 = teacher.project(views).chunk(2)
    return (loss(z0, t1) + loss(z1, t0)) / 2
