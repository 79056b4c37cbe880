"""Groups of features that move with training: SMoG's. Names and arguments are lightly's."""

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from fastjem.functional import checks
from fastjem.functional.precision import in_float32, loss_dtype
from fastjem.kernels.arithmetic import widest
from fastjem.ops.autograd import ops


class SMoGPrototypes(nn.Module):
    """Groups that follow the features assigned to them, and scores against them (Pang et al. 2022, arXiv 2207.06167).

    Args:
        group_features: [K, D], of the beginning: `fastjem.functional.kmeans(features, K).centroids`.
        beta: how much of a group stays where features are assigned to it.
    """

    group_features: nn.Parameter

    def __init__(self, group_features: Tensor, beta: float) -> None:
        super().__init__()
        checks.matrices("SMoGPrototypes", "group_features must be [K, D]", group_features)
        self.group_features = nn.Parameter(group_features, requires_grad=False)
        self.beta = beta

    def forward(self, x: Tensor, group_features: Tensor, temperature: float = 0.1) -> Tensor:
        """[B, K]: cosines of x [B, D] with group features [K, D], over the temperature."""
        return normalize(x, dim=1) @ normalize(group_features.to(x.dtype), dim=1).T / temperature

    @torch.no_grad()
    def get_updated_group_features(self, x: Tensor) -> Tensor:
        """[K, D]: each group moved by 1 - beta towards the mean of the rows of x [B, D] that are assigned to it."""
        assignments = self.assign_groups(x)
        groups = self.group_features.to(x.device)
        rows = widest(x)
        sums = rows.new_zeros(groups.shape).index_put((assignments,), rows, accumulate=True)
        counts = rows.new_zeros(groups.shape[0]).index_put((assignments,), torch.ones_like(rows[:, 0]), accumulate=True)
        means = (sums / counts[:, None]).to(groups.dtype)
        return torch.where(counts[:, None] > 0, self.beta * groups + (1 - self.beta) * means, groups)

    def set_group_features(self, x: Tensor) -> None:
        """Replace the groups by x [K, D]."""
        self.group_features.data = x.to(self.group_features.device)

    @torch.no_grad()
    def assign_groups(self, x: Tensor) -> Tensor:
        """[B] int64: the group of the largest cosine with each row of x [B, D]."""
        checks.matrices("SMoGPrototypes", "x must be [B, D]", x)
        groups = normalize(in_float32(self.group_features.to(x.device)), dim=1).to(loss_dtype(x))
        return ops.kmeans_step(x.detach(), groups, True, False)[0]
