"""`torch.nn.functional.cross_entropy(logits, labels)` and its gradient `softmax(logits) - one_hot(labels)`, unscaled.

A row that fits in registers is read once. A longer one is read twice: once for the maximum and the sum of exponentials,
with one running maximum for the whole block (one for each element would cost a second exponential), and once for the
gradient, backwards: what was read last is still in the L2 cache.

Large gradients (but float16's) have their scale already, so that backward needn't read them again where it begins with
the loss: rows that aren't ignored are then counted before.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launch, tiling
from ..arithmetic import compute_dtype, dense_rows
from . import reference


@triton.jit
def _gradient(p, column, label, ignored, valid):
    """softmax - one_hot; 0 where the row is ignored, NaN where the label is none."""
    g = tl.where(column == label, p - 1, p)
    return tl.where(ignored, 0.0, tl.where(valid, g, float("nan")))


@triton.jit
def _smoothed_gradient(p, column, label, ignored, valid, epsilon, of_all, weight):
    """`_gradient` of a target that is `of_all` in every class and 1 - epsilon more at the label, weighted."""
    g = p - of_all
    g = tl.where(column == label, g - (1 - epsilon), g) * weight
    return tl.where(ignored, 0.0, tl.where(valid, g, float("nan")))


@triton.jit(do_not_specialize=["N", "ignore_index"])
def _cross_entropy_kernel(
    logits,  # [N, K], rows s_row * ALIGN apart
    labels,  # [N] int64
    gradient,  # [N, K] contiguous, or None
    sums,  # [programs], the losses of a program's rows; [N] with OF_ROWS, of each
    counts,  # [programs] int32, how many aren't ignored; None with OF_ROWS
    weights,  # [N], of rows in the gradient; rows of weight 0 are ignored; None without OF_ROWS
    smoothing,  # 0-dim; None without OF_ROWS
    one_over,  # 0-dim, what gradients are multiplied by; or None
    N,
    K,  # / ALIGN
    s_row,  # / ALIGN
    ignore_index,
    COMPUTE: tl.constexpr,
    OF_ROWS: tl.constexpr,  # with weights and label smoothing, the losses apart
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,  # >= K * ALIGN
):
    i_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    column = tl.arange(0, BLOCK)[None, :]
    inside = i_row < N
    mask = inside[:, None] & (column < K * ALIGN)
    label = tl.load(labels + i_row, inside, ignore_index).to(tl.int64)
    ignored = label == ignore_index
    valid = (label >= 0) & (label < K * ALIGN)

    b_logits = logits + launch.row_start(i_row, s_row, ALIGN)  # [ROWS]
    x = tl.load(b_logits[:, None] + column, mask, -float("inf")).to(COMPUTE)  # [ROWS, BLOCK]
    x_label = tl.load(b_logits + label, valid & inside, float("nan")).to(COMPUTE)
    maximum = tl.max(x, 1)
    e = tl.exp(x - maximum[:, None])
    total = tl.sum(e, 1)
    epsilon = tl.zeros((), COMPUTE)
    per_class = tl.zeros((), COMPUTE)
    weight = tl.zeros((), COMPUTE)
    if OF_ROWS:
        weight = tl.load(weights + i_row, inside, 0).to(COMPUTE)
        ignored = ignored | (weight == 0)
        epsilon = tl.load(smoothing).to(COMPUTE)
        per_class = 1 / tl.cast(K * ALIGN, COMPUTE)  # K may be the constant 1, which has no .to
        # no smoothing, and a logit of -inf: 0 times infinity would be NaN
        uniform = tl.sum(tl.where(mask, maximum[:, None] - x, 0.0), 1) * per_class
        uniform = tl.where(epsilon == 0, 0.0, epsilon * uniform)
        loss = tl.where(ignored, 0.0, tl.log(total) + ((1 - epsilon) * (maximum - x_label) + uniform))
        tl.store(sums + i_row, loss, inside)
    else:
        loss = tl.where(ignored, 0.0, tl.log(total) + (maximum - x_label))
        tl.store(sums + tl.program_id(0), tl.sum(loss, 0))
        tl.store(counts + tl.program_id(0), tl.sum((label != ignore_index).to(tl.int32), 0))
    if gradient is not None:
        p = e * (1 / total)[:, None]
        if OF_ROWS:
            g = _smoothed_gradient(
                p,
                column,
                label[:, None],
                ignored[:, None],
                valid[:, None],
                epsilon,
                epsilon * per_class,
                weight[:, None],
            )
        else:
            g = _gradient(p, column, label[:, None], ignored[:, None], valid[:, None])
        if one_over is not None:
            g *= tl.load(one_over)
        tl.store(gradient + launch.row_start(i_row, K, ALIGN)[:, None] + column, g, mask)


@triton.jit(do_not_specialize=["ignore_index"])
def _cross_entropy_long_kernel(
    logits,  # [N, K], rows s_row * ALIGN apart
    labels,  # [N] int64
    gradient,  # [N, K] contiguous, or None
    sums,  # [N]
    counts,  # [N] int32; None with OF_ROWS
    weights,  # [N], of rows in the gradient; rows of weight 0 are ignored; None without OF_ROWS
    smoothing,  # 0-dim; None without OF_ROWS
    one_over,  # 0-dim, what gradients are multiplied by; or None
    K,  # / ALIGN
    s_row,  # / ALIGN
    ignore_index,
    COMPUTE: tl.constexpr,
    OF_ROWS: tl.constexpr,  # with weights and label smoothing, the losses apart
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    i_row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    label = tl.load(labels + i_row)
    ignored = label == ignore_index
    valid = (label >= 0) & (label < K * ALIGN)

    row = logits + launch.row_start(i_row, s_row, ALIGN)
    x_label = tl.load(row + label, valid, float("nan")).to(COMPUTE)
    maximum = tl.full((), -float("inf"), COMPUTE)
    shift = tl.zeros((), COMPUTE)  # the maximum, but finite
    b_total = tl.zeros([BLOCK], COMPUTE)
    b_sum = tl.zeros([BLOCK], COMPUTE)
    for i in tl.range(0, K * ALIGN, BLOCK, num_stages=STAGES):
        mask = column < K * ALIGN - i
        x = tl.load(row + i + column, mask, -float("inf"), eviction_policy="evict_last").to(COMPUTE)
        new = tl.maximum(maximum, tl.max(x, 0))
        shift = launch.finite(new)
        b_total = b_total * tl.exp(launch.finite(maximum) - shift) + tl.exp(x - shift)
        maximum = new
        if OF_ROWS:
            b_sum += tl.where(mask, x, 0.0)
    total = tl.sum(b_total, 0)
    epsilon = tl.zeros((), COMPUTE)
    per_class = tl.zeros((), COMPUTE)
    weight = tl.zeros((), COMPUTE)
    if OF_ROWS:
        weight = tl.load(weights + i_row).to(COMPUTE)
        ignored = ignored | (weight == 0)
        epsilon = tl.load(smoothing).to(COMPUTE)
        per_class = 1 / tl.cast(K * ALIGN, COMPUTE)  # K may be the constant 1, which has no .to
        uniform = tl.where(epsilon == 0, 0.0, epsilon * (maximum - tl.sum(b_sum, 0) * per_class))
        loss = tl.where(ignored, 0.0, tl.log(total) + ((1 - epsilon) * (maximum - x_label) + uniform))
    else:
        loss = tl.where(ignored, 0.0, tl.log(total) + (maximum - x_label))
        tl.store(counts + i_row, (label != ignore_index).to(tl.int32))
    tl.store(sums + i_row, loss)
    if gradient is not None:
        out = gradient + launch.row_start(i_row, K, ALIGN)
        last_block = (K * ALIGN - 1) // BLOCK * BLOCK
        if one_over is not None:
            factor = tl.load(one_over)
        for done in tl.range(0, K * ALIGN, BLOCK, num_stages=STAGES):
            i = last_block - done
            mask = column < K * ALIGN - i
            x = tl.load(row + i + column, mask, 0, eviction_policy="evict_first").to(COMPUTE)
            p = tl.exp(x - shift) * (1 / total)
            if OF_ROWS:
                g = _smoothed_gradient(p, i + column, label, ignored, valid, epsilon, epsilon * per_class, weight)
            else:
                g = _gradient(p, i + column, label, ignored, valid)
            if one_over is not None:
                g *= factor
            tl.store(out + i + column, g, mask, eviction_policy="evict_first")


@triton.jit(do_not_specialize=["N", "ignore_index"])
def _one_over_count_kernel(labels, out, N, ignore_index, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    count = tl.zeros([BLOCK], tl.int32)
    for i in range(0, N, BLOCK):
        label = tl.load(labels + i + index, index < N - i, ignore_index).to(tl.int64)
        count += (label != ignore_index).to(tl.int32)
    tl.store(out, 1 / tl.sum(count, 0).to(out.dtype.element_ty))


def cross_entropy(
    logits: Tensor,  # [N, K]
    labels: Tensor,  # [N] int64
    ignore_index: int,
    wanted: list[bool],
) -> tuple[Tensor, list[Tensor], Tensor]:
    if logits.dtype not in launch.DTYPES:
        return reference.cross_entropy(logits, labels, ignore_index, wanted)
    one_over = None
    if wanted[0] and logits.dtype != torch.float16 and logits.numel() >= tiling.SCALED_AHEAD:
        one_over = _one_over_count(labels, ignore_index, compute_dtype(logits.dtype))
    gradient, sums, counts = _launched(logits, labels, None, None, ignore_index, wanted[0], one_over)
    if one_over is not None:
        loss, scale = launch.total(sums, 1.0, 1.0, over=one_over)
    else:
        loss, scale = launch.mean(sums, counts)
    return loss, [gradient], scale


def _one_over_count(labels: Tensor, ignore_index: int, compute: torch.dtype) -> Tensor:
    """1 / (how many rows aren't ignored), 0-dim."""
    out = torch.empty((), dtype=compute, device=labels.device)
    arguments = labels.contiguous(), out, len(labels), ignore_index
    launch.launch(_one_over_count_kernel, (1,), *arguments, **tiling.mean_of_rows(), device_of=labels)
    return out


def cross_entropy_rows(
    logits: Tensor,  # [N, K]
    labels: Tensor,  # [N] int64
    weights: Tensor,  # [N]
    label_smoothing: Tensor,  # 0-dim
    ignore_index: int,
    wanted: list[bool],
) -> tuple[Tensor, list[Tensor]]:
    if logits.dtype not in launch.DTYPES:
        return reference.cross_entropy_rows(logits, labels, weights, label_smoothing, ignore_index, wanted)
    gradient, losses, _ = _launched(logits, labels, weights, label_smoothing, ignore_index, wanted[0])
    return losses, [gradient]


def _launched(
    logits: Tensor,
    labels: Tensor,
    weights: Tensor | None,
    label_smoothing: Tensor | None,
    ignore_index: int,
    wanted: bool,
    one_over: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient, and losses and numbers of rows by program; with weights the losses of rows."""
    n, k = logits.shape
    logits = dense_rows(logits)
    compute = compute_dtype(logits.dtype)
    gradient = torch.empty((n, k), dtype=logits.dtype, device=logits.device) if wanted else None
    align = launch.alignment(logits)
    tile = tiling.cross_entropy(k, compute)
    programs = n if tile is None else triton.cdiv(n, tile["ROWS"])
    of_rows = weights is not None and label_smoothing is not None
    sums = torch.empty(n if of_rows else programs, dtype=compute, device=logits.device)
    counts = torch.empty(programs, dtype=torch.int32, device=logits.device)
    launch.launch(
        _cross_entropy_long_kernel if tile is None else _cross_entropy_kernel,
        (programs,),
        logits,
        labels.contiguous(),
        gradient,
        sums,
        None if of_rows else counts,
        weights.contiguous() if of_rows else None,
        label_smoothing if of_rows else None,
        one_over,
        *([] if tile is None else [n]),
        k // align,
        logits.stride(0) // align,
        ignore_index,
        COMPUTE=launch.DTYPES[compute],
        OF_ROWS=of_rows,
        ALIGN=align,
        **(tile or tiling.cross_entropy_long(compute, of_rows)),
        device_of=logits,
    )
    return logits.new_empty(0) if gradient is None else gradient, sums, counts
