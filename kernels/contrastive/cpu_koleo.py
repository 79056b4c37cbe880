"""KoLeo on the CPU: torch makes tiles of similarities, C++ keeps each row's best (csrc/contrastive/koleo.cpp)."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _C, tiling
from ..arithmetic import compute_dtype, scalar_like
from ..native import CODES, address, address_of_row, gradient_for
from . import cpu_engine, reference


class _Tile(NamedTuple):
    """Similarities of some rows with candidates, in memory that the next tile overwrites."""

    similarities: Tensor  # [rows, columns]
    row: int  # the first row's number among the rows
    row_number: int  # and among the candidates
    column_number: int  # the first column's number among the candidates
    rows_per_group: int  # after so many rows the candidates are those of the next group
    columns_from: int  # columns from here on are rows, too, and look at the tile's rows as their candidates


def _tiles(rows: Tensor, candidates: Tensor, offset: int, group_size: int) -> Iterator[_Tile]:
    """Every pair of a row and a candidate of its group, in the order of candidates for each row.

    Where the rows are the candidates, a group's product is symmetric: tiles on and above the diagonal are enough, and
    their columns look at them as rows.
    """
    n = len(rows)
    symmetric = n == len(candidates)
    height = min(group_size, tiling.CPU_KOLEO_ROWS)
    memory = torch.empty(max(height * group_size, tiling.CPU_TILE**2), dtype=rows.dtype)
    if symmetric and group_size == height:
        groups = rows.view(n // group_size, group_size, rows.shape[1])
        at_once = max(1, tiling.CPU_TILE**2 // group_size**2)
        for first in range(0, len(groups), at_once):
            some = groups[first : first + at_once]
            out = memory[: len(some) * group_size**2].view(len(some), group_size, group_size)
            row = first * group_size
            tile = torch.bmm(some, some.mT, out=out).view(-1, group_size)
            yield _Tile(tile, row, row, row, group_size, group_size)
        return
    width = max(1, tiling.CPU_TILE**2 // height)
    for group in range(offset // group_size * group_size, offset + n, group_size):
        first_row, last_row = max(group, offset), min(group + group_size, offset + n)
        for start in range(first_row, last_row, height):
            stop = min(start + height, last_row)
            own = rows[start - offset : stop - offset]
            for column in range(start if symmetric else group, group + group_size, width):
                others = candidates[column : min(column + width, group + group_size)]
                out = memory[: len(own) * len(others)].view(len(own), len(others))
                columns_from = max(0, stop - column) if symmetric else len(others)
                tile = torch.mm(own, others.T, out=out)
                yield _Tile(tile, start - offset, start, column, len(own), columns_from)


def koleo_neighbors(rows: Tensor, candidates: Tensor, offset: int, topk: int, group_size: int, eps: float) -> Tensor:
    if rows.dtype not in CODES or candidates.dtype != rows.dtype:
        return reference.koleo_neighbors(rows, candidates, offset, topk, group_size, eps)
    others, _ = cpu_engine.unit_rows(candidates, True, eps=eps)
    own = others if len(rows) == len(candidates) else cpu_engine.unit_rows(rows, True, eps=eps)[0]
    best = torch.full((len(own), topk), -math.inf, dtype=own.dtype)  # similarities, best first
    numbers = torch.zeros(len(own), topk, dtype=torch.int64)  # and whose they are
    for tile in _tiles(own, others, offset, group_size):
        column = tile.column_number - offset  # its number among the rows, if columns are rows
        _C.koleo_neighbors(
            CODES[own.dtype],
            tile.similarities.data_ptr(),
            *tile.similarities.shape,
            tile.row_number,
            tile.column_number,
            tile.rows_per_group,
            topk,
            address_of_row(best, tile.row),
            address_of_row(numbers, tile.row),
            address_of_row(best, column),
            address_of_row(numbers, column),
            tile.columns_from,
            torch.get_num_threads(),
        )
    return numbers


def koleo(
    x: Tensor, neighbors: Tensor, p: float, eps: float, wanted: list[bool]
) -> tuple[Tensor, list[Tensor], Tensor]:
    if x.dtype not in CODES:
        return reference.koleo(x, neighbors, p, eps, wanted)
    unit, divisors = cpu_engine.unit_rows(x, True, eps=eps)
    neighbors = neighbors.contiguous()
    gradient = gradient_for(x, wanted[0])
    scale = 1 / neighbors.numel()
    total = _C.koleo(
        CODES[x.dtype],
        address(unit),
        address(divisors),
        address(neighbors),
        *unit.shape,
        neighbors.shape[1],
        p,
        eps,
        torch.finfo(x.dtype).max,
        address(gradient),
        torch.get_num_threads(),
    )
    loss = torch.full((), total * scale, dtype=compute_dtype(x.dtype))
    return loss, [gradient], scalar_like(x, scale)
