"""InfoNCE on a GPU, the whole loss: three launches forward and one or two backward.

* forward: unit rows of queries, positives and negatives, the positives' cosines, the factor (1); the walk over the
  negatives, log-sum-exps and the sums that a query's gradient is made of in one (2); log-sum-exps of all, the loss, and
  in other programs of that launch the gradients of queries and positives (3). Of more than FEW rows several programs
  make the loss, and another kernel adds what they have (4).
* backward: where negatives need a gradient, a walk by programs that own some of them (1); the upstream gradient, the
  way of negatives through the unit length, and as one program more the temperature's gradient (2).

Rows whose gradient doesn't fit in registers take weights in memory. Few rows have products of ours (query_products.py):
one launch more where negatives are constants, none otherwise. Of many torch multiplies. Where negatives are constants,
of which nothing is kept for backward, that is forward and three launches more; otherwise backward and two, as the same
weights make the negatives' gradient too.
"""

import functools
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .. import chips, launch, tiling
from ..arithmetic import UNIT_EPS, dense_rows
from . import composed, gpu_engine, query_products
from . import products as few_products
from .composed import OwnImage
from .gpu_engine import Parts, Scaling, Side
from .gpu_views import inverse, scaling, total
from .of_views import state_rows
from .query_kernels import add_attended_kernel, finish_queries_kernel, join_queries_kernel, unit_queries_kernel
from .sums import attend_kernel

# Rows of which one program makes all log-sum-exps and the loss, in eight steps: predicted, some 12 us beside a walk of
# at least 50. A launch more would cost the host 3 to 8.
FEW = 8192


MERGED = 5  # tiles that take as long as a program's sums of products, which are written and read again
MOST_PROGRAMS = 8  # for a multiprocessor: of more, what they write would be more than what is read


def _unit_tile(width: int) -> dict:
    """Of two rows beside one another; those that aren't whole words spill in 4 warps."""
    rows = tiling.views_rows(width)
    return rows | {"num_warps": 8} if width % 16 else rows


def _join_tile(rows: dict) -> dict:
    """Four log-sum-exps a thread: with so many registers as fewer rows get, a call of the logarithm spills."""
    return rows | {"AT_ONCE": 1024, "num_warps": max(8, rows["num_warps"])}


@functools.cache
def splits_in_waves(blocks: int, tiles: int, multiprocessors: int) -> tuple[int, int]:
    """How many programs share the walk of a block of rows, and how many of its tiles each takes.

    So that no multiprocessor waits for another: the time is that of the one with the most programs, of which two run at
    once and hide each other's products; one alone takes as long as both.
    """

    def time(splits: int) -> int:
        programs = triton.cdiv(blocks * splits, multiprocessors)  # of the multiprocessor with the most
        return triton.cdiv(programs, 2) * (triton.cdiv(tiles, splits) + MERGED)

    most = min(tiles, max(1, MOST_PROGRAMS * multiprocessors // blocks))
    tiles_per_program = triton.cdiv(tiles, min(range(1, most + 1), key=time))
    return triton.cdiv(tiles, tiles_per_program), tiles_per_program


def walk_attending(
    a: Tensor, b: Tensor, scaling: Scaling, own_image: OwnImage, tile: dict, running: bool
) -> tuple[Parts, Tensor]:
    """The rows' sums by program, and with them those of `exponentials @ b`, [parts, N, D] float32.

    tile: `tiling.similarity_attend`.
    """
    n, d = a.shape
    m = len(b)
    blocks = triton.cdiv(n, tile["BM"])
    tiles = triton.cdiv(m, tile["BN"])
    splits, tiles_per_program = splits_in_waves(blocks, tiles, chips.current().multiprocessors)
    sums = torch.empty(splits, n, dtype=torch.float32, device=a.device)
    parts = Parts(torch.empty_like(sums) if running else None, sums)
    out = torch.empty(splits, n, d, dtype=torch.float32, device=a.device)
    launch.launch(
        attend_kernel, (blocks, splits), a, b, scaling.factor, *parts, out, n, m, d,
        *gpu_engine.own_image_arguments(own_image), tiles_per_program, scaling.pivot,
        HAS_OWN_IMAGE=own_image.column_period > 0, RUNNING=running, GAIN=launch.gain(a.dtype), **tile, device_of=a,
    )  # fmt: skip
    return parts, out


def _shared_walk(n: int, m: int, d: int, dtype: torch.dtype, running: bool) -> query_products.Walk | None:
    tile = query_products.exponentials_tile(d, dtype, running)
    blocks = triton.cdiv(n, tile["BM"])
    splits, _ = splits_in_waves(blocks, triton.cdiv(m, tile["BN"]), chips.current().multiprocessors)
    return query_products.shared_walk(n, m, d, dtype, tile, splits)


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
    unit_tile = _unit_tile(d)
    launch.launch(
        unit_queries_kernel, (blocks + triton.cdiv(m, rows["ROWS"]),), *given, learned, inverse(temperature, learned),
        unit, unit_positive, others, of_rows, of_positives, divisors, factor, n, m, d, *(x.stride(0) for x in given),
        EPS=UNIT_EPS, **unit_tile, device_of=query,
    )  # fmt: skip
    scale = scaling(temperature, learned, factor, unit)
    own = composed.own_row(n, offset, m)
    # In float16 exponentials around one pivot for all, times launch.gain, are at most exp(1 / temperature) * 1024.
    running = scale.running or (unit.dtype == torch.float16 and 1 / temperature > 4)
    on_chip = tiling.similarity_attend(d, unit.dtype, running)
    attends = wanted[0] or wanted[3]
    products = None
    walk = _shared_walk(n, m, d, unit.dtype, running) if attends and on_chip is None and not wanted[2] else None
    if attends and on_chip is not None:
        parts, products = walk_attending(unit, others, scale, own, on_chip, running)
    elif walk is not None:
        parts, products = query_products.walk_attending(unit, others, scale, own, walk, running)
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


class Late(NamedTuple):
    """What a walk over negatives that need a gradient leaves to be finished."""

    sums: Tensor | None = None  # [parts, K, D] float32
    attended: Tensor | None = None  # [N, D] float32, where queries' gradients don't have it yet
    along: Tensor | None = None  # [parts] float64, where slopes don't have it yet


def _walk_of_negatives(
    unit: Tensor, others: Tensor, state: Tensor, scale: Scaling, own: OwnImage, tile: dict | None, wanted: list[bool]
) -> Late:
    queries = Side(unit, state[0] if scale.running else None, state[1])
    negatives = Side(others, None, None)
    if tile is not None or not (wanted[0] or wanted[3]):
        return Late(gpu_engine.products(negatives, queries, scale, gpu_engine.transposed(own), tile))
    sums = torch.empty(1, *others.shape, dtype=torch.float32, device=unit.device)
    attended = torch.empty(unit.shape, dtype=torch.float32, device=unit.device) if wanted[0] else None
    dots = gpu_engine.weighted_by_bands(
        queries, negatives, scale, own, attended, sums[0], wanted[3], is_first=True
    )  # fmt: skip
    return Late(sums, attended, gpu_engine.joined(dots))


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
    wanted = [*wanted[:3], wanted[3] and learned is not None]
    gradients = [
        torch.empty_like(x, dtype=dtype) if want else x.new_empty(0, dtype=dtype)
        for x, want in zip((of_query, of_positive, others), wanted, strict=False)
    ]
    gradients.append(factor.new_empty(0) if learned is None or not wanted[3] else torch.empty_like(learned))
    asked = [x if want else None for x, want in zip(gradients, wanted, strict=True)]
    late = Late()
    if wanted[2]:
        scale = scaling(temperature, learned, factor, unit)
        own = composed.own_row(count, offset, len(others))
        tile = tiling.similarity_owner(others.shape[1], unit.dtype, scale.running)
        if tile is None and few_products.fits(count, len(others), others.shape[1], unit.dtype):
            query_products.gradients(
                upstream, of_query, of_positive, slopes, unit, of_rows, others, divisors, state, factor, scale, own,
                asked,
            )  # fmt: skip
            return gradients
        late = _walk_of_negatives(unit, others, state, scale, own, tile, wanted)
    d = max(x.shape[-1] if x.numel() else 1 for x in gradients[:3])
    m = len(others) if wanted[2] else 0
    rows = tiling.views_rows(d)
    programs = triton.cdiv(count, rows["ROWS"]) if wanted[0] or wanted[1] else 0
    of_negatives = triton.cdiv(m, rows["ROWS"])
    launch.launch(
        finish_queries_kernel, (programs + of_negatives + wanted[3],), of_query if wanted[0] else None,
        of_positive if wanted[1] else None, slopes if wanted[3] else None, late.attended, late.along, late.sums,
        *((None, None) if late.attended is None else (unit, of_rows)),
        *((None, None) if late.sums is None else (others, divisors)), factor, upstream, *asked, count, m, d, programs,
        of_negatives, 0 if late.sums is None else len(late.sums), 0 if late.along is None else len(late.along),
        EPS=UNIT_EPS, **rows, device_of=factor,
    )  # fmt: skip
    return gradients
