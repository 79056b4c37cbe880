"""SigLIP's sums over pairs on the CPU: torch.mm makes a tile of similarities, C++ its losses and their derivatives."""

import torch
from torch import Tensor

from .. import _C
from ..native import address_of_row
from . import cpu_engine


def sums(
    x: Tensor,  # [n, D]
    y: Tensor,  # [m, D]
    factor: float,
    bias: float,
    offset: int,  # row i's own pair is column offset + i
    wanted: list[bool],
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Over all pairs the sums of loss, G * similarity and G [3] float64, and those wanted of `G @ y` and `G.T @ x`.

    G is the loss's derivative by the logits.
    """
    a, _ = cpu_engine.unit_rows(x, False)
    b, _ = cpu_engine.unit_rows(y, False)
    a_sum = torch.empty_like(a) if wanted[0] else None
    b_sum = torch.empty_like(b) if wanted[1] else None
    losses, dots, slopes = by_row = torch.zeros(3, len(a), dtype=torch.float64)
    for tile in cpu_engine.tiles(a, b):
        _C.similarity_sigmoid(
            *tile.arguments(),
            factor,
            bias,
            tile.row,
            offset,
            tile.column,
            address_of_row(losses, tile.row),
            address_of_row(slopes, tile.row),
            address_of_row(dots, tile.row),
            torch.get_num_threads(),
        )
        add_products(tile, a, b, a_sum, b_sum)
    return by_row.sum(1), a_sum, b_sum


def add_products(tile: cpu_engine.Tile, a: Tensor, b: Tensor, a_sum: Tensor | None, b_sum: Tensor | None) -> None:
    """`a_sum += G @ b` and `b_sum += G.T @ a` of a tile in whose place the loss's derivatives G are now."""
    if a_sum is not None:
        _add_product(a_sum[tile.rows], tile.similarities, b[tile.columns], tile.column == 0)
    if b_sum is not None:
        _add_product(b_sum[tile.columns], tile.similarities.T, a[tile.rows], tile.row == 0)


def _add_product(total: Tensor, x: Tensor, y: Tensor, is_first: bool) -> None:
    """`total += x @ y`. The first tile of these rows, which is often the only one, finds nothing there to be read."""
    if is_first:
        torch.mm(x, y, out=total)
    else:
        total.addmm_(x, y)
