"""CAPI's loss (Darcet et al. 2025, arXiv 2502.08769). Names, arguments and defaults are lightly's."""

import torch
from torch import Tensor, nn

import fastjem.functional as F
from fastjem.collectives import Agreement, check_distributed, default_group
from fastjem.functional import checks


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
    def balanced(self, scores: Tensor) -> Tensor:
        """[B, P, K] -> [B, P, K]: scores whose softmax, over the teacher's temperature, is the codes."""
        options = {"epsilon": self.teacher_temperature, "iterations": self.sinkhorn_iterations}
        group = default_group(self.gather_distributed)
        bias = F.sinkhorn_bias(scores.detach().transpose(0, 1), **options, group=group)  # [P, K]
        return scores.detach() + self.teacher_temperature * bias

    def cross_entropy(self, student: Tensor, targets: Tensor) -> Tensor:
        """0-dim, of scores [B, P, K] against `balanced` ones, the mean over rows."""
        return F.prototype_cross_entropy(
            [student.flatten(0, 1)],
            [targets.flatten(0, 1)],
            student_temperature=self.student_temperature,
            teacher_temperature=self.teacher_temperature,
            pairs="same",
            group=default_group(self.gather_distributed),
        )

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
        targets = self.balanced(teacher_logits)
        if teacher_index is not None:
            targets = targets.gather(1, teacher_index[..., None].expand(-1, -1, targets.shape[2]))
        return self.cross_entropy(student_logits, targets)

    def _check(self, teacher_logits: Tensor, student_logits: Tensor, teacher_index: Tensor | None) -> None:
        contract = "teacher_logits must be [B, P, K], student_logits [B, Q, K], teacher_index [B, Q] or None, Q = P"
        shapes = [tuple(teacher_logits.shape), tuple(student_logits.shape)]
        wanted = student_logits.shape[:2] if teacher_index is None else teacher_index.shape
        fit = teacher_logits.dim() == student_logits.dim() == 3 and wanted == student_logits.shape[:2]
        if not fit or shapes[0][::2] != shapes[1][::2] or (teacher_index is None and shapes[0] != shapes[1]):
            came = shapes if teacher_index is None else [*shapes, tuple(teacher_index.shape)]
            checks.fail("CAPILoss", contract, came)
