"""InfoNCE on a GPU, the whole loss: three launches forward and one or two backward.

* forward: unit rows of queries, positives and negatives, the positives' cosines, the factor (1); the walk over the
  negatives, log-sum-exps and the sums that a query's gradient is made of in one (2); log-sum-exps of all, the loss, and in
  other programs of that launch the gradients of queries and positives (3). Of more than FEW rows several programs make
  the loss, and another kernel adds what they have (4).
* backward: where negatives need a gradient, a walk by programs that own some of them (1); the upstream gradient, the way
  of negatives through the unit length, and as one program more the temperature's gradient (2).

Rows whose gradient doesn't fit in registers take weights in memory and torch's products of them. Where negatives are
constants, of which nothing is kept for backward, that is forward and three launches more; otherwise backward and two or
three, as the same weights make the negatives' gradient too.
"""

import torch
import triton
from torch import Tensor

from .. import launch, tiling
from ..arithmetic import UNIT_EPS, dense_rows
from . import composed, gpu_engine
from .gpu_engine import Side
from .gpu_views import inverse, scaling, total
from .of_views import state_rows
from .query_kernels import add_attended_kernel, finish_queries_kernel, join_queries_kernel, unit_queries_kernel

# Rows of which one program makes all log-sum-exps and the loss, in eight steps: predicted, some 12 us beside a walk of at
# least 50. A launch more would cost the host 3 to 8.
FEW = 8192


def _join_tile(rows: dict) -> dict:
    """Four log-sum-exps a thread: with so many registers as fewer rows get, a call of the logarithm spills."""
    warps = max(8, rows["num_warps"])
    return rows | {"ROWS": rows["ROWS"] * warps // rows["num_warps"], "AT_ONCE": 1024, "num_warps": warps}


def forward(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor,
    learned: Tensor | None,
    offset: int,
    temperature: float,
    wanted: list[bool],
) -> tuple[Tensor, ...]:
    n, d = query.shape
    m = len(negatives)
    given = [dense_rows(x) for x in (query, positive, negatives)]
    unit, unit_positive, others = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in given)
    of_rows = torch.empty(2, n, dtype=torch.float64, device=query.device)
    of_positives = torch.empty_like(of_rows)
    divisors = torch.empty(m, dtype=torch.float64, device=query.device)
    factor = torch.empty((), dtype=torch.float64, device=query.device)
    rows = tiling.views_rows(d)
    blocks = triton.cdiv(n, rows["ROWS"])
    launch.launch(
        unit_queries_kernel, (blocks + triton.cdiv(m, rows["ROWS"]),), *given, learned, inverse(temperature, learned),
        unit, unit_positive, others, of_rows, of_positives, divisors, factor, n, m, d, *(x.stride(0) for x in given), EPS=UNIT_EPS,
        **rows, device_of=query,
    )  # fmt: skip
    scale = scaling(temperature, learned, factor, unit)
    own = composed.own_row(n, offset, m)
    on_chip = tiling.similarity_attend(d, unit.dtype)
    attends = wanted[0] or wanted[3]
    products = None
    if attends and on_chip is not None:
        parts, products = gpu_engine.walk_attending(unit, others, scale, own, on_chip)
    else:
        tile = tiling.similarity_sums(d, unit.dtype)
        parts = gpu_engine.walk(unit, others, scale, own, tile, range(triton.cdiv(m, tile["BN"])))
    state = torch.empty(2, state_rows(n), dtype=torch.float32, device=query.device)
    of_query, of_positive = (
        torch.empty(n, d, dtype=torch.float32, device=query.device) if want else None for want in wanted[:2]
    )
    slopes = torch.empty(n, dtype=torch.float64, device=query.device) if wanted[3] else None
    loss = torch.empty((), dtype=torch.float32, device=query.device)
    join = _join_tile(rows)
    few = n <= FEW
    rows_per_head = state.shape[1] if few else join["AT_ONCE"]
    heads = triton.cdiv(state.shape[1], rows_per_head)
    losses = loss if few else torch.empty(heads, dtype=torch.float64, device=query.device)
    of_gradients = triton.cdiv(n, join["ROWS"]) if attends or wanted[1] else 0
    launch.launch(
        join_queries_kernel, (heads + of_gradients,), *parts, products, unit, unit_positive, factor, of_rows,
        of_positives, state,
        of_query, slopes, of_positive, losses, n, d, state.shape[1], len(parts.sums), heads, rows_per_head, scale.pivot,
        RUNNING=scale.running, ALONE=few, EPS=UNIT_EPS, **join, device_of=query,
    )  # fmt: skip
    if not few:
        total(losses, loss, 1 / n)
    if attends and products is None and not wanted[2]:
        side = Side(unit, state[0] if scale.running else None, state[1])
        attended = gpu_engine.products(side, Side(others, None, None), scale, own, None)
        launch.launch(
            add_attended_kernel, (blocks,), attended, unit, of_rows, of_query, slopes, n, d, EPS=UNIT_EPS, **rows,
            device_of=query,
        )  # fmt: skip
    kept = (unit, of_rows, others, divisors, state)
    if not wanted[2]:
        kept = [x.new_empty(0) for x in kept]
    none = state.new_empty(0)
    of_query, of_positive = (none.clone() if x is None else x for x in (of_query, of_positive))
    return loss, of_query, of_positive, factor.new_empty(0) if slopes is None else slopes, *kept, factor


def backward(
    upstream: Tensor,
    of_query: Tensor,
    of_positive: Tensor,
    slopes: Tensor,
    unit: Tensor,
    of_rows: Tensor,
    others: Tensor,
    divisors: Tensor,
    state: Tensor,
    factor: Tensor,
    learned: Tensor | None,
    offset: int,
    temperature: float,
    count: int,
    dtype: torch.dtype,
    wanted: list[bool],
) -> list[Tensor]:
    n = count
    of_temperature = learned is not None and wanted[3]
    attended = along = sums = None
    m = 0
    if wanted[2]:
        m = len(others)
        scale = scaling(temperature, learned, factor, unit)
        own = composed.own_row(n, offset, m)
        queries = Side(unit, state[0] if scale.running else None, state[1])
        negatives = Side(others, None, None)
        tile = tiling.similarity_owner(others.shape[1], unit.dtype, scale.running)
        if tile is not None or not (wanted[0] or of_temperature):
            sums = gpu_engine.products(negatives, queries, scale, gpu_engine.transposed(own), tile)
        else:
            sums = torch.empty(1, *others.shape, dtype=torch.float32, device=unit.device)
            attended = torch.empty(unit.shape, dtype=torch.float32, device=unit.device) if wanted[0] else None
            dots = gpu_engine.weighted_by_bands(
                queries, negatives, scale, own, attended, sums[0], of_temperature, is_first=True
            )
            along = gpu_engine.lines(dots) if of_temperature else None
    given = [x if want else None for x, want in zip((of_query, of_positive, slopes), [*wanted[:2], of_temperature])]
    gradients = [
        torch.empty_like(x, dtype=dtype) if want else x.new_empty(0, dtype=dtype)
        for x, want in zip((of_query, of_positive, others), wanted, strict=False)
    ]
    gradients.append(torch.empty_like(learned) if of_temperature else factor.new_empty(0))
    asked = [x if want else None for x, want in zip(gradients, [*wanted[:3], of_temperature], strict=True)]
    widths = [x.shape[1] for x in (of_query, of_positive, others) if x.dim() == 2]
    d = widths[0] if widths else 1
    rows = tiling.views_rows(d)
    programs = triton.cdiv(n, rows["ROWS"]) if wanted[0] or wanted[1] else 0
    of_negatives = triton.cdiv(m, rows["ROWS"])
    launch.launch(
        finish_queries_kernel, (programs + of_negatives + of_temperature,), *given, attended, along, sums,
        *((None, None) if attended is None else (unit, of_rows)), *((None, None) if sums is None else (others, divisors)),
        factor, upstream, *asked, n, m, d, programs, of_negatives, 0 if sums is None else len(sums),
        0 if along is None else len(along), EPS=UNIT_EPS, **rows, device_of=factor,
    )  # fmt: skip
    return gradients
