"""The contrastive engine on the CPU: torch.mm makes a tile of similarities, C++ turns it into exponentials and sums.

A tile fits in the second-level caches of two cores (tiling.CPU_TILE); nothing of N x M lives longer than a tile.
`composed.Engine` says what the functions do that are named there.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _C, tiling
from ..arithmetic import UNIT_EPS, compute_dtype
from ..native import CODES, address, address_of_row
from .composed import OwnImage


def unit_rows(
    x: Tensor, normalize: bool, out: Tensor | None = None, eps: float = UNIT_EPS
) -> tuple[Tensor, Tensor | None]:
    """Rows in the dtype to compute in, and their divisors [N] float64."""
    dtype = compute_dtype(x.dtype)
    if x.dtype not in CODES:
        x = x.float()
    if not normalize and x.dtype == dtype:
        return x.contiguous(), None
    if x.stride(1) != 1:
        x = x.contiguous()
    out = torch.empty(x.shape, dtype=dtype) if out is None else out[: len(x)]
    divisors = torch.empty(len(x), dtype=torch.float64) if normalize else None
    _C.unit_rows(
        CODES[x.dtype],
        address(x),
        *x.shape,
        x.stride(0),
        eps,
        address(out),
        address(divisors),
        torch.get_num_threads(),
    )
    return out, divisors


def through_unit_rows(
    gradient: Tensor,
    unit: Tensor,
    divisors: Tensor | None,
    dtype: torch.dtype,
    scale: float = 1.0,
    out: Tensor | None = None,  # of that dtype; None: memory of the gradient, where that is of that dtype
    eps: float = UNIT_EPS,
) -> Tensor:
    if divisors is None:
        return (gradient if scale == 1 else gradient * scale).to(dtype)
    native = dtype if dtype in CODES else gradient.dtype
    if out is None:
        out = gradient if native == gradient.dtype else torch.empty(gradient.shape, dtype=native)
    _C.through_unit_rows(
        CODES[native],
        address(gradient),
        address(unit),
        address(divisors),
        *gradient.shape,
        eps,
        scale,
        address(out),
        torch.get_num_threads(),
    )
    return out.to(dtype)


def away_from_zero(factor: float) -> float:
    """A factor that makes logits as good as 0 in place of one that is 0, or nearly.

    What a row doesn't see is -infinity in a sum, and in a gradient float32's lowest number, 3.4e38: times the factor it
    must be so low that its exponential is 0, and isn't even a small number, as that is multiplied by 3.4e38 again.
    """
    return math.copysign(1e-36, factor) if abs(factor) < 1e-36 else factor


def dots(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(1, dtype=torch.float64)


def sum_dtype(x: Tensor) -> torch.dtype:
    return x.dtype


@dataclass(frozen=True)
class Scaling:
    """How similarities become logits and their exponentials stay finite: see csrc/contrastive/similarity.cpp."""

    factor: float  # a logit is a similarity times it
    shift: float  # subtracted from every logit before exp, unless running
    running: bool  # no shift is safe for all logits: every row and column keeps a maximum, in units of similarities

    @classmethod
    def of(cls, factor: float, bound: float, dtype: torch.dtype) -> "Scaling":
        """For similarities of at most `bound`, negative ones too.

        Unless running, no logit is above `top` or below `-bottom` after the shift: in float32 a sum of 1e7 times
        exp(70) is finite, and exp(-86) is a normal number.
        """
        top, bottom = (600.0, 700.0) if dtype == torch.float64 else (70.0, 86.0)
        largest = abs(factor) * bound * 1.0001
        shift = max(0.0, largest - top)
        factor = away_from_zero(factor)
        safe = largest + shift <= bottom  # false for NaN, which makes the maxima running
        return cls(factor, shift, not safe)

    def arguments(self) -> tuple[float, float, bool]:
        """What C++ takes as its `Scaling`."""
        return self.factor, self.shift, self.running

    def start(self, n: int) -> tuple[Tensor, Tensor]:
        """The log-sum-exp of no logits, as (maximum, sum) [n] float64.

        Running: the maximum is one of similarities, the sum one of exp(logit - maximum * |factor|). Otherwise every
        maximum is the shift, and the sum one of exp(logit - shift).
        """
        maximum = -math.inf if self.running else self.shift
        return torch.full((n,), maximum, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)

    def log_sum_exp(self, maximum: Tensor, total: Tensor) -> Tensor:
        return maximum * (abs(self.factor) if self.running else 1) + total.log()

    def lse_states(self, lse: Tensor | None, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        """Log-sum-exps of rows or columns as `similarity_weights` takes them: (pivots, adjustments).

        An adjustment is the factor that makes exp(logit - lse) of an exponential around a pivot. Running: of
        exp((similarity - pivot) * factor), the pivot being lse / factor rounded, and the adjustment what rounding left,
        near 1. So the exponent is near 0 where the result is large, and keeps its digits. Otherwise: of
        exp(logit - shift), without pivots.
        """
        if lse is None:
            return None, None
        # A log-sum-exp of no logits is -inf. Its pivots and adjustments are finite all the same, so that the weight of
        # a column that isn't seen is 0; a quarter, as a row's and a column's adjustments are added.
        largest = torch.finfo(dtype).max / 4
        if not self.running:
            return None, (self.shift - lse).exp().clamp_max(largest).to(dtype)
        pivot = (lse / self.factor).clamp(-largest, largest).to(dtype)
        left = (pivot.double() * self.factor - lse).where(lse != -math.inf, 0)
        # +inf: 0, which makes the weight of a logit of +inf NaN. In float64 the product is +inf as well.
        adjustment = left.where(lse != math.inf, -math.inf).exp()
        return pivot, adjustment.clamp_max(largest).to(dtype)


def scaling_of(factor: float | Tensor, bound: float | None, a: Tensor, b: Tensor) -> Scaling:
    bound = _largest_norm(a) * _largest_norm(b) if bound is None else bound
    return Scaling.of(float(factor), bound, a.dtype)


def _largest_norm(x: Tensor) -> float:
    return torch.linalg.vector_norm(x, dim=1).max().item()


class Tile(NamedTuple):
    """`a[rows] @ b[columns].T` in memory that the next tile overwrites."""

    row: int  # the first
    column: int  # the first
    rows: slice
    columns: slice
    similarities: Tensor

    def arguments(self) -> tuple[int, int, int, int, int]:
        """What every kernel takes first: dtype, address, rows, columns, stride."""
        x = self.similarities
        rows, columns = x.shape
        return CODES[x.dtype], x.data_ptr(), rows, columns, columns

    def own_image_arguments(self, own_image: OwnImage) -> tuple[int, int, int, int, int]:
        """What C++ takes as its `OwnImage`."""
        return self.row, own_image.row_period, own_image.offset, self.column, own_image.column_period


def tiles(a: Tensor, b: Tensor, symmetric: bool = False) -> Iterator[Tile]:
    """All tiles of `a @ b.T`, or those on and above the diagonal."""
    height = min(tiling.CPU_TILE, len(a))
    width = height if symmetric else min(len(b), max(tiling.CPU_TILE, tiling.CPU_TILE**2 // height))
    memory = torch.empty(height * width, dtype=a.dtype)
    for row in range(0, len(a), height):
        rows = slice(row, min(row + height, len(a)))
        for column in range(row if symmetric else 0, len(b), width):
            columns = slice(column, min(column + width, len(b)))
            shape = rows.stop - row, columns.stop - column
            out = memory[: shape[0] * shape[1]].view(shape)
            yield Tile(row, column, rows, columns, torch.mm(a[rows], b[columns].T, out=out))


def row_log_sum_exps(a: Tensor, b: Tensor, scaling: Scaling, own_image: OwnImage, *, symmetric: bool = False) -> Tensor:
    return _log_sum_exps(a, b, scaling, own_image, symmetric, False)[0]


def both_log_sum_exps(a: Tensor, b: Tensor, scaling: Scaling, own_image: OwnImage) -> tuple[Tensor, Tensor]:
    return _log_sum_exps(a, b, scaling, own_image, False, True)


def _log_sum_exps(
    a: Tensor, b: Tensor, scaling: Scaling, own_image: OwnImage, symmetric: bool, columns: bool
) -> tuple[Tensor, Tensor]:
    row_max, row_sum = scaling.start(len(a))
    column_max, column_sum = (row_max, row_sum) if symmetric else scaling.start(len(b))
    for tile in tiles(a, b, symmetric):
        both = columns or (symmetric and tile.column > tile.row)
        _C.similarity_sums(
            *tile.arguments(),
            scaling.arguments(),
            tile.own_image_arguments(own_image),
            False,
            address_of_row(row_max, tile.row),
            address_of_row(row_sum, tile.row),
            0,
            address_of_row(column_max, tile.column) if both else 0,
            address_of_row(column_sum, tile.column) if both else 0,
            torch.get_num_threads(),
        )
    return scaling.log_sum_exp(row_max, row_sum), scaling.log_sum_exp(column_max, column_sum)


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
    a_pivots, a_adjustments = scaling.lse_states(a_lse, a.dtype)
    b_pivots, b_adjustments = scaling.lse_states(b_lse, a.dtype)
    # C++ takes the pivots and then the adjustments where maxima are running, and otherwise the adjustments alone
    a_state = (a_pivots, a_adjustments) if scaling.running else (a_adjustments, None)
    b_state = (b_pivots, b_adjustments) if scaling.running else (b_adjustments, None)
    row_dots = torch.zeros(len(a), dtype=torch.float64)
    for tile in tiles(a, b, symmetric):
        _C.similarity_weights(
            *tile.arguments(),
            scaling.arguments(),
            tile.own_image_arguments(own_image),
            address_of_row(a_state[0], tile.row),
            address_of_row(b_state[0], tile.column),
            address_of_row(a_state[1], tile.row),
            address_of_row(b_state[1], tile.column),
            0 if symmetric else address_of_row(row_dots, tile.row),
            torch.get_num_threads(),
        )
        weights = tile.similarities  # in whose place they are now
        if a_sum is not None:
            a_sum[tile.rows].addmm_(weights, b[tile.columns])
        if b_sum is not None and not (symmetric and tile.row == tile.column):
            b_sum[tile.columns].addmm_(weights.T, a[tile.rows])
    return None if symmetric or b_lse is None else row_dots


def bank_tiles(query: Tensor, bank: Tensor) -> Iterator[tuple[Tile, Tensor]]:
    """Tiles of `query @ unit_rows(bank).T`, each with its rows of `unit_rows(bank)`.

    The bank is normalised some rows at a time. Their memory [width, D] and that of their similarities [height, width]
    are at most half of a tile's each, unless rows are so wide that 64 of them are more.
    """
    n, d = query.shape
    height = min(tiling.CPU_TILE, n)
    half_tile = tiling.CPU_TILE**2 // 2
    width = max(tiling.CPU_BANK_ROWS, min(len(bank), half_tile // max(height, d)))
    unit_memory = torch.empty(width, d, dtype=query.dtype)
    memory = torch.empty(height * width, dtype=query.dtype)
    for column in range(0, len(bank), width):
        columns = slice(column, min(column + width, len(bank)))
        unit_bank, _ = unit_rows(bank[columns], True, out=unit_memory)
        for row in range(0, n, height):
            rows = slice(row, min(row + height, n))
            shape = rows.stop - row, len(unit_bank)
            out = memory[: shape[0] * shape[1]].view(shape)
            yield Tile(row, column, rows, columns, torch.mm(query[rows], unit_bank.T, out=out)), unit_bank


def attend(
    query: Tensor, bank: Tensor, temperature: float, own_image: OwnImage, wanted: bool
) -> tuple[Tensor, Tensor | None]:
    scaling = scaling_of(1 / temperature, 1.0, query, query)
    maximum, total = scaling.start(len(query))
    rescale = torch.empty(len(query), dtype=torch.float64) if scaling.running else None
    result = torch.zeros_like(query) if wanted else None
    for tile, unit_bank in bank_tiles(query, bank):
        _C.similarity_sums(
            *tile.arguments(),
            scaling.arguments(),
            tile.own_image_arguments(own_image),
            wanted,
            address_of_row(maximum, tile.row),
            address_of_row(total, tile.row),
            address_of_row(rescale, tile.row),
            0,
            0,
            torch.get_num_threads(),
        )
        if result is not None:
            exponentials = tile.similarities  # in whose place they are now
            if rescale is not None:  # for the maximum that the rows have now
                result[tile.rows].mul_(rescale[tile.rows, None])
            result[tile.rows].addmm_(exponentials, unit_bank)
    if result is not None:
        result.mul_((1 / total).nan_to_num(posinf=0.0)[:, None])
    return scaling.log_sum_exp(maximum, total), result
