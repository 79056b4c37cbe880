"""Losses between a student's and a teacher's prototype scores: DINO, iBOT. Arguments and defaults are lightly's."""

import torch
from torch import Tensor, nn

import fastjem.functional as F
from fastjem.collectives import Agreement, default_group
from fastjem.functional import checks
from fastjem.functional.precision import loss_dtype
from fastjem.nn.hooks import is_overridden
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

    def _agreement(self, *, may_be_nothing: bool = False) -> Agreement:
        """Of the ranks, where `forward` makes collectives: with Sinkhorn, or to move the centre at once."""
        is_local = self.centering == "center" and self.defer_center_update
        return Agreement(type(self).__name__, None if is_local else default_group(), may_be_nothing=may_be_nothing)

    def _check(
        self, ranks: Agreement, teacher: list[Tensor], student: list[Tensor], shape: str, prototypes: int
    ) -> None:
        """The scores are [rows, K] of all prototypes. Of several ranks some may have no rows."""
        contract = f"teacher_out and student_out must be {shape} of {prototypes} prototypes"
        scores = [*teacher, *student]
        may_be_empty = None if default_group() is None and not ranks.may_be_nothing else 0
        checks.matrices(ranks.who, contract, *scores, may_be_empty=may_be_empty)
        if scores[0].shape[1] != prototypes:
            checks.fail(ranks.who, contract, tuple(scores[0].shape))
        checks.positive(ranks.who, "student_temp", self.student_temp, student[0])
        ranks.rows_of(teacher[0])
        ranks.alike(self.centering, len(teacher))

    def _loss(
        self,
        teacher: list[Tensor],
        student: list[Tensor],
        center: Tensor,
        temperature: float | Tensor,
        pairs: str = "different",
        weights: Tensor | None = None,
    ) -> Tensor:
        """The cross-entropy of this rank's rows, 0 without any; `statistics` are of them."""
        if self.centering == "sinkhorn":
            bias = F.sinkhorn_bias(teacher, epsilon=temperature, group=default_group())
        else:
            bias = center.flatten() / -(temperature.detach() if isinstance(temperature, Tensor) else temperature)
        if not teacher[0].shape[0]:
            self.statistics = None
            return torch.stack([x.sum(dtype=loss_dtype(x)) for x in student]).sum()
        loss, self.statistics = F.prototype_cross_entropy(
            student,
            teacher,
            student_temperature=self.student_temp,
            teacher_temperature=temperature,
            teacher_bias=bias,
            pairs=pairs,
            weights=weights,
            statistics=True,
        )
        return loss

    def _batch_mean(self, center: Tensor) -> Tensor:
        """[K], of the teacher's scores in the last call of `_loss`; zeros of none."""
        return torch.zeros_like(center.flatten()) if self.statistics is None else self.statistics.mean

    @torch.no_grad()
    def update_center(self, teacher_out: Tensor) -> None:
        """Move the centre towards the mean of the teacher's scores, or hold it for `step_ends`.

        A subclass may override it: `forward` calls it with all views, DINO's [V, B, K] stacked as in lightly, iBOT's
        [M, K]. Not overridden, `forward` takes the mean that came with the loss: no pass over the scores, no stack.
        """
        rows = teacher_out.flatten(0, -2)
        self._move_center(rows.mean(0, dtype=loss_dtype(rows)), rows.shape[0])

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

    The loss is this rank's own, the centre (and Sinkhorn) of all ranks' rows. A rank may come without rows: its loss
    is 0.
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

    @property
    @torch.no_grad()
    def teacher_temp_schedule(self) -> Tensor:
        """[warmup_teacher_temp_epochs], on the host: the teacher's temperature in each epoch of the warm-up."""
        epochs = range(self.warmup_teacher_temp_epochs)
        return torch.tensor([float(self._temperature(None, epoch, None)) for epoch in epochs], device="cpu")

    def reset_parameters(self) -> None:
        self.center.zero_()

    def forward(
        self,
        teacher_out: list[Tensor],
        student_out: list[Tensor],
        teacher_temp: float | Tensor | None = None,
        epoch: int | None = None,
    ) -> Tensor:
        """0-dim. Scores [B, K] of each view; views of one index are the same view. The teacher's get no gradient."""
        with self._agreement() as ranks:
            teacher = list(teacher_out)
            student = list(student_out)
            if not teacher or len({*range(len(teacher)), *range(len(student))}) < 2:
                came = f"{len(teacher)} teacher and {len(student)} student views"
                checks.fail(ranks.who, "there must be at least two views, one of them the teacher's", came)
            self._check(ranks, teacher, student, "a [B, K] a view", self.center.numel())
            temperature = self._temperature(teacher_temp, epoch, teacher[0])
        loss = self._loss(teacher, student, self.center, temperature)
        if self.centering == "center":
            if is_overridden(self, "update_center", _Distillation):
                self.update_center(torch.stack(teacher).detach())
            else:
                self._move_center(self._batch_mean(self.center), len(teacher) * teacher[0].shape[0])
        return loss

    def _temperature(
        self, teacher_temp: float | Tensor | None, epoch: int | None, like: Tensor | None
    ) -> float | Tensor:
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

    The loss is this rank's own, the centre (and Sinkhorn) of all ranks' patches. Without masked patches it is 0, and
    such a rank takes part in the others' centre with none.
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
        with self._agreement(may_be_nothing=True) as ranks:
            if mask.dim() != 3 or mask.dtype != torch.bool:
                checks.fail(ranks.who, "mask must be [B, H, W] bool", f"{tuple(mask.shape)} {mask.dtype}")
            counts = mask.sum((1, 2))  # [B]
            looks = not mask.is_cuda and not torch.compiler.is_compiling()  # on CUDA it would stall the device
            if looks and int(counts.sum()) != student_out.shape[0]:
                contract = "the mask must have as many true entries as there are patches"
                checks.fail(ranks.who, contract, f"{int(counts.sum())} and {student_out.shape[0]}")
            self._check(ranks, [teacher_out], [student_out], "[M, K], a row a masked patch,", self.center.value.numel())
            temperature = self.teacher_temp if teacher_temp is None else teacher_temp
            temperature = checks.positive(ranks.who, "teacher_temp", temperature, teacher_out)
        if not torch.compiler.is_compiling() and not any(ranks.sizes):  # no patch is masked, on no rank: no loss
            self.statistics = None
            return student_out.sum(dtype=loss_dtype(student_out))
        of_image = 1 / counts.clamp_min(1).to(loss_dtype(student_out))
        weights = of_image.repeat_interleave(counts, output_size=student_out.shape[0])  # [M]
        loss = self._loss([teacher_out], [student_out], self.center.value, temperature, "same", weights)
        if self.centering == "center":
            self._follow_teacher(teacher_out)
        return loss * (weights.sum() / max(mask.shape[0], 1))

    def _follow_teacher(self, scores: Tensor) -> None:
        """Move the centre by the teacher's scores [M, K] of the last call of `_loss`."""
        if is_overridden(self, "update_center", _Distillation):
            self.update_center(scores.detach())
        elif is_overridden(self.center, "update", Center):
            self.center.update(scores.detach())
        else:
            self._move_center(self._batch_mean(self.center.value), scores.shape[0])

    def _move_center(self, mean: Tensor, rows: int) -> None:
        if self.defer_center_update:
            self.center.hold(mean, rows)
        else:
            self.center.move(mean, rows)

    def step_ends(self) -> None:
        """With `defer_center_update`: move the centre, once for all batches since the last call."""
        if self.defer_center_update:
            self.center.step_ends(default_group())


class IBOTPlusPlusPatchLoss(IBOTPatchLoss):
    """Cross-entropy of all patches, hidden and visible, against the teacher's sight of them: iBOT++ (arXiv 2604.12012).

    Of each image the mean over its hidden patches and, times a weight, that over its visible ones; the mean over
    images. The centre is of all patches. Arguments as of `IBOTPatchLoss`.
    """

    def forward(
        self,
        teacher_out: Tensor,
        student_out: Tensor,
        mask: Tensor | None = None,
        teacher_temp: float | Tensor | None = None,
        visible_loss_weight: float | Tensor = 1.0,
    ) -> Tensor:
        """0-dim float32 (float64 for float64 scores).

        Args:
            teacher_out, student_out: [B, P, K] scores of all patches, or [B P, K] with a mask. The teacher's get no
                gradient.
            mask: [B, ...] bool, P for each image, true where the student didn't see the patch. None: all patches count
                alike.
            teacher_temp: in place of the module's.
            visible_loss_weight: of the visible patches.
        """
        with self._agreement() as ranks:
            for x in (teacher_out, student_out):
                if not isinstance(x, Tensor) or x.dim() not in (2, 3) or (x.dim() == 2 and mask is None):
                    contract = "teacher_out and student_out must be [B, P, K], or [B P, K] with a mask"
                    checks.fail(ranks.who, contract, checks.shape(x))
            patches = student_out[..., 0].numel()
            if mask is not None and (mask.dtype != torch.bool or mask.dim() < 2 or mask.numel() != patches):
                contract = f"mask must be [B, ...] bool of {patches} patches"
                checks.fail(ranks.who, contract, f"{tuple(mask.shape)} {mask.dtype}")
            teacher, student = (x.flatten(0, -2) for x in (teacher_out, student_out))
            self._check(ranks, [teacher], [student], "[B, P, K]", self.center.value.numel())
            temperature = self.teacher_temp if teacher_temp is None else teacher_temp
            temperature = checks.positive(ranks.who, "teacher_temp", temperature, teacher)
            of_visible = ("visible_loss_weight", visible_loss_weight, student)
            visible = checks.number(ranks.who, *of_visible, low=0, inclusive=True)
        weights = None
        share = 1
        if mask is not None:
            hidden = mask.flatten(1).to(loss_dtype(student))  # [B, P]
            seen = 1 - hidden
            of_hidden = hidden / hidden.sum(1, keepdim=True).clamp_min(1)
            weights = (of_hidden + visible * seen / seen.sum(1, keepdim=True).clamp_min(1)).flatten().detach()
            total = weights.sum()
            share = total / max(mask.shape[0], 1)
            weights = torch.where(total == 0, 1.0, weights)  # where no patch counts the loss is 0, and not 0 / 0
        loss = self._loss([teacher], [student], self.center.value, temperature, "same", weights)
        if self.centering == "center":
            self._follow_teacher(teacher)
        return loss * share
