"""VISReg as a module (Wu et al. 2026, arXiv 2606.02572), with lightly's names, arguments and defaults."""

from typing import NamedTuple

from torch import Tensor, nn

import fastjem.functional as F
from fastjem.collectives import check_distributed, default_group
from fastjem.functional import checks


class VISRegLossComponents(NamedTuple):
    """The loss and its terms, which are not weighted."""

    total: Tensor
    pred: Tensor
    scale: Tensor
    shape: Tensor
    center: Tensor


class VISRegLoss(nn.Module):
    """`fastjem.functional.visreg` with fresh random directions at each call.

    Args:
        lambda_param: weight of the regulariser in [0, 1].
        num_slices: how many directions.
        lambda_scale, lambda_shape, lambda_center: weights within it.
        gather_distributed: take the loss over the global batch of all ranks, which draw the same directions.
        eps: added to deviations before rows are divided by them.
    """

    def __init__(
        self,
        lambda_param: float = 0.9,
        num_slices: int = 4096,
        lambda_scale: float = 1.0,
        lambda_shape: float = 1.0,
        lambda_center: float = 1.0,
        gather_distributed: bool = False,
        eps: float = 1e-4,
    ):
        super().__init__()
        check_distributed("VISRegLoss", gather_distributed)
        self.lambda_param = checks.number("VISRegLoss", "lambda_param", lambda_param, low=0, high=1, inclusive=True)
        self.num_slices = checks.integer("VISRegLoss", "num_slices", num_slices, 1)
        self.lambda_scale = checks.number("VISRegLoss", "lambda_scale", lambda_scale, low=0, inclusive=True)
        self.lambda_shape = checks.number("VISRegLoss", "lambda_shape", lambda_shape, low=0, inclusive=True)
        self.lambda_center = checks.number("VISRegLoss", "lambda_center", lambda_center, low=0, inclusive=True)
        self.gather_distributed = gather_distributed
        self.eps = checks.host_number("VISRegLoss", "eps", eps, low=0)

    def directions(self, proj: Tensor) -> Tensor:
        """[D, num_slices] fresh random unit columns for embeddings [..., D]; over ranks the same on each."""
        return F.random_directions(proj.shape[-1], self.num_slices, proj, group=default_group(self.gather_distributed))

    def forward(self, *, local_proj: Tensor, global_proj: Tensor) -> Tensor:
        """0-dim, of [V_local, N, D] and [V_global, N, D]."""
        directions = self.directions(global_proj)
        weights = (self.lambda_param, self.lambda_scale, self.lambda_shape, self.lambda_center)
        return self._weighted(local_proj, global_proj, directions, *weights)

    def forward_components(self, *, local_proj: Tensor, global_proj: Tensor) -> VISRegLossComponents:
        """The same with its terms, each of which may be differentiated; a call of the function for each."""
        directions = self.directions(global_proj)
        weights = (0.0, 0.0, 0.0, 0.0), (1.0, 1.0, 0.0, 0.0), (1.0, 0.0, 1.0, 0.0), (1.0, 0.0, 0.0, 1.0)
        pred, scale, shape, center = (self._weighted(local_proj, global_proj, directions, *w) for w in weights)
        regulariser = self.lambda_scale * scale + self.lambda_shape * shape + self.lambda_center * center
        total = (1 - self.lambda_param) * pred + self.lambda_param * regulariser
        return VISRegLossComponents(total, pred, scale, shape, center)

    def _weighted(
        self,
        local_proj: Tensor,
        global_proj: Tensor,
        directions: Tensor,
        lambda_param: float | Tensor,
        scale: float | Tensor,
        shape: float | Tensor,
        center: float | Tensor,
    ) -> Tensor:
        return F.visreg(
            local_proj,
            global_proj,
            directions,
            lambda_param=lambda_param,
            scale=scale,
            shape=shape,
            center=center,
            eps=self.eps,
            group=default_group(self.gather_distributed),
        )
