"""NT-Xent on the views of one batch on a GPU, the whole loss: three or four launches forward and one to three backward.

Below some thousand rows a loss takes as long as its launches, so that nothing between the walks over tiles is torch's:

* forward: unit rows, the logits between an image's views, the factor (1); the walk (2); log-sum-exps, what the walk of
  gradients takes of them, and the loss (3). Of many rows several programs do that, and one adds their losses (4).
* backward: few rows are walked over by several programs for a block, whose sums another kernel adds, with the terms
  between views, the way through the unit length, the scale and the upstream gradient (two launches); of many, each
  program does all of that for its rows. A temperature's gradient is one launch more.
* Rows whose gradient doesn't fit in registers take weights in memory. Of few a product of ours finishes what it has
  (view_products.py: two launches, the temperature's gradient with them); of many torch multiplies, before that kernel.

Few rows have no half of tiles left out: without columns' sums there are so few parts to join that one program does.
"""

import torch
import triton
from torch import Tensor

from .. import launch, tiling
from ..arithmetic import UNIT_EPS, dense_rows, no_gradient
from . import gpu_engine, products, view_products
from .composed import OwnImage
from .gpu_engine import Scaling
from .of_views import state_rows
from .views import finish_views_kernel, join_views_kernel, own_views_kernel, total_kernel, unit_views_kernel


def as_one(views: list[Tensor]) -> tuple[Tensor, int, int, int]:
    """(a tensor, views, how many elements they are apart, how many their rows are), rows being dense."""
    if len(views) == 1:
        (z,) = views
        z = dense_rows(z)
        return z, z.shape[0], z.stride(0), z.stride(1)
    first, second = views
    if first.stride() != second.stride() or first.stride(1) != 1:
        # One copy of both. Of two the second, which is known by its distance alone, would be freed before it is read.
        return as_one([torch.stack(views)])
    return first, 2, (second.data_ptr() - first.data_ptr()) // first.element_size(), first.stride(0)


def inverse(temperature: float, learned: Tensor | None) -> float:
    """What views.factor_of takes beside a learned temperature, which leaves it unread."""
    return 1 / temperature if learned is None else 1.0


def scaling(temperature: float, learned: Tensor | None, factor: Tensor, unit: Tensor) -> Scaling:
    """As gpu_engine.scaling_of, of a factor that a kernel has written, or will have."""
    if learned is not None:
        return Scaling(factor, True, 0.0)
    return gpu_engine.scaling_of_number(1 / temperature, factor, unit.dtype)


def are_few(rows: int, width: int, dtype: torch.dtype, running: bool) -> bool:
    """Whether a block of rows' gradient is shared by several programs."""
    tile = tiling.similarity_owner(width, dtype, running)
    return rows <= tiling.PROGRAMS // 2 * (64 if tile is None else tile["BM"])


def _parts(flat: Tensor, scale: Scaling, own: OwnImage, few: bool) -> tuple[gpu_engine.SymmetricParts, Tensor | None]:
    """What the last walk leaves to be joined, and the log-sum-exps of those before it."""
    tile = tiling.similarity_sums(flat.shape[1], flat.dtype)
    if few:
        rows = gpu_engine.walk(flat, flat, scale, own, tile, range(triton.cdiv(len(flat), tile["BN"])))
        return gpu_engine.SymmetricParts(rows, None, 0), None
    before = None
    last = None
    for parts in gpu_engine.symmetric_parts(flat, scale, own, tile):
        if last is not None:
            lse = gpu_engine.join_parts(last.rows, last.columns, scale, last.met_once)
            before = lse if before is None else torch.logaddexp(before, lse)
        last = parts
    assert last is not None
    return last, before


def forward(
    views: list[Tensor], weights: Tensor | None, learned: Tensor | None, temperature: float, decoupled: bool
) -> tuple[Tensor, ...]:
    z, v, s_view, s_row = as_one(views)
    n, d = views[-1].shape[-2:]
    unit = torch.empty(v, n, d, dtype=z.dtype, device=z.device)
    # each in its own memory, as an operator's results must be
    divisors = torch.empty(v, n, dtype=torch.float64, device=z.device)
    lse = torch.empty_like(divisors)
    logits = torch.empty(v, v, n, dtype=torch.float64, device=z.device)
    factor = torch.empty((), dtype=torch.float64, device=z.device)
    tile = tiling.views_rows(d)
    launch.launch(
        unit_views_kernel, (triton.cdiv(n, tile["ROWS"]),), z, learned, inverse(temperature, learned), unit, divisors,
        logits, factor, n, d, v, s_view, s_row, EPS=UNIT_EPS, **tile, device_of=z,
    )  # fmt: skip
    scale = scaling(temperature, learned, factor, unit)
    few = are_few(v * n, d, z.dtype, scale.running)
    parts, before = _parts(unit.view(v * n, d), scale, OwnImage(n, 0, n), few)
    state = torch.empty(2, state_rows(v * n), dtype=torch.float32, device=z.device)
    loss = torch.empty((), dtype=torch.float32, device=z.device)
    join = tiling.join_rows(few)
    programs = 1 if few else triton.cdiv(v * n, join["BLOCK"])
    losses = loss if few else torch.empty(programs, dtype=torch.float64, device=z.device)
    columns = (None, None) if parts.columns is None else parts.columns
    lines = 0 if parts.columns is None else len(parts.columns.sums)
    launch.launch(
        join_views_kernel, (programs,), *parts.rows, *columns, before, logits,
        None if weights is None else weights.contiguous(), factor, lse, *state, losses, n, v, len(parts.rows.sums),
        lines, parts.met_once, v * n if few else join["BLOCK"], scale.pivot,
        DECOUPLED=decoupled, RUNNING=scale.running, ALONE=few, **join, device_of=z,
    )  # fmt: skip
    if not few:
        total(losses, loss, 1 / (v * n))
    return loss, unit, divisors, lse, state, factor


def total(
    sums: Tensor, out: Tensor, times: float, factor: Tensor | None = None, upstream: Tensor | None = None
) -> None:
    """`out = sums.sum() * times * factor**2 * upstream`, by one program."""
    launch.launch(
        total_kernel, (1,), sums, factor, upstream, out, sums.numel(), times, **tiling.total(), device_of=sums
    )  # fmt: skip


def backward(
    upstream: Tensor,
    unit: Tensor,  # [V, N, D]
    divisors: Tensor,
    lse: Tensor,
    state: Tensor,
    factor: Tensor,
    weights: Tensor | None,
    learned: Tensor | None,
    temperature: float,
    decoupled: bool,
    wanted: list[bool],
) -> tuple[Tensor, Tensor]:
    v, n, d = unit.shape
    flat = unit.view(v * n, d)
    scale = scaling(temperature, learned, factor, unit)
    weights = None if weights is None else weights.contiguous()
    tile = tiling.similarity_owner(d, unit.dtype, scale.running)
    with_temperature = learned is not None and wanted[1]
    if tile is None and products.fits(v * n, v * n, d, unit.dtype):
        of_temperature = torch.empty_like(learned) if with_temperature else None  # pyright: ignore[reportArgumentType]
        gradient = view_products.gradients(
            upstream, unit, divisors, lse, state, factor, weights, scale, decoupled, of_temperature
        )
        return gradient, no_gradient(lse) if of_temperature is None else of_temperature
    gradient = torch.empty_like(unit)
    pivots = state[0] if scale.running else None
    of_rows = (unit, divisors, lse, weights, factor, upstream)
    rows = tiling.views_rows(d)
    few = are_few(v * n, d, unit.dtype, scale.running)
    step = rows["ROWS"] if tile is None or few else tile["BM"]
    programs = triton.cdiv(v * n, step)
    along = torch.empty(programs, dtype=torch.float64, device=unit.device) if with_temperature else None
    if tile is not None and not few:
        sums = torch.empty(flat.shape, dtype=torch.float32, device=unit.device)
        launch.launch(
            own_views_kernel, (programs,), *of_rows, sums, gradient, along, pivots, state[1], n, v, d, scale.pivot,
            RUNNING=scale.running, DECOUPLED=decoupled, GAIN=launch.gain(unit.dtype), EPS=UNIT_EPS,
            ROWS=min(rows["ROWS"], tile["BM"]), **tile, device_of=unit,
        )  # fmt: skip
    else:
        side = gpu_engine.Side(flat, pivots, state[1])
        sums = gpu_engine.products(side, side, scale, OwnImage(n, 0, n), tile)
        launch.launch(
            finish_views_kernel, (programs,), sums, *of_rows, gradient, along, len(sums), n, v, d,
            EPS=UNIT_EPS, DECOUPLED=decoupled, **rows, device_of=unit,
        )  # fmt: skip
    if learned is None or along is None:
        return gradient, no_gradient(lse)
    of_temperature = torch.empty_like(learned)
    total(along, of_temperature, -1 / (2 * v * n), factor, upstream)
    return gradient, of_temperature
