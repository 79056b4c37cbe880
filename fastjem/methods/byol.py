"""BYOL: Grill et al. 2020, arXiv 2006.07733."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

import fastjem.functional as F
from fastjem.data.views import Views
from fastjem.methods._parts import Defaults, Parts, mlp


class BYOL(nn.Module):
    """A predictor of the momentum encoder's projection of the other view; no negatives."""

    family, prevents_collapse = "self-distillation", "predictor and momentum encoder: the two sides differ"
    views = Views(large=2, recipe="byol")
    ema = ("encoder", "projector")
    constant_rate: tuple[str, ...] = ()
    defaults = Defaults(
        "lars", 0.8, 1.5e-6, momentum=0.996, source="section 3.3: LARS, 3.2 at batch 4096, 1.5e-6; tau 0.996 to 1"
    )

    def __init__(
        self,
        width: int,
        *,
        hidden: int = 4096,
        dim: int = 256,
        norm: str = "batch",
        group: dist.ProcessGroup | None = None,
    ):
        super().__init__()
        self.projector = mlp(width, hidden, dim, norm=norm)
        self.predictor = mlp(dim, hidden, dim, norm=norm)

    def loss(self, student: Parts, teacher: Parts, views: list[Tensor], step: Tensor) -> Tensor:
        p0, p1 = student.predictor(student.project(views)).chunk(2)
        with torch.no_grad():
            z0, z1 = teacher.project(views).chunk(2)
        # 2 - 2 cos, both ways
        return 4 + 2 * (F.negative_cosine(p0, z1) + F.negative_cosine(p1, z0))
