"""CAPI's loss (Darcet et al. 2025, arXiv 2502.08769). Names, arguments and defaults are lightly's."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

import fastjem.functional as F
from fastjem.collectives import Agreement, check_distributed, default_group, sum_and_count_of_ranks
from fastjem.functional import checks
from fastjem.functional.sinkhorn import sinkhorn_with_floor


class PlaceCodes(NamedTuple):
    """Sinkhorn's codes at each place: `kept * softmax(scores / teacher_temperature + bias)`."""

    bias: Tensor  # [P, K]
    kept: Tensor  # [B, P], 1 but for rows whose scores are far below all others


class CAPILoss(nn.Module):
    """The teacher's scores make codes by Sinkhorn at each place by itself, over the images, which the student predicts.

    Args:
        teacher_temperature: what the teacher's scores are divided by before Sinkhorn.
        student_temperature: what the student's are.
        sinkhorn_iterations: at least one.
        gather_distributed: Sinkhorn and the mean of the loss over the images of all ranks.
    """

    def __init__(
        self,
        teacher_temperature: float = 0.06,
        student_temperature: float = 0.12,
        sinkhorn_iterations: int = 3,
        gather_distributed: bool = False,
    ) -> None:
        super().__init__()
        check_distributed("CAPILoss", gather_distributed)
        self.teacher_temperature = checks.positive("CAPILoss", "teacher_temperature", teacher_temperature)
        self.student_temperature = checks.positive("CAPILoss", "student_temperature", student_temperature)
        self.sinkhorn_iterations = checks.integer("CAPILoss", "sinkhorn_iterations", sinkhorn_iterations, 1)
        self.gather_distributed = gather_distributed

    @torch.no_grad()
    def codes(self, scores: Tensor) -> PlaceCodes:
        """Of scores [B, P, K] over the teacher's temperature: Sinkhorn over images, at each place by itself."""
        options = {"epsilon": self.teacher_temperature, "iterations": self.sinkhorn_iterations}
        group = default_group(self.gather_distributed)
        bias, kept = sinkhorn_with_floor(scores.detach().transpose(0, 1), **options, group=group)
        return PlaceCodes(bias, kept.mT)

    def cross_entropy(self, student: Tensor, teacher: Tensor, codes: PlaceCodes, index: Tensor | None = None) -> Tensor:
        """0-dim, of scores [B, Q, K] against the codes of scores [B, P, K] at the places [B, Q], None: all in turn."""
        bias, kept = codes
        teacher = teacher.detach()
        if index is not None:
            teacher = teacher.gather(1, index[..., None].expand(-1, -1, teacher.shape[2]))
            bias, kept = bias[index], kept.gather(1, index)
        targets = teacher + self.teacher_temperature * bias
        sides = [student.flatten(0, 1)], [targets.flatten(0, 1)]
        return self._kept_mean(F.prototype_cross_entropy, sides, kept)

    def head_cross_entropy(
        self,
        student: Tensor,
        student_prototypes: Tensor,
        teacher: Tensor,
        teacher_prototypes: Tensor,
        codes: PlaceCodes,
        index: Tensor | None = None,
    ) -> Tensor:
        """`cross_entropy` of `features @ prototypes.T`, without scores in memory.

        Each place has a bias of its own. It is a column of the teacher's prototypes, which the place's rows have a 1
        for; the student has zeros there.

        Args:
            student: [B, Q, D]; student_prototypes: [K, D].
            teacher: [B, P, E], constants; teacher_prototypes: [K, E].
            index: [B, Q] int64, the teacher's places; None: all in turn, Q = P.
        """
        bias, kept = codes
        places = torch.eye(bias.shape[0], dtype=bias.dtype, device=bias.device).expand(len(teacher), -1, -1)
        teacher = torch.cat([teacher.detach().to(bias.dtype), places], 2)
        if index is not None:
            teacher = teacher.gather(1, index[..., None].expand(-1, -1, teacher.shape[2]))
            kept = kept.gather(1, index)
        columns = self.teacher_temperature * bias.T
        teacher_prototypes = torch.cat([teacher_prototypes.detach().to(bias.dtype), columns], 1)
        width = max(student.shape[2], teacher.shape[2])
        sides = (
            [_wide(student, width).flatten(0, 1)],
            [_wide(teacher, width).flatten(0, 1)],
            _wide(student_prototypes, width),
            _wide(teacher_prototypes, width),
        )
        return self._kept_mean(F.prototype_head_cross_entropy, sides, kept)

    def _kept_mean(self, cross_entropy: Callable[..., Tensor], sides: Sequence, kept: Tensor) -> Tensor:
        """The mean over the rows of all ranks of cross-entropies times what the rows keep, [B, Q]."""
        group = default_group(self.gather_distributed)
        if group is None:
            share = kept.mean()
        else:
            everything, count = sum_and_count_of_ranks(kept.sum(), kept.numel(), group)
            share = everything / count
        loss = cross_entropy(
            *sides,
            student_temperature=self.student_temperature,
            teacher_temperature=self.teacher_temperature,
            pairs="same",
            weights=kept.masked_fill(share <= 0, 1.0).flatten(),
            group=group,
        )
        return loss * share.to(loss.dtype)

    def forward(self, teacher_logits: Tensor, student_logits: Tensor, teacher_index: Tensor | None = None) -> Tensor:
        """0-dim.

        Args:
            teacher_logits: [B, P, K], constants.
            student_logits: [B, Q, K].
            teacher_index: [B, Q] int64, which of the teacher's places the student predicts; None: Q = P, all in turn.

        Raises:
            ValueError: for other shapes.
        """
        with Agreement("CAPILoss", default_group(self.gather_distributed)) as ranks:
            self._check(teacher_logits, student_logits, teacher_index)
            ranks.rows_of(teacher_logits)
        codes = self.codes(teacher_logits)
        return self.cross_entropy(student_logits, teacher_logits, codes, teacher_index)

    def _check(self, teacher_logits: Tensor, student_logits: Tensor, teacher_index: Tensor | None) -> None:
        contract = "teacher_logits must be [B, P, K], student_logits [B, Q, K], teacher_index [B, Q] or None, Q = P"
        shapes = [tuple(teacher_logits.shape), tuple(student_logits.shape)]
        wanted = student_logits.shape[:2] if teacher_index is None else teacher_index.shape
        fit = teacher_logits.dim() == student_logits.dim() == 3 and wanted == student_logits.shape[:2]
        if not fit or shapes[0][::2] != shapes[1][::2] or (teacher_index is None and shapes[0] != shapes[1]):
            came = shapes if teacher_index is None else [*shapes, tuple(teacher_index.shape)]
            checks.fail("CAPILoss", contract, came)


def _wide(x: Tensor, width: int) -> Tensor:
    """With zeros behind its columns."""
    return nn.functional.pad(x, (0, width - x.shape[-1]))
