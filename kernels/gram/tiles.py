"""Gram matrices by tiles, with torch's products: a tile of both is made, subtracted, summed and multiplied at once.

Both matrices are symmetric, so a block of rows meets the columns from its own diagonal on, and their tile counts twice.
Beside those of eager code (two products forward, two backward, all whole) that is half to three quarters of the FLOPs.
What is left between the products is a few passes over a tile in the cache.
"""

import torch
from torch import Tensor

from .. import tiling
from ..arithmetic import scalar_like, through_unit_rows, unit_rows, widen, widest


def _errors(u: Tensor, v: Tensor, first: int, rows: int, negatives: str) -> tuple[Tensor, Tensor]:
    """The differences [g, rows, P - first] from row `first`'s diagonal on; and again, where the student's count."""
    u_right, v_right = u[:, first:].mT, v[:, first:].mT
    error = torch.bmm(u[:, first : first + rows], u_right)
    if negatives == "keep":
        error.baddbmm_(v[:, first : first + rows], v_right, alpha=-1)
        return error, error
    targets = torch.bmm(v[:, first : first + rows], v_right)
    idle = error <= 0
    if negatives == "clamp_teacher":
        idle.logical_and_(targets <= 0)
    error.masked_fill_(idle, 0)
    error.sub_(targets.masked_fill_(targets <= 0, 0))
    return error, error.masked_fill(idle, 0)


def gram_loss(
    student: Tensor,  # [G, P, D]
    teacher: Tensor,  # [G, P, D]
    normalize: bool,
    negatives: str,
    wanted: list[bool],
) -> tuple[Tensor, list[Tensor], Tensor]:
    groups, patches, _ = student.shape
    rows, at_once = tiling.gram(groups, patches)
    total = widest(student.new_zeros(()))
    gradient = torch.empty_like(student, memory_format=torch.contiguous_format) if wanted[0] else student.new_empty(0)
    for begin in range(0, groups, at_once):
        x = widen(student[begin : begin + at_once])
        y = widen(teacher[begin : begin + at_once])
        u, norm = unit_rows(x) if normalize else (x, x)
        v = unit_rows(y)[0] if normalize else y
        of_rows = torch.zeros_like(u) if wanted[0] else None
        for first in range(0, patches, rows):
            error, counted = _errors(u, v, first, min(rows, patches - first), negatives)
            height = error.shape[1]
            total += _squares(error[:, :, :height]) + 2 * _squares(error[:, :, height:])  # not less: inf - inf is NaN
            if of_rows is None:
                continue
            of_rows[:, first : first + height].baddbmm_(counted, u[:, first:])
            if first + height < patches:  # the tile's transpose
                below = of_rows[:, first + height :]
                below.baddbmm_(counted[:, :, height:].mT, u[:, first : first + height])
        if of_rows is not None:
            of_rows = through_unit_rows(of_rows, u, norm) if normalize else of_rows / patches
            gradient[begin : begin + at_once] = of_rows
    scale = scalar_like(student, 4 / (groups * patches * (patches if normalize else 1)))
    return (total / (groups * patches**2)).to(scale.dtype), [gradient], scale


def _squares(x: Tensor) -> Tensor:
    """0-dim, the sum of the squares, a row's in float32: torch.linalg.vector_norm of all is off by 4e-6 on a CPU."""
    return widest(torch.linalg.vector_norm(x, dim=-1)).square().sum()
