"""What is added to a loss: CO2's consistency and DSE's dense structure. Names, arguments and defaults as in lightly."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

import fastjem.functional as F
from fastjem.functional import checks
from fastjem.functional.precision import in_float32, loss_dtype, without_autocast
from fastjem.kernels.arithmetic import without_diagonal
from fastjem.nn.memory_bank import MemoryBankModule


class CO2Regularizer(nn.Module):
    """`alpha / 2 * (KL(p, q) + KL(q, p))`: two views shall find a third image alike similar (arXiv 2010.02217).

    p is the softmax of the first view's similarities, over the temperature, to its other view and to the negatives; q
    the other view's to the same. Wei et al. 2020.

    Args:
        alpha: the weight.
        t_consistency: the temperature.
        memory_bank_size: (number of negatives, dimension); 0: the negatives are the other images' second views.

    The result is differentiable for both views. (lightly 1.6's isn't for either: it is copied into a new tensor.)
    """

    def __init__(self, alpha: float = 1, t_consistency: float = 0.05, memory_bank_size: int | Sequence[int] = 0):
        super().__init__()
        self.memory_bank = MemoryBankModule(memory_bank_size)
        self.t_consistency = t_consistency
        self.alpha = alpha

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        """[N, D] and [N, D] -> 0-dim. The bank is read before it takes up `out1`, normalised."""
        checks.matrices("CO2Regularizer", "out0 and out1 must be [N, D] both", out0, out1)
        temperature = checks.positive("CO2Regularizer", "t_consistency", self.t_consistency, out0)
        with without_autocast(out0):
            x, y = (nn.functional.normalize(in_float32(z), dim=1) for z in (out0, out1))
            _, bank = self.memory_bank(y.detach(), update=True)
            positive = (x * y).sum(1, keepdim=True)
            of_x, of_y = (torch.cat([positive, self._negatives(*pair, bank)], 1) for pair in ((x, y), (y, x)))
            p, q = ((logits / temperature).log_softmax(1) for logits in (of_x, of_y))
            # Both divergences in one: sum over k of (p_k - q_k) (log p_k - log q_k)
            divergence = ((p.exp() - q.exp()) * (p - q)).sum(1).mean()
        return (self.alpha * 0.5 * divergence).to(loss_dtype(out0))

    def _negatives(self, x: Tensor, other: Tensor, bank: Tensor | None) -> Tensor:
        """[N, K]: similarities to the bank's rows, or [N, N - 1] to those of the other view of other images."""
        if bank is not None:
            return x @ bank.to(x)
        return without_diagonal(x @ other.T)


class DSERegularizer(nn.Module):
    """`-weight * fastjem.functional.dense_structure(x)`: patches shall lie in clusters apart.

    Args:
        weight: at least 0.
        normalize, local_clusters, global_clusters: see there.
        max_kmeans_iters, tol: its `iterations` and `tolerance`.
    """

    def __init__(
        self,
        weight: float = 1.0,
        normalize: bool = True,
        local_clusters: int = 3,
        global_clusters: int = 24,
        max_kmeans_iters: int = 20,
        tol: float = 1e-4,
    ):
        super().__init__()
        who = "DSERegularizer"
        self.weight = checks.host_number(who, "weight", weight, low=0, inclusive=True)
        self.normalize = normalize
        self.local_clusters = checks.integer(who, "local_clusters", local_clusters, 1)
        self.global_clusters = checks.integer(who, "global_clusters", global_clusters, 1)
        self.max_kmeans_iters = checks.integer(who, "max_kmeans_iters", max_kmeans_iters, 1)
        self.tol = checks.host_number(who, "tol", tol, low=0)

    def forward(self, representations: Tensor) -> Tensor:
        """[B, P, D] -> 0-dim."""
        checks.matrices("DSERegularizer", "representations must be [B, P, D]", representations, dims=3)
        if not self.weight:
            return representations.sum(dtype=loss_dtype(representations)) * 0
        return -self.weight * F.dense_structure(
            representations,
            normalize=self.normalize,
            local_clusters=self.local_clusters,
            global_clusters=self.global_clusters,
            iterations=self.max_kmeans_iters,
            tolerance=self.tol,
        )
