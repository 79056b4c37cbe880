"""What a loader hands out (`Crops`), and what a method is given (`Batch`): `finish` makes the one of the other."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

import fastjem.functional as F
from fastjem.data.masking import Masks, drawn_together
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

    views: list[Tensor]  # V x [B, H, W, C] uint8, or float32 levels from 0 to 255 (`Levels.floats`)
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
    late: bool = False,
) -> Batch:
    """The batch as a method takes it: colours done and normalised, masks drawn, everything on the device.

    Args:
        specs: one a view, those that the loader had.
        masks: at most one a view. Which patches are hidden follows (seed, epoch, key, view); how many, the step.
        seed: the run's.
        step: the number of the optimiser's step.
        dtype: of the views: float32, bfloat16 or float16.
        channels_last: the views' memory format; their shape is [B, C, H, W] in either case.
        late: the views are `LateView`s, whose colours are done where they are read.
    """

    def colours(view: Tensor, table: Tensor, spec: ViewSpec) -> Tensor:
        view = view.to(device, non_blocking=True)
        layout = {"dtype": dtype, "channels_last": channels_last}
        finished = partial(F.augment, mean=spec.mean, std=spec.std, **layout)
        return LateView(view, table, finished, dtype) if late else finished(view, table)

    tables = [table.to(device, non_blocking=True) for table in crops.tables]
    views = [colours(*parts) for parts in zip(crops.views, tables, specs, strict=True)]
    index = crops.index.to(device, non_blocking=True)
    labels = None if crops.labels is None else crops.labels.to(device, non_blocking=True)
    keys = index if crops.keys is None else crops.keys.to(device, non_blocking=True)
    drawn = drawn_together(masks, seed, crops.epoch, keys, step)
    return Batch(views, index, labels, drawn, tables)


class LateView(Tensor):
    """A view [B, C, H, W] that is a loader's crops still, of a byte a channel, with what is to be done to them.

    Its shape, dtype and device are those of the finished view. `rows_of` finishes some of its rows; any other operation
    finishes all of them first, and gives an ordinary tensor.

    Args:
        crops: [B, H, W, C] uint8 or float32, on the device.
        table: [B, P], see `Crops`.
        finished: of crops and their rows of the table: the view [B, C, H, W].
        dtype: of the finished view.
    """

    __torch_function__: Any = torch._C._disabled_torch_function_impl  # results are tensors, and no views that are late
    crops: Tensor
    table: Tensor
    finished: Callable[[Tensor, Tensor], Tensor]

    @staticmethod
    def __new__(
        cls, crops: Tensor, table: Tensor, finished: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype
    ) -> "LateView":
        batch, height, width, channels = crops.shape
        make: Any = torch.Tensor._make_wrapper_subclass
        view = make(cls, (batch, channels, height, width), dtype=dtype, device=crops.device)
        view.crops = crops
        view.table = table
        view.finished = finished
        return view

    def __repr__(self, **_: Any) -> str:
        return f"LateView({tuple(self.shape)}, {self.dtype}, of {self.crops.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(LateView, lambda view: view.rows(slice(None)), (args, kwargs or {}))
        return func(*args, **kwargs)

    def rows(self, at: slice) -> Tensor:
        """Some of the rows, finished."""
        return self.finished(self.crops[at], self.table[at])


def rows_of(view: Tensor, at: slice) -> Tensor:
    """`view[at]`, and of a `LateView` these rows alone are finished."""
    return view.rows(at) if isinstance(view, LateView) else view[at]


def part_of(batch: Batch, at: slice) -> Batch:
    """Some of a batch's images, with all that belongs to them."""
    masks = {
        number: Masks(*(None if x is None else x[at] for x in mask))  # type: ignore[arg-type]
        for number, mask in batch.masks.items()
    }
    return Batch(
        [rows_of(view, at) for view in batch.views],
        batch.index[at],
        None if batch.labels is None else batch.labels[at],
        masks,
        [table[at] for table in batch.tables],
    )
