"""The contrastive engine on a GPU: how kernels on tiles of similarities divide the work.

* Log-sum-exps: a program owns a block of rows and walks over tiles of candidates. The candidates' own sums, where
  they are wanted, are written by tile, one line for each block of rows, and added in a fixed order. So a symmetric
  matrix needs half of its tiles, and CLIP's two directions one pass. Lines are bounded: a longer walk is taken in
  pieces.
* Gradients of bfloat16 and float16 rows of width 256 at most: a program owns rows, keeps their gradient in registers
  and walks over all candidates, computing the similarities again.
* Others, where that sum doesn't fit in registers: weights of a band of rows in memory, and torch's products of them.
  Whole losses of few rows have products of ours, which finish the gradient (products.py).

No float is added by two programs in an order of their own: the bits repeat. Where there are few rows, candidates are
split among programs, whose results are added in a fixed order.

A bounded similarity (unit rows, temperatures of 0.0128 and more) needs no running maximum: one pivot serves all (see
tiles.py). `composed.Engine` says what the functions do that are named there.
"""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .. import launch, tiling
from ..chips import multiplies
from . import products as few_products
from .composed import OwnImage
from .rows import dots, join, lse_states, through_unit_rows, unit_rows
from .sums import best_kernel, sums_kernel
from .weights import owner_kernel, weights_kernel

__all__ = [
    "add_weighted",
    "best",
    "both_log_sum_exps",
    "dots",
    "row_log_sum_exps",
    "scaling_of",
    "sum_dtype",
    "through_unit_rows",
    "unit_rows",
]


def sum_dtype(x: Tensor) -> torch.dtype:
    return torch.float32


@dataclass(frozen=True)
class Scaling:
    """Logits are similarities times a factor, and exponentials are formed around a pivot: see tiles.py."""

    tensor: Tensor | None  # 0-dim, the factor; None: it is the number, which sums_kernel and weights_kernel take
    running: bool  # every row has a pivot of its own
    pivot: float  # otherwise: the one for all, a float32 number
    number: float = 0.0

    @property
    def factor(self) -> Tensor:
        assert self.tensor is not None, "a kernel that takes no number"
        return self.tensor


def scaling_of(factor: float | Tensor, bound: float | None, a: Tensor, b: Tensor) -> Scaling:
    """One pivot for all rows where no logit can be too large for it; `factor` is positive if it is a number.

    A tensor's value isn't known on the host, and neither are the norms of rows that come as they are: there pivots are
    running.
    """
    if isinstance(factor, Tensor):
        return Scaling(factor, True, 0.0)
    tensor = torch.full((), factor, dtype=torch.float64, device=a.device)
    if bound is None:
        return Scaling(tensor, True, 0.0)
    return scaling_of_number(factor, tensor, a.dtype, bound)


def scaling_of_number(factor: float, tensor: Tensor, dtype: torch.dtype, bound: float = 1.0) -> Scaling:
    """For a positive factor, which is in `tensor` as well."""
    largest = factor * bound * (1.0001 if dtype == torch.float32 else 1.01)  # rounded rows may be longer than 1
    # Less pivot * factor, no logit is above 70 (in float32 a sum of 1e7 times exp(70) is finite) or below -86 (exp(-86)
    # is a normal number). Where that can't be, pivots are running. A multiple of 1 / 1024 is exact in float32.
    pivot = math.ceil(max(0.0, largest - 70) / factor * 1024) / 1024
    return Scaling(tensor, largest + pivot * factor > 86, pivot)


def splits_of(blocks: int, tiles: int) -> tuple[int, int]:
    """How many programs share the walk of a block of rows, and how many of its tiles each takes."""
    tiles_per_program = triton.cdiv(tiles, min(tiles, max(1, tiling.PROGRAMS // blocks)))
    return triton.cdiv(tiles, tiles_per_program), tiles_per_program


def own_image_arguments(own_image: OwnImage, first_row: int = 0) -> tuple[int, int, int, int]:
    """First row, row period, offset, column period for the kernels, which divide by periods: each is at least 1."""
    return first_row, own_image.row_period, own_image.offset, max(own_image.column_period, 1)


def transposed(own_image: OwnImage) -> OwnImage:
    """Which rows show a column's own image: `own_image` of the transposed product `b @ a.T`."""
    if not own_image.column_period:
        return own_image
    return OwnImage(own_image.column_period, -own_image.offset, own_image.row_period)


# Log-sum-exps --------------------------------------------------------------------------------------------------------


class Parts(NamedTuple):
    """Log-sum-exps in parts, to be joined: the sums of exponentials, and where pivots are running the maxima."""

    maxima: Tensor | None  # [parts, N]
    sums: Tensor  # [parts, N]

    @classmethod
    def empty(cls, parts: int, n: int, scaling: Scaling, device: torch.device) -> "Parts":
        sums = torch.empty(parts, n, dtype=torch.float32, device=device)
        return cls(torch.empty_like(sums) if scaling.running else None, sums)


class Classes(NamedTuple):
    """Of rows that have classes, and what walks find of them."""

    numbers: Tensor  # int32, of all rows and on to whole tiles
    positives: list[Tensor]  # each walk's sums of similarities within classes, [splits, N] float32: see sums_kernel


def walk(
    a: Tensor,
    b: Tensor,
    scaling: Scaling,
    own_image: OwnImage,
    tile: dict,
    tiles: range,  # which tiles of a block of rows
    columns: Parts | None = None,  # for columns' sums: one line for each block of rows; if symmetric, for each distance
    first_row: int = 0,  # its number among all rows
    symmetric: bool = False,
    classes: Classes | None = None,
) -> Parts:
    """The rows' sums by program."""
    n, d = a.shape
    m = len(b)
    blocks = triton.cdiv(n, tile["BM"])
    splits, tiles_per_program = splits_of(blocks, len(tiles))
    rows = Parts.empty(splits, n, scaling, a.device)
    of_classes = (None, None)
    if classes is not None:
        of_classes = (classes.numbers, torch.empty(splits, n, dtype=torch.float32, device=a.device))
        classes.positives.append(of_classes[1])
    launch.launch(
        sums_kernel, (blocks, splits), a, b, scaling.tensor, scaling.number, *of_classes, *rows,
        *(columns or (None, None)), n, m, d, *own_image_arguments(own_image, first_row), tiles.start, tiles.stop,
        tiles_per_program, scaling.pivot, HAS_OWN_IMAGE=own_image.column_period > 0, RUNNING=scaling.running,
        SYMMETRIC=symmetric, **tile, device_of=a,
    )  # fmt: skip
    return rows


def join_parts(rows: Parts, columns: Parts | None, scaling: Scaling, met_once: int = 0) -> Tensor:
    return join(rows, columns, scaling.factor, scaling.pivot, scaling.running, met_once)


class SymmetricParts(NamedTuple):
    """What a walk over some distances from the diagonal leaves to be joined."""

    rows: Parts
    columns: Parts | None
    met_once: int  # so many first rows have nothing in the columns' last line


def symmetric_parts(
    a: Tensor, scaling: Scaling, own_image: OwnImage, tile: dict, classes: Classes | None = None
) -> Iterator[SymmetricParts]:
    """Of tiles at distances 0 .. blocks / 2 of the diagonal, a bounded number of distances at once.

    The diagonal's tiles are whole and have no line of columns' sums, so the first walk takes one distance more.
    """
    n = len(a)
    blocks = triton.cdiv(n, tile["BM"])
    tiles_per_block = tile["BM"] // tile["BN"]
    distances = blocks // 2 + 1
    lines_at_once = max(1, tiling.COLUMN_SUMS // (n * (1 + scaling.running)))
    first = 0
    while first < distances:
        stop = min(first + lines_at_once + (first == 0), distances)
        lines = stop - max(first, 1)
        columns = Parts.empty(lines, n, scaling, a.device) if lines else None
        tiles = range(first * tiles_per_block, stop * tiles_per_block)
        rows = walk(a, a, scaling, own_image, tile, tiles, columns, symmetric=True, classes=classes)
        # The farthest of an even number of blocks meet once: the first half walks there and has no line for itself.
        once = columns is not None and blocks % 2 == 0 and stop == distances
        yield SymmetricParts(rows, columns, blocks // 2 * tile["BM"] if once else 0)
        first = stop


def row_log_sum_exps(a: Tensor, b: Tensor, scaling: Scaling, own_image: OwnImage, *, symmetric: bool = False) -> Tensor:
    tile = tiling.similarity_sums(a.shape[1], a.dtype)
    if symmetric:
        walks = symmetric_parts(a, scaling, own_image, tile)
        parts = [join_parts(rows, columns, scaling, met_once) for rows, columns, met_once in walks]
        return functools.reduce(torch.logaddexp, parts)
    tiles = range(triton.cdiv(len(b), tile["BN"]))
    return join_parts(walk(a, b, scaling, own_image, tile, tiles), None, scaling)


def both_log_sum_exps(a: Tensor, b: Tensor, scaling: Scaling, own_image: OwnImage) -> tuple[Tensor, Tensor]:
    tile = tiling.similarity_sums(a.shape[1], a.dtype)
    tiles = range(triton.cdiv(len(b), tile["BN"]))
    band = max(1, tiling.COLUMN_SUMS // (len(b) * (1 + scaling.running))) * tile["BM"]
    row_lse = []
    column_lse = []
    for start in range(0, len(a), band):
        part = a[start : start + band]
        columns = Parts.empty(triton.cdiv(len(part), tile["BM"]), len(b), scaling, a.device)
        rows = walk(part, b, scaling, own_image, tile, tiles, columns, start)
        row_lse.append(join_parts(rows, None, scaling))
        column_lse.append(join_parts(columns, None, scaling))
    return torch.cat(row_lse), functools.reduce(torch.logaddexp, column_lse)


# Gradients -----------------------------------------------------------------------------------------------------------


class Side(NamedTuple):
    """The rows of one side of a product, and their log-sum-exps as the kernels of weights take them."""

    rows: Tensor  # [N, D]
    pivots: Tensor | None  # [N]
    adjustments: Tensor | None  # [N]; None: this side has no log-sum-exps
    classes: Tensor | None = None  # [N] int32
    pulls: Tensor | None = None  # [N] float32, between the rows of a class

    @classmethod
    def of(cls, rows: Tensor, lse: Tensor | None, scaling: Scaling) -> "Side":
        return cls(rows, *lse_states(lse, scaling.factor, scaling.pivot, scaling.running))

    def part(self, rows: slice) -> "Side":
        return Side(self.rows[rows], *(None if x is None else x[rows] for x in self[1:]))


def _owned(
    a: Side, b: Side, scaling: Scaling, own_image: OwnImage, tile: dict, with_dots: bool
) -> tuple[Tensor, Tensor | None]:
    """`G @ b` by programs that own rows of a, and the sums of G * similarities by row: [splits, N, D] and [splits, N],
    float32, to be added."""
    n, d = a.rows.shape
    m = len(b.rows)
    blocks = triton.cdiv(n, tile["BM"])
    splits, tiles_per_program = splits_of(blocks, triton.cdiv(m, tile["BN"]))
    out = torch.empty(splits, n, d, dtype=torch.float32, device=a.rows.device)
    row_dots = torch.empty(splits, n, dtype=torch.float32, device=a.rows.device) if with_dots else None
    launch.launch(
        owner_kernel, (blocks, splits), a.rows, b.rows, scaling.factor, a.pivots, a.adjustments, b.pivots,
        b.adjustments, a.classes, a.pulls, b.classes, b.pulls, out, row_dots, n, m, d,
        *own_image_arguments(own_image), tiles_per_program, scaling.pivot,
        HAS_OWN_IMAGE=own_image.column_period > 0, RUNNING=scaling.running, GAIN=launch.gain(a.rows.dtype), **tile,
        device_of=a.rows,
    )  # fmt: skip
    return out, row_dots


def bands(a: Tensor, b: Tensor, wanted: bool) -> Iterator[tuple[slice, Tensor | None]]:
    """Some rows of a at a time, with memory for their weights [rows, M] if it is wanted.

    There is memory for whole tiles: beyond the weights it holds anything.
    """
    bands = max(1, tiling.WEIGHTS_BYTES // few_products.bytes_of(1, len(b), a.dtype))
    at_once = bands * few_products.PADDED
    memory = few_products.memory(min(at_once, len(a)), len(b), a) if wanted else None
    for start in range(0, len(a), at_once):
        rows = slice(start, min(start + at_once, len(a)))
        yield rows, None if memory is None else memory[: rows.stop - start, : len(b)]


def add_product(out: Tensor, weights: Tensor, rows: Tensor, *, is_first: bool = False) -> None:
    """`out += weights @ rows / gain` in float32; of the first, whatever `out` holds has no part in it."""
    alpha = 1 / launch.gain(rows.dtype)
    beta = 0 if is_first else 1
    if rows.dtype == torch.float32 or not rows.is_cuda or not multiplies(rows.dtype):
        out.addmm_(weights.float(), rows.float(), beta=beta, alpha=alpha)
    else:
        torch.ops.aten.addmm.dtype_out(out, weights, rows, torch.float32, beta=beta, alpha=alpha, out=out)


def products(a: Side, b: Side, scaling: Scaling, own_image: OwnImage, tile: dict | None) -> Tensor:
    """`G @ b` [parts, N, D] float32, to be added; tile: `tiling.similarity_owner`."""
    if tile is not None:
        return _owned(a, b, scaling, own_image, tile, False)[0]
    out = torch.empty(a.rows.shape, dtype=torch.float32, device=a.rows.device)
    weighted_by_bands(a, b, scaling, own_image, out, None, False, is_first=True)
    return out[None]


def weigh(
    a: Side,
    b: Side,
    scaling: Scaling,
    own_image: OwnImage,
    weights: Tensor | None,  # [N, M] in whole tiles, for G * GAIN
    with_dots: bool,
    first_row: int = 0,  # its number among all rows
    row_dots: Tensor | None = None,  # these two: see weights_kernel
    column_dots: Tensor | None = None,
) -> Tensor | None:
    """The weights, and if wanted the sum of G * similarities of each program, [programs] float64."""
    n, d = a.rows.shape
    m = len(b.rows)
    tile = tiling.similarity_weights(d, a.rows.dtype)
    grid = (triton.cdiv(n, tile["BM"]) * triton.cdiv(m, tile["BN"]),)
    dots_by_tile = torch.empty(grid, dtype=torch.float64, device=b.rows.device) if with_dots else None
    launch.launch(
        weights_kernel, grid, a.rows, b.rows, scaling.tensor, scaling.number, a.pivots, a.adjustments, b.pivots,
        b.adjustments, a.classes, a.pulls, b.classes, b.pulls, weights, dots_by_tile, row_dots, column_dots, n, m, d,
        *own_image_arguments(own_image, first_row), 0 if weights is None else weights.stride(0) // 8, scaling.pivot,
        HAS_OWN_IMAGE=own_image.column_period > 0, RUNNING=scaling.running, GAIN=launch.gain(b.rows.dtype), **tile,
        device_of=b.rows,
    )  # fmt: skip
    return dots_by_tile


def weighted_by_bands(
    a: Side,
    b: Side,
    scaling: Scaling,
    own_image: OwnImage,
    a_sum: Tensor | None,
    b_sum: Tensor | None,
    with_dots: bool,
    *,
    is_first: bool = False,  # nothing is in the sums yet
) -> list[Tensor]:
    """Of each band the sums of G * similarities by program, [programs] float64."""
    row_dots = []
    for rows, weights in bands(a.rows, b.rows, a_sum is not None or b_sum is not None):
        part = a.part(rows)
        dots_by_tile = weigh(part, b, scaling, own_image, weights, with_dots, rows.start)
        if weights is not None and a_sum is not None:
            add_product(a_sum[rows], weights, b.rows, is_first=is_first)
        if weights is not None and b_sum is not None:
            add_product(b_sum, weights.T, part.rows, is_first=is_first and not rows.start)
        if dots_by_tile is not None:
            row_dots.append(dots_by_tile)
    return row_dots


def joined(by_band: list[Tensor]) -> Tensor | None:
    """What `weighted_by_bands` returns, in one tensor of which everything is to be added; None: nothing."""
    if len(by_band) < 2:
        return by_band[0] if by_band else None
    return torch.cat(by_band)


def add_weighted(
    a: Tensor,
    b: Tensor,
    scaling: Scaling,
    own_image: OwnImage,
    a_lse: Tensor,
    b_lse: Tensor | None,
    a_sum: Tensor | None,
    b_sum: Tensor | None,
    *,
    symmetric: bool = False,
) -> Tensor | None:
    """If `symmetric`, the rows' own walk does both halves, and there are no sums of G * similarities."""
    of_a = Side.of(a, a_lse, scaling)
    of_b = Side.of(b, b_lse, scaling)
    with_dots = b_lse is not None and not symmetric
    if symmetric:
        b_sum = None
    tile = tiling.similarity_owner(a.shape[1], a.dtype, scaling.running)
    if tile is None or (a_sum is None and b_sum is None):
        by_band = weighted_by_bands(of_a, of_b, scaling, own_image, a_sum, b_sum, with_dots)
        return joined(by_band)
    row_dots = None
    if a_sum is not None or with_dots:
        out, dots_by_split = _owned(of_a, of_b, scaling, own_image, tile, with_dots)
        row_dots = None if dots_by_split is None else dots_by_split.sum(0, dtype=torch.float64)
        if a_sum is not None:
            a_sum += out[0] if len(out) == 1 else out.sum(0)
    if b_sum is not None:
        out, _ = _owned(of_b, of_a, scaling, transposed(own_image), tile, False)
        b_sum += out[0] if len(out) == 1 else out.sum(0)
    return row_dots


# What is not composed ------------------------------------------------------------------------------------------------


def best(a: Tensor, b: Tensor) -> Tensor:
    """[N] int64: the row of b with which each row of a has the largest product."""
    n, d = a.shape
    m = len(b)
    tile = tiling.similarity_sums(d, a.dtype)
    if tile["WHOLE"]:
        tile["num_warps"] = 8  # no columns' sums here, for which four are faster; four spill on sm_86
    blocks = triton.cdiv(n, tile["BM"])
    splits, tiles_per_program = splits_of(blocks, triton.cdiv(m, tile["BN"]))
    values = torch.empty(splits, n, dtype=torch.float32, device=a.device)
    columns = torch.empty(splits, n, dtype=torch.int64, device=a.device)
    launch.launch(best_kernel, (blocks, splits), a, b, values, columns, n, m, d, tiles_per_program, **tile, device_of=a)
    return columns.gather(0, values.argmax(0, keepdim=True))[0]
