"""What a loader hands out (`Crops`), and what a method is given (`Batch`): `finish` makes the one of the other."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastjem.data.colours import augmented
from fastjem.data.masking import Masks, drawn_masks
from fastjem.data.views import MaskSpec, ViewSpec


class Batch(NamedTuple):
    """V views of B images, on the run's device. A NamedTuple, as DDP, FSDP2, compile and pinning look into these."""

    views: list[Tensor]  # V x [B, C, H, W], the large ones first
    index: Tensor  # [B] int64: the number in its source of the image that each row shows
    labels: Tensor | None = None  # [B] int64; None where the source has none
    masks: dict[int, Masks] = {}  # noqa: RUF012  by the number of the view; never changed in place
    tables: list[Tensor] = []  # noqa: RUF012  V x [B, P]: how each view was cut and changed (`fastjem.kernels.augment.columns`)


class Crops(NamedTuple):
    """V views of B images, cut and resized; their colours are still the images' own.

    `index` says which images are really there: where one couldn't be read, the number of the image that stands in for
    it. The views' parameters are those of the sample that was asked for, which the order of the epoch alone decides.
    """

    views: list[Tensor]  # V x [B, H, W, C] uint8
    tables: list[Tensor]  # V x [B, P] float32: what is still to be done, by the columns of the augmentation table
    index: Tensor  # [B] int64: the image's number in its source
    epoch: int  # a batch lies in one epoch
    labels: Tensor | None  # [B] int64, of the images in `index`; None where the source has none
    unreadable: list[tuple[str, str]]  # (path, reason) of images that others replaced
    keys: Tensor | None = None  # [B] int64: what masks are drawn by (`loaders.protocol.mask_keys`); None: `index`


def finish(
    crops: Crops,
    specs: Sequence[ViewSpec],
    device: torch.device | str,
    *,
    masks: Sequence[MaskSpec] = (),
    seed: int = 0,
    step: int = 0,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
) -> Batch:
    """The batch as a method takes it: colours done and normalised, masks drawn, everything on the device.

    Args:
        specs: one a view, those that the loader had.
        masks: at most one a view. Which patches are hidden follows (seed, epoch, key, view); how many, the step.
        seed: the run's.
        step: the number of the optimiser's step.
        dtype: of the views: float32, bfloat16 or float16.
        channels_last: the views' memory format; their shape is [B, C, H, W] in either case.
    """

    def colours(view: Tensor, table: Tensor, spec: ViewSpec) -> Tensor:
        view = view.to(device, non_blocking=True)
        return augmented(view, table, mean=spec.mean, std=spec.std, dtype=dtype, channels_last=channels_last)

    tables = [table.to(device, non_blocking=True) for table in crops.tables]
    views = [colours(*parts) for parts in zip(crops.views, tables, specs, strict=True)]
    index = crops.index.to(device, non_blocking=True)
    labels = None if crops.labels is None else crops.labels.to(device, non_blocking=True)
    keys = index if crops.keys is None else crops.keys.to(device, non_blocking=True)
    drawn = {spec.view: drawn_masks(spec, seed, crops.epoch, keys, step) for spec in masks}
    return Batch(views, index, labels, drawn, tables)
