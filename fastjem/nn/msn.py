"""Masked Siamese Networks: MSN's loss and PMSN's. Names, arguments and defaults are lightly's."""

import math
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

import fastjem.functional as F
from fastjem.collectives import (
    Agreement,
    check_distributed,
    default_group,
    global_loss,
    sum_and_count_of_ranks,
)
from fastjem.functional import checks
from fastjem.functional.precision import loss_dtype, without_autocast
from fastjem.nn.hooks import is_overridden


class MSNLoss(nn.Module):
    """Masked Siamese Networks (Assran et al. 2022, arXiv 2204.07141).

    Args:
        temperature: of the similarities with the prototypes, in (0, inf).
        sinkhorn_iterations: on the sharpened targets; 0 for none.
        regularization_weight: of the mean entropy regulariser; 0 for none.
        gather_distributed: Sinkhorn, the regulariser and the mean of the loss over the samples of all ranks (one may
            have none).

    A subclass may override `regularization_loss`, as lightly's PMSNLoss does.
    """

    def __init__(
        self,
        temperature: float = 0.1,
        sinkhorn_iterations: int = 3,
        regularization_weight: float = 1.0,
        gather_distributed: bool = False,
    ) -> None:
        super().__init__()
        checks.positive("MSNLoss", "temperature", temperature)
        check_distributed("MSNLoss", gather_distributed)
        self.temperature = temperature
        self.sinkhorn_iterations = checks.integer("MSNLoss", "sinkhorn_iterations", sinkhorn_iterations, 0)
        self.regularization_weight = regularization_weight
        self.gather_distributed = gather_distributed

    def forward(
        self, anchors: Tensor, targets: Tensor, prototypes: Tensor, target_sharpen_temperature: float = 0.25
    ) -> Tensor:
        """0-dim. anchors [V B, D], view after view; targets [B, D], constants; prototypes [K, D]. Normalised inside."""
        group = default_group(self.gather_distributed)
        name = type(self).__name__
        with Agreement(name, group) as ranks, without_autocast(anchors):
            may_be_empty = None if group is None else 0
            contract = "anchors must be [V B, D], targets [B, D], prototypes [K, D]"
            checks.matrices(name, contract, anchors, targets, prototypes, same=False, may_be_empty=may_be_empty)
            if not anchors.shape[1] == targets.shape[1] == prototypes.shape[1]:
                checks.fail(name, contract, f"{[list(x.shape) for x in (anchors, targets, prototypes)]}")
            if anchors.shape[0] % targets.shape[0] if targets.shape[0] else anchors.shape[0]:
                contract = f"anchors must be whole views of the {targets.shape[0]} targets"
                checks.fail(name, contract, f"{anchors.shape[0]} rows")
            wide = loss_dtype(anchors)
            anchors, targets, prototypes = (functional.normalize(x.to(wide)) for x in (anchors, targets, prototypes))
            scores = anchors @ prototypes.T  # [V B, K]
            views = scores.split(targets.shape[0]) if targets.shape[0] else (scores,)  # V x [B, K]
            teacher = targets.detach() @ prototypes.detach().T
            sharpen = checks.positive(name, "target_sharpen_temperature", target_sharpen_temperature, anchors)
            sharp = checks.positive(name, "temperature", self.temperature, anchors) * sharpen
            weight = checks.number(name, "regularization_weight", self.regularization_weight, anchors)
            is_regularised = isinstance(weight, Tensor) or weight > 0
            ranks.rows_of(teacher)
            ranks.alike(self.sinkhorn_iterations, "regularised" if is_regularised else "not regularised")
        bias = None
        if self.sinkhorn_iterations:
            bias = F.sinkhorn_bias(
                teacher, epsilon=sharp, iterations=self.sinkhorn_iterations, normalize_samples_first=True, group=group
            )
        loss = F.prototype_cross_entropy(
            views,
            [teacher],
            student_temperature=self.temperature,
            teacher_temperature=sharp,
            teacher_bias=bias,
            pairs="all",
            group=group,
        )
        if is_regularised:
            if is_overridden(self, "regularization_loss", MSNLoss):
                regularizer = self._of_mean_probabilities(scores, group)
            else:
                regularizer = F.mean_entropy(views, temperature=self.temperature, group=group)
            loss = loss + (weight * regularizer).to(loss.dtype)
        return loss

    def regularization_loss(self, mean_anchor_probs: Tensor) -> Tensor:
        """`sum_k p_k log p_k + log K` of p [K]. Not overridden, `forward` doesn't call it: `mean_entropy` is faster."""
        return torch.special.xlogy(mean_anchor_probs, mean_anchor_probs).sum() + math.log(mean_anchor_probs.shape[0])

    def _of_mean_probabilities(self, scores: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        """A subclass's `regularization_loss`, which is given the mean over the rows of all ranks."""
        total = (scores / self.temperature).softmax(1).sum(0)  # [K]
        everything, rows = sum_and_count_of_ranks(total, scores.shape[0], group)
        # The value of all ranks' rows, with the gradient of this rank's.
        mean = (total + (everything - total).detach()) / rows
        loss = self.regularization_loss(mean_anchor_probs=mean)
        return loss if group is None else global_loss(loss, loss, group)


class PMSNCustomLoss(MSNLoss):
    """MSN whose prototypes are used by any distribution (Assran et al. 2022, arXiv 2210.07277).

    Args:
        target_distribution: of the mean probabilities p [K] -> [K], what they should be; constants.
        others: see `MSNLoss`.
    """

    def __init__(
        self,
        target_distribution: Callable[[Tensor], Tensor],
        temperature: float = 0.1,
        sinkhorn_iterations: int = 3,
        regularization_weight: float = 1.0,
        gather_distributed: bool = False,
    ) -> None:
        super().__init__(temperature, sinkhorn_iterations, regularization_weight, gather_distributed)
        self.target_distribution = target_distribution

    def regularization_loss(self, mean_anchor_probs: Tensor) -> Tensor:
        """`sum_k q_k (log q_k - log p_k)`, q the target of p [K]."""
        target = self.target_distribution(mean_anchor_probs).to(mean_anchor_probs).detach()
        return functional.kl_div(mean_anchor_probs.log(), target, reduction="sum")


class PMSNLoss(MSNLoss):
    """MSN whose prototypes are used by a power law (Assran et al. 2022, arXiv 2210.07277).

    Args:
        power_law_exponent: the k-th prototype has a share in proportion to `k ** -power_law_exponent`.
        others: see `MSNLoss`.
    """

    def __init__(
        self,
        temperature: float = 0.1,
        sinkhorn_iterations: int = 3,
        regularization_weight: float = 1.0,
        power_law_exponent: float = 0.25,
        gather_distributed: bool = False,
    ) -> None:
        super().__init__(temperature, sinkhorn_iterations, regularization_weight, gather_distributed)
        self.power_law_exponent = power_law_exponent

    def regularization_loss(self, mean_anchor_probs: Tensor) -> Tensor:
        """`sum_k q_k (log q_k - log p_k)`, q the power law, of p [K]."""
        k = torch.arange(1, mean_anchor_probs.shape[0] + 1, device=mean_anchor_probs.device)
        law = k.to(mean_anchor_probs.dtype) ** -self.power_law_exponent
        return functional.kl_div(mean_anchor_probs.log(), law / law.sum(), reduction="sum")
