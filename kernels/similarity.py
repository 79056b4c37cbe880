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
from fastjem.kernels import launch, tiling
from fastjem.kernels.contrastive import Place
from fastjem.kernels.similarity_kernels import (
    best_kernel,
    log_sum_exp_kernel,
    sigmoid_kernel,
    unit_kernel,
    weighted_kernel,
)
from torch import Tensor

EPS = 1e-12


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
        unit_kernel,
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
        log_sum_exp_kernel,
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
        weighted_kernel,
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
    launch.launch(sigmoid_kernel, grid, a, b, factor, bias, out, sums, n, m, d, offset, **tile, device_of=a)
    return sums, out


def best(a: Tensor, b: Tensor) -> Tensor:
    """[N] int64: the row of b with which each row of a has the largest product."""
    (n, d), m = a.shape, len(b)
    tile = tiling.similarity_forward(d, a.dtype, True)
    splits, each = _splits(n, m, tile)
    values = torch.empty(splits, n, dtype=torch.float32, device=a.device)
    columns = torch.empty(splits, n, dtype=torch.int64, device=a.device)
    grid = (triton.cdiv(n, tile["BM"]), splits)
    launch.launch(best_kernel, grid, a, b, values, columns, n, m, d, each, **tile, device_of=a)
    return columns.gather(0, values.argmax(0, keepdim=True))[0]
