"""SimCLR: Chen et al. 2020, arXiv 2002.05709."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

import fastjem.functional as F
from fastjem.data.views import Views
from fastjem.methods._parts import Defaults, Parts, mlp


class SimCLR(nn.Module):
    """Each view must find the other view of its image among all views of the batch."""

    family, prevents_collapse = "contrastive", "the other images of the batch push away"
    views = Views(large=2, recipe="simclr")
    ema: tuple[str, ...] = ()
    defaults = Defaults("lars", 1.2, 1e-6, source="B.1: LARS, 0.075 sqrt(B), which is 4.8 at 4096; weight decay 1e-6")

    def __init__(
        self,
        width: int,
        *,
        hidden: int | None = None,
        dim: int = 128,
        temperature: float = 0.1,
        norm: str = "batch",
        group: dist.ProcessGroup | None = None,
    ):
        super().__init__()
        self.projector = mlp(width, hidden or width, dim, norm=norm, last_norm=True)
        self.temperature, self.group = temperature, group

    def loss(self, student: Parts, teacher: Parts, views: list[Tensor], step: Tensor) -> Tensor:
        z0, z1 = student.project(views).chunk(2)
        if teacher is student:
            return F.nt_xent(z0, z1, temperature=self.temperature, group=self.group)
        with torch.no_grad():
            t0, t1 = teacher.project(views).chunk(2)
        pairs = ((z0, t1), (z1, t0))
        return sum(F.nt_xent(z, t, temperature=self.temperature, group=self.group) for z, t in pairs) / 2
