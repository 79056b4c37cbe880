"""Gram anchoring: the student's patches keep the similarities that an earlier model's have (DINOv3)."""

from torch import Tensor

from fastjem.functional import checks
from fastjem.ops.autograd import one_pass

NEGATIVES = ("keep", "clamp", "clamp_teacher")
LEVELS = ("image", "batch")


def gram_loss(
    student: Tensor, teacher: Tensor, *, level: str = "image", normalize: bool = True, negatives: str = "keep"
) -> Tensor:
    """`mse_loss(u @ u.mT, v @ v.mT)`, u and v the patches of student and teacher at unit length: Gram anchoring.

    Siméoni et al. 2025, arXiv 2508.10104, equation 2, as a mean over pairs of patches. Neither Gram matrix is in
    memory: only tiles of them.

    Args:
        student: [B, P, D], features of patches.
        teacher: [B, P, D], of the Gram teacher at the same patches; gets no gradient.
        level: "image": patches of one image meet; "batch": all B P do.
        normalize: False: the rows as they are.
        negatives: of the similarities: "keep"; "clamp": those of either count as 0; "clamp_teacher": the teacher's do,
            and the student's where both are negative (DINOv3's code calls them remove_neg and remove_only_teacher_neg).

    Returns:
        0-dim float32 (float64 for float64 inputs).

    Raises:
        ValueError: for other shapes, dtypes or options.
    """
    checks.matrices("gram_loss", "student and teacher must be [B, P, D] both", student, teacher, dims=3)
    if level not in LEVELS:
        checks.fail("gram_loss", f"level must be one of {', '.join(LEVELS)}", repr(level))
    if negatives not in NEGATIVES:
        checks.fail("gram_loss", f"negatives must be one of {', '.join(NEGATIVES)}", repr(negatives))
    student, teacher = checks.common(student, teacher.detach())
    if level == "batch":
        student = student.flatten(0, 1)[None]
        teacher = teacher.flatten(0, 1)[None]
    return one_pass("gram_loss", (student,), teacher, bool(normalize), negatives)
