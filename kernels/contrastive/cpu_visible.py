"""The engine of options on the CPU: tiles of `cpu_engine`, on which csrc/contrastive/visible.cpp works.

`visible.VisibleEngine` says what the functions do that are named there.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _C
from ..native import address, address_of_row
from .cpu_engine import Scaling, scaling_of, sum_dtype, tiles, unit_rows
from .visible import Slopes, Sums, Visible

__all__ = ["product_rows", "scaling_of", "sum_dtype", "visible_products", "visible_sums"]


def product_rows(x: Tensor, products: torch.dtype) -> Tensor:
    """In float32 or float64: a processor gains little by less, and loses digits."""
    return unit_rows(x, False)[0]


class Seen:
    """`Visible` as C++ takes it, with the memory that the addresses are of."""

    def __init__(self, visible: Visible, a: Tensor, b: Tensor, columns: bool):
        ids = [None if x is None else x.contiguous() for x in (visible.row_ids, visible.column_ids)]
        exclude = visible.exclude
        if exclude is not None and exclude.stride(1) != 1:
            exclude = exclude.contiguous()
        row_limit = None if visible.row_limit is None else visible.row_limit.to(a.dtype).contiguous()
        column_limit = None if visible.column_limit is None else visible.column_limit.to(a.dtype).contiguous()
        if columns and column_limit is None:
            column_limit = torch.full((b.shape[0],), math.inf, dtype=a.dtype)
        self._memory = [*ids, exclude, row_limit, column_limit]
        mask = (0, 1, 1, 0) if exclude is None else (address(exclude), *exclude.shape, exclude.stride(0))
        self.arguments = (*map(address, ids), *mask, address(row_limit), address(column_limit))


def _addresses(vectors: Sequence[Tensor | None], first: int) -> tuple[int, ...]:
    return tuple(address_of_row(x, first) for x in vectors)


def visible_sums(
    a: Tensor, b: Tensor, scaling: Scaling, visible: Visible, columns: bool, totals: bool, *, symmetric: bool
) -> tuple[Sums, Sums | None]:
    seen = Seen(visible, a, b, columns or symmetric)

    def start(n: int) -> list[Tensor | None]:
        """Maximum, sum, total, count of nothing."""
        more = [torch.zeros(n, dtype=torch.float64) if totals else None for _ in range(2)]
        return [*scaling.start(n), *more]

    def joined(sums: Sequence[Tensor | None]) -> Sums:
        maximum, total = sums[:2]
        assert maximum is not None and total is not None
        of_seen = (torch.empty(0, dtype=torch.float64) if x is None else x for x in sums[2:])
        return Sums(scaling.log_sum_exp(maximum, total), *of_seen)

    of_rows = start(a.shape[0])
    of_columns = of_rows if symmetric else start(b.shape[0]) if columns else [None] * 4
    for tile in tiles(a, b, symmetric):
        both = columns or (symmetric and tile.column > tile.row)
        _C.visible_sums(
            *tile.arguments(),
            scaling.arguments(),
            tile.own_image_arguments(visible.own_image),
            seen.arguments,
            _addresses(of_rows, tile.row),
            _addresses(of_columns, tile.column) if both else (0, 0, 0, 0),
            torch.get_num_threads(),
        )
    return joined(of_rows), joined(of_columns) if columns else None


def _slope_vectors(slopes: Slopes | None, scaling: Scaling, dtype: torch.dtype) -> list[Tensor | None]:
    """Pivots, factors of the exponentials, and what is added to their product: as C++ takes them."""
    if slopes is None:
        return [None] * 3
    pivots, adjustments = scaling.lse_states(slopes.lse, dtype)
    assert adjustments is not None
    of_lse = (adjustments * slopes.of_lse).to(dtype)
    if slopes.of_total is None:
        return [pivots, of_lse, torch.zeros_like(of_lse)]
    return [pivots, of_lse, slopes.of_total.to(dtype).contiguous()]


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
    seen = Seen(visible, a, b, of_columns is not None)
    row = _slope_vectors(of_rows, scaling, a.dtype)
    column = row if symmetric else _slope_vectors(of_columns, scaling, a.dtype)
    for total in (a_sum, b_sum):
        if total is not None:
            total.zero_()
    for tile in tiles(a, b, symmetric):
        _C.visible_weights(
            *tile.arguments(),
            scaling.arguments(),
            tile.own_image_arguments(visible.own_image),
            seen.arguments,
            _addresses(row, tile.row),
            _addresses(column, tile.column),
            torch.get_num_threads(),
        )
        weights = tile.similarities  # in whose place they are now
        if a_sum is not None:
            a_sum[tile.rows].addmm_(weights, b[tile.columns])
        if symmetric and a_sum is not None and tile.column > tile.row:
            a_sum[tile.columns].addmm_(weights.T, a[tile.rows])
        if b_sum is not None:
            b_sum[tile.columns].addmm_(weights.T, a[tile.rows])
