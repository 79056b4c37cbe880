"""NT-Xent's gradient where rows are few and don't stay in registers, in two launches: see products.py.

The first makes the weights of a tile in each of its programs, and in others what is between the views of an image; the
second multiplies and finishes. Rows are numbered r = v N + n, as in views.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launch, tiling
from ..arithmetic import UNIT_EPS
from . import products
from .gpu_engine import Scaling
from .products import place, product, store_block, sum_of_all, sum_of_lines, through_unit
from .tiles import load_rows
from .views import pull_of_view
from .weights import as_stored, store_tile, weights_of_tile

OF_IMAGES = {"ROWS": 16, "BLOCK": 64}  # of rows of an image's views, whose logits are made by blocks of columns


@triton.jit(do_not_specialize=["N", "V", "s_out"])
def weigh_views_kernel(
    unit,  # [V, N, D]
    lse,  # [V, N] float64
    weights,  # [V, N] of the positives, or None
    factor,  # 0-dim float64
    pivots,  # [V N] float32 and more; None unless RUNNING
    adjustments,  # [V N] float32 and more
    out,  # [V N, V N] in whole tiles, rows s_out * 8 apart: G * GAIN, 0 between views of an image
    pulls,  # [V, V N] float32: what draws a row to each view of its image, which is subtracted from G
    radial,  # [blocks + 1, V N] float32, parts of <unit row, its gradient>: of blocks of columns, and of the pulls
    N,
    V,
    D,
    s_out,
    pivot,
    RUNNING: tl.constexpr,
    DECOUPLED: tl.constexpr,
    GAIN: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = N * V
    factor_value = tl.load(factor)
    blocks_a = tl.cdiv(rows, BM)
    blocks_b = tl.cdiv(rows, BN)
    program = tl.program_id(0)
    if program < blocks_a * blocks_b:
        block_a = program % blocks_a
        block_b = program // blocks_a
        g, s = weights_of_tile(
            unit, unit, factor_value, pivots, adjustments, pivots, adjustments, block_a, block_b, rows, rows, D, 0, N,
            0, N, pivot, True, RUNNING, BLOCK_D, BM, BN,
        )  # fmt: skip
        i_a = block_a * BM + tl.arange(0, BM)
        part = tl.sum(as_stored(g, unit.dtype.element_ty, GAIN) * s, 1)
        tl.store(radial + launch.row_start(block_b, rows, 1) + i_a, part, i_a < rows)
        store_tile(out, i_a, block_b * BN + tl.arange(0, BN), s_out, g * GAIN)
    else:
        i_row = (program - blocks_a * blocks_b) * ROWS + tl.arange(0, ROWS)
        inside = i_row < rows
        v = i_row // N
        b_lse = tl.load(lse + i_row, inside, 0.0)
        along = tl.zeros([ROWS], tl.float64)
        for j in range(0, V):
            other = j * N + i_row % N
            terms = tl.zeros([ROWS, BLOCK], tl.float64)
            for first in range(0, D, BLOCK):
                u = load_rows(unit, i_row, rows, D, first, BLOCK).to(tl.float32)
                terms += (u * load_rows(unit, other, rows, D, first, BLOCK).to(tl.float32)).to(tl.float64)
            cosine = tl.sum(terms, 1)
            pull = pull_of_view(cosine * factor_value, b_lse, lse, weights, i_row, other, inside, V, DECOUPLED)
            pull = tl.where(v != j, pull, 0.0)
            tl.store(pulls + launch.row_start(j, rows, 1) + i_row, pull.to(tl.float32), inside)
            along -= pull * cosine + launch.no_number(pull)
        tl.store(radial + launch.row_start(blocks_b, rows, 1) + i_row, along.to(tl.float32), inside)


@triton.jit(do_not_specialize=["N", "V", "s_weights", "lines"])
def product_views_kernel(
    weights,  # these three: see weigh_views_kernel
    pulls,
    radial,  # [lines, V N] float32
    unit,  # [V, N, D]
    divisors,  # [V, N] float64
    factor,  # 0-dim float64
    upstream,  # 0-dim
    gradient,  # [V, N, D]
    of_temperature,  # 0-dim, the temperature's gradient, by the first program; or None
    N,
    V,
    D,
    s_weights,
    lines,
    GAIN: tl.constexpr,
    EPS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    rows = N * V
    factor_value = tl.load(factor)
    scale = tl.load(upstream).to(tl.float64) * factor_value / rows
    program = tl.program_id(0)
    if of_temperature is not None:
        program -= 1
    if program >= 0:
        first_row, first_column = place(program, D, BM, BN)
        g = product(weights, unit, first_row, first_column, rows, D, s_weights, False, GAIN, BM, BN, BLOCK_K)
        i_row = first_row + tl.arange(0, BM)
        for j in range(0, V):
            pull = tl.load(pulls + launch.row_start(j, rows, 1) + i_row, i_row < rows, 0.0)
            other = load_rows(unit, j * N + i_row % N, rows, D, first_column, BN).to(tl.float32)
            g -= pull[:, None] * other
        along = sum_of_lines(radial, i_row, rows, lines)
        g = through_unit(g, along, unit, divisors, i_row, first_column, rows, D, EPS, BN)
        store_block(gradient, i_row, first_column, rows, D, g * scale.to(tl.float32), BN)
    elif of_temperature is not None:  # logits are quadratic in unit rows, and divided by the temperature
        tl.store(of_temperature, -sum_of_all(radial, lines * rows) / 2 * scale * factor_value)


def gradients(
    upstream: Tensor,
    unit: Tensor,  # [V, N, D]
    divisors: Tensor,
    lse: Tensor,
    state: Tensor,
    factor: Tensor,
    weights: Tensor | None,
    scaling: Scaling,
    decoupled: bool,
    of_temperature: Tensor | None,  # 0-dim, for the gradient
) -> Tensor:
    v, n, d = unit.shape
    rows = v * n
    tile = tiling.similarity_weights(d, unit.dtype)
    blocks = triton.cdiv(rows, tile["BN"])
    memory = products.memory(rows, rows, unit)
    pulls = torch.empty(v, rows, dtype=torch.float32, device=unit.device)
    radial = torch.empty(blocks + 1, rows, dtype=torch.float32, device=unit.device)
    launch.launch(
        weigh_views_kernel, (triton.cdiv(rows, tile["BM"]) * blocks + triton.cdiv(rows, OF_IMAGES["ROWS"]),), unit, lse,
        weights, factor, state[0] if scaling.running else None, state[1], memory, pulls, radial, n, v, d,
        memory.stride(0) // 8, scaling.pivot, RUNNING=scaling.running, DECOUPLED=decoupled,
        GAIN=launch.gain(unit.dtype), **OF_IMAGES, **tile, device_of=unit,
    )  # fmt: skip
    gradient = torch.empty_like(unit)
    tile = products.tile(unit.dtype)
    launch.launch(
        product_views_kernel, (products.blocks_of(rows, d, tile) + (of_temperature is not None),), memory, pulls,
        radial, unit, divisors, factor, upstream, gradient, of_temperature, n, v, d, memory.stride(0) // 8, len(radial),
        GAIN=launch.gain(unit.dtype), EPS=UNIT_EPS, **tile, device_of=unit,
    )  # fmt: skip
    return gradient
