"""The contrastive losses on the CPU: torch.mm makes a tile of similarities, C++ turns it into exponentials and their sums.

A tile is as large as a core's cache; nothing of N x N lives longer than that.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from fastjem.kernels import _C
from torch import Tensor

CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
EPS = 1e-12
ROWS, COLUMNS = 1024, 1024  # of a tile: 4 MiB of float32, the second-level caches of two cores


def _at(x: Tensor | None, start: int = 0) -> int:
    return 0 if x is None else x.data_ptr() + start * x.stride(0) * x.element_size()


def _unit(x: Tensor, normalize: bool = True, out: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
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


def _through_unit(gradient: Tensor, unit: Tensor, divisors: Tensor | None, dtype: torch.dtype) -> Tensor:
    if divisors is None:
        return gradient.to(dtype)
    native = dtype if dtype in CODES else gradient.dtype
    out = gradient if native == gradient.dtype else torch.empty(gradient.shape, dtype=native)
    _C.through_unit_rows(
        CODES[native], _at(gradient), _at(unit), _at(divisors), *gradient.shape, EPS, 1.0, _at(out), torch.get_num_threads()
    )  # fmt: skip
    return out.to(dtype)


@dataclass(frozen=True)
class _Scaling:
    """Logits are similarities times `factor`; `shift` is subtracted before exp where that is safe for every logit there can be."""

    factor: float
    shift: float
    running: bool  # not safe: every row and column keeps a maximum of its own

    @classmethod
    def of(cls, factor: float, bound: float, dtype: torch.dtype) -> "_Scaling":
        """`bound`: of the similarities' size. In float32, exp(-86) is a normal number, and so is a sum of 1e7 times exp(70)."""
        top, bottom = (600.0, 700.0) if dtype == torch.float64 else (70.0, 86.0)
        largest = abs(factor) * bound * 1.0001
        shift = max(0.0, largest - top)
        return cls(factor, shift, not largest + shift <= bottom)

    @property
    def values(self) -> tuple[float, float, bool]:
        return self.factor, self.shift, self.running

    def start(self, n: int) -> tuple[Tensor, Tensor]:
        """The log-sum-exp of nothing, as (maximum, sum of exp(logit - maximum))."""
        maximum = -math.inf if self.running else self.shift
        return torch.full((n,), maximum, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)

    def weights(self, lse: Tensor | None, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        """What `similarity_weights` wants of rows or columns."""
        if lse is None:
            return None, None
        if not self.running:
            return (self.shift - lse).exp().clamp_max(1e38).to(dtype), None
        rounded = lse.clamp(-1e30, 1e30).to(dtype)
        return rounded, (rounded - lse).exp().nan_to_num(1.0, 1.0).clamp_max(2.0).to(dtype)


def _largest_norm(x: Tensor) -> float:
    return torch.linalg.vector_norm(x, dim=1).max().item()


@dataclass(frozen=True)
class _Place:
    """Which columns a row doesn't see: those that show its image. Rows and columns repeat their images with these periods."""

    rows: int = 1
    offset: int = 0
    columns: int = 0  # 0: a row sees everything

    def at(self, row: int, column: int) -> tuple[int, int, int, int, int]:
        return row, self.rows, self.offset, column, self.columns


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


def _log_sum_exps(
    a: Tensor, b: Tensor, scaling: _Scaling, place: _Place, *, upper: bool = False, columns: bool = False
) -> tuple[Tensor, Tensor]:
    """The log-sum-exp of every row; and of every column, if wanted. `upper`: a is b, and half of the tiles are enough."""
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
            place.at(i, j),
            False,
            _at(row_max, i),
            _at(row_sum, i),
            0,
            _at(column_max, j) if both else 0,
            _at(column_sum, j) if both else 0,
            torch.get_num_threads(),
        )
    return row_max + row_sum.log(), column_max + column_sum.log()


def _add_weighted(
    a: Tensor,
    b: Tensor,
    scaling: _Scaling,
    place: _Place,
    a_lse: Tensor,
    b_lse: Tensor | None,
    a_sum: Tensor | None,
    b_sum: Tensor | None,
    *,
    upper: bool = False,
) -> Tensor:
    """`a_sum += G @ b` and `b_sum += G.T @ a`, G = exp(logit - a_lse) + exp(logit - b_lse); returns `sum(G * similarities)` by row."""
    row, row_rest = scaling.weights(a_lse, a.dtype)
    column, column_rest = scaling.weights(b_lse, a.dtype)
    dots = torch.zeros(len(a), dtype=torch.float64)
    for i, i2, j, j2, tile in _tiles(a, b, upper):
        _C.similarity_weights(
            CODES[a.dtype],
            _at(tile),
            *tile.shape,
            tile.stride(0),
            scaling.values,
            place.at(i, j),
            _at(row, i),
            _at(column, j),
            _at(row_rest, i),
            _at(column_rest, j),
            0 if upper else _at(dots, i),
            torch.get_num_threads(),
        )
        if a_sum is not None:
            a_sum[i:i2].addmm_(tile, b[j:j2])
        if b_sum is not None and not (upper and i == j):
            b_sum[j:j2].addmm_(tile.T, a[i:i2])
    return dots


def _same(x: Tensor, y: Tensor) -> bool:
    return x.data_ptr() == y.data_ptr() and x.shape == y.shape and x.stride() == y.stride() and x.dtype == y.dtype


def _own_images(rows: Tensor, candidates: Tensor, offset: int) -> bool:
    return 0 <= offset <= candidates.shape[1] - rows.shape[1]


def _positive_logits(unit: Tensor, other: Tensor, factor: float) -> Tensor:
    """[V, V, n] float64: logits of views u and v of the same image."""
    v, n, _ = unit.shape
    logits = torch.empty(v, v, n, dtype=torch.float64)
    for i in range(v):
        for j in range(i + 1, v):
            logits[i, j] = logits[j, i] = (unit[i] * other[j]).sum(1, dtype=torch.float64) * factor
    return logits


def _prepare(rows: Tensor, candidates: Tensor, offset: int, temperature: float, normalize: bool):
    (v, n, d), total = rows.shape, candidates.shape[1]
    local = _same(rows, candidates) and offset == 0
    a, divisors = _unit(rows.reshape(v * n, d), normalize)
    b = a if local else _unit(candidates.reshape(v * total, d), normalize)[0]
    bound = 1.0 if normalize else _largest_norm(a) * _largest_norm(b)
    return local, a, divisors, b, _Scaling.of(1 / temperature, bound, a.dtype), _Place(n, offset, total)


def _diagonal(logits: Tensor) -> Tensor:
    return torch.diagonal(logits, dim1=0, dim2=1).T  # [V, n], a view


def nt_xent(
    rows: Tensor, candidates: Tensor, offset: int, temperature: float, decoupled: bool, normalize: bool
) -> tuple[Tensor, Tensor]:
    v, n, d = rows.shape
    local, a, _, b, scaling, place = _prepare(rows, candidates, offset, temperature, normalize)
    lse = _log_sum_exps(a, b, scaling, place, upper=local)[0].view(v, n)
    if v == 1 or not _own_images(rows, candidates, offset):
        return torch.zeros_like(lse), lse
    unit = a.view(v, n, d)
    logits = _positive_logits(unit, unit, scaling.factor)
    _diagonal(logits).zero_()
    positives = logits.sum(1) / (v - 1)
    if not decoupled:
        _diagonal(logits).copy_(lse)  # so that the positives count with the very bits that they are subtracted with
        lse = logits.logsumexp(1)
    return positives, lse


def nt_xent_backward(
    rows: Tensor,
    candidates: Tensor,
    rows_lse: Tensor,
    candidates_lse: Tensor,
    weights: Tensor | None,
    offset: int,
    temperature: float,
    decoupled: bool,
    normalize: bool,
) -> Tensor:
    v, n, d = rows.shape
    local, a, divisors, b, scaling, place = _prepare(rows, candidates, offset, temperature, normalize)
    gradient = torch.zeros_like(a)
    lses = rows_lse.reshape(-1), candidates_lse.reshape(-1)
    _add_weighted(a, b, scaling, place, *lses, gradient, gradient if local else None, upper=local)
    if v > 1 and _own_images(rows, candidates, offset):
        unit, by_view = a.view(v, n, d), gradient.view(v, n, d)
        logits = _positive_logits(unit, unit, scaling.factor)
        w = torch.ones_like(rows_lse) if weights is None else weights[:, offset : offset + n].double()
        pulled = (w[:, None] + w) / (v - 1)  # [V, V, n]
        if not decoupled:
            pulled = pulled - (logits - rows_lse[:, None]).exp() - (logits - rows_lse).exp()
        pulled = pulled.to(a.dtype)
        for i in range(v):
            for j in range(v):
                if i != j:
                    by_view[i].addcmul_(pulled[i, j, :, None], unit[j], value=-1)
    return _through_unit(gradient, a, divisors, rows.dtype).view(v, n, d)


def info_nce(
    query: Tensor, positive: Tensor, negatives: Tensor, offset: int, temperature: float, wanted: list[bool]
) -> tuple[Tensor, list[Tensor], Tensor]:
    (n, d), k = query.shape, len(negatives)
    (q, q_divisors), (p, p_divisors) = _unit(query), _unit(positive)
    scaling = _Scaling.of(1 / temperature, 1.0, q.dtype)
    place = _Place(n, offset, k) if -n < offset < k else _Place()
    own = (q * p).sum(1, dtype=torch.float64) * scaling.factor  # [N]

    # one pass over the negatives gives the log-sum-exps and, relative to the running shift, the gradient for the queries
    maximum, total = scaling.start(n)
    rescale = torch.empty(n, dtype=torch.float64) if scaling.running else None
    q_gradient = torch.zeros_like(q) if wanted[0] else None
    rows = min(ROWS, n)
    columns = max(64, min(k, ROWS * COLUMNS // 2 // max(rows, d)))
    unit_memory, tile_memory = torch.empty(columns, d, dtype=q.dtype), torch.empty(rows * columns, dtype=q.dtype)
    for j in range(0, k, columns):
        unit, _ = _unit(negatives[j : j + columns], out=unit_memory)
        for i in range(0, n, rows):
            i2 = min(i + rows, n)
            tile = torch.mm(q[i:i2], unit.T, out=tile_memory[: (i2 - i) * len(unit)].view(i2 - i, len(unit)))
            _C.similarity_sums(
                CODES[q.dtype],
                _at(tile),
                *tile.shape,
                tile.stride(0),
                scaling.values,
                place.at(i, j),
                wanted[0],
                _at(maximum, i),
                _at(total, i),
                _at(rescale, i),
                0,
                0,
                torch.get_num_threads(),
            )
            if wanted[0]:
                if scaling.running:
                    q_gradient[i:i2].mul_(rescale[i:i2, None])
                q_gradient[i:i2].addmm_(tile, unit)
    negative_lse = maximum + total.log()
    lse = torch.logaddexp(negative_lse, own)
    own_weight = (own - lse).expm1().to(q.dtype)[:, None]  # the positive's probability - 1

    gradients = [x.new_empty(0) for x in (query, positive, negatives)]
    if wanted[0]:
        q_gradient.mul_((maximum - lse).exp().nan_to_num(0.0)[:, None]).addcmul_(own_weight, p)
        gradients[0] = _through_unit(q_gradient, q, q_divisors, query.dtype)
    if wanted[1]:
        gradients[1] = _through_unit(own_weight * q, p, p_divisors, positive.dtype)
    if wanted[2]:
        unit, divisors = _unit(negatives)
        gradient = torch.zeros_like(unit)
        _add_weighted(q, unit, scaling, place, lse, None, None, gradient)
        gradients[2] = _through_unit(gradient, unit, divisors, negatives.dtype)
    return (lse - own).mean().to(q.dtype), gradients, torch.tensor(1 / (n * temperature), dtype=q.dtype)


def _pairs(x: Tensor, y: Tensor, logit_scale: Tensor, offset: int):
    (a, _), (b, _) = _unit(x, normalize=False), _unit(y, normalize=False)
    scaling = _Scaling.of(logit_scale.item(), _largest_norm(a) * _largest_norm(b), a.dtype)
    first, last = max(0, -offset), min(len(x), len(y) - offset)  # the rows whose own pair is among y
    own = slice(first, max(first, last)), slice(first + offset, max(first, last) + offset)
    if own[0].start >= own[0].stop:
        own = slice(0, 0), slice(0, 0)
    logits = (a[own[0]] * b[own[1]]).sum(1, dtype=torch.float64)
    return a, b, scaling, _Place(len(x), offset, len(y)), own, logits


def clip_loss(x: Tensor, y: Tensor, logit_scale: Tensor, offset: int) -> tuple[Tensor, Tensor, Tensor]:
    a, b, scaling, place, own, similarities = _pairs(x, y, logit_scale, offset)
    x_lse, y_lse = _log_sum_exps(a, b, scaling, place, columns=True)
    positives = torch.zeros_like(x_lse)
    positives[own[0]] = similarities * scaling.factor
    x_lse[own[0]] = torch.logaddexp(x_lse[own[0]], positives[own[0]])
    y_lse[own[1]] = torch.logaddexp(y_lse[own[1]], positives[own[0]])
    return positives, x_lse, y_lse


def clip_loss_backward(
    x: Tensor, y: Tensor, logit_scale: Tensor, x_lse: Tensor, y_lse: Tensor, offset: int, wanted: list[bool]
) -> tuple[list[Tensor], Tensor]:
    a, b, scaling, place, own, similarities = _pairs(x, y, logit_scale, offset)
    sums = [torch.zeros_like(z) if w else None for z, w in zip((a, b), wanted, strict=True)]
    dots = _add_weighted(a, b, scaling, place, x_lse, y_lse, *sums)
    logits = similarities * scaling.factor
    g = (logits - x_lse[own[0]]).expm1() + (logits - y_lse[own[1]]).expm1()
    weight = g.to(a.dtype)[:, None]
    if wanted[0]:
        sums[0][own[0]].addcmul_(weight, b[own[1]])
    if wanted[1]:
        sums[1][own[1]].addcmul_(weight, a[own[0]])
    gradients = [z.new_empty(0) if s is None else s.to(z.dtype) for s, z in zip(sums, (x, y), strict=True)]
    return gradients, dots.sum() + g.dot(similarities)


def siglip_loss(
    x: Tensor, y: Tensor, logit_scale: Tensor, logit_bias: Tensor, offset: int, wanted: list[bool]
) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    (a, _), (b, _) = _unit(x, normalize=False), _unit(y, normalize=False)
    factor, bias = logit_scale.item(), logit_bias.item()
    sums = [torch.zeros_like(z) if w else None for z, w in zip((a, b), wanted, strict=True)]
    losses, totals, dots = torch.zeros(3, len(a), dtype=torch.float64)
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
            *(_at(v, i) for v in (losses, totals, dots)),
            torch.get_num_threads(),
        )
        if wanted[0]:
            sums[0][i:i2].addmm_(tile, b[j:j2])
        if wanted[1]:
            sums[1][j:j2].addmm_(tile.T, a[i:i2])
    gradients = [z.new_empty(0) if s is None else s.to(z.dtype) for s, z in zip(sums, (x, y), strict=True)]
    return losses.sum(), gradients, dots.sum(), totals.sum()


def nearest_neighbors(query: Tensor, bank: Tensor) -> Tensor:
    q, _ = _unit(query)
    best = torch.full((len(q),), -math.inf, dtype=q.dtype)
    index = torch.full((len(q),), -1, dtype=torch.int64)
    rows = min(ROWS, len(q))
    columns = max(64, min(len(bank), ROWS * COLUMNS // 2 // max(rows, q.shape[1])))
    unit_memory, tile_memory = torch.empty(columns, q.shape[1], dtype=q.dtype), torch.empty(rows * columns, dtype=q.dtype)
    for j in range(0, len(bank), columns):
        unit, _ = _unit(bank[j : j + columns], out=unit_memory)
        for i in range(0, len(q), rows):
            i2 = min(i + rows, len(q))
            tile = torch.mm(q[i:i2], unit.T, out=tile_memory[: (i2 - i) * len(unit)].view(i2 - i, len(unit)))
            _C.similarity_best(
                CODES[q.dtype],
                _at(tile),
                *tile.shape,
                tile.stride(0),
                j,
                _at(best, i),
                _at(index, i),
                torch.get_num_threads(),
            )
    return index
