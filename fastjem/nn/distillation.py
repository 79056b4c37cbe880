"""Losses between a student's and a teacher's prototype scores: DINO, iBOT. Arguments and defaults are lightly's."""

import torch
from torch import Tensor, nn

import fastjem.functional as F
from fastjem.collectives import default_group
from fastjem.functional import checks
from fastjem.functional.precision import loss_dtype
from fastjem.nn.parts import Center, HeldMean, check_center_mode, move_center

CENTERINGS = ("center", "sinkhorn")


class _Distillation(nn.Module):
    """What DINO and iBOT share: the teacher's bias, the statistics of the last batch, and when the centre moves."""

    def __init__(self, teacher_temp: float, student_temp: float, centering: str, defer_center_update: bool) -> None:
        super().__init__()
        if centering not in CENTERINGS:
            name = type(self).__name__
            raise ValueError(f"{name}: centering must be one of {', '.join(CENTERINGS)}, got {centering!r}")
        self.teacher_temp = teacher_temp
        self.student_temp = student_temp
        self.centering = centering
        self.defer_center_update = defer_center_update
        self.statistics: F.TeacherStatistics | None = None  # of the last batch: entropy and usage tell of a collapse

    def _bias(self, teacher: list[Tensor], center: Tensor, temperature: float | Tensor) -> Tensor:
        if self.centering == "sinkhorn":
            return F.sinkhorn_bias(teacher, epsilon=temperature, group=default_group())
        if isinstance(temperature, Tensor):
            temperature = temperature.detach().to(center.dtype)
        return center.flatten() / -temperature

    @torch.no_grad()
    def update_center(self, teacher_out: Tensor) -> None:
        """Move the centre towards the mean of the teacher's scores, or hold it for `step_ends`.

        A subclass may override it: `forward` calls it with all views, DINO's [V, B, K] stacked as in lightly, iBOT's
        [M, K]. Not overridden, `forward` takes the mean that came with the loss: no pass over the scores, no stack.
        """
        rows = teacher_out.flatten(0, -2)
        self._move_center(rows.mean(0, dtype=loss_dtype(rows)), len(rows))

    def _is_update_center_overridden(self) -> bool:
        return getattr(self.update_center, "__func__", None) is not _Distillation.update_center

    def _move_center(self, mean: Tensor, rows: int) -> None:
        raise NotImplementedError


class DINOLoss(_Distillation):
    """Cross-entropy of the student's views against the teacher's other views (Caron et al. 2021, arXiv 2104.14294).

    Args:
        output_dim: K.
        warmup_teacher_temp, teacher_temp, warmup_teacher_temp_epochs: the teacher's temperature goes linearly from the
            first to the second over so many epochs, where forward is told the epoch.
        student_temp: the student's temperature.
        center_momentum, center_mode: see `Center`.
        centering: "center", or "sinkhorn" (DINOv2: 3 iterations over all teacher views together); then the centre
            stays.
        defer_center_update: forward leaves the centre, and `step_ends`, which you call once per optimiser step, moves
            it by all batches since the last call: with gradient accumulation as with one large batch.
    """

    center: Tensor

    def __init__(
        self,
        output_dim: int = 65536,
        warmup_teacher_temp: float = 0.04,
        teacher_temp: float = 0.04,
        warmup_teacher_temp_epochs: int = 30,
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
        center_mode: str = "mean",
        centering: str = "center",
        defer_center_update: bool = False,
    ) -> None:
        super().__init__(teacher_temp, student_temp, centering, defer_center_update)
        check_center_mode("DINOLoss", center_mode)
        # A buffer of the loss itself, and no `Center`, because lightly's checkpoints have it so.
        self.register_buffer("center", torch.zeros(1, 1, output_dim))
        self.held = HeldMean((1, 1, output_dim)) if defer_center_update else None
        self.center_momentum = center_momentum
        self.warmup_teacher_temp = warmup_teacher_temp
        self.warmup_teacher_temp_epochs = warmup_teacher_temp_epochs
        self.teacher_temp_schedule = torch.linspace(warmup_teacher_temp, teacher_temp, warmup_teacher_temp_epochs)

    def forward(
        self,
        teacher_out: list[Tensor],
        student_out: list[Tensor],
        teacher_temp: float | Tensor | None = None,
        epoch: int | None = None,
    ) -> Tensor:
        """0-dim. Scores [B, K] of each view; views of one index are the same view. The teacher's get no gradient."""
        teacher = list(teacher_out)
        temperature = self._temperature(teacher_temp, epoch, teacher[0])
        loss, self.statistics = F.prototype_cross_entropy(
            student_out,
            teacher,
            student_temperature=self.student_temp,
            teacher_temperature=temperature,
            teacher_bias=self._bias(teacher, self.center, temperature),
            statistics=True,
        )
        if self.centering == "center":
            if self._is_update_center_overridden():
                self.update_center(torch.stack(teacher).detach())
            else:
                self._move_center(self.statistics.mean, len(teacher) * len(teacher[0]))
        return loss

    def _temperature(self, teacher_temp: float | Tensor | None, epoch: int | None, like: Tensor) -> float | Tensor:
        if teacher_temp is not None:
            return checks.positive("DINOLoss", "teacher_temp", teacher_temp, like)
        last = checks.positive("DINOLoss", "teacher_temp", self.teacher_temp, like)
        if epoch is None or epoch >= self.warmup_teacher_temp_epochs:
            return last
        # Computed and not looked up in a tensor, whose values torch.compile doesn't know.
        first = checks.positive("DINOLoss", "warmup_teacher_temp", self.warmup_teacher_temp, like)
        return first + (last - first) * (epoch / max(self.warmup_teacher_temp_epochs - 1, 1))

    def _move_center(self, mean: Tensor, rows: int) -> None:
        if self.held is not None:
            self.held.hold(mean, rows)
        else:
            move_center(self.center, mean, rows, self.center_momentum, default_group())

    def step_ends(self) -> None:
        """With `defer_center_update`: move the centre, once for all batches since the last call."""
        if self.held is not None:
            self.held.move(self.center, self.center_momentum, default_group())


class IBOTPatchLoss(_Distillation):
    """Cross-entropy of masked patches against the teacher's sight of them, as in iBOT and DINOv2.

    Zhou et al. 2022, arXiv 2111.07832.

    Args:
        output_dim: K.
        teacher_temp, student_temp: temperatures.
        center_mode, center_momentum: see `Center`.
        centering: "center", or "sinkhorn" (DINOv2); then the centre stays.
        defer_center_update: see `DINOLoss`.
    """

    def __init__(
        self,
        output_dim: int = 65536,
        teacher_temp: float = 0.04,
        student_temp: float = 0.1,
        center_mode: str = "mean",
        center_momentum: float = 0.9,
        centering: str = "center",
        defer_center_update: bool = False,
    ) -> None:
        super().__init__(teacher_temp, student_temp, centering, defer_center_update)
        check_center_mode("IBOTPatchLoss", center_mode)
        self.center = Center((1, output_dim), center_mode, center_momentum)

    def forward(
        self, teacher_out: Tensor, student_out: Tensor, mask: Tensor, teacher_temp: float | Tensor | None = None
    ) -> Tensor:
        """The sum over patches of their cross-entropy / the masked patches of their image, / B.

        Args:
            teacher_out, student_out: [M, K] scores of the masked patches, in the mask's order. The teacher's get no
                gradient.
            mask: [B, H, W] bool, M of it true.
            teacher_temp: in place of the module's.

        Returns:
            0-dim float32 (float64 for float64 scores).
        """
        if mask.dim() != 3 or mask.dtype != torch.bool:
            raise ValueError(f"IBOTPatchLoss: mask must be [B, H, W] bool, got {tuple(mask.shape)} {mask.dtype}")
        if not len(student_out):
            return student_out.sum() * 0  # no patch masked: no loss
        counts = mask.sum((1, 2))  # [B]
        looks = not mask.is_cuda and not torch.compiler.is_compiling()  # on CUDA it would stall the device
        if looks and int(counts.sum()) != len(student_out):
            raise ValueError(
                "IBOTPatchLoss: the mask must have as many true entries as there are patches, "
                f"got {int(counts.sum())} and {len(student_out)}"
            )
        of_image = 1 / counts.clamp_min(1).to(loss_dtype(student_out))
        weights = of_image.repeat_interleave(counts, output_size=len(student_out))  # [M]
        temperature = self.teacher_temp if teacher_temp is None else teacher_temp
        temperature = checks.positive("IBOTPatchLoss", "teacher_temp", temperature, teacher_out)
        loss, self.statistics = F.prototype_cross_entropy(
            [student_out],
            [teacher_out],
            student_temperature=self.student_temp,
            teacher_temperature=temperature,
            teacher_bias=self._bias([teacher_out], self.center.value, temperature),
            pairs="same",
            weights=weights,
            statistics=True,
        )
        if self.centering == "center":
            if self._is_update_center_overridden():
                self.update_center(teacher_out.detach())
            else:
                self._move_center(self.statistics.mean, len(teacher_out))
        return loss * (weights.sum() / len(mask))

    def _move_center(self, mean: Tensor, rows: int) -> None:
        if self.defer_center_update:
            self.center.hold(mean, rows)
        else:
            self.center.move(mean, rows)

    def step_ends(self) -> None:
        """With `defer_center_update`: move the centre, once for all batches since the last call."""
        if self.defer_center_update:
            self.center.step_ends(default_group())
