"""Contrastive losses with options, on the CPU, whose similarities fit one tile: a loss of each row, and the gradients.

`visible.py` makes similarities and exponentials in the forward pass and again in the backward pass, as it may not keep
them, and whatever a loss is made of goes through torch in small steps, 60 of them. A single tile (`tiling.CPU_TILE`
squared) may stay until backward, and C++ makes the rows' losses of it: CLIP of 256 pairs x 512 with ids took 3.1 ms,
twice torch.compile's.

What a row sees is decided by its own image, ids and `exclude`; its loss may have label smoothing. Everything else goes
the long way, and so does what `losses` returns None of: too large a tile, or logits whose range is too wide for one
shift.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .. import _C, tiling
from ..native import CODES, address
from . import cpu_engine
from .composed import OwnImage
from .cpu_visible import Seen
from .visible import Visible

ROWS, BOTH, SAME = range(3)  # which losses there are, of csrc/contrastive/seen_tile.cpp's Sides


class Shape(NamedTuple):
    """What a loss is of: rows alone, both sides of pairs, or rows that are the columns, too."""

    sides: int
    own_image: OwnImage
    positives: int  # of each row: rows i + distance, i + 2 distance and so on of the partners
    distance: int
    partners_are_columns: bool


class Plan(NamedTuple):
    shape: Shape
    factor: float  # a logit is a similarity times it
    smoothing: float


class Tile(NamedTuple):
    """What is kept until backward."""

    rows: Tensor  # [N, D]
    columns: Tensor  # [M, D]
    exponentials: Tensor  # [N, M], 0 of what isn't seen
    state: Tensor  # float64: what C++ knows of rows and columns


def fits(rows: int, columns: int) -> bool:
    return 0 < rows <= tiling.CPU_TILE and 0 < rows * columns <= tiling.CPU_TILE**2


def losses(
    rows: Tensor,  # [N, D], float32 or float64, dense; so are the others
    columns: Tensor,  # [M, D]
    partners: Tensor,  # [N, D]
    plan: Plan,
    row_ids: Tensor | None,
    column_ids: Tensor | None,
    exclude: Tensor | None,  # as in `Visible`
) -> tuple[Tensor, Tile] | None:
    """[N] float64, the rows' losses (of both sides: the mean of row i's and column i's), and what gradients need."""
    n, width = rows.shape
    m = columns.shape[0]
    shape = plan.shape
    similarities = torch.mm(rows, columns.T)
    both = shape.sides == BOTH
    state = torch.empty(n * (shape.positives + 2) + 2 * m * both, dtype=torch.float64)
    result = torch.empty(n, dtype=torch.float64)
    seen = Seen(Visible(shape.own_image, row_ids, column_ids, exclude, None, None), rows, columns, False)
    own = shape.own_image
    found = _C.seen_tile_losses(
        *(CODES[rows.dtype], address(similarities), n, m),
        cpu_engine.away_from_zero(plan.factor),
        (0, own.row_period, own.offset, 0, own.column_period),
        seen.arguments,
        (address(rows), address(partners), width, shape.positives, shape.distance),
        *(plan.smoothing, shape.sides, address(state), address(result), torch.get_num_threads()),
    )
    return (result, Tile(rows, columns, similarities, state)) if found else None


def weights(plan: Plan, tile: Tile, slopes: Tensor, in_place: bool) -> tuple[Tensor, Tensor | None]:
    """The derivatives by the logits [N, M]; and those by the positives' [N, P], where they are no columns.

    Args:
        slopes: [N] float64, by the rows' losses.
        in_place: the exponentials aren't needed again.
    """
    values = tile.exponentials
    n, m = values.shape
    result = values if in_place else torch.empty_like(values)
    shape = plan.shape
    of_positives = None if shape.partners_are_columns else values.new_empty(n, shape.positives)
    if shape.sides == BOTH:  # a loss is the mean of two
        slopes = slopes / 2
    slopes = slopes.contiguous()
    _C.seen_tile_weights(
        *(CODES[values.dtype], address(values), address(result), n, m),
        *(shape.positives, shape.distance, plan.smoothing, shape.sides),
        *(address(tile.state), address(slopes), address(of_positives), torch.get_num_threads()),
    )
    return result, of_positives


def inner_product(x: Tensor, y: Tensor) -> float:
    """Of two dense tensors of one size, summed in double."""
    return _C.dot(CODES[x.dtype], address(x), address(y), x.numel(), torch.get_num_threads())
