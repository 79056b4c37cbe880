"""CLIP's loss on the pairs of one batch on a GPU, the whole loss: three launches forward and two backward.

* forward: one walk over all tiles for both directions (1); the pairs' similarities, log-sum-exps, what the walk of
  gradients takes of them, and the losses of some pairs (2); their mean (3).
* backward: programs that own rows of x and others that own rows of y, in one grid (1); another kernel adds the parts
  that a block's programs have made and the pairs' own terms, and multiplies by the scale and the upstream gradient (2).
  The scale's own gradient is one program more of that. Rows whose gradient doesn't fit in registers take weights in
  memory. Of few a product of ours for both sides is the finish as well (products.py); of many there is torch's product
  for each side: two launches more.
"""

import torch
import triton
from torch import Tensor

from .. import launch, tiling
from ..arithmetic import no_gradient
from . import gpu_engine, products
from .composed import OwnImage
from .gpu_engine import Scaling, Side
from .gpu_views import total
from .of_views import state_rows
from .pair_kernels import finish_pairs_kernel, join_pairs_kernel, own_pairs_kernel, product_pairs_kernel

COLUMNS = 64  # of a row at a time, where nothing has to be known of all of it


def _tile(width: int) -> dict:
    return tiling.views_rows(min(width, COLUMNS))


def _scaling(learned: Tensor | None, logit_scale: float) -> Scaling:
    return Scaling(learned, True, 0.0, logit_scale)


def forward(x: Tensor, y: Tensor, learned: Tensor | None, logit_scale: float) -> tuple[Tensor, Tensor, Tensor]:
    x = x.contiguous()
    y = y.contiguous()
    n, d = x.shape
    scaling = _scaling(learned, logit_scale)
    own_pair = OwnImage(n, 0, n)
    sums_tile = tiling.similarity_sums(d, x.dtype)
    blocks = triton.cdiv(n, sums_tile["BM"])
    if 2 * blocks * n <= tiling.COLUMN_SUMS or blocks == 1:
        columns = gpu_engine.Parts.empty(blocks, n, scaling, x.device)
        tiles = range(triton.cdiv(n, sums_tile["BN"]))
        rows = gpu_engine.walk(x, y, scaling, own_pair, sums_tile, tiles, columns)
        others = None
    else:  # columns' sums don't fit in memory at once
        rows = columns = (None, None)
        in_tensor = gpu_engine.scaling_of(logit_scale if learned is None else learned, None, x, y)
        others = torch.stack(gpu_engine.both_log_sum_exps(x, y, in_tensor, own_pair))
    of_pairs = torch.empty(3, n, dtype=torch.float64, device=x.device)
    state = torch.empty(2, 2, state_rows(n), dtype=torch.float32, device=x.device)
    tile = _tile(d)
    programs = state.shape[2] // tile["ROWS"]
    losses = torch.empty(programs, dtype=torch.float64, device=x.device)
    launch.launch(
        join_pairs_kernel, (programs,), x, y, learned, logit_scale, *rows, *columns, others, of_pairs, state, losses,
        n, d, state.shape[2], *(0 if sums is None else len(sums) for _, sums in (rows, columns)), **tile, device_of=x,
    )  # fmt: skip
    loss = torch.empty((), dtype=torch.float32, device=x.device)
    total(losses, loss, 1 / (2 * n))
    return loss, of_pairs, state


def _sides(
    x: Tensor, y: Tensor, learned: Tensor | None, logit_scale: float, state: Tensor
) -> tuple[Side, Side, Scaling, OwnImage]:
    """What kernels of weights take."""
    return Side(x, *state[0]), Side(y, *state[1]), _scaling(learned, logit_scale), OwnImage(len(x), 0, len(x))


def _sums(
    x: Tensor, y: Tensor, learned: Tensor | None, logit_scale: float, state: Tensor, wanted: list[bool]
) -> tuple[Tensor, Tensor | None]:
    """`G @ y` and `G.T @ x` [parts, 2, N, D], and sums of G * similarities to be added, less the pairs' own terms.

    What isn't wanted may be anything.
    """
    n, d = x.shape
    tile = tiling.similarity_owner(d, x.dtype, True)
    if tile is not None and any(wanted[:2]):
        first_side = 0 if wanted[0] or wanted[2] else 1
        blocks = triton.cdiv(n, tile["BM"]) * ((2 if wanted[1] else 1) - first_side)
        splits, tiles_per_program = gpu_engine.splits_of(blocks, triton.cdiv(n, tile["BN"]))
        out = torch.empty(splits, 2, n, d, dtype=torch.float32, device=x.device)
        dots = torch.empty(splits, n, dtype=torch.float32, device=x.device) if wanted[2] else None
        launch.launch(
            own_pairs_kernel, (blocks, splits), x, y, learned, logit_scale, state, out, dots, n, d, state.shape[2],
            first_side, tiles_per_program, GAIN=launch.gain(x.dtype), **tile, device_of=x,
        )  # fmt: skip
        return out, dots
    out = torch.empty(1, 2, n if any(wanted[:2]) else 0, d, dtype=torch.float32, device=x.device)
    of_x, of_y = (out[0, side] if wanted[side] else None for side in range(2))
    sides = _sides(x, y, learned, logit_scale, state)
    dots = gpu_engine.weighted_by_bands(*sides, of_x, of_y, wanted[2], is_first=True)
    return out, gpu_engine.joined(dots)


def backward(
    upstream: Tensor,
    x: Tensor,
    y: Tensor,
    learned: Tensor | None,
    logit_scale: float,
    of_pairs: Tensor,
    state: Tensor,
    wanted: list[bool],
) -> tuple[list[Tensor], Tensor]:
    x = x.contiguous()
    y = y.contiguous()
    n, d = x.shape
    gradients = [torch.empty_like(z) if want else z.new_empty(0) for z, want in zip((x, y), wanted, strict=False)]
    of_scale = None if learned is None or not wanted[2] else torch.empty_like(learned)
    arguments = (x, y, learned, logit_scale, upstream, of_pairs, *gradients)
    first_side = 0 if wanted[0] else 1
    on_chip = tiling.similarity_owner(d, x.dtype, True) is not None
    if any(wanted[:2]) and not on_chip and products.fits(n, n, d, x.dtype):
        weights = products.memory(n, n, x)
        dots = gpu_engine.weigh(*_sides(x, y, learned, logit_scale, state), weights, of_scale is not None)
        tile = products.tile(x.dtype)
        of_rows = products.blocks_of(n, d, tile) * sum(wanted[:2])
        launch.launch(
            product_pairs_kernel, (of_rows + (of_scale is not None),), weights, *arguments, dots, of_scale, n, d,
            weights.stride(0) // 8, first_side, of_rows, 0 if dots is None else dots.numel(), 1 / (2 * n),
            GAIN=launch.gain(x.dtype), **tile, device_of=x,
        )  # fmt: skip
        return gradients, no_gradient(x) if of_scale is None else of_scale
    sums, dots = _sums(x, y, learned, logit_scale, state, wanted)
    tile = _tile(d)
    of_rows = triton.cdiv(n, tile["ROWS"]) * triton.cdiv(d, tile["BLOCK"]) * sum(wanted[:2])
    launch.launch(
        finish_pairs_kernel, (of_rows + (of_scale is not None),), sums, *arguments, dots, of_scale,
        n, d, first_side, of_rows, len(sums),
        0 if dots is None else dots.numel(), 1 / (2 * n), **tile, device_of=x,
    )  # fmt: skip
    return gradients, no_gradient(x) if of_scale is None else of_scale
