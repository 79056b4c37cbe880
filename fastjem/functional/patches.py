"""Patches: masked ones as rows, without boolean indexing, which would wait; and the alignment of their kernels."""

import torch
from torch import Tensor

from fastjem.functional import checks
from fastjem.functional.precision import in_float32, without_autocast


def masked_rows(mask: Tensor, count: int | None = None) -> tuple[Tensor, Tensor]:
    """(rows [M], weights [M]): the flat indices of the masked patches in order, and 1 / (the masked ones of its image).

    For the patch losses of iBOT, CAPI and data2vec: `tokens.flatten(0, 1)[rows]` goes through a head, which then never
    sees the other patches, and its scores into `prototype_cross_entropy(..., pairs="same", weights=weights)`;
    `regression(..., rows=rows, weights=weights)` reads them where they are.

    Args:
        mask: [B, ...] bool, true where a patch is masked.
        count: M, where the host knows it; on a GPU it has to be given, as looking would wait. Where there are fewer
            masked patches, unmasked ones of weight 0 fill up; where there are more, the last ones are left out.
            None: as many as there are, for masks on the CPU.

    Returns:
        int64 and float32, on the mask's device.

    Raises:
        ValueError: for other shapes or dtypes, a count of more patches than there are, and None for one on a GPU.
    """
    op = "masked_rows"
    if not isinstance(mask, Tensor) or mask.dim() < 2 or mask.dtype != torch.bool:
        came = f"{checks.shape(mask)} {getattr(mask, 'dtype', '')}".strip()
        checks.fail(op, "mask must be [B, ...] bool", came)
    flat = mask.flatten(1)  # [B, P]
    if count is None:
        if not mask.is_cpu:
            checks.fail(op, f"count must be given for a mask on {mask.device.type}", None)
        rows = flat.flatten().nonzero()[:, 0]
    else:
        count = checks.integer(op, "count", count, 0)
        if count > flat.numel():
            checks.fail(op, f"count must be at most the {flat.numel()} patches", count)
        rows = flat.flatten().logical_not().to(torch.uint8).argsort(stable=True)[:count]
    masked = flat.sum(1, dtype=torch.float32).clamp_min(1)  # [B]
    weights = flat.flatten()[rows].float() / masked[rows // max(flat.shape[1], 1)]
    return rows, weights


def patch_kernel_alignment(
    student: Tensor, teacher: Tensor, mask: Tensor | None = None, *, eps: float = 1e-6
) -> Tensor:
    """`1 - CKA` of the patches' linear kernels, the mean over images: patches keep the similarities the teacher's have.

    With x the student's and y the teacher's patches of an image, each less its image's mean, CKA is
    `|x.T y|^2 / (|x.T x| |y.T y|)` (Kornblith et al. 2019, arXiv 1905.00414), which is taken of x y.T's shape [P, P] or
    of x.T y's [D, D], whichever is smaller.

    Args:
        student, teacher: [B, P, D] each; the teacher's get no gradient.
        mask: [B, P] bool, true where a patch doesn't count. An image with fewer than two that do doesn't count either.
        eps: the least a squared norm of a kernel is taken for.

    Returns:
        0-dim float32 (float64 for float64 inputs); 0 where no image counts.

    Raises:
        ValueError: for other shapes or dtypes.
    """
    op = "patch_kernel_alignment"
    checks.matrices(op, "student and teacher must be [B, P, D] both", student, teacher, dims=3)
    is_mask = isinstance(mask, Tensor) and mask.shape == student.shape[:2] and mask.dtype == torch.bool
    if mask is not None and not is_mask:
        came = f"{checks.shape(mask)} {getattr(mask, 'dtype', '')}".strip()
        checks.fail(op, f"mask must be {list(student.shape[:2])} bool", came)
    eps = checks.host_number(op, "eps", eps, low=0)
    with without_autocast(student):
        x, y = (in_float32(z) for z in checks.common(student, teacher.detach()))
        if mask is None:
            x, y = (z - z.mean(1, keepdim=True) for z in (x, y))
            counted = x.new_ones(x.shape[0]) * (x.shape[1] >= 2)
        else:
            checks.one_device(op, (student, mask))
            weights = (~mask)[..., None].to(x.dtype)
            count = weights.sum(1, keepdim=True)
            x, y = ((z - (z * weights).sum(1, keepdim=True) / count.clamp_min(1)) * weights for z in (x, y))
            counted = (count[:, 0, 0] >= 2).to(x.dtype)
        if x.shape[1] < x.shape[2]:
            ours = x @ x.mT
            its = y @ y.mT
            shared, of_x, of_y = ((a * b).sum((1, 2)) for a, b in ((ours, its), (ours, ours), (its, its)))
        else:
            shared, of_x, of_y = ((a.mT @ b).square().sum((1, 2)) for a, b in ((x, y), (x, x), (y, y)))
        cka = shared / (of_x.clamp_min(eps).sqrt() * of_y.clamp_min(eps).sqrt())
        return ((1 - cka) * counted).sum() / counted.sum().clamp_min(1)
