"""What DINO, SwAV and their kin have in common: the cross-entropy of scores against prototypes."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

import fastjem.functional as F

# Bytes of a step's scores and their gradients beyond which they aren't held in memory but made in tiles, twice. On two
# AVX-512 cores, float32, a DINO step of a small encoder (2 + 8 views, features of 256) then takes 0.64 of the time at
# 1,475 MiB (256 images against 65,536 prototypes) and 0.92 to 1 at 369 and 184 (64 against 65,536, 256 against 8,192).
# Below, holding them is faster: at 46 MiB (64 against 8,192) the tiles take 1.2 times as long.
LARGEST_SCORES = 160 << 20


def scores_fit(student: Sequence[Tensor], teacher: Sequence[Tensor], prototypes: int) -> bool:
    """Whether the scores [rows, K] of both sides, and the gradients of the student's, are small enough to be held."""
    student_rows = sum(x.shape[0] for x in student)
    teacher_rows = sum(x.shape[0] for x in teacher)
    element = student[0].element_size()
    return (2 * student_rows + teacher_rows) * prototypes * element <= LARGEST_SCORES


def cross_entropy_of_features(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    student_prototypes: Tensor,
    teacher_prototypes: Tensor,
    *,
    student_temperature: float,
    teacher_temperature: float,
    teacher_bias: Tensor,
    pairs: str = "different",
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`fastjem.functional.prototype_cross_entropy` of `features @ prototypes.T`, and the mean of the teacher's scores.

    Where the scores fit into `LARGEST_SCORES` bytes they are computed by one library call a side, else tile by tile
    inside the head-fused operator, which holds none of them.

    Args:
        student: S tensors [B, D]; teacher: T tensors [B, D], constants.
        student_prototypes, teacher_prototypes: [K, D].
        teacher_bias: [K] or [T, K].
        pairs, weights: as for `prototype_cross_entropy`; iBOT's patches are the pairs "same".

    Returns:
        The loss, 0-dim, and the mean [K] over this rank's teacher views and rows.
    """
    options = {
        "student_temperature": student_temperature,
        "teacher_temperature": teacher_temperature,
        "teacher_bias": teacher_bias,
        "pairs": pairs,
        "weights": weights,
    }
    if scores_fit(student, teacher, len(student_prototypes)):
        student_scores = linear(torch.cat(list(student)), student_prototypes).split([len(x) for x in student])
        with torch.no_grad():
            teacher_scores = linear(torch.cat(list(teacher)), teacher_prototypes).split([len(x) for x in teacher])
        loss, statistics = F.prototype_cross_entropy(student_scores, teacher_scores, **options, statistics=True)
        return loss, statistics.mean
    loss = F.prototype_head_cross_entropy(student, teacher, student_prototypes, teacher_prototypes, **options)
    with torch.no_grad():
        mean = linear(torch.cat(list(teacher)).mean(0, dtype=torch.float32), teacher_prototypes.float())
    return loss, mean
