"""Losses of patches at their places, and how two crops' patches come to be at the same ones. Names as in lightly."""

from typing import Any

import torch
from torch import Tensor, nn

import fastjem.functional as F
from fastjem.functional import checks


class PatchKernelAlignmentLoss(nn.Module):
    """`fastjem.functional.patch_kernel_alignment` (PaKA, arXiv 2509.05606): 1 - CKA of student's and teacher's patches.

    Args:
        max_tokens: so many patches of each image, drawn at random among those that count, if it has more; None: all.
    """

    def __init__(self, max_tokens: int | None = None):
        super().__init__()
        least = 2
        self.max_tokens = (
            None if max_tokens is None else checks.integer("PatchKernelAlignmentLoss", "max_tokens", max_tokens, least)
        )

    def forward(self, student_features: Tensor, teacher_features: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, P, D] and [B, P, D] (a constant) -> 0-dim; mask: [B, P] bool, true where a patch doesn't count."""
        most = self.max_tokens
        if most is not None and student_features.dim() == 3 and student_features.shape[1] > most:
            drawn = torch.rand(student_features.shape[:2], device=student_features.device)
            if mask is not None:
                drawn = drawn.masked_fill(mask, torch.inf)
            chosen = drawn.topk(most, dim=1, largest=False).indices  # [B, most]
            places = chosen[..., None].expand(-1, -1, student_features.shape[2])
            student_features, teacher_features = (x.gather(1, places) for x in (student_features, teacher_features))
            mask = None if mask is None else mask.gather(1, chosen)
        return F.patch_kernel_alignment(student_features, teacher_features, mask)


def roi_resample_to_grid(feature_map: Tensor, boxes: Tensor, out_h: int, out_w: int) -> Tensor:
    """A box of each image's features, resampled to a grid: what two crops share, at the same places of both.

    Args:
        feature_map: [B, C, H, W]; gets its gradient.
        boxes: [B, 4], (left, top, right, bottom) in features: between 0 and W, and 0 and H.
        out_h, out_w: of the grid.

    Returns:
        [B, out_h * out_w, C], row by row, by torchvision's `roi_align` with `aligned=True`.

    Raises:
        ValueError: for other shapes.
        ImportError: without torchvision.
    """
    from torchvision.ops import roi_align

    op = "roi_resample_to_grid"
    checks.matrices(op, "feature_map must be [B, C, H, W]", feature_map, dims=4)
    if boxes.dim() != 2 or boxes.shape != (feature_map.shape[0], 4):
        checks.fail(op, f"boxes must be [{feature_map.shape[0]}, 4]", tuple(boxes.shape))
    numbered = torch.arange(boxes.shape[0], device=feature_map.device)[:, None]
    boxes = torch.cat([numbered.to(feature_map), boxes.to(feature_map)], 1)
    align: Any = roi_align
    cut = align(feature_map, boxes, output_size=(out_h, out_w), spatial_scale=1.0, aligned=True)
    return cut.flatten(2).mT.contiguous()
