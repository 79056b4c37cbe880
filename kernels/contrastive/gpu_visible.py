"""Log-sum-exps over what rows see and their gradient, on a GPU: `visible.VisibleEngine` of visible_kernels.py.

The work is divided as in gpu_engine.py: rows' and columns' sums in one walk over the tiles; gradients of narrow rows in
half precision by programs that own rows, others by weights of a band of rows in memory.
"""

import functools
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .. import launch, tiling
from . import gpu_engine
from .composed import OwnImage
from .gpu_engine import Scaling, scaling_of, sum_dtype
from .rows import join, lse_states
from .visible import Slopes, Sums, Visible
from .visible_kernels import visible_owner_kernel, visible_sums_kernel, visible_weights_kernel

__all__ = ["product_rows", "scaling_of", "sum_dtype", "visible_products", "visible_sums"]


def product_rows(x: Tensor, products: torch.dtype) -> Tensor:
    half = x.dtype == torch.float32 and products.itemsize == 2
    return x.to(products if half else x.dtype).contiguous()


class _Mask(NamedTuple):
    """`Visible` as the kernels take it."""

    tensors: tuple[Tensor | None, ...]  # row_ids, column_ids, exclude, row_limit, column_limit
    exclude: tuple[int, int, int, int]  # its rows, columns and their strides
    own_image: OwnImage

    @classmethod
    def of(cls, visible: Visible) -> "_Mask":
        ids = (None if x is None else x.contiguous() for x in (visible.row_ids, visible.column_ids))
        limits = (None if x is None else x.float().contiguous() for x in (visible.row_limit, visible.column_limit))
        exclude = visible.exclude
        if exclude is None:
            return cls((*ids, None, *limits), (1, 1, 1, 1), visible.own_image)
        stated = (exclude.shape[0], exclude.shape[1], exclude.stride(0), exclude.stride(1))
        return cls((*ids, exclude.view(torch.uint8), *limits), stated, visible.own_image)

    def transposed(self) -> "_Mask":
        """What columns see of rows."""
        row_ids, column_ids, exclude, row_limit, column_limit = self.tensors
        rows, columns, s_row, s_column = self.exclude
        tensors = (column_ids, row_ids, exclude, column_limit, row_limit)
        return _Mask(tensors, (columns, rows, s_column, s_row), gpu_engine.transposed(self.own_image))

    def part(self, rows: slice) -> "_Mask":
        """Of some rows, which the kernels number from `first_row` on."""
        row_ids, column_ids, exclude, row_limit, column_limit = self.tensors
        row_ids = None if row_ids is None else row_ids[rows]
        row_limit = None if row_limit is None else row_limit[rows]
        return self._replace(tensors=(row_ids, column_ids, exclude, row_limit, column_limit))

    def numbers(self, first_row: int = 0) -> tuple[int, ...]:
        return *self.exclude, *gpu_engine.own_image_arguments(self.own_image, first_row)

    @property
    def has_own_image(self) -> bool:
        return self.own_image.column_period > 0


class _Parts(NamedTuple):
    """Sums in parts, to be joined, [parts, N] each."""

    maxima: Tensor
    sums: Tensor
    totals: Tensor | None
    counts: Tensor | None

    @classmethod
    def empty(cls, parts: int, n: int, totals: torch.dtype | None, device: torch.device) -> "_Parts":
        maxima, sums = torch.empty(2, parts, n, dtype=torch.float32, device=device)
        if totals is None:
            return cls(maxima, sums, None, None)
        counts = torch.empty(parts, n, dtype=torch.int32, device=device)
        return cls(maxima, sums, torch.empty(parts, n, dtype=totals, device=device), counts)

    def joined(self, scaling: Scaling) -> Sums:
        lse = join((self.maxima, self.sums), None, scaling.factor, 0.0, True)
        if self.totals is None or self.counts is None:
            return Sums(lse, lse.new_empty(0), lse.new_empty(0))
        return Sums(lse, self.totals.sum(0, dtype=torch.float64), self.counts.sum(0, dtype=torch.float64))


def _added(x: Sums, y: Sums) -> Sums:
    """Of both parts of what is seen."""
    return Sums(torch.logaddexp(x.lse, y.lse), x.total + y.total, x.count + y.count)


def visible_sums(
    a: Tensor, b: Tensor, scaling: Scaling, visible: Visible, columns: bool, totals: bool, *, symmetric: bool
) -> tuple[Sums, Sums | None]:
    """A symmetric product is computed whole."""
    mask = _Mask.of(visible)
    d = a.shape[1]
    m = len(b)
    tile = tiling.similarity_visible(d, a.dtype)
    numbers = 2 + 2 * totals  # of a column and a block of rows
    band = max(1, tiling.COLUMN_SUMS // (m * numbers)) * tile["BM"] if columns else len(a)
    of_rows: list[Sums] = []
    of_columns: list[Sums] = []
    for start in range(0, len(a), band):
        rows = slice(start, min(start + band, len(a)))
        part = mask.part(rows)
        n = rows.stop - start
        blocks = triton.cdiv(n, tile["BM"])
        splits, tiles_per_program = gpu_engine.splits_of(blocks, triton.cdiv(m, tile["BN"]))
        row_parts = _Parts.empty(splits, n, torch.float64 if totals else None, a.device)
        column_parts = _Parts.empty(blocks, m, torch.float32 if totals else None, a.device) if columns else None
        launch.launch(
            visible_sums_kernel, (blocks, splits), a[rows], b, *part.tensors, *row_parts,
            *(column_parts or (None,) * 4), n, m, d, *part.numbers(start), tiles_per_program,
            HAS_OWN_IMAGE=mask.has_own_image, **tile, device_of=a,
        )  # fmt: skip
        of_rows.append(row_parts.joined(scaling))
        if column_parts is not None:
            of_columns.append(column_parts.joined(scaling))
    sums = of_rows[0] if len(of_rows) == 1 else Sums(*(torch.cat(parts) for parts in zip(*of_rows, strict=True)))
    return sums, functools.reduce(_added, of_columns) if columns else None


class _Side(NamedTuple):
    """One side's slopes as the kernels take them, [N] float32 each; four times None: this side has none."""

    pivots: Tensor | None = None
    adjustments: Tensor | None = None
    of_lse: Tensor | None = None
    of_total: Tensor | None = None

    @classmethod
    def of(cls, slopes: Slopes | None, scaling: Scaling, size: Tensor | None) -> "_Side":
        if slopes is None:
            return cls()
        vectors = (slopes.of_lse, slopes.of_total)
        if size is not None:
            vectors = (None if x is None else x / size for x in vectors)
        numbers = (None if x is None else x.float().contiguous() for x in vectors)
        return cls(*lse_states(slopes.lse, scaling.factor, 0.0, True), *numbers)

    def part(self, rows: slice) -> "_Side":
        return _Side(*(None if x is None else x[rows] for x in self))


def _size(*sides: Slopes | None) -> Tensor:
    """The largest slope, 0-dim; 1 where it is none to divide by."""
    slopes = [x for side in sides if side is not None for x in side[1:] if x is not None]
    largest = torch.stack([x.abs().max() for x in slopes if x.numel()]).max()
    return largest.where((largest > 0) & largest.isfinite(), 1.0)


def visible_products(
    a: Tensor,
    b: Tensor,
    scaling: Scaling,
    visible: Visible,
    of_rows: Slopes | None,
    of_columns: Slopes | None,
    a_sum: Tensor | None,
    b_sum: Tensor | None,
    *,
    symmetric: bool,
) -> None:
    """A symmetric product is computed whole. Slopes carry 1 / N, which float16 products leave for afterwards."""
    if a_sum is None and b_sum is None:
        return
    size = _size(of_rows, of_columns) if a.dtype == torch.float16 else None
    mask = _Mask.of(visible)
    of_a = _Side.of(of_rows, scaling, size)
    sides = of_a, of_a if symmetric else _Side.of(of_columns, scaling, size)
    tile = tiling.similarity_visible_owner(a.shape[1], a.dtype)
    if tile is None:
        _by_bands(a, b, mask, sides, a_sum, b_sum)
    else:
        if a_sum is not None:
            _owned(a, b, mask, sides, tile, a_sum)
        if b_sum is not None:
            _owned(b, a, mask.transposed(), (sides[1], sides[0]), tile, b_sum)
    if size is not None:
        for total in (a_sum, b_sum):
            if total is not None:
                total *= size


def _owned(a: Tensor, b: Tensor, mask: _Mask, sides: tuple[_Side, _Side], tile: dict, total: Tensor) -> None:
    """`total = G @ b` [N, D] float32 by programs that own rows of a."""
    n, d = a.shape
    m = len(b)
    blocks = triton.cdiv(n, tile["BM"])
    splits, tiles_per_program = gpu_engine.splits_of(blocks, triton.cdiv(m, tile["BN"]))
    out = total[None] if splits == 1 else torch.empty(splits, n, d, dtype=torch.float32, device=a.device)
    launch.launch(
        visible_owner_kernel, (blocks, splits), a, b, *mask.tensors, *sides[0], *sides[1], out, n, m, d,
        *mask.numbers(), tiles_per_program, HAS_OWN_IMAGE=mask.has_own_image, GAIN=launch.gain(a.dtype), **tile,
        device_of=a,
    )  # fmt: skip
    if splits > 1:
        torch.sum(out, 0, out=total)


def _by_bands(
    a: Tensor, b: Tensor, mask: _Mask, sides: tuple[_Side, _Side], a_sum: Tensor | None, b_sum: Tensor | None
) -> None:
    tile = tiling.similarity_visible_weights(a.dtype)
    m, d = b.shape
    for rows, weights in gpu_engine.bands(a, b, True):
        assert weights is not None
        part = mask.part(rows)
        n = rows.stop - rows.start
        grid = (triton.cdiv(n, tile["BM"]) * triton.cdiv(m, tile["BN"]),)
        launch.launch(
            visible_weights_kernel, grid, a[rows], b, *part.tensors, *sides[0].part(rows), *sides[1], weights, n, m, d,
            *part.numbers(rows.start), weights.stride(0) // 8, HAS_OWN_IMAGE=mask.has_own_image,
            GAIN=launch.gain(a.dtype), **tile, device_of=a,
        )  # fmt: skip
        if a_sum is not None:
            gpu_engine.add_product(a_sum[rows], weights, b, is_first=True)
        if b_sum is not None:
            gpu_engine.add_product(b_sum, weights.T, a[rows], is_first=rows.start == 0)
