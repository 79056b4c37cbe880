"""InfoNCE on a GPU, the whole loss: three launches forward and one or two backward.

* forward: unit rows of queries, positives and negatives, the positives' cosines, the factor (1); the walk over the
  negatives, log-sum-exps and the sums that a query's gradient is made of in one (2); log-sum-exps of all, what the walk
  of the negatives' gradient takes of them, those sums of all programs, and the loss (3). From FEW rows on several
  programs do the loss's part, and another kernel adds their losses (4).
* backward: where negatives need a gradient, a walk by programs that own some of them (1); the positives' terms, the way
  through the unit length, the scale, the upstream gradient, and as one program more the temperature's gradient (2).

Rows whose gradient doesn't fit in registers take weights in memory and torch's products of them, two launches more:
forward where negatives are constants, of which nothing is kept for backward; otherwise backward, where the same weights
make the negatives' gradient too.
"""

import torch
import triton
from torch import Tensor

from .. import launch, tiling
from ..arithmetic import UNIT_EPS, dense_rows, no_gradient
from . import composed, gpu_engine
from .gpu_engine import Side
from .gpu_views import inverse, scaling, total
from .of_queries import attends
from .of_views import state_rows
from .query_kernels import finish_queries_kernel, join_queries_kernel, unit_queries_kernel

FEW = 4096  # rows whose log-sum-exps and loss one program makes, in eight steps: about a launch
AT_ONCE = 512  # four rows a thread: with so many registers as fewer get, a call of the logarithm spills


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
    device = query.device
    unit = torch.empty(2, n, d, dtype=query.dtype, device=device)
    of_rows = torch.empty(5, n, dtype=torch.float64, device=device)
    others = torch.empty(m, d, dtype=query.dtype, device=device)
    divisors = torch.empty(m, dtype=torch.float64, device=device)
    factor = torch.empty((), dtype=torch.float64, device=device)
    rows = tiling.views_rows(d)
    blocks = triton.cdiv(n, rows["ROWS"])
    launch.launch(
        unit_queries_kernel, (blocks + triton.cdiv(m, rows["ROWS"]),), *given, learned, inverse(temperature, learned),
        unit, of_rows, others, divisors, factor, n, m, d, *(x.stride(0) for x in given), EPS=UNIT_EPS, **rows,
        device_of=query,
    )  # fmt: skip
    scale = scaling(temperature, learned, factor, unit)
    own = composed.own_row(n, offset, m)
    on_chip = tiling.similarity_attend(d, unit.dtype)
    products = None
    if attends(wanted) and on_chip is not None:
        parts, products = gpu_engine.walk_attending(unit[0], others, scale, own, on_chip)
    else:
        tile = tiling.similarity_sums(d, unit.dtype)
        parts = gpu_engine.walk(unit[0], others, scale, own, tile, range(triton.cdiv(m, tile["BN"])))
    state = torch.empty(2, state_rows(n), dtype=torch.float32, device=device)
    attended = torch.empty(n if attends(wanted) else 0, d, dtype=torch.float32, device=device)
    loss = torch.empty((), dtype=torch.float32, device=device)
    later = attends(wanted) and on_chip is None and not wanted[2]  # `attended` is a product of weights
    few = n <= FEW
    rows_per_head = state.shape[1] if few else AT_ONCE
    heads = triton.cdiv(state.shape[1], rows_per_head)
    losses = loss if few else torch.empty(heads, dtype=torch.float64, device=device)
    joins = attends(wanted) and not later
    launch.launch(
        join_queries_kernel, (heads + (blocks if joins else 0),), *parts, products, unit, factor,
        of_rows, state, attended if joins else None, losses, n, d, state.shape[1], len(parts.sums), heads,
        rows_per_head, scale.pivot, RUNNING=scale.running, ALONE=few, AT_ONCE=AT_ONCE, **rows, device_of=query,
    )  # fmt: skip
    if not few:
        total(losses, loss, 1 / n)
    if later:
        side = Side(unit[0], state[0] if scale.running else None, state[1])
        dots = gpu_engine.weighted_by_bands(
            side, Side(others, None, None), scale, own, attended, None, wanted[3], is_first=True
        )
        first = 0
        for part in dots:
            torch.sum(part, 0, dtype=torch.float64, out=of_rows[4, first : first + part.shape[1]])
            first += part.shape[1]
    if not wanted[2]:
        others, divisors = (x.new_empty(0) for x in (others, divisors))
    return loss, unit, of_rows, attended if attends(wanted) else no_gradient(attended), others, divisors, state, factor


def backward(
    upstream: Tensor,
    unit: Tensor,  # [2, N, D]
    of_rows: Tensor,
    attended: Tensor,
    negatives: Tensor,
    divisors: Tensor,
    state: Tensor,
    factor: Tensor,
    learned: Tensor | None,
    offset: int,
    temperature: float,
    wanted: list[bool],
) -> list[Tensor]:
    _, n, d = unit.shape
    m = len(negatives) if wanted[2] else 0
    with_temperature = wanted[3] and learned is not None
    scale = scaling(temperature, learned, factor, unit)
    along = of_rows[4:] if with_temperature else None
    sums = None
    if wanted[2]:
        of_queries = Side(unit[0], state[0] if scale.running else None, state[1])
        others = Side(negatives, None, None)
        own = composed.own_row(n, offset, m)
        tile = tiling.similarity_owner(d, unit.dtype, scale.running)
        if tile is not None or not attends(wanted):
            sums = gpu_engine.products(others, of_queries, scale, gpu_engine.transposed(own), tile)
        else:
            sums = torch.empty(1, m, d, dtype=torch.float32, device=unit.device)
            attended = torch.empty(n, d, dtype=torch.float32, device=unit.device)
            dots = gpu_engine.weighted_by_bands(
                of_queries, others, scale, own, attended, sums[0], with_temperature, is_first=True
            )
            along = gpu_engine.lines(dots) if with_temperature else None
    like = (unit[0], unit[0], negatives)
    gradients = [
        torch.empty_like(x) if want else x.new_empty(0) for x, want in zip(like, wanted[:3], strict=True)
    ]
    of_temperature = torch.empty_like(learned) if with_temperature else no_gradient(of_rows)
    rows = tiling.views_rows(d)
    of_rows_programs = triton.cdiv(n, rows["ROWS"]) if wanted[0] or wanted[1] else 0
    of_negatives_programs = triton.cdiv(m, rows["ROWS"])
    outputs = [x if want else None for x, want in zip(gradients, wanted[:3], strict=True)]
    launch.launch(
        finish_queries_kernel, (of_rows_programs + of_negatives_programs + with_temperature,),
        attended if wanted[0] else None, sums, unit, negatives if wanted[2] else None, of_rows,
        divisors if wanted[2] else None, along, factor, upstream, *outputs, of_temperature if with_temperature else None, n, m, d, of_rows_programs,
        of_negatives_programs, 1 if sums is None else len(sums), 0 if along is None else len(along), EPS=UNIT_EPS,
        **rows, device_of=unit,
    )  # fmt: skip
    return [*gradients, of_temperature]
