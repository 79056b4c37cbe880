"""VICReg: Bardes et al. 2022, arXiv 2105.04906."""

import torch.distributed as dist
from torch import Tensor, nn

import fastjem.functional as F
from fastjem.data.views import Views
from fastjem.methods._parts import Defaults, Parts, mlp
from fastjem.methods.barlow_twins import symmetric


class VICReg(nn.Module):
    """Views alike, every dimension's deviation at least one, no two dimensions correlated."""

    family, prevents_collapse = "decorrelation", "variance kept above 1, covariance below"
    views = Views(large=2, recipe="vicreg")
    ema: tuple[str, ...] = ()
    defaults = Defaults("lars", 0.57, 1e-6, source="section 4.2: LARS, 1.6 at batch 2048, 1e-6")

    def __init__(
        self,
        width: int,
        *,
        hidden: int | None = None,
        invariance: float = 25.0,
        variance: float = 25.0,
        covariance: float = 1.0,
        norm: str = "batch",
        group: dist.ProcessGroup | None = None,
    ):
        super().__init__()
        hidden = hidden or 4 * width  # the paper's 8192 for ResNet-50's 2048
        self.projector = mlp(width, hidden, hidden, hidden, norm=norm, last_bias=False)
        self.weights = {"lambda_param": invariance, "mu_param": variance, "nu_param": covariance}
        self.group = group

    def loss(self, student: Parts, teacher: Parts, views: list[Tensor], step: Tensor) -> Tensor:
        return symmetric(F.vicreg, student, teacher, views, **self.weights, group=self.group)
