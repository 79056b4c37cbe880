"""SimSiam: Chen and He 2021, arXiv 2011.10566."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

import fastjem.functional as F
from fastjem.data.views import Views
from fastjem.methods._parts import Defaults, Parts, mlp


class SimSiam(nn.Module):
    """A predictor of the other view's projection, through which no gradient flows; no negatives, no momentum.

    `stop_gradient=False` is the paper's figure 2: the representation collapses. It is there to see the alarm.
    """

    family, prevents_collapse = "self-distillation", "predictor and stop-gradient: the two sides differ"
    views = Views(large=2, recipe="mocov2")
    ema: tuple[str, ...] = ()
    asymmetric = True  # see fastjem.train.Alarm
    constant_rate = ("predictor",)
    defaults = Defaults("sgd", 0.05, 1e-4, warmup_epochs=0, short=("lars", 2.4),
                        source="section 3: SGD, 0.05 B/256, 1e-4, predictor's rate constant")  # fmt: skip

    def __init__(
        self,
        width: int,
        *,
        hidden: int = 2048,
        dim: int = 2048,
        bottleneck: int = 512,
        stop_gradient: bool = True,
        norm: str = "batch",
        group: dist.ProcessGroup | None = None,
    ):
        super().__init__()
        self.projector = mlp(width, hidden, hidden, dim, norm=norm, last_norm=True, last_affine=False)
        self.predictor = mlp(dim, bottleneck, dim, norm=norm)
        self.stop_gradient = stop_gradient

    def loss(self, student: Parts, teacher: Parts, views: list[Tensor], step: Tensor) -> Tensor:
        z = student.project(views)
        p0, p1 = student.predictor(z).chunk(2)
        if teacher is not student:
            with torch.no_grad():
                z = teacher.project(views)
        z0, z1 = (z.detach() if self.stop_gradient else z).chunk(2)
        return (F.negative_cosine(p0, z1) + F.negative_cosine(p1, z0)) / 2
