"""SigLIP's loss on a GPU, of the pairs of one batch or of parts of it: two launches and a product for each gradient.

A pair is a decision of its own, so that its loss and the derivatives are known as soon as its logit is:

* forward: a program makes a tile of similarities, three sums of it and the derivatives (1), which torch multiplies with
  the rows of either side (2); the loss and its derivatives by the scale and the bias are sums of the programs' (1).
  Of very many pairs a band of rows' derivatives is in memory at a time.
* backward: both gradients, and those of a learned scale and bias, times the upstream gradient (1).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launch, tiling
from ..arithmetic import no_gradient
from . import gpu_engine
from .tiles import load_rows
from .weights import sigmoid_kernel

COLUMNS = 64  # of a row at a time, as nothing has to be known of all of it


@triton.jit(do_not_specialize=["parts"])
def sigmoid_totals_kernel(
    sums,  # [3, parts] float64
    loss,  # 0-dim, the first sum times `times`
    derivatives,  # [2] float64, the others
    parts,
    times: tl.float64,
    BLOCK: tl.constexpr,
):
    which = tl.program_id(0)
    total = launch.summed(sums + launch.row_start(which, parts, 1), parts, BLOCK) * tl.full((), times, tl.float64)
    if which == 0:
        tl.store(loss, total)
    else:
        tl.store(derivatives + which - 1, total)


@triton.jit(do_not_specialize=["N", "first_side", "of_rows"])
def finish_sigmoid_kernel(
    x_sum,  # [N, D] float32: `G @ y`, see weights.sigmoid_kernel
    y_sum,  # [N, D] float32: `G.T @ x`
    derivatives,  # [2] float64, by the scale and by the bias
    upstream,  # 0-dim
    factor,  # 0-dim, or None: the scale
    factor_number: tl.float64,  # otherwise
    x_gradient,  # [N, D]
    y_gradient,  # [N, D]
    of_scale,  # 0-dim, or None
    of_bias,  # 0-dim, or None
    N,
    D,
    first_side,  # 1: the rows of y alone
    of_rows,  # programs that finish rows; one more has the numbers
    each: tl.float64,  # 1 / N
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    upstream_value = tl.load(upstream).to(tl.float64)
    program = tl.program_id(0)
    if program < of_rows:
        scale = (launch.number(factor, factor_number) * upstream_value * tl.full((), each, tl.float64)).to(tl.float32)
        columns = tl.cdiv(D, BLOCK)
        blocks = tl.cdiv(N, ROWS)
        side = first_side + program // columns // blocks
        i_row = program // columns % blocks * ROWS + tl.arange(0, ROWS)
        first = program % columns * BLOCK
        g = load_rows(launch.chosen((x_sum, y_sum), side), i_row, N, D, first, BLOCK) * scale
        out = launch.chosen((x_gradient, y_gradient), side)
        column = first + tl.arange(0, BLOCK)
        mask = (i_row < N)[:, None] & (column < D)[None, :]
        tl.store(out + launch.row_start(i_row, D, 1)[:, None] + column[None, :], g.to(out.dtype.element_ty), mask)
    else:
        if of_scale is not None:
            tl.store(of_scale, tl.load(derivatives) * upstream_value)
        if of_bias is not None:
            tl.store(of_bias, tl.load(derivatives + 1) * upstream_value)


def _sums(
    a: Tensor,
    b: Tensor,
    factor: Tensor | None,
    bias: Tensor | None,
    factor_number: float,
    bias_number: float,
    offset: int,
    wanted: list[bool],
) -> tuple[Tensor, list[Tensor]]:
    """By program the sums over pairs of loss, G * similarity and G, [3, parts] float64; and `G @ b` and `G.T @ a` in
    float32, empty where none is wanted. Rows are contiguous."""
    tile = tiling.similarity_sigmoid(a.dtype)
    m = len(b)
    column_blocks = triton.cdiv(m, tile["BN"])
    parts = triton.cdiv(len(a), tile["BM"]) * column_blocks  # a band has whole blocks of rows, but for the last
    sums = torch.empty(3, parts, dtype=torch.float64, device=a.device)
    of_a, of_b = (
        torch.empty(z.shape if want else 0, dtype=torch.float32, device=z.device)
        for z, want in zip((a, b), wanted, strict=True)
    )
    first_part = 0
    for rows, weights in gpu_engine.bands(a, b, any(wanted)):
        part = a[rows]
        n, d = part.shape
        programs = triton.cdiv(n, tile["BM"]) * column_blocks
        launch.launch(
            sigmoid_kernel, (programs,), part, b, factor, bias, factor_number, bias_number, weights, sums, n, m, d,
            offset + rows.start, first_part, parts, 0 if weights is None else weights.stride(0) // 8,
            GAIN=launch.gain(a.dtype), **tile, device_of=a,
        )  # fmt: skip
        first_part += programs
        if weights is not None and wanted[0]:
            gpu_engine.add_product(of_a[rows], weights, b, is_first=True)
        if weights is not None and wanted[1]:
            gpu_engine.add_product(of_b, weights.T, part, is_first=not rows.start)
    return sums, [of_a, of_b]


def _totals(sums: Tensor, loss: Tensor, times: float) -> Tensor:
    """The loss, and its derivatives by scale and bias [2]."""
    derivatives = torch.empty(2, dtype=torch.float64, device=sums.device)
    launch.launch(
        sigmoid_totals_kernel, (3,), sums, loss, derivatives, sums.shape[1], times, **tiling.total(), device_of=sums
    )  # fmt: skip
    return derivatives


def of_part(
    x: Tensor, y: Tensor, logit_scale: Tensor, logit_bias: Tensor, offset: int, wanted: list[bool]
) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    """The operator `siglip_loss`."""
    sums, of_rows = _sums(x.contiguous(), y.contiguous(), logit_scale, logit_bias, 0.0, 0.0, offset, wanted)
    loss = torch.empty((), dtype=torch.float64, device=x.device)
    of_scale, of_bias = _totals(sums, loss, 1.0).unbind()
    return loss, [of.to(x.dtype) for of in of_rows], of_scale.clone(), of_bias.clone()


def forward(
    x: Tensor,
    y: Tensor,
    learned_scale: Tensor | None,
    learned_bias: Tensor | None,
    logit_scale: float,
    logit_bias: float,
    wanted: list[bool],
) -> tuple[Tensor, list[Tensor], Tensor]:
    numbers = (learned_scale, learned_bias, logit_scale, logit_bias)
    sums, of_rows = _sums(x.contiguous(), y.contiguous(), *numbers, 0, wanted)
    loss = torch.empty((), dtype=torch.float32, device=x.device)
    derivatives = _totals(sums, loss, 1 / len(x))
    return loss, of_rows, derivatives


def backward(
    upstream: Tensor,
    sums: list[Tensor],
    derivatives: Tensor,
    learned_scale: Tensor | None,
    learned_bias: Tensor | None,
    logit_scale: float,
    dtype: torch.dtype,
    wanted: list[bool],
) -> tuple[list[Tensor], Tensor, Tensor]:
    gradients = [
        torch.empty(of.shape if want else 0, dtype=dtype, device=of.device)
        for of, want in zip(sums, wanted, strict=False)
    ]
    of_scale = None if learned_scale is None or not wanted[2] else torch.empty_like(learned_scale)
    of_bias = None if learned_bias is None or not wanted[3] else torch.empty_like(learned_bias)
    n, d = next((of.shape for of, want in zip(sums, wanted, strict=False) if want), (1, 1))
    tile = tiling.views_rows(min(d, COLUMNS))
    of_rows = triton.cdiv(n, tile["ROWS"]) * triton.cdiv(d, tile["BLOCK"]) * sum(wanted[:2])
    has_numbers = of_scale is not None or of_bias is not None
    if of_rows + has_numbers:
        launch.launch(
            finish_sigmoid_kernel, (of_rows + has_numbers,), *sums, derivatives, upstream, learned_scale, logit_scale,
            *gradients, of_scale, of_bias, n, d, 0 if wanted[0] else 1, of_rows, 1 / n, **tile, device_of=derivatives,
        )  # fmt: skip
    none = no_gradient(derivatives)
    return gradients, none if of_scale is None else of_scale, none.clone() if of_bias is None else of_bias
