"""Tiles of similarities on a GPU: the engine that kernels/contrastive.py composes the contrastive operators of.

* Log-sum-exps: a program owns a block of rows and walks over tiles of candidates. The candidates' own sums, where
  they are wanted, are written by tile, one line a block of rows, and added in a fixed order. So a symmetric matrix
  needs half of its tiles, and CLIP's two directions one pass. Lines are bounded: a longer walk is taken in pieces.
* Gradients of bfloat16 and float16 rows of at most 256 columns: a program owns rows, keeps their gradient in registers
  and walks over all candidates, computing the similarities again.
* Others, where that sum doesn't fit in registers: weights of a band of rows in memory, and torch's products of them.

No float is added by two programs in an order of their own: the bits repeat. Where there are few rows, candidates are
split among programs, whose results are added in a fixed order.

A bounded similarity (unit rows, temperatures of 0.0128 and more) needs no running maximum: one pivot serves all.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
from fastjem.kernels import launch, tiling
from fastjem.kernels.contrastive import Place
from fastjem.kernels.similarity_gradients import owner_kernel, sigmoid_kernel, weights_kernel
from fastjem.kernels.similarity_kernels import attend_kernel, best_kernel, sums_kernel
from fastjem.kernels.similarity_rows import dots, join, states, through_unit, unit
from torch import Tensor

__all__ = ["add_weighted", "attend", "dots", "log_sum_exps", "scaling", "sum_dtype", "through_unit", "unit"]

PROGRAMS = 264  # two for each SM of a Hopper GPU. A constant, as the bits depend on it
LINES = 1 << 24  # float32 numbers of the columns' sums: 64 MiB
BAND = 1 << 27  # bytes of weights


def supported(*tensors: Tensor) -> bool:
    """float64 is the reference's."""
    return all(x.dtype in (torch.float32, torch.bfloat16, torch.float16) for x in tensors)


def sum_dtype(x: Tensor) -> torch.dtype:
    return torch.float32


@dataclass(frozen=True)
class Scaling:
    factor: Tensor  # 0-dim
    running: bool
    pivot: float  # in units of similarities, a float32 number


def scaling(factor: float | Tensor, bound: float | None, a: Tensor, b: Tensor) -> Scaling:
    """A tensor's value isn't known on the host, and neither are the norms of rows that come as they are."""
    if isinstance(factor, Tensor):
        return Scaling(factor, True, 0.0)
    tensor = torch.full((), factor, dtype=torch.float64, device=a.device)
    if bound is None:
        return Scaling(tensor, True, 0.0)
    largest = factor * bound * (1.0001 if a.dtype == torch.float32 else 1.01)  # rounded rows may be longer than 1
    pivot = math.ceil(max(0.0, largest - 70) / factor * 1024) / 1024
    return Scaling(tensor, largest + pivot * factor > 86, pivot)


def _gain(dtype: torch.dtype) -> int:
    return 1024 if dtype == torch.float16 else 1


def _splits(blocks: int, tiles: int) -> tuple[int, int]:
    """How many programs share a block's walk, and how many tiles each takes."""
    each = triton.cdiv(tiles, min(tiles, max(1, PROGRAMS // blocks)))
    return triton.cdiv(tiles, each), each


def _periods(place: Place, start: int = 0) -> tuple[int, int, int, int]:
    return start, place.rows, place.offset, max(place.columns, 1)


def _swapped(place: Place) -> Place:
    return Place(place.columns, -place.offset, place.rows) if place.columns else place


def _walk(
    a: Tensor, b: Tensor, logits: Scaling, place: Place, tile: dict, tiles: range, lines: int, start: int, upper: bool
) -> tuple[tuple, tuple | None]:
    """The parts of rows' sums [splits, N], and of columns' [lines, M] if there are lines; each with its maxima."""
    (n, d), m, blocks = a.shape, len(b), triton.cdiv(len(a), tile["BM"])
    splits, each = _splits(blocks, len(tiles))
    rows, columns = (
        [None if skipped else torch.empty(k, size, dtype=torch.float32, device=a.device) for skipped in without]
        for k, size, without in (
            (splits, n, (not logits.running, False)),
            (lines, m, (not lines or not logits.running, not lines)),
        )
    )
    launch.launch(
        sums_kernel, (blocks, splits), a, b, logits.factor, *rows, *columns, n, m, d, *_periods(place, start),
        tiles.start, tiles.stop, each, logits.pivot, PERIODIC=place.columns > 0, RUNNING=logits.running, UPPER=upper,
        **tile, device_of=a,
    )  # fmt: skip
    return tuple(rows), tuple(columns) if lines else None


def _join(rows: tuple, columns: tuple | None, logits: Scaling) -> Tensor:
    return join(rows, columns, logits.factor, logits.pivot, logits.running)


def _symmetric(a: Tensor, logits: Scaling, place: Place, tile: dict) -> Tensor:
    n, blocks, per_block = len(a), triton.cdiv(len(a), tile["BM"]), tile["BM"] // tile["BN"]
    distances = blocks // 2 + 1
    at_once = max(1, LINES // (n * (1 + logits.running)))
    lse = None
    for first in range(0, distances, at_once + (lse is None)):
        stop = min(first + at_once + (lse is None), distances)  # the diagonal has no line
        lines = stop - max(first, 1)
        tiles = range(first * per_block, stop * per_block)
        rows, columns = _walk(a, a, logits, place, tile, tiles, lines, 0, True)
        if columns and blocks % 2 == 0 and stop == distances:  # the farthest blocks meet once
            for x, nothing in zip(columns, (-math.inf, 0), strict=True):
                if x is not None:
                    x[-1, : blocks // 2 * tile["BM"]] = nothing
        part = _join(rows, columns, logits)
        lse = part if lse is None else torch.logaddexp(lse, part)
    return lse


def log_sum_exps(
    a: Tensor, b: Tensor, logits: Scaling, place: Place, *, upper: bool = False, columns: bool = False
) -> tuple[Tensor, Tensor | None]:
    tile = tiling.similarity_sums(a.shape[1], a.dtype, columns or upper)
    if upper:
        return _symmetric(a, logits, place, tile), None
    tiles = range(triton.cdiv(len(b), tile["BN"]))
    if not columns:
        return _join(_walk(a, b, logits, place, tile, tiles, 0, 0, False)[0], None, logits), None
    band = max(1, LINES // (len(b) * (1 + logits.running))) * tile["BM"]
    row_lse, column_lse = [], None
    for i in range(0, len(a), band):
        rows_of_band = a[i : i + band]
        lines = triton.cdiv(len(rows_of_band), tile["BM"])
        rows, by_line = _walk(rows_of_band, b, logits, place, tile, tiles, lines, i, False)
        row_lse.append(_join(rows, None, logits))
        part = _join(by_line, None, logits)
        column_lse = part if column_lse is None else torch.logaddexp(column_lse, part)
    return torch.cat(row_lse), column_lse


def attend(q: Tensor, bank: Tensor, temperature: float, place: Place, wanted: bool) -> tuple[Tensor, Tensor | None]:
    rows, _ = unit(bank, True)
    logits = scaling(1 / temperature, 1.0, q, rows)
    tile = tiling.similarity_attend(q.shape[1], q.dtype)
    if not wanted or tile is None:
        lse, _ = log_sum_exps(q, rows, logits, place)
        out = torch.zeros(q.shape, dtype=torch.float32, device=q.device) if wanted else None
        if wanted:
            add_weighted(q, rows, logits, place, lse, None, out, None)
        return lse, out
    (n, d), m, blocks = q.shape, len(rows), triton.cdiv(len(q), tile["BM"])
    splits, each = _splits(blocks, triton.cdiv(m, tile["BN"]))
    maxima, sums = torch.empty(2, splits, n, dtype=torch.float32, device=q.device)
    out = torch.empty(splits, n, d, dtype=torch.float32, device=q.device)
    launch.launch(
        attend_kernel, (blocks, splits), q, rows, logits.factor, maxima, sums, out, n, m, d, *_periods(place), each,
        PERIODIC=place.columns > 0, GAIN=_gain(q.dtype), **tile, device_of=q,
    )  # fmt: skip
    lse = join((maxima, sums), None, logits.factor, 0.0, True)
    shares = (maxima.double() * logits.factor - lse).exp().nan_to_num(0.0).float()
    return lse, out.mul_(shares[:, :, None]).sum(0)


def _own(
    a: Tensor, b: Tensor, logits: Scaling, place: Place, a_state: tuple, b_state: tuple, tile: dict, with_dots: bool
) -> tuple[Tensor, Tensor | None]:
    (n, d), m, blocks = a.shape, len(b), triton.cdiv(len(a), tile["BM"])
    splits, each = _splits(blocks, triton.cdiv(m, tile["BN"]))
    out = torch.empty(splits, n, d, dtype=torch.float32, device=a.device)
    row_dots = torch.empty(splits, n, dtype=torch.float32, device=a.device) if with_dots else None
    launch.launch(
        owner_kernel, (blocks, splits), a, b, logits.factor, *a_state, *b_state, out, row_dots, n, m, d,
        *_periods(place), each, logits.pivot, PERIODIC=place.columns > 0, RUNNING=logits.running,
        GAIN=_gain(a.dtype), **tile, device_of=a,
    )  # fmt: skip
    return out[0] if splits == 1 else out.sum(0), row_dots.sum(0, dtype=torch.float64) if with_dots else None


def _bands(a: Tensor, b: Tensor, wanted: bool) -> Iterator[tuple[int, Tensor, Tensor | None]]:
    """(i, some rows a[i:], memory for their weights): rows of memory are whole 16-byte words apart."""
    stride = triton.cdiv(len(b), 8) * 8
    rows = min(len(a), max(128, BAND // (stride * a.element_size()) // 128 * 128))
    memory = torch.empty(rows, stride, dtype=a.dtype, device=a.device) if wanted else None
    for i in range(0, len(a), rows):
        part = a[i : i + rows]
        yield i, part, memory[: len(part), : len(b)] if wanted else None


def _add_product(out: Tensor, weights: Tensor, rows: Tensor) -> None:
    """`out += weights @ rows / gain` in float32."""
    alpha = 1 / _gain(rows.dtype)
    if rows.dtype == torch.float32 or not rows.is_cuda:
        out.addmm_(weights.float(), rows.float(), alpha=alpha)
    else:
        torch.ops.aten.addmm.dtype_out(out, weights, rows, torch.float32, alpha=alpha, out=out)


def _add_weighted_bands(
    a: Tensor, b: Tensor, logits: Scaling, place: Place, a_state: tuple, b_state: tuple, a_sum, b_sum, with_dots: bool
) -> Tensor | None:
    tile = tiling.similarity_weights(a.dtype)
    row_dots = []
    for i, part, weights in _bands(a, b, a_sum is not None or b_sum is not None):
        (n, d), m = part.shape, len(b)
        grid = (triton.cdiv(n, tile["BM"]), triton.cdiv(m, tile["BN"]))
        parts = torch.empty(grid[1], n, dtype=torch.float32, device=a.device) if with_dots else None
        state = [None if x is None else x[i : i + n] for x in a_state]
        launch.launch(
            weights_kernel, grid, part, b, logits.factor, *state, *b_state, weights, parts, n, m, d,
            *_periods(place, i), 0 if weights is None else weights.stride(0) // 8, logits.pivot,
            PERIODIC=place.columns > 0, RUNNING=logits.running, GAIN=_gain(a.dtype),
            **tile, device_of=a,
        )  # fmt: skip
        if a_sum is not None:
            _add_product(a_sum[i : i + n], weights, b)
        if b_sum is not None:
            _add_product(b_sum, weights.T, part)
        if with_dots:
            row_dots.append(parts.sum(0, dtype=torch.float64))
    return torch.cat(row_dots) if with_dots else None


def add_weighted(
    a: Tensor,
    b: Tensor,
    logits: Scaling,
    place: Place,
    a_lse: Tensor,
    b_lse: Tensor | None,
    a_sum: Tensor | None,
    b_sum: Tensor | None,
    *,
    upper: bool = False,
) -> Tensor | None:
    """With `upper` the rows' own walk has done both halves, and nobody asks for `sum(G * similarities)`."""
    a_state, b_state = (states(x, logits.factor, logits.pivot, logits.running) for x in (a_lse, b_lse))
    b_sum, with_dots = None if upper else b_sum, b_lse is not None and not upper
    tile = tiling.similarity_owner(a.shape[1], a.dtype, logits.running)
    if tile is None or (a_sum is None and b_sum is None):
        return _add_weighted_bands(a, b, logits, place, a_state, b_state, a_sum, b_sum, with_dots)
    row_dots = None
    if a_sum is not None or with_dots:
        out, row_dots = _own(a, b, logits, place, a_state, b_state, tile, with_dots)
        if a_sum is not None:
            a_sum += out
    if b_sum is not None:
        b_sum += _own(b, a, logits, _swapped(place), b_state, a_state, tile, False)[0]
    return row_dots


def sigmoid(
    a: Tensor, b: Tensor, factor: Tensor, bias: Tensor, offset: int, a_sum: Tensor | None, b_sum: Tensor | None
) -> Tensor:
    """[3] float64: the sums of loss, G and G * similarities; `a_sum += G @ b`, `b_sum += G.T @ a`."""
    tile = tiling.similarity_sigmoid(a.dtype)
    totals = torch.zeros(3, dtype=torch.float64, device=a.device)
    for i, part, weights in _bands(a, b, a_sum is not None or b_sum is not None):
        (n, d), m = part.shape, len(b)
        grid = (triton.cdiv(n, tile["BM"]), triton.cdiv(m, tile["BN"]))
        sums = torch.empty(3, grid[1], n, dtype=torch.float32, device=a.device)
        launch.launch(
            sigmoid_kernel, grid, part, b, factor, bias, weights, sums, n, m, d, offset + i,
            0 if weights is None else weights.stride(0) // 8, GAIN=_gain(a.dtype), **tile, device_of=a,
        )  # fmt: skip
        totals += sums.sum((1, 2), dtype=torch.float64)
        if a_sum is not None:
            _add_product(a_sum[i : i + n], weights, b)
        if b_sum is not None:
            _add_product(b_sum, weights.T, part)
    return totals


def best(a: Tensor, b: Tensor) -> Tensor:
    """[N] int64: the row of b with which each row of a has the largest product."""
    (n, d), m = a.shape, len(b)
    tile = tiling.similarity_sums(d, a.dtype, False)
    blocks = triton.cdiv(n, tile["BM"])
    splits, each = _splits(blocks, triton.cdiv(m, tile["BN"]))
    values = torch.empty(splits, n, dtype=torch.float32, device=a.device)
    columns = torch.empty(splits, n, dtype=torch.int64, device=a.device)
    launch.launch(best_kernel, (blocks, splits), a, b, values, columns, n, m, d, each, **tile, device_of=a)
    return columns.gather(0, values.argmax(0, keepdim=True))[0]
