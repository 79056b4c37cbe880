"""Tiles of similarities on a GPU: the engine that kernels/contrastive.py composes the contrastive operators of.

Each program owns rows and walks over all candidates: nothing is added by two programs, so the bits repeat. Where
there are few rows the candidates are split among programs, whose results are combined in a fixed order afterwards.
The running maximum is kept in every row; for unit rows at temperatures of 0.0128 and more a constant shift takes its
place.

Rows wider than 256 are multiplied in chunks; the gradient's columns are then chunks of programs of their own.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from fastjem.kernels import launch, tiling
from fastjem.kernels.contrastive import Place
from torch import Tensor

EPS = 1e-12


@triton.jit
def _load(x, i_row, N, D, start, BLOCK: tl.constexpr):
    """Rows i_row, columns start .. start + BLOCK of a dense [N, D]; zeros outside."""
    column = start + tl.arange(0, BLOCK)
    mask = (i_row < N)[:, None] & (column < D)[None, :]
    return tl.load(x + launch.row_start(i_row, D, 1)[:, None] + column[None, :], mask, 0)


@triton.jit
def _product(
    a, b, b_a, i_a, i_b, N, M, D, BLOCK_D: tl.constexpr, CHUNKS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):
    """[BM, BN] float32: similarities; and the candidates' rows, if they are one chunk (so are the rows b_a then)."""
    b_b = _load(b, i_b, M, D, 0, BLOCK_D)
    s = tl.dot(b_a, tl.trans(b_b), input_precision="tf32x3")
    for c in tl.static_range(1, CHUNKS):
        b_rest = _load(b, i_b, M, D, c * BLOCK_D, BLOCK_D)
        s += tl.dot(_load(a, i_a, N, D, c * BLOCK_D, BLOCK_D), tl.trans(b_rest), input_precision="tf32x3")
    return s, b_b


@triton.jit
def _seen(i_a, i_b, M, rows_period, offset, columns_period, PERIODIC: tl.constexpr):
    """[BM, BN]: the columns that exist and don't show the row's own image."""
    seen = (i_b < M)[None, :]
    if PERIODIC:
        seen = seen & ((i_b % columns_period)[None, :] != (i_a % rows_period + offset)[:, None])
    return seen


@triton.jit(do_not_specialize=["N", "M", "rows_period", "offset", "columns_period", "per_split"])
def _log_sum_exp_kernel(
    a,  # [N, D]
    b,  # [M, D]
    factor,  # 0-dim
    maxima,  # [splits, N]
    totals,  # [splits, N]
    out,  # [splits, N, D] float32: sum_j exp(logit - maximum) b_j, or None
    N,
    M,
    D,
    rows_period,
    offset,
    columns_period,
    per_split,  # blocks of columns
    shift,
    PERIODIC: tl.constexpr,
    RUNNING: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNKS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    i_split = tl.program_id(1)
    i_a = tl.program_id(0) * BM + tl.arange(0, BM)
    scale = tl.load(factor).to(tl.float32)
    b_a = _load(a, i_a, N, D, 0, BLOCK_D)
    maximum = tl.full([BM], -float("inf"), tl.float32)
    if not RUNNING:
        maximum = tl.zeros([BM], tl.float32) + shift
    total = tl.zeros([BM], tl.float32)
    if out is not None:
        acc = tl.zeros([BM, BLOCK_D], tl.float32)
    for block in range(i_split * per_split, min((i_split + 1) * per_split, tl.cdiv(M, BN))):
        i_b = block * BN + tl.arange(0, BN)
        s, b_b = _product(a, b, b_a, i_a, i_b, N, M, D, BLOCK_D, CHUNKS, BM, BN)
        x = tl.where(_seen(i_a, i_b, M, rows_period, offset, columns_period, PERIODIC), s * scale, -float("inf"))
        if RUNNING:
            now = tl.maximum(maximum, tl.max(x, 1))
            base = tl.where(now == -float("inf"), 0.0, now)
            rescale = tl.exp(maximum - base)
            e = tl.exp(x - base[:, None])
            total = total * rescale + tl.sum(e, 1)
            maximum = now
            if out is not None:
                acc = acc * rescale[:, None]
        else:
            e = tl.exp(x - shift)
            total += tl.sum(e, 1)
        if out is not None:
            acc += tl.dot(e.to(b_b.dtype), b_b, input_precision="tf32x3")
    at = i_split.to(tl.int64) * N + i_a
    tl.store(maxima + at, maximum, i_a < N)
    tl.store(totals + at, total, i_a < N)
    if out is not None:
        column = tl.arange(0, BLOCK_D)
        mask = (i_a < N)[:, None] & (column < D)[None, :]
        tl.store(out + (at * D)[:, None] + column[None, :], acc, mask)


@triton.jit(do_not_specialize=["N", "M", "rows_period", "offset", "columns_period"])
def _weighted_kernel(
    a,  # [N, D]
    b,  # [M, D]
    factor,  # 0-dim
    a_lse,  # [N] float64, or None
    b_lse,  # [M] float64, or None
    out,  # [N, D] float32: G @ b
    dots,  # [N] float32: the sum of G * similarities by row
    N,
    M,
    D,
    rows_period,
    offset,
    columns_period,
    PERIODIC: tl.constexpr,
    GAIN: tl.constexpr,  # float16 weights would be subnormal numbers without
    BLOCK_D: tl.constexpr,
    CHUNKS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    i_chunk = tl.program_id(1)
    i_a = tl.program_id(0) * BM + tl.arange(0, BM)
    scale = tl.load(factor).to(tl.float32)
    b_a = _load(a, i_a, N, D, 0, BLOCK_D)
    if a_lse is not None:
        row = tl.load(a_lse + i_a, i_a < N, float("inf")).to(tl.float32)
    acc = tl.zeros([BM, BLOCK_D], tl.float32)
    dot = tl.zeros([BM], tl.float32)
    for start in range(0, M, BN):
        i_b = start + tl.arange(0, BN)
        s, b_b = _product(a, b, b_a, i_a, i_b, N, M, D, BLOCK_D, CHUNKS, BM, BN)
        seen = _seen(i_a, i_b, M, rows_period, offset, columns_period, PERIODIC)
        x = s * scale
        g = tl.zeros([BM, BN], tl.float32)
        if a_lse is not None:
            g += tl.exp(x - row[:, None])
        if b_lse is not None:
            column_lse = tl.load(b_lse + i_b, i_b < M, float("inf")).to(tl.float32)
            g += tl.exp(x - column_lse[None, :])
        g = tl.where(seen, g, 0.0)
        dot += tl.sum(g * s, 1)
        if CHUNKS > 1:
            b_b = _load(b, i_b, M, D, i_chunk * BLOCK_D, BLOCK_D)
        acc += tl.dot((g * GAIN).to(b_b.dtype), b_b, input_precision="tf32x3")
    column = i_chunk * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = (i_a < N)[:, None] & (column < D)[None, :]
    tl.store(out + launch.row_start(i_a, D, 1)[:, None] + column[None, :], acc / GAIN, mask)
    if i_chunk == 0:
        tl.store(dots + i_a, dot, i_a < N)


@triton.jit(do_not_specialize=["N", "M", "offset"])
def _sigmoid_kernel(
    a,  # [N, D]
    b,  # [M, D]
    factor,  # 0-dim
    bias,  # 0-dim
    out,  # [N, D] float32: G @ b, or None
    sums,  # [3, N] float32: loss, G, G * similarity of each row
    N,
    M,
    D,
    offset,
    BLOCK_D: tl.constexpr,
    CHUNKS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    i_chunk = tl.program_id(1)
    i_a = tl.program_id(0) * BM + tl.arange(0, BM)
    scale, shift = tl.load(factor).to(tl.float32), tl.load(bias).to(tl.float32)
    b_a = _load(a, i_a, N, D, 0, BLOCK_D)
    acc = tl.zeros([BM, BLOCK_D], tl.float32)
    loss = tl.zeros([BM], tl.float32)
    weight = tl.zeros([BM], tl.float32)
    dot = tl.zeros([BM], tl.float32)
    for start in range(0, M, BN):
        i_b = start + tl.arange(0, BN)
        s, b_b = _product(a, b, b_a, i_a, i_b, N, M, D, BLOCK_D, CHUNKS, BM, BN)
        label = tl.where(i_b[None, :] == (i_a + offset)[:, None], -1.0, 1.0)
        x = label * (s * scale + shift)  # the loss is softplus(x)
        e = tl.exp(-tl.abs(x))
        one_more = 1 + e
        # log(1 + e) loses e below 1e-7; Kahan's correction gives log1p
        log1p = tl.where(one_more == 1, e, tl.log(one_more) * (e / tl.where(one_more == 1, 1.0, one_more - 1)))
        seen = (i_b < M)[None, :]
        loss += tl.sum(tl.where(seen, tl.maximum(x, 0.0) + log1p, 0.0), 1)
        g = tl.where(seen, label * tl.where(x > 0, 1.0, e) / one_more, 0.0)
        weight += tl.sum(g, 1)
        dot += tl.sum(g * s, 1)
        if out is not None:
            if CHUNKS > 1:
                b_b = _load(b, i_b, M, D, i_chunk * BLOCK_D, BLOCK_D)
            acc += tl.dot(g.to(b_b.dtype), b_b, input_precision="tf32x3")
    if out is not None:
        column = i_chunk * BLOCK_D + tl.arange(0, BLOCK_D)
        mask = (i_a < N)[:, None] & (column < D)[None, :]
        tl.store(out + launch.row_start(i_a, D, 1)[:, None] + column[None, :], acc, mask)
    if i_chunk == 0:
        tl.store(sums + i_a, loss, i_a < N)
        tl.store(sums + N + i_a, weight, i_a < N)
        tl.store(sums + 2 * N + i_a, dot, i_a < N)


@triton.jit(do_not_specialize=["N", "M", "per_split"])
def _best_kernel(
    a,  # [N, D]
    b,  # [M, D]
    values,  # [splits, N]
    columns,  # [splits, N] int64
    N,
    M,
    D,
    per_split,
    BLOCK_D: tl.constexpr,
    CHUNKS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    i_split = tl.program_id(1)
    i_a = tl.program_id(0) * BM + tl.arange(0, BM)
    b_a = _load(a, i_a, N, D, 0, BLOCK_D)
    best = tl.full([BM], -float("inf"), tl.float32)
    where = tl.zeros([BM], tl.int32)
    for block in range(i_split * per_split, min((i_split + 1) * per_split, tl.cdiv(M, BN))):
        i_b = block * BN + tl.arange(0, BN)
        s, _ = _product(a, b, b_a, i_a, i_b, N, M, D, BLOCK_D, CHUNKS, BM, BN)
        s = tl.where((i_b < M)[None, :], s, -float("inf"))
        now = tl.max(s, 1)
        first = tl.min(tl.where(s == now[:, None], i_b[None, :], 2147483647), 1)
        better = now > best
        where = tl.where(better, first, where)
        best = tl.where(better, now, best)
    at = i_split.to(tl.int64) * N + i_a
    tl.store(values + at, best, i_a < N)
    tl.store(columns + at, where.to(tl.int64), i_a < N)


@triton.jit(do_not_specialize=["N"])
def _unit_kernel(
    x,  # [N, D], rows s_x apart
    out,  # [N, D]
    divisors,  # [N] float32
    N,
    D,
    s_x,
    EPS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    mask = (i_row < N)[:, None] & (column < D)[None, :]
    b_x = tl.load(x + launch.row_start(i_row, s_x, 1)[:, None] + column[None, :], mask, 0).to(tl.float32)
    # the largest element taken out first: squares of large or small ones leave float32's range
    largest = tl.max(tl.abs(b_x), 1)
    largest = tl.where(largest > 0, largest, 1.0)
    b_y = b_x / largest[:, None]
    divisor = tl.maximum(tl.sqrt(tl.sum(b_y * b_y, 1)) * largest, EPS)
    tl.store(out + launch.row_start(i_row, D, 1)[:, None] + column[None, :], b_x / divisor[:, None], mask)
    tl.store(divisors + i_row, divisor, i_row < N)


def supported(*tensors: Tensor) -> bool:
    """float64 is the reference's, and so is whatever has no tensor-core product."""
    return all(x.dtype in (torch.float32, torch.bfloat16, torch.float16) for x in tensors)


def sum_dtype(x: Tensor) -> torch.dtype:
    return torch.float32


def unit(x: Tensor, normalize: bool) -> tuple[Tensor, Tensor | None]:
    """In the dtype of the input, which is that of the products; float32 sums."""
    if not normalize:
        return x.contiguous(), None
    x = launch.rows(x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    divisors = torch.empty(len(x), dtype=torch.float32, device=x.device)
    tile = tiling.unit_rows(x.shape[1])
    launch.launch(
        _unit_kernel,
        (triton.cdiv(len(x), tile["ROWS"]),),
        x,
        out,
        divisors,
        *x.shape,
        x.stride(0),
        EPS=EPS,
        **tile,
        device_of=x,
    )
    return out, divisors


def through_unit(gradient: Tensor, rows: Tensor, divisors: Tensor | None, dtype: torch.dtype) -> Tensor:
    if divisors is None:
        return gradient.to(dtype)
    rows = rows.to(gradient.dtype)
    radial = (gradient * rows).sum(1) * (divisors > EPS)
    return gradient.addcmul(radial[:, None], rows, value=-1).div_(divisors[:, None]).to(dtype)


@dataclass(frozen=True)
class Scaling:
    factor: Tensor  # 0-dim
    running: bool
    shift: float


def scaling(factor: float | Tensor, bound: float | None, a: Tensor, b: Tensor) -> Scaling:
    """A tensor's value isn't known on the host, and neither are the norms of rows that come as they are."""
    if bound is None or isinstance(factor, Tensor):
        if not isinstance(factor, Tensor):
            factor = torch.full((), factor, dtype=torch.float32, device=a.device)
        return Scaling(factor, True, 0.0)
    largest = factor * bound * 1.02  # bfloat16 rows may be a little longer than 1
    shift = max(0.0, largest - 70)
    return Scaling(torch.full((), factor, dtype=torch.float32, device=a.device), largest + shift > 86, shift)


def _splits(n: int, m: int, tile: dict) -> tuple[int, int]:
    """So many that two programs an SM have work, whatever GPU it is (the bits depend on it): (splits, blocks of
    each)."""
    blocks = triton.cdiv(m, tile["BN"])
    splits = min(blocks, max(1, 264 // triton.cdiv(n, tile["BM"])))
    each = triton.cdiv(blocks, splits)
    return triton.cdiv(blocks, each), each


def _row_sums(
    a: Tensor, b: Tensor, logits: Scaling, place: Place, with_sum: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    (n, d), m = a.shape, len(b)
    tile = tiling.similarity_forward(d, a.dtype, with_sum)
    splits, each = _splits(n, m, tile)
    maxima, totals = torch.empty(2, splits, n, dtype=torch.float32, device=a.device)
    out = torch.empty(splits, n, d, dtype=torch.float32, device=a.device) if with_sum else None
    launch.launch(
        _log_sum_exp_kernel,
        (triton.cdiv(n, tile["BM"]), splits),
        a,
        b,
        logits.factor,
        maxima,
        totals,
        out,
        n,
        m,
        d,
        place.rows,
        place.offset,
        max(place.columns, 1),
        each,
        logits.shift,
        PERIODIC=place.columns > 0,
        RUNNING=logits.running,
        **tile,
        device_of=a,
    )
    return maxima.double(), totals.double(), out


def _swapped(place: Place) -> Place:
    return Place(place.columns, -place.offset, place.rows) if place.columns else place


def log_sum_exps(
    a: Tensor, b: Tensor, logits: Scaling, place: Place, *, upper: bool = False, columns: bool = False
) -> tuple[Tensor, Tensor | None]:
    maxima, totals, _ = _row_sums(a, b, logits, place, False)
    rows = (maxima + totals.log()).logsumexp(0)
    return rows, log_sum_exps(b, a, logits, _swapped(place))[0] if columns else None


def attend(q: Tensor, bank: Tensor, temperature: float, place: Place, wanted: bool) -> tuple[Tensor, Tensor | None]:
    rows, _ = unit(bank, True)
    logits = scaling(1 / temperature, 1.0, q, rows)
    one_pass = wanted and q.shape[1] <= tiling.similarity_chunk(q.dtype)
    maxima, totals, out = _row_sums(q, rows, logits, place, one_pass)
    parts = maxima + totals.log()  # [splits, N]
    lse = parts.logsumexp(0)
    if not wanted:
        return lse, None
    if not one_pass:
        out = torch.empty(q.shape, dtype=torch.float32, device=q.device)
        _weighted(q, rows, logits, place, lse, None, out)
        return lse, out
    return lse, (out * (maxima - lse).exp().nan_to_num(0.0).float()[:, :, None]).sum(0)


def _weighted(
    a: Tensor, b: Tensor, logits: Scaling, place: Place, a_lse: Tensor | None, b_lse: Tensor | None, out: Tensor
) -> Tensor:
    (n, d), m = a.shape, len(b)
    tile = tiling.similarity_backward(d, a.dtype)
    row_dots = torch.empty(n, dtype=torch.float32, device=a.device)
    launch.launch(
        _weighted_kernel,
        (triton.cdiv(n, tile["BM"]), tile["CHUNKS"]),
        a,
        b,
        logits.factor,
        a_lse,
        b_lse,
        out,
        row_dots,
        n,
        m,
        d,
        place.rows,
        place.offset,
        max(place.columns, 1),
        PERIODIC=place.columns > 0,
        GAIN=1024 if a.dtype == torch.float16 else 1,
        **tile,
        device_of=a,
    )
    return row_dots.double()


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
    """The sums come as zeros and are written whole. With `upper` the rows' own walk has done both halves."""
    a_lse, b_lse = a_lse.contiguous(), None if b_lse is None else b_lse.contiguous()
    row_dots = None
    if a_sum is not None or b_lse is not None:
        out = torch.empty(a.shape, dtype=torch.float32, device=a.device) if a_sum is None else a_sum
        row_dots = _weighted(a, b, logits, place, a_lse, b_lse, out)
    if b_sum is not None and not upper:
        _weighted(b, a, logits, _swapped(place), b_lse, a_lse, b_sum)
    return row_dots


def sigmoid(
    a: Tensor, b: Tensor, factor: Tensor, bias: Tensor, offset: int, wanted: bool
) -> tuple[Tensor, Tensor | None]:
    """[3, N] float32, the sums of each row over loss, G, G * similarities; and G @ b, if wanted."""
    (n, d), m = a.shape, len(b)
    tile = tiling.similarity_backward(d, a.dtype, sigmoid=True)
    sums = torch.empty(3, n, dtype=torch.float32, device=a.device)
    out = torch.empty(a.shape, dtype=torch.float32, device=a.device) if wanted else None
    grid = (triton.cdiv(n, tile["BM"]), tile["CHUNKS"] if wanted else 1)
    launch.launch(_sigmoid_kernel, grid, a, b, factor, bias, out, sums, n, m, d, offset, **tile, device_of=a)
    return sums, out


def best(a: Tensor, b: Tensor) -> Tensor:
    """[N] int64: the row of b with which each row of a has the largest product."""
    (n, d), m = a.shape, len(b)
    tile = tiling.similarity_forward(d, a.dtype, True)
    splits, each = _splits(n, m, tile)
    values = torch.empty(splits, n, dtype=torch.float32, device=a.device)
    columns = torch.empty(splits, n, dtype=torch.int64, device=a.device)
    grid = (triton.cdiv(n, tile["BM"]), splits)
    launch.launch(_best_kernel, grid, a, b, values, columns, n, m, d, each, **tile, device_of=a)
    return columns.gather(0, values.argmax(0, keepdim=True))[0]
