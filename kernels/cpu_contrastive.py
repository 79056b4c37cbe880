"""The contrastive losses on the CPU: torch.mm makes a tile of similarities, C++ turns it into exponentials and their
sums.

A tile is as large as a core's cache; nothing of N x N lives longer than that.
"""

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from fastjem.kernels import _C, contrastive
from fastjem.kernels.contrastive import Place
from torch import Tensor

CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
EPS = 1e-12
ROWS, COLUMNS = 1024, 1024  # of a tile: 4 MiB of float32, the second-level caches of two cores


def _at(x: Tensor | None, start: int = 0) -> int:
    return 0 if x is None else x.data_ptr() + start * x.stride(0) * x.element_size()


def unit(x: Tensor, normalize: bool, out: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """[N, D] rows in the compute dtype, of length 1, and their divisors [N] float64; as they are, without."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if x.dtype not in CODES:
        x = x.float()
    if not normalize and x.dtype == dtype:
        return x.contiguous(), None
    if x.stride(1) != 1:
        x = x.contiguous()
    out = torch.empty(x.shape, dtype=dtype) if out is None else out[: len(x)]
    divisors = torch.empty(len(x), dtype=torch.float64) if normalize else None
    _C.unit_rows(
        CODES[x.dtype], _at(x), *x.shape, x.stride(0), EPS, _at(out), _at(divisors), torch.get_num_threads()
    )  # fmt: skip
    return out, divisors


def through_unit(gradient: Tensor, unit: Tensor, divisors: Tensor | None, dtype: torch.dtype) -> Tensor:
    if divisors is None:
        return gradient.to(dtype)
    native = dtype if dtype in CODES else gradient.dtype
    out = gradient if native == gradient.dtype else torch.empty(gradient.shape, dtype=native)
    _C.through_unit_rows(
        CODES[native], _at(gradient), _at(unit), _at(divisors), *gradient.shape, EPS, 1.0, _at(out),
        torch.get_num_threads(),
    )  # fmt: skip
    return out.to(dtype)


def dots(a: Tensor, b: Tensor) -> Tensor:
    """[N] float64."""
    return (a * b).sum(1, dtype=torch.float64)


@dataclass(frozen=True)
class _Scaling:
    """Logits are similarities times `factor`; `shift` is subtracted before exp where that is safe for every logit
    there can be."""

    factor: float
    shift: float
    running: bool  # not safe: every row and column keeps a maximum of its own, in units of similarities

    @classmethod
    def of(cls, factor: float, bound: float, dtype: torch.dtype) -> "_Scaling":
        """`bound`: of the similarities' size. In float32, exp(-86) is a normal number, and so is a sum of 1e7
        times exp(70)."""
        top, bottom = (600.0, 700.0) if dtype == torch.float64 else (70.0, 86.0)
        largest = abs(factor) * bound * 1.0001
        shift = max(0.0, largest - top)
        factor = factor or 1e-37  # 0 times the -inf of what a row doesn't see would be NaN
        return cls(factor, shift, not largest + shift <= bottom)

    @property
    def values(self) -> tuple[float, float, bool]:
        return self.factor, self.shift, self.running

    def start(self, n: int) -> tuple[Tensor, Tensor]:
        """The log-sum-exp of nothing, as (maximum, sum of exp(logit - logit of the maximum))."""
        maximum = -math.inf if self.running else self.shift
        return torch.full((n,), maximum, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)

    def log_sum_exp(self, maximum: Tensor, total: Tensor) -> Tensor:
        return maximum * (abs(self.factor) if self.running else 1) + total.log()

    def weights(self, lse: Tensor | None, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        """What `similarity_weights` wants of rows or columns."""
        if lse is None:
            return None, None
        if not self.running:
            return (self.shift - lse).exp().clamp_max(1e38).to(dtype), None
        pivot = (lse / self.factor).clamp(-1e30, 1e30).to(dtype)
        rest = (pivot.double() * self.factor - lse).where(lse.isfinite(), 0).exp()
        return pivot, rest.clamp_max(1e38).to(dtype)


def _largest_norm(x: Tensor) -> float:
    return torch.linalg.vector_norm(x, dim=1).max().item()


def sum_dtype(x: Tensor) -> torch.dtype:
    return x.dtype


def scaling(factor: float | Tensor, bound: float | None, a: Tensor, b: Tensor) -> _Scaling:
    bound = _largest_norm(a) * _largest_norm(b) if bound is None else bound
    return _Scaling.of(float(factor), bound, a.dtype)


def _at_tile(place: Place, row: int, column: int) -> tuple[int, int, int, int, int]:
    return row, place.rows, place.offset, column, place.columns


def _tiles(a: Tensor, b: Tensor, upper: bool) -> Iterator[tuple[int, int, int, int, Tensor]]:
    """a[i:i2] @ b[j:j2].T for all tiles, or for those on and above the diagonal."""
    rows = min(ROWS, len(a))
    columns = rows if upper else min(len(b), max(COLUMNS, ROWS * COLUMNS // rows))
    memory = torch.empty(rows * columns, dtype=a.dtype)
    for i in range(0, len(a), rows):
        i2 = min(i + rows, len(a))
        for j in range(i if upper else 0, len(b), columns):
            j2 = min(j + columns, len(b))
            tile = memory[: (i2 - i) * (j2 - j)].view(i2 - i, j2 - j)
            yield i, i2, j, j2, torch.mm(a[i:i2], b[j:j2].T, out=tile)


def log_sum_exps(
    a: Tensor, b: Tensor, scaling: _Scaling, place: Place, *, upper: bool = False, columns: bool = False
) -> tuple[Tensor, Tensor]:
    """The log-sum-exp of every row; and of every column, if wanted. `upper`: a is b, and half of the tiles are
    enough."""
    row_max, row_sum = scaling.start(len(a))
    column_max, column_sum = (row_max, row_sum) if upper else scaling.start(len(b))
    for i, _, j, _, tile in _tiles(a, b, upper):
        both = columns or (upper and j > i)
        _C.similarity_sums(
            CODES[a.dtype],
            _at(tile),
            *tile.shape,
            tile.stride(0),
            scaling.values,
            _at_tile(place, i, j),
            False,
            _at(row_max, i),
            _at(row_sum, i),
            0,
            _at(column_max, j) if both else 0,
            _at(column_sum, j) if both else 0,
            torch.get_num_threads(),
        )
    return scaling.log_sum_exp(row_max, row_sum), scaling.log_sum_exp(column_max, column_sum)


def add_weighted(
    a: Tensor,
    b: Tensor,
    scaling: _Scaling,
    place: Place,
    a_lse: Tensor,
    b_lse: Tensor | None,
    a_sum: Tensor | None,
    b_sum: Tensor | None,
    *,
    upper: bool = False,
) -> Tensor:
    """`a_sum += G @ b` and `b_sum += G.T @ a`, G = exp(logit - a_lse) + exp(logit - b_lse); returns `sum(G *
    similarities)` by row."""
    row, row_rest = scaling.weights(a_lse, a.dtype)
    column, column_rest = scaling.weights(b_lse, a.dtype)
    row_dots = torch.zeros(len(a), dtype=torch.float64)
    for i, i2, j, j2, tile in _tiles(a, b, upper):
        _C.similarity_weights(
            CODES[a.dtype],
            _at(tile),
            *tile.shape,
            tile.stride(0),
            scaling.values,
            _at_tile(place, i, j),
            _at(row, i),
            _at(column, j),
            _at(row_rest, i),
            _at(column_rest, j),
            0 if upper else _at(row_dots, i),
            torch.get_num_threads(),
        )
        if a_sum is not None:
            a_sum[i:i2].addmm_(tile, b[j:j2])
        if b_sum is not None and not (upper and i == j):
            b_sum[j:j2].addmm_(tile.T, a[i:i2])
    return row_dots


def _bank_tiles(q: Tensor, bank: Tensor) -> Iterator[tuple[int, int, int, Tensor, Tensor]]:
    """(i, i2, j, unit rows bank[j:j2], q[i:i2] @ unit.T): the bank is normalised a tile at a time and never copied."""
    (n, d), rows = q.shape, min(ROWS, len(q))
    columns = max(64, min(len(bank), ROWS * COLUMNS // 2 // max(rows, d)))
    unit_memory, memory = torch.empty(columns, d, dtype=q.dtype), torch.empty(rows * columns, dtype=q.dtype)
    for j in range(0, len(bank), columns):
        rows_of_bank, _ = unit(bank[j : j + columns], True, out=unit_memory)
        for i in range(0, n, rows):
            i2 = min(i + rows, n)
            tile = memory[: (i2 - i) * len(rows_of_bank)].view(i2 - i, -1)
            yield i, i2, j, rows_of_bank, torch.mm(q[i:i2], rows_of_bank.T, out=tile)


def attend(
    q: Tensor,  # [N, D] of unit length
    bank: Tensor,  # [K, D]
    temperature: float,
    place: Place,
    wanted: bool,
) -> tuple[Tensor, Tensor | None]:
    """[N] float64: the log-sum-exp over the bank; and, if wanted, `softmax(logits) @ unit(bank)`; both in one pass."""
    logits = scaling(1 / temperature, 1.0, q, q)
    maximum, total = logits.start(len(q))
    rescale = torch.empty(len(q), dtype=torch.float64) if logits.running else None
    result = torch.zeros_like(q) if wanted else None
    for i, i2, j, unit_rows, tile in _bank_tiles(q, bank):
        _C.similarity_sums(
            CODES[q.dtype],
            _at(tile),
            *tile.shape,
            tile.stride(0),
            logits.values,
            _at_tile(place, i, j),
            wanted,
            _at(maximum, i),
            _at(total, i),
            _at(rescale, i),
            0,
            0,
            torch.get_num_threads(),
        )
        if wanted:
            if logits.running:
                result[i:i2].mul_(rescale[i:i2, None])
            result[i:i2].addmm_(tile, unit_rows)
    if wanted:
        result.mul_((1 / total).nan_to_num(posinf=0.0)[:, None])
    return logits.log_sum_exp(maximum, total), result


def siglip_loss(
    x: Tensor, y: Tensor, logit_scale: Tensor, logit_bias: Tensor, offset: int, wanted: list[bool]
) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    (a, _), (b, _) = unit(x, False), unit(y, False)
    factor, bias = logit_scale.item(), logit_bias.item()
    sums = [torch.zeros_like(z) if w else None for z, w in zip((a, b), wanted, strict=True)]
    losses, totals, products = torch.zeros(3, len(a), dtype=torch.float64)
    for i, i2, j, j2, tile in _tiles(a, b, False):
        _C.similarity_sigmoid(
            CODES[a.dtype],
            _at(tile),
            *tile.shape,
            tile.stride(0),
            factor,
            bias,
            i,
            offset,
            j,
            *(_at(v, i) for v in (losses, totals, products)),
            torch.get_num_threads(),
        )
        if wanted[0]:
            sums[0][i:i2].addmm_(tile, b[j:j2])
        if wanted[1]:
            sums[1][j:j2].addmm_(tile.T, a[i:i2])
    gradients = [z.new_empty(0) if s is None else s.to(z.dtype) for s, z in zip(sums, (x, y), strict=True)]
    return losses.sum(), gradients, products.sum(), totals.sum()


def nearest_neighbors(query: Tensor, bank: Tensor) -> Tensor:
    q, _ = unit(query, True)
    best = torch.full((len(q),), -math.inf, dtype=q.dtype)
    index = torch.full((len(q),), -1, dtype=torch.int64)
    for i, _, j, _, tile in _bank_tiles(q, bank):
        _C.similarity_best(
            CODES[q.dtype], _at(tile), *tile.shape, tile.stride(0), j, _at(best, i), _at(index, i),
            torch.get_num_threads(),
        )  # fmt: skip
    return index


_ENGINE = sys.modules[__name__]
nt_xent = partial(contrastive.nt_xent, _ENGINE)
nt_xent_backward = partial(contrastive.nt_xent_backward, _ENGINE)
info_nce = partial(contrastive.info_nce, _ENGINE)
clip_loss = partial(contrastive.clip_loss, _ENGINE)
clip_loss_backward = partial(contrastive.clip_loss_backward, _ENGINE)
