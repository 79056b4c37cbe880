"""The specification; conventions are in kernels/__init__.py."""

import torch
from torch import Tensor

from ..arithmetic import no_gradient, through_unit_rows, unit_rows, widen


def gram_loss(
    student: Tensor,  # [G, P, D]
    teacher: Tensor,  # [G, P, D]
    normalize: bool,
    negatives: str,  # "keep" | "clamp" | "clamp_teacher"
    wanted: list[bool],
) -> tuple[Tensor, list[Tensor], Tensor]:
    """`mse_loss(u @ u.mT, v @ v.mT)` of the student's rows u and the teacher's v, of unit length if `normalize`.

    "clamp": negative similarities of either count as 0. "clamp_teacher": the teacher's do, and the student's where both
    are negative.
    """
    x = widen(student)
    y = widen(teacher)
    u, norm = unit_rows(x) if normalize else (x, x)
    v = unit_rows(y)[0] if normalize else y
    similarities = u @ u.mT
    targets = v @ v.mT
    counts = torch.ones_like(similarities)
    if negatives == "clamp":
        counts = counts.masked_fill(similarities <= 0, 0)
    elif negatives == "clamp_teacher":
        counts = counts.masked_fill((similarities <= 0) & (targets <= 0), 0)
    if negatives != "keep":
        similarities = similarities.masked_fill(counts == 0, 0)
        targets = targets.masked_fill(targets <= 0, 0)
    error = similarities - targets
    loss = error.square().mean()
    patches = student.shape[1]
    gradient = (error * counts) @ u
    # Rows that aren't of unit length may make sums that float16 doesn't have.
    gradient = through_unit_rows(gradient, u, norm) if normalize else gradient / patches
    scale = torch.full_like(loss, 4 / (student.shape[0] * patches * (patches if normalize else 1)))
    return loss, [gradient.to(student.dtype) if wanted[0] else no_gradient(student)], scale
