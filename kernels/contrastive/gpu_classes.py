"""The supervised contrastive loss of one rank's batch on a GPU, the whole loss: three or four launches forward and two
or three backward.

* forward: unit rows, classes and the factor (1); the walk, which sums a row's similarities with those of its class
  beside its exponentials (2); log-sum-exps, what the walk of gradients takes of them, and the loss (3). Of many rows
  several programs do that, and one adds their losses (4).
* backward: the walk over tiles, whose weights are probabilities less what a class pulls (1), and the way through the
  unit length, with the scale and the upstream gradient (2). A temperature's gradient is one launch more, as is torch's
  product where a row's gradient doesn't fit in registers.

Of many rows that are all anchors the walk goes over half of the tiles. Classes come as int64 ids of images. The first
kernel finds the first image of each class, by comparing all ids: V V times fewer comparisons than the walk has pairs,
which then are of 32 bits.
"""

import torch
import triton
from torch import Tensor

from .. import chips, launch, tiling
from ..arithmetic import UNIT_EPS, dense_rows, no_gradient
from . import gpu_engine
from .class_kernels import finish_classes_kernel, join_classes_kernel, unit_classes_kernel
from .composed import OwnImage
from .gpu_engine import Classes, Scaling
from .gpu_views import are_few, inverse, scaling, total
from .of_views import state_rows


def _scaling(temperature: float, learned: Tensor | None, factor: Tensor, unit: Tensor, normalize: bool) -> Scaling:
    """Rows as they come may be of any length, so that pivots are running."""
    return scaling(temperature, learned, factor, unit) if normalize else Scaling(factor, True, 0.0)


def _unit_tile(width: int) -> dict:
    """Comparisons of ids beside a row's numbers in 64 registers spill on sm_120."""
    tile = tiling.views_rows(width)
    return tile | {"num_warps": max(8, tile["num_warps"])}


def _sums_tile(width: int, dtype: torch.dtype) -> dict:
    tile = tiling.similarity_sums(width, dtype)
    return tile | {"num_warps": 8} if tile["WHOLE"] else tile  # 4 spill beside classes: 3 on sm_90, 53 on sm_100


def _owner_tile(width: int, dtype: torch.dtype, running: bool) -> dict | None:
    tile = tiling.similarity_owner(width, dtype, running)
    if tile is None:
        return None
    if not tile["EVEN"]:
        return tile | {"num_warps": 8}  # 4 spill on sm_80 and sm_90
    if tile["BLOCK_D"] > 128 and chips.current().capability < 90:
        return tile | {"BM": 64}  # 128 spill 29 on sm_80
    return tile


def _parts(
    flat: Tensor, anchors: int, scale: Scaling, classes: Classes, few: bool
) -> tuple[gpu_engine.SymmetricParts, Tensor | None]:
    """What the last walk leaves to be joined, and the log-sum-exps of those before it."""
    rows = len(flat)
    own = OwnImage(anchors, 0, rows)
    tile = _sums_tile(flat.shape[1], flat.dtype)
    if few or anchors < rows:
        tiles = range(triton.cdiv(rows, tile["BN"]))
        of_rows = gpu_engine.walk(flat[:anchors], flat, scale, own, tile, tiles, classes=classes)
        return gpu_engine.SymmetricParts(of_rows, None, 0), None
    *earlier, last = gpu_engine.symmetric_parts(flat, scale, own, tile, classes)
    before = None
    for parts in earlier:
        lse = gpu_engine.join_parts(parts.rows, parts.columns, scale, parts.met_once)
        before = lse if before is None else torch.logaddexp(before, lse)
    return last, before


def forward(
    z: Tensor, ids: Tensor | None, learned: Tensor | None, temperature: float, one_anchor: bool, normalize: bool
) -> tuple[Tensor, ...]:
    z = dense_rows(z)
    v, n, d = z.shape
    rows = v * n
    anchors = n if one_anchor else rows
    unit = torch.empty(v, n, d, dtype=z.dtype, device=z.device)
    # each in its own memory, as an operator's results must be
    lse = torch.empty(v, n, dtype=torch.float64, device=z.device)
    divisors = torch.empty_like(lse) if normalize else None
    table = torch.empty(2, state_rows(rows), dtype=torch.int32, device=z.device)
    factor = torch.empty((), dtype=torch.float64, device=z.device)
    tile = _unit_tile(d)
    launch.launch(
        unit_classes_kernel, (triton.cdiv(n, tile["ROWS"]),), z, None if ids is None else ids.contiguous(), learned,
        inverse(temperature, learned), unit, divisors, table, factor, n, d, v, 1 if one_anchor else v, table.shape[1],
        z.stride(0), z.stride(1), EPS=UNIT_EPS, **tile, device_of=z,
    )  # fmt: skip
    scale = _scaling(temperature, learned, factor, unit, normalize)
    few = are_few(rows, d, z.dtype, scale.running)
    classes = Classes(table[0], [])
    parts, before = _parts(unit.view(rows, d), anchors, scale, classes, few)
    positives = classes.positives[0] if len(classes.positives) == 1 else torch.cat(classes.positives)
    state = torch.empty(3, table.shape[1], dtype=torch.float32, device=z.device)
    loss = torch.empty((), dtype=torch.float32, device=z.device)
    join = tiling.join_rows(few)
    programs = 1 if few else triton.cdiv(table.shape[1], join["BLOCK"])
    losses = loss if few else torch.empty(programs, dtype=torch.float64, device=z.device)
    columns = (None, None) if parts.columns is None else parts.columns
    lines = 0 if parts.columns is None else len(parts.columns.sums)
    launch.launch(
        join_classes_kernel, (programs,), *parts.rows, *columns, before, positives, table, factor, lse, state, losses,
        anchors, rows, table.shape[1], len(parts.rows.sums), lines, parts.met_once, len(positives),
        table.shape[1] if few else join["BLOCK"], scale.pivot, RUNNING=scale.running, ALONE=few, **join, device_of=z,
    )  # fmt: skip
    if not few:
        total(losses, loss, 1 / anchors)
    return loss, unit, lse.new_empty(0) if divisors is None else divisors, lse, table, state, factor


def backward(
    upstream: Tensor,
    unit: Tensor,  # [V, N, D]
    divisors: Tensor,
    lse: Tensor,
    table: Tensor,
    state: Tensor,
    factor: Tensor,
    learned: Tensor | None,
    temperature: float,
    one_anchor: bool,
    normalize: bool,
    wanted: list[bool],
) -> tuple[Tensor, Tensor]:
    v, n, d = unit.shape
    rows = v * n
    anchors = n if one_anchor else rows
    scale = _scaling(temperature, learned, factor, unit, normalize)
    flat = unit.view(rows, d)
    side = gpu_engine.Side(flat, state[0] if scale.running else None, state[1], table[0], state[2])
    owner = _owner_tile(d, unit.dtype, scale.running)
    sums = gpu_engine.products(side, side, scale, OwnImage(rows, 0, rows), owner)
    gradient = torch.empty_like(unit)
    tile = tiling.views_rows(d)
    programs = triton.cdiv(rows, tile["ROWS"])
    with_temperature = learned is not None and wanted[1]
    along = torch.empty(programs, dtype=torch.float64, device=unit.device) if with_temperature else None
    launch.launch(
        finish_classes_kernel, (programs,), sums, flat, divisors if normalize else None, factor, upstream, gradient,
        along, len(sums), rows, d, 1 / anchors, EPS=UNIT_EPS, **tile, device_of=unit,
    )  # fmt: skip
    if learned is None or along is None:
        return gradient, no_gradient(lse)
    of_temperature = torch.empty_like(learned)
    total(along, of_temperature, -1 / (2 * anchors), factor, upstream)
    return gradient, of_temperature
