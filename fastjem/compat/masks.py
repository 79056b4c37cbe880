"""I-JEPA's masks as a collate function, drawn by `fastjem.data.masks`. Names and arguments are lightly's."""

from multiprocessing import Value
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate

from fastjem.data.masks import multi_block_mask, visible
from fastjem.functional import checks


class IJEPAMaskCollator:
    """A batch, and which patches the context encoder is given and the predictor predicts.

    Args:
        input_size, patch_size: of the images, in pixels.
        enc_mask_scale, pred_mask_scale: the share of an image's patches that the context, and a target, has.
        aspect_ratio: of a target's height to its width.
        nenc: of contexts, 1. allow_overlap: False. More contexts, and contexts that hold targets, aren't drawn here.
        npred: how many targets.
        min_keep: a context has more patches than this, where it can.

    Calling it with a list of samples gives (the batch, [the context's indices [B, K]], the targets' [B, P] each).
    Blocks' sizes are one for a batch, of a generator seeded by the batch's number, which all workers count together.
    """

    def __init__(
        self,
        input_size: int | tuple[int, int] = (224, 224),
        patch_size: int = 16,
        enc_mask_scale: tuple[float, float] = (0.2, 0.8),
        pred_mask_scale: tuple[float, float] = (0.2, 0.8),
        aspect_ratio: tuple[float, float] = (0.3, 3.0),
        nenc: int = 1,
        npred: int = 2,
        min_keep: int = 4,
        allow_overlap: bool = False,
    ):
        who = type(self).__name__
        if nenc != 1:
            checks.fail(who, "nenc must be 1", nenc)
        if allow_overlap:
            checks.fail(who, "allow_overlap must be False", allow_overlap)
        height, width = (input_size, input_size) if isinstance(input_size, int) else input_size
        self.grid = height // patch_size, width // patch_size
        if min(self.grid) < 2:
            checks.fail(who, "there must be two patches at least in height and width", self.grid)
        self.enc_mask_scale = enc_mask_scale
        self.pred_mask_scale = pred_mask_scale
        self.aspect_ratio = aspect_ratio
        self.npred = checks.integer(who, "npred", npred, 1)
        self.min_keep = checks.integer(who, "min_keep", min_keep, 0)
        self._batches = Value("q", 0)

    def __call__(self, batch: list[Any]) -> tuple[Any, list[Tensor], list[Tensor]]:
        with self._batches.get_lock():
            number = self._batches.value
            self._batches.value += 1
        of_target, of_context = torch.rand(2, generator=torch.Generator().manual_seed(number)).tolist()
        masks = multi_block_mask(
            len(batch),
            self.grid,
            targets=self.npred,
            target_scale=self.pred_mask_scale,
            target_aspect=self.aspect_ratio,
            context_scale=self.enc_mask_scale,
            keep=self.min_keep,
            sizes=(of_target, of_context),
        )
        return default_collate(batch), [visible(masks.context)], list(masks.targets.unbind(1))
