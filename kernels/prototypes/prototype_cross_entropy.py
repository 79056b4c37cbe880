"""The cross-entropy of student against teacher views, and the student's gradient, without a tensor of probabilities.

First every row's logsumexp, of all views in one launch, then for an image and a block of prototypes all views at once:
the teacher's probabilities are made there, for loss and gradient of every student view. Views are tuples of pointers:
lists needn't lie in one tensor. Gradients have their scale already (not in float16, which may have no number so small),
so that backward needn't read them again where the loss is what it begins with.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launch, tiling
from ..arithmetic import compute_dtype, dense_rows, no_gradient
from ..native import scale_within
from . import reference
from .pairing import PAIRS, count, partners
from .row_logsumexp import dense, row_logsumexps


@triton.jit
def _probability(teacher, bias, lse, i_row, column, inside, stride, scale, COMPUTE: tl.constexpr, ALIGN: tl.constexpr):
    """A block of softmax(teacher * scale + bias) of one row, 0 outside and below the smallest normal number."""
    v = tl.load(teacher + launch.row_start(i_row, stride, ALIGN) + column, inside, -float("inf")).to(COMPUTE) * scale
    if bias is not None:
        v += tl.load(bias + column, inside, 0)
    q = tl.exp(v - lse)
    return tl.where(q < (2.2250738585072014e-308 if tl.float64 == COMPUTE else 1.1754943508222875e-38), 0.0, q)


@triton.jit(do_not_specialize=["B"])
def _prototype_cross_entropy_kernel(
    student,  # tuple of S x [B, K], rows s_student[v] * ALIGN apart
    gradients,  # tuple of S x [B, K] contiguous, or None each
    teacher,  # tuple of T x [B, K], rows s_teacher[v] * ALIGN apart
    s_student,  # tuple of S / ALIGN
    s_teacher,  # tuple of T / ALIGN
    bias,  # tuple of T x [K], or None each
    lse,  # [S + T, B]
    weights,  # [B], or None
    one_over,  # 0-dim, over the weights of all pairs of rows; None without weights
    losses,  # [B, blocks]
    B,
    K,  # / ALIGN
    student_scale: tl.float64,
    teacher_scale: tl.float64,
    gradient_scale: tl.float64,  # what gradients are multiplied by, beside weights and `one_over`
    S: tl.constexpr,
    T: tl.constexpr,
    PAIRS: tl.constexpr,
    MASSES: tl.constexpr,  # how many teacher views each student view is paired with
    SCALED: tl.constexpr,  # gradients are multiplied by `one_over`
    COMPUTE: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # images in reverse: the logsumexp read the last ones last, and they may still be in the L2 cache
    blocks = tl.cdiv(K * ALIGN, BLOCK)
    i_row = B - 1 - tl.program_id(0) // blocks
    i_block = tl.program_id(0) % blocks
    column = i_block * BLOCK + tl.arange(0, BLOCK)
    inside = column < K * ALIGN
    scale = tl.full((), student_scale, COMPUTE)
    sharp = tl.full((), teacher_scale, COMPUTE)
    weight = tl.full((), 1.0, COMPUTE)
    if weights is not None:
        weight = tl.load(weights + i_row)
    factor = weight * tl.full((), gradient_scale, COMPUTE)
    if SCALED:
        factor *= tl.load(one_over)
    total = tl.zeros([BLOCK], COMPUTE)
    if PAIRS == 2 or (PAIRS == 0 and S > T):
        for t in tl.static_range(T):
            of_row = tl.load(lse + (S + t) * B + i_row)
            total += _probability(
                teacher[t], bias[t], of_row, i_row, column, inside, s_teacher[t], sharp, COMPUTE, ALIGN
            )
    b_loss = tl.zeros([BLOCK], COMPUTE)
    for s in tl.static_range(S):
        y = total
        if PAIRS != 2 and s < T:  # a sum of its own: subtracting from the total would cancel
            y = tl.zeros([BLOCK], COMPUTE)
            for t in tl.static_range(T):
                if (t == s) == (PAIRS == 1):
                    of_row = tl.load(lse + (S + t) * B + i_row)
                    y += _probability(
                        teacher[t], bias[t], of_row, i_row, column, inside, s_teacher[t], sharp, COMPUTE, ALIGN
                    )
        if MASSES[s] > 0:
            x = tl.load(student[s] + launch.row_start(i_row, s_student[s], ALIGN) + column, inside, 0).to(COMPUTE)
            log_p = x * scale - tl.load(lse + s * B + i_row)
            b_loss -= tl.where(inside & (y != 0), y * log_p, 0.0)  # 0 times -inf is 0
            if gradients[s] is not None:
                g = (MASSES[s] * tl.exp(log_p) - y) * factor
                tl.store(gradients[s] + launch.row_start(i_row, K, ALIGN) + column, g, inside)
        else:
            if gradients[s] is not None:
                tl.store(gradients[s] + launch.row_start(i_row, K, ALIGN) + column, tl.zeros([BLOCK], COMPUTE), inside)
    out = losses + launch.row_start(i_row, blocks, 1) + i_block
    tl.store(out, tl.sum(b_loss, 0) * weight)


@triton.jit(do_not_specialize=["B"])
def _statistics_kernel(
    teacher,  # tuple of T x [B, K], rows s_teacher[v] * ALIGN apart
    s_teacher,  # tuple of T / ALIGN
    bias,  # tuple of T x [K], or None each
    lse,  # [S + T, B]
    mean,  # [K]
    usage,  # [K]
    entropies,  # [blocks]
    B,
    K,  # / ALIGN
    teacher_scale: tl.float64,
    S: tl.constexpr,
    T: tl.constexpr,
    COMPUTE: tl.constexpr,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < K * ALIGN
    scale = tl.full((), teacher_scale, COMPUTE)
    logits = tl.zeros([BLOCK], COMPUTE)
    probabilities = tl.zeros([BLOCK], COMPUTE)
    entropy = tl.zeros([BLOCK], COMPUTE)
    for t in tl.static_range(T):
        for i in range(0, B, ROWS):
            i_row = i + tl.arange(0, ROWS)
            mask = (i_row < B)[:, None] & inside[None, :]
            start = launch.row_start(i_row, s_teacher[t], ALIGN)
            x = tl.load(teacher[t] + start[:, None] + column[None, :], mask, 0).to(COMPUTE)
            v = x * scale
            if bias[t] is not None:
                v += tl.load(bias[t] + column, inside, 0)[None, :]
            log_q = v - tl.load(lse + (S + t) * B + i_row, i_row < B, 0)[:, None]
            q = tl.where(mask, tl.exp(log_q), 0.0)
            logits += tl.sum(x, 0)
            probabilities += tl.sum(q, 0)
            entropy -= tl.sum(tl.where(q == 0, 0.0, q * log_q), 0)  # NaN stays
    tl.store(mean + column, logits / (B * T), inside)
    tl.store(usage + column, probabilities / (B * T), inside)
    tl.store(entropies + tl.program_id(0), tl.sum(entropy, 0) / (B * T))


@triton.jit(do_not_specialize=["parts", "blocks"])
def _finish_kernel(
    losses,  # [parts]
    one_over,  # 0-dim, or None
    entropies,  # [blocks], or None
    loss,  # 0-dim
    scale,  # 0-dim
    entropy,  # 0-dim, or None
    parts,
    blocks,
    loss_factor: tl.float64,
    scale_value: tl.float64,
    SCALED: tl.constexpr,  # as in the kernel before: the scale has no `one_over`
    BLOCK: tl.constexpr,
):
    dtype: tl.constexpr = losses.dtype.element_ty
    total = launch.summed(losses, parts, BLOCK) * tl.full((), loss_factor, dtype)
    of_gradients = tl.full((), scale_value, dtype)
    if one_over is not None:
        total *= tl.load(one_over)
        if SCALED:
            of_gradients += launch.no_number(tl.load(one_over))
        else:
            of_gradients *= tl.load(one_over)
    tl.store(loss, total)
    tl.store(scale, of_gradients)
    if entropies is not None:
        tl.store(entropy, launch.summed(entropies, blocks, BLOCK))


class _Teacher(NamedTuple):
    """The teacher's views as the kernels take them."""

    views: tuple[Tensor, ...]  # T x [B, K] with dense rows
    biases: tuple[Tensor | None, ...]  # T x [K]
    temperature: float
    lse: Tensor  # [S + T, B]
    align: int  # the kernels' ALIGN, of the student's views too

    @property
    def strides(self) -> tuple[int, ...]:
        return tuple(view.stride(0) // self.align for view in self.views)

    def constants(self) -> dict:
        return {
            "teacher_scale": 1 / self.temperature,
            "S": len(self.lse) - len(self.views),
            "T": len(self.views),
            "COMPUTE": launch.DTYPES[self.lse.dtype],
            "ALIGN": self.align,
        }


def _teacher_statistics(teacher: _Teacher) -> tuple[Tensor, Tensor, Tensor]:
    """The mean logits [K], the mean probabilities [K], and the mean entropy of a row by blocks of prototypes."""
    b, k = teacher.views[0].shape
    tile = tiling.teacher_statistics(teacher.lse.dtype)
    blocks = triton.cdiv(k, tile["BLOCK"])
    mean = teacher.lse.new_empty(k)
    usage = teacher.lse.new_empty(k)
    entropies = teacher.lse.new_empty(blocks)
    launch.launch(
        _statistics_kernel,
        (blocks,),
        teacher.views,
        teacher.strides,
        teacher.biases,
        teacher.lse,
        mean,
        usage,
        entropies,
        b,
        k // teacher.align,
        **teacher.constants(),
        **tile,
        device_of=mean,
    )
    return mean, usage, entropies


def prototype_cross_entropy(
    student: list[Tensor],
    teacher: list[Tensor],
    student_temperature: float,
    teacher_temperature: float,
    teacher_bias: Tensor | None,
    pairs: str,
    weights: Tensor | None,
    statistics: bool,
    wanted: list[bool],
) -> tuple[Tensor, list[Tensor], Tensor, list[Tensor]]:
    compute = compute_dtype(student[0].dtype)
    if student[0].dtype not in launch.DTYPES or compute_dtype(teacher[0].dtype) != compute:
        arguments = (student_temperature, teacher_temperature, teacher_bias, pairs, weights, statistics, wanted)
        return reference.prototype_cross_entropy(student, teacher, *arguments)
    b, k = student[0].shape
    views, teachers = len(student), len(teacher)
    student_views = tuple(dense_rows(v) for v in student)
    teacher_views = tuple(dense_rows(v) for v in teacher)
    weights = dense(weights, compute)
    bias = dense(teacher_bias, compute)
    biases = None if bias is None else (bias,) * teachers if bias.dim() == 1 else tuple(bias.unbind())
    lse = torch.empty((views + teachers, b), dtype=compute, device=student[0].device)
    row_logsumexps(student_views, 1 / student_temperature, teacher_views, biases, 1 / teacher_temperature, lse)
    align = launch.alignment(*student_views, *teacher_views)
    of_teacher = _Teacher(teacher_views, biases or (None,) * teachers, teacher_temperature, lse, align)

    # over the pairs of rows; where they have weights, their number is a tensor
    number = count(views, teachers, pairs)
    over = 1 / (b * number) if weights is None else 1.0
    one_over = None if weights is None else launch.one_over(weights, number)
    in_kernel = scale_within(over / student_temperature, student[0].dtype)
    is_scaled = in_kernel != 1
    gradients = tuple(
        torch.empty((b, k), dtype=v.dtype, device=v.device) if w else None for v, w in zip(student, wanted, strict=True)
    )
    tile = tiling.prototype_cross_entropy(compute)
    blocks = triton.cdiv(k, tile["BLOCK"])
    losses = lse.new_empty(b, blocks)
    launch.launch(
        _prototype_cross_entropy_kernel,
        (blocks * b,),
        student_views,
        gradients,
        teacher_views,
        tuple(v.stride(0) // align for v in student_views),
        of_teacher.strides,
        of_teacher.biases,
        lse,
        weights,
        one_over,
        losses,
        b,
        k // align,
        student_scale=1 / student_temperature,
        gradient_scale=in_kernel,
        PAIRS=PAIRS[pairs],
        MASSES=tuple(partners(i, teachers, pairs) for i in range(views)),
        SCALED=is_scaled and one_over is not None,
        **of_teacher.constants(),
        **tile,
        device_of=losses,
    )
    mean, usage, entropies = _teacher_statistics(of_teacher) if statistics else (None, None, None)
    loss, scale = losses.new_empty(()), losses.new_empty(())
    entropy = None if entropies is None else losses.new_empty(())
    launch.launch(
        _finish_kernel,
        (1,),
        losses,
        one_over,
        entropies,
        loss,
        scale,
        entropy,
        losses.numel(),
        0 if entropies is None else len(entropies),
        over,
        1.0 if is_scaled else over / student_temperature,
        SCALED=is_scaled,
        **tiling.mean_of_rows(),
        device_of=losses,
    )
    returned = [no_gradient(v) if g is None else g for g, v in zip(gradients, student, strict=True)]
    return loss, returned, scale, [x for x in (mean, usage, entropy) if x is not None]
