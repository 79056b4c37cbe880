"""Contrastive losses on the CPU whose similarities fit one tile: loss and gradients at once, each exponential once.

The engine makes similarities in the forward pass and again in the backward pass, as it may not keep them. A single tile
(`tiling.CPU_TILE`) may stay: that is a product fewer, and two calls of C++ in place of some twenty small steps of torch
(CLIP of 512 pairs x 512: 3.4 ms, and 5.8 without).

Each function returns None where the tile is too large, an argument isn't plain and dense, or the logits' range is too
wide for one shift; whoever calls then goes the long way.
"""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import _C, tiling
from ..arithmetic import compute_dtype
from ..native import CODES, Found, address, scalar
from ..plain import plain
from . import cpu_engine


def _fits(x: Tensor, y: Tensor, rows: int) -> bool:
    """Whether both are plain and [N, D] of one shape and dtype, and so many rows squared fit a tile."""
    return (
        3 < rows <= tiling.CPU_TILE
        and x.shape == y.shape
        and x.dtype == y.dtype
        and x.dtype in CODES
        and x.shape[1] > 0
        and plain((x, y))
    )


def _alone(function: Callable[..., Found | None]) -> Callable[..., Found | None]:
    """Without autograd, and without autocast, which would make the products bfloat16: no dispatcher sees to it here."""

    @functools.wraps(function)
    def run(*args, **options) -> Found | None:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            return function(*args, **options)

    return run


def _total(
    similarities: Tensor, a: Tensor, b: Tensor, distance: int, factor: float, decoupled: bool, wanted: bool
) -> float | None:
    """The sum of the losses; the similarities become the weights. None: their range is too wide."""
    found, total = _C.one_tile(
        CODES[a.dtype],
        address(similarities),
        len(a),
        address(a),
        address(b),
        a.shape[1],
        distance,
        cpu_engine.away_from_zero(factor),
        decoupled,
        wanted,
        torch.get_num_threads(),
    )
    return total if found else None


@_alone
def of_two_views(
    z0: Tensor,  # [N, D]
    z1: Tensor,  # [N, D]
    temperature: float,
    wanted: Sequence[bool],
    *,
    decoupled: bool = False,
    normalize: bool = True,
) -> Found | None:
    """NT-Xent, and DCL if decoupled."""
    n = z0.shape[0]
    if not _fits(z0, z1, 2 * n):
        return None
    dtype = compute_dtype(z0.dtype)
    unit = torch.empty(2 * n, z0.shape[1], dtype=dtype)
    divisors: list[Tensor | None] = []
    for i, z in enumerate((z0, z1)):
        rows = unit[i * n : (i + 1) * n]
        if normalize or z.dtype != dtype:
            divisors.append(cpu_engine.unit_rows(z, normalize, out=rows)[1])
        else:
            rows.copy_(z)
            divisors.append(None)
    weights = torch.mm(unit, unit.T)
    total = _total(weights, unit, unit, n, 1 / temperature, decoupled, any(wanted))
    if total is None:
        return None
    gradients = [
        cpu_engine.through_unit_rows(torch.mm(of_view, unit), rows, divisor, z0.dtype) if want else None
        for of_view, rows, divisor, want in zip(weights.split(n), unit.split(n), divisors, wanted, strict=True)
    ]
    factor = 1 / (2 * n * temperature)
    return Found(scalar(total / (2 * n), dtype), gradients, (factor, factor))


@_alone
def clip_loss(x: Tensor, y: Tensor, scale: Tensor, wanted: Sequence[bool]) -> Found | None:
    n = x.shape[0]
    if not _fits(x, y, n) or not plain((scale,)):
        return None
    a, _ = cpu_engine.unit_rows(x, False)
    b, _ = cpu_engine.unit_rows(y, False)
    factor = scale.item()
    weights = torch.mm(a, b.T)
    total = _total(weights, a, b, 0, factor, False, any(wanted))
    if total is None:
        return None
    gradients: list[Tensor | None] = [None, None, None]
    if wanted[0] or wanted[2]:
        of_rows = torch.mm(weights, b)
        if wanted[2]:  # the sum of weight * similarity, as similarities are a @ b.T
            size = of_rows.numel()
            dot = _C.dot(CODES[a.dtype], address(a), address(of_rows), size, torch.get_num_threads())
            gradients[2] = scalar(dot, scale.dtype)
        gradients[0] = of_rows.to(x.dtype) if wanted[0] else None
    if wanted[1]:
        gradients[1] = torch.mm(weights.T, a).to(y.dtype)
    each = 1 / (2 * n)
    return Found(scalar(total * each, a.dtype), gradients, (factor * each, factor * each, each))


@_alone
def siglip_loss(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, wanted: Sequence[bool]) -> Found | None:
    n = x.shape[0]
    if not _fits(x, y, n) or not plain((scale, bias)):
        return None
    a, _ = cpu_engine.unit_rows(x, False)
    b, _ = cpu_engine.unit_rows(y, False)
    factor = scale.item()
    slopes = torch.mm(a, b.T)
    sums = torch.zeros(3, n, dtype=torch.float64)
    _C.similarity_sigmoid(
        *(CODES[a.dtype], address(slopes), n, n, n),
        *(factor, bias.item()),
        *(0, 0, 0),  # of the tile in a larger square: its first row, a partner's distance, its first column
        *(address(part) for part in sums),
        torch.get_num_threads(),
    )
    total, of_bias, of_scale = sums.sum(1).tolist()
    gradients = [
        torch.mm(slopes, b).to(x.dtype) if wanted[0] else None,
        torch.mm(slopes.T, a).to(y.dtype) if wanted[1] else None,
        scalar(of_scale, scale.dtype) if wanted[2] else None,
        scalar(of_bias, bias.dtype) if wanted[3] else None,
    ]
    each = 1 / n
    return Found(scalar(total * each, a.dtype), gradients, (factor * each, factor * each, each, each))
