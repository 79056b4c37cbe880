"""Masked Siamese Networks: MSN's loss and PMSN's. Names, arguments and defaults are lightly's."""

import math
from collections.abc import Callable
from typing import Any

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
    mean_loss_of_ranks,
    sum_and_count_of_ranks,
)
from fastjem.functional import checks
from fastjem.functional.head_usage import head_cross_entropy_and_usage
from fastjem.functional.held import scores_fit
from fastjem.functional.precision import loss_dtype, without_autocast
from fastjem.nn.hooks import is_overridden

LARGEST_HELD_OVER_RANKS = 8192  # prototypes, within a graph


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
            given = targets.dtype
            anchors, targets, prototypes = (functional.normalize(x.to(wide)) for x in (anchors, targets, prototypes))
            sharpen = checks.positive(name, "target_sharpen_temperature", target_sharpen_temperature, anchors)
            sharp = checks.positive(name, "temperature", self.temperature, anchors) * sharpen
            weight = checks.number(name, "regularization_weight", self.regularization_weight, anchors)
            is_regularised = isinstance(weight, Tensor) or weight > 0
            ranks.rows_of(anchors)
            ranks.alike(prototypes.shape[0], self.sinkhorn_iterations)
            ranks.alike("regularised" if is_regularised else "not regularised")
        views = list(anchors.split(targets.shape[0])) if targets.shape[0] else [anchors]  # V x [B, D]
        held = _are_held(prototypes, ranks, group)
        scores = bias = None
        with torch.no_grad(), without_autocast(anchors):
            if held or self.sinkhorn_iterations:
                dtype = wide if held else given
                scores = targets.to(dtype) @ prototypes.to(dtype).T  # [B, K], of the teacher
        if self.sinkhorn_iterations and scores is not None:
            iterations = {"iterations": self.sinkhorn_iterations, "normalize_samples_first": True}
            bias = F.sinkhorn_bias(scores, epsilon=sharp, **iterations, group=group)
        options = {
            "student_temperature": self.temperature,
            "teacher_temperature": sharp,
            "teacher_bias": bias,
            "pairs": "all",
        }
        if held:
            assert scores is not None
            loss, regularizer = self._of_scores(views, scores, prototypes, options, is_regularised, group)
        else:
            loss, regularizer = self._of_features(views, targets, prototypes, options, is_regularised, group)
        return loss if regularizer is None else loss + (weight * regularizer).to(loss.dtype)

    def _of_scores(
        self,
        views: list[Tensor],  # [B, D] each
        teacher: Tensor,  # [B, K], its scores
        prototypes: Tensor,
        options: dict[str, Any],
        is_regularised: bool,
        group: dist.ProcessGroup | None,
    ) -> tuple[Tensor, Tensor | None]:
        """The loss, and the regulariser if there is one, of scores [V B, K] that are held in memory."""
        with without_autocast(teacher):
            scores = torch.cat(views) @ prototypes.T
        by_view = scores.split(teacher.shape[0]) if teacher.shape[0] else (scores,)
        loss = F.prototype_cross_entropy(by_view, [teacher], **options, group=group)
        if not is_regularised:
            return loss, None
        if not is_overridden(self, "regularization_loss", MSNLoss):
            return loss, F.mean_entropy(by_view, temperature=self.temperature, group=group)
        temperature = checks.positive(type(self).__name__, "temperature", self.temperature, scores)
        total = (scores / temperature).softmax(1).sum(0)  # [K]
        return loss, self._of_mean_probabilities(total, scores.shape[0], group)

    def _of_features(
        self,
        views: list[Tensor],
        targets: Tensor,  # [B, D]
        prototypes: Tensor,
        options: dict[str, Any],
        is_regularised: bool,
        group: dist.ProcessGroup | None,
    ) -> tuple[Tensor, Tensor | None]:
        """The same, of scores of some images at a time."""
        loss, total = head_cross_entropy_and_usage(type(self).__name__, views, [targets], prototypes, **options)
        rows = targets.shape[0]
        loss = mean_loss_of_ranks(loss, rows, group)
        if not is_regularised:
            return loss, None
        return loss, self._of_mean_probabilities(total, rows * len(views), group)

    def regularization_loss(self, mean_anchor_probs: Tensor) -> Tensor:
        """`sum_k p_k log p_k + log K` of p [K]. Where it isn't overridden and scores are held, `mean_entropy` is."""
        p = mean_anchor_probs
        logs = p.clamp_min(torch.finfo(p.dtype).tiny).log()  # 0 log 0 is 0, and its slope is finite
        return (p * logs).sum() + math.log(p.shape[0])

    def _of_mean_probabilities(self, total: Tensor, rows: int, group: dist.ProcessGroup | None) -> Tensor:
        """`regularization_loss` of the mean over the rows of all ranks; total [K] is the sum over this rank's."""
        everything, count = sum_and_count_of_ranks(total, rows, group)
        # The value of all ranks' rows, with the gradient of this rank's.
        mean = (total + (everything - total).detach()) / count
        loss = self.regularization_loss(mean_anchor_probs=mean)
        return loss if group is None else global_loss(loss, loss, group)


def _are_held(prototypes: Tensor, ranks: Agreement, group: dist.ProcessGroup | None) -> bool:
    """Whether the student's scores and their gradients are few enough to be held in memory.

    On two AVX-512 cores, float32, 64 images of 10 views and features of 256, making them some images at a time, twice,
    takes 1.3 times as long for 1024 prototypes (5 MiB) and 1.2 times for 65,536 (320 MiB); for PMSN, whose softmax
    autograd would hold as well, 1.2 and 1.0 times.

    All ranks say the same, as they talk to each other in other words then: it follows from the largest batch. Within a
    graph of torch.compile none knows that of the others, and the number of prototypes alone tells.
    """
    if group is not None and torch.compiler.is_compiling():
        return prototypes.shape[0] <= LARGEST_HELD_OVER_RANKS
    return scores_fit(max(ranks.sizes), 0, prototypes.shape[0], prototypes.element_size())


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
        exponent = checks.number("PMSNLoss", "power_law_exponent", self.power_law_exponent, mean_anchor_probs)
        law = k.to(mean_anchor_probs.dtype) ** -exponent
        return functional.kl_div(mean_anchor_probs.log(), law / law.sum(), reduction="sum")
