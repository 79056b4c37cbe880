"""Masked patches, of which each image may have another number, as rows: without boolean indexing, which would wait."""

import torch
from torch import Tensor

from fastjem.functional import checks


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
