"""Barlow Twins: Zbontar et al. 2021, arXiv 2103.03230."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

import fastjem.functional as F
from fastjem.data.views import Views
from fastjem.methods._parts import Defaults, Parts, mlp


class BarlowTwins(nn.Module):
    """The cross-correlation of the two views' dimensions, drawn to the identity."""

    family, prevents_collapse = "decorrelation", "cross-correlation near the identity"
    views = Views(large=2, recipe="barlow")
    ema: tuple[str, ...] = ()
    defaults = Defaults(
        "lars", 0.57, 1.5e-6, source="section 2.2: LARS, 1.6 at batch 2048, 1.5e-6; loss times 0.024 in main.py"
    )

    def __init__(
        self,
        width: int,
        *,
        hidden: int | None = None,
        lambda_param: float = 0.0051,
        scale: float = 0.024,
        norm: str = "batch",
        group: dist.ProcessGroup | None = None,
    ):
        super().__init__()
        hidden = hidden or 4 * width  # the paper's 8192 for ResNet-50's 2048
        self.projector = mlp(width, hidden, hidden, hidden, norm=norm, last_bias=False)
        self.lambda_param, self.scale, self.group = lambda_param, scale, group

    def loss(self, student: Parts, teacher: Parts, views: list[Tensor], step: Tensor) -> Tensor:
        return self.scale * symmetric(
            F.barlow_twins, student, teacher, views, lambda_param=self.lambda_param, group=self.group
        )


def symmetric(loss, student: Parts, teacher: Parts, views: list[Tensor], **options) -> Tensor:  # type: ignore
    """The loss of the two views; with a momentum encoder, the mean of both directions against its projections."""
    z0, z1 = student.project(views).chunk(2)
    if teacher is student:
        return loss(z0, z1, **options)
    with torch.no_grad():
        t0, t1 = teacher.project(views).chunk(2)
    return (loss(z0, t1, **options) + loss(z1, t0, **options)) / 2
