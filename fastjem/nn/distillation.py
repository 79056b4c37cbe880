"""Losses between a student's and a teacher's prototype scores: DINO, iBOT, and the centre. Arguments and defaults are
lightly's."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

import fastjem.functional as F
from fastjem.nn.prototypes import everyone

CENTERINGS = ("center", "sinkhorn")


@torch.no_grad()
def _mean_over_ranks(mean: Tensor, rows: int) -> Tensor:
    """The mean over the rows of all ranks (batches may be uneven): one collective."""
    if (group := everyone()) is None:
        return mean
    packed = torch.cat([mean.flatten() * rows, mean.new_full((1,), rows)])
    dist.all_reduce(packed, group=group)
    return (packed[:-1] / packed[-1]).reshape(mean.shape)


class Center(nn.Module):
    """DINO's centre: the moving average of the batch's mean, over all ranks where torch.distributed runs.

    Args:
        size: of the centre; the mean is taken over the dimensions that are 1 here.
        mode: "mean".
        momentum: what the old centre keeps.
    """

    def __init__(self, size: tuple[int, ...], mode: str = "mean", momentum: float = 0.9) -> None:
        super().__init__()
        _check_mode("Center", mode)
        self.size = size
        self.dim = tuple(i for i, s in enumerate(size) if s == 1)
        self.center: Tensor
        self.register_buffer("center", torch.zeros(size))
        self.momentum = momentum

    @property
    def value(self) -> Tensor:
        return self.center

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Move towards the mean of `x`, which has as many dimensions as the centre."""
        count = 1
        for i in self.dim:
            count *= x.shape[i]
        self.move(x.mean(self.dim, keepdim=True, dtype=self.center.dtype), count)

    def move(self, mean: Tensor, rows: int) -> None:
        """Move towards this rank's mean over so many rows, which a loss may have computed already."""
        _move(self.center, mean, rows, self.momentum)


@torch.no_grad()
def _move(center: Tensor, mean: Tensor, rows: int, momentum: float) -> None:
    mean = _mean_over_ranks(mean.to(center.dtype), rows).reshape(center.shape)
    center.mul_(momentum).add_(mean, alpha=1 - momentum)


def _check_mode(name: str, mode: str) -> None:
    if mode != "mean":
        raise ValueError(f"{name}: the centre's mode must be mean, got {mode!r}")


def _check_centering(name: str, centering: str) -> None:
    if centering not in CENTERINGS:
        raise ValueError(f"{name}: centering must be one of {', '.join(CENTERINGS)}, got {centering!r}")


class _Distillation(nn.Module):
    """What DINO and iBOT share: the teacher's bias, and the statistics of the last batch."""

    def __init__(self, teacher_temp: float, student_temp: float, centering: str) -> None:
        super().__init__()
        _check_centering(type(self).__name__, centering)
        self.teacher_temp, self.student_temp, self.centering = teacher_temp, student_temp, centering
        self.statistics: F.TeacherStatistics | None = None  # of the last batch: entropy and usage tell of a collapse

    def _bias(self, teacher: list[Tensor], center: Tensor, temperature: float) -> Tensor:
        if self.centering == "sinkhorn":
            return F.sinkhorn_bias(teacher, epsilon=temperature, group=everyone())
        return center.flatten() / -temperature


class DINOLoss(_Distillation):
    """Cross-entropy of the student's views against the teacher's other views (Caron et al. 2021, arXiv 2104.14294).

    Args:
        output_dim: K.
        warmup_teacher_temp, teacher_temp, warmup_teacher_temp_epochs: the teacher's temperature goes linearly from
        the first to
            the second over so many epochs, where forward is told the epoch.
        student_temp: the student's temperature.
        center_momentum, center_mode: see `Center`.
        centering: "center", or "sinkhorn" (DINOv2: 3 iterations over all teacher views together); then the centre
        stays.
    """

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
    ) -> None:
        super().__init__(teacher_temp, student_temp, centering)
        _check_mode("DINOLoss", center_mode)
        self.center: Tensor
        self.register_buffer("center", torch.zeros(1, 1, output_dim))
        self.center_momentum = center_momentum
        self.warmup_teacher_temp_epochs = warmup_teacher_temp_epochs
        self.teacher_temp_schedule = torch.linspace(warmup_teacher_temp, teacher_temp, warmup_teacher_temp_epochs)

    def forward(
        self,
        teacher_out: list[Tensor],
        student_out: list[Tensor],
        teacher_temp: float | None = None,
        epoch: int | None = None,
    ) -> Tensor:
        """0-dim. Scores [B, K] of each view; views of one index are the same view. The teacher's get no gradient."""
        if teacher_temp is None:
            warming = epoch is not None and epoch < self.warmup_teacher_temp_epochs
            teacher_temp = self.teacher_temp_schedule[epoch] if warming else self.teacher_temp
        teacher, temperature = list(teacher_out), float(teacher_temp)
        loss, self.statistics = F.prototype_cross_entropy(
            student_out,
            teacher,
            student_temperature=self.student_temp,
            teacher_temperature=temperature,
            teacher_bias=self._bias(teacher, self.center, temperature),
            statistics=True,
        )
        if self.centering == "center":
            _move(self.center, self.statistics.mean, len(teacher) * len(teacher[0]), self.center_momentum)
        return loss


class IBOTPatchLoss(_Distillation):
    """Cross-entropy of masked patches against the teacher's sight of them (Zhou et al. 2022, arXiv 2111.07832; as in
    DINOv2).

    Args:
        output_dim: K.
        teacher_temp, student_temp: temperatures.
        center_mode, center_momentum: see `Center`.
        centering: "center", or "sinkhorn" (DINOv2); then the centre stays.
    """

    def __init__(
        self,
        output_dim: int = 65536,
        teacher_temp: float = 0.04,
        student_temp: float = 0.1,
        center_mode: str = "mean",
        center_momentum: float = 0.9,
        centering: str = "center",
    ) -> None:
        super().__init__(teacher_temp, student_temp, centering)
        self.center = Center((1, output_dim), center_mode, center_momentum)

    def forward(
        self, teacher_out: Tensor, student_out: Tensor, mask: Tensor, teacher_temp: float | None = None
    ) -> Tensor:
        """0-dim: the sum over patches of their cross-entropy / the masked patches of their image, / B.

        teacher_out, student_out: [M, K], the masked patches in the mask's order. mask: [B, H, W] bool, M of it true.
        The teacher's get no gradient.
        """
        if mask.dim() != 3 or mask.dtype != torch.bool:
            raise ValueError(f"IBOTPatchLoss: mask must be [B, H, W] bool, got {tuple(mask.shape)} {mask.dtype}")
        if not len(student_out):
            return student_out.sum() * 0  # no patch masked: no loss
        counts = mask.sum((1, 2))  # [B]
        if not mask.is_cuda and int(counts.sum()) != len(student_out):  # on CUDA, looking would stall the device
            raise ValueError(
                "IBOTPatchLoss: the mask must have as many true entries as there are patches, "
                f"got {int(counts.sum())} and {len(student_out)}"
            )
        wide = torch.float64 if student_out.dtype == torch.float64 else torch.float32
        of_image = 1 / counts.clamp_min(1).to(wide)
        weights = of_image.repeat_interleave(counts, output_size=len(student_out))  # [M]
        temperature = float(self.teacher_temp if teacher_temp is None else teacher_temp)
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
            self.center.move(self.statistics.mean, len(teacher_out))
        return loss * (weights.sum() / len(mask))
