"""The cross-entropy of student against teacher views, and the student's gradient, without a tensor of probabilities.

First every row's logsumexp, then for an image and a block of prototypes all views at once: the teacher's probabilities
are made there, for loss and gradient of every student view. Views are tuples of pointers: lists needn't lie in one
tensor.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launch, tiling
from ..arithmetic import compute_dtype, dense_rows, no_gradient
from . import reference
from .pairing import PAIRS, count, one_over_pairs, partners
from .row_logsumexp import dense, row_logsumexp


@triton.jit
def _probability(teacher, bias, lse, i_row, column, inside, stride, scale, COMPUTE: tl.constexpr):
    """A block of softmax(teacher * scale + bias) of one row, 0 outside and below the smallest normal number."""
    v = tl.load(teacher + tl.cast(i_row, tl.int64) * stride + column, inside, -float("inf")).to(COMPUTE) * scale
    if bias is not None:
        v += tl.load(bias + column, inside, 0)
    q = tl.exp(v - lse)
    return tl.where(q < (2.2250738585072014e-308 if tl.float64 == COMPUTE else 1.1754943508222875e-38), 0.0, q)


@triton.jit(do_not_specialize=["B"])
def _prototype_cross_entropy_kernel(
    student,  # tuple of S x [B, K]
    gradients,  # tuple of S x [B, K] contiguous, or None each
    teacher,  # tuple of T x [B, K]
    s_student,  # tuple of S row strides
    s_teacher,  # tuple of T row strides
    bias,  # tuple of T x [K], or None each
    student_lse,  # [S, B]
    teacher_lse,  # [T, B]
    weights,  # [B], or None
    losses,  # [B, blocks]
    B,
    K,
    STUDENT_SCALE: tl.constexpr,
    TEACHER_SCALE: tl.constexpr,
    S: tl.constexpr,
    T: tl.constexpr,
    PAIRS: tl.constexpr,
    MASSES: tl.constexpr,  # how many teacher views each student view is paired with
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # images in reverse: the logsumexp read the last ones last, and they may still be in the L2 cache
    blocks = tl.cdiv(K, BLOCK)
    i_row = B - 1 - tl.program_id(0) // blocks
    i_block = tl.program_id(0) % blocks
    column = i_block * BLOCK + tl.arange(0, BLOCK)
    inside = column < K
    scale = tl.full((), STUDENT_SCALE, COMPUTE)
    teacher_scale = tl.full((), TEACHER_SCALE, COMPUTE)
    weight = tl.full((), 1.0, COMPUTE)
    if weights is not None:
        weight = tl.load(weights + i_row)
    total = tl.zeros([BLOCK], COMPUTE)
    if PAIRS == 2 or (PAIRS == 0 and S > T):
        for t in tl.static_range(T):
            lse = tl.load(teacher_lse + t * B + i_row)
            total += _probability(teacher[t], bias[t], lse, i_row, column, inside, s_teacher[t], teacher_scale, COMPUTE)
    b_loss = tl.zeros([BLOCK], COMPUTE)
    for s in tl.static_range(S):
        y = total
        if PAIRS != 2 and s < T:  # a sum of its own: subtracting from the total would cancel
            y = tl.zeros([BLOCK], COMPUTE)
            for t in tl.static_range(T):
                if (t == s) == (PAIRS == 1):
                    lse = tl.load(teacher_lse + t * B + i_row)
                    y += _probability(
                        teacher[t], bias[t], lse, i_row, column, inside, s_teacher[t], teacher_scale, COMPUTE
                    )
        if MASSES[s] > 0:
            x = tl.load(student[s] + tl.cast(i_row, tl.int64) * s_student[s] + column, inside, 0).to(COMPUTE)
            log_p = x * scale - tl.load(student_lse + s * B + i_row)
            b_loss -= tl.where(inside & (y != 0), y * log_p, 0.0)  # 0 times -inf is 0
            if gradients[s] is not None:
                g = (MASSES[s] * tl.exp(log_p) - y) * weight
                tl.store(gradients[s] + tl.cast(i_row, tl.int64) * K + column, g, inside)
        else:
            if gradients[s] is not None:
                tl.store(gradients[s] + tl.cast(i_row, tl.int64) * K + column, tl.zeros([BLOCK], COMPUTE), inside)
    out = losses + tl.cast(i_row, tl.int64) * blocks + i_block
    tl.store(out, tl.sum(b_loss, 0) * weight)


@triton.jit(do_not_specialize=["B"])
def _statistics_kernel(
    teacher,  # tuple of T x [B, K]
    s_teacher,  # tuple of T row strides
    bias,  # tuple of T x [K], or None each
    teacher_lse,  # [T, B]
    mean,  # [K]
    usage,  # [K]
    entropies,  # [blocks]
    B,
    K,
    TEACHER_SCALE: tl.constexpr,
    T: tl.constexpr,
    COMPUTE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < K
    scale = tl.full((), TEACHER_SCALE, COMPUTE)
    logits = tl.zeros([BLOCK], COMPUTE)
    probabilities = tl.zeros([BLOCK], COMPUTE)
    entropy = tl.zeros([BLOCK], COMPUTE)
    for t in tl.static_range(T):
        for i in range(0, B, ROWS):
            i_row = i + tl.arange(0, ROWS)
            mask = (i_row < B)[:, None] & inside[None, :]
            start = i_row.to(tl.int64) * s_teacher[t]
            x = tl.load(teacher[t] + start[:, None] + column[None, :], mask, 0).to(COMPUTE)
            v = x * scale
            if bias[t] is not None:
                v += tl.load(bias[t] + column, inside, 0)[None, :]
            log_q = v - tl.load(teacher_lse + t * B + i_row, i_row < B, 0)[:, None]
            q = tl.where(mask, tl.exp(log_q), 0.0)
            logits += tl.sum(x, 0)
            probabilities += tl.sum(q, 0)
            entropy -= tl.sum(tl.where(q == 0, 0.0, q * log_q), 0)  # NaN stays
    tl.store(mean + column, logits / (B * T), inside)
    tl.store(usage + column, probabilities / (B * T), inside)
    tl.store(entropies + tl.program_id(0), tl.sum(entropy, 0) / (B * T))


class _Teacher(NamedTuple):
    """The teacher's views as the kernels take them."""

    views: tuple[Tensor, ...]  # T x [B, K] with dense rows
    biases: tuple[Tensor | None, ...]  # T x [K]
    temperature: float
    lse: Tensor  # [T, B]

    @property
    def strides(self) -> tuple[int, ...]:
        return tuple(view.stride(0) for view in self.views)

    def constants(self) -> dict:
        return {
            "TEACHER_SCALE": 1 / self.temperature,
            "T": len(self.views),
            "COMPUTE": launch.DTYPES[self.lse.dtype],
        }


def _logsumexps(views: tuple[Tensor, ...], biases: tuple, temperature: float, compute: torch.dtype) -> Tensor:
    """[V, B], of every view's rows `view / temperature + bias`; NaN where it is infinite."""
    out = torch.empty((len(views), len(views[0])), dtype=compute, device=views[0].device)
    for view, bias, lse in zip(views, biases, out, strict=True):
        row_logsumexp(view, bias, 1 / temperature, lse, softmax=True)
    return out


def _teacher_statistics(teacher: _Teacher) -> list[Tensor]:
    """The mean logits [K], the mean probabilities [K] and the mean entropy of a row, 0-dim."""
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
        k,
        **teacher.constants(),
        **tile,
        device_of=mean,
    )
    return [mean, usage, entropies.sum()]


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
    biases = (bias,) * teachers if bias is None or bias.dim() == 1 else tuple(bias.unbind())
    student_lse = _logsumexps(student_views, (None,) * views, student_temperature, compute)
    teacher_lse = _logsumexps(teacher_views, biases, teacher_temperature, compute)
    of_teacher = _Teacher(teacher_views, biases, teacher_temperature, teacher_lse)

    gradients = tuple(
        torch.empty((b, k), dtype=v.dtype, device=v.device) if w else None for v, w in zip(student, wanted, strict=True)
    )
    tile = tiling.prototype_cross_entropy(compute)
    blocks = triton.cdiv(k, tile["BLOCK"])
    losses = student_lse.new_empty(b, blocks)
    launch.launch(
        _prototype_cross_entropy_kernel,
        (blocks * b,),
        student_views,
        gradients,
        teacher_views,
        tuple(v.stride(0) for v in student_views),
        of_teacher.strides,
        biases,
        student_lse,
        teacher_lse,
        weights,
        losses,
        b,
        k,
        STUDENT_SCALE=1 / student_temperature,
        S=views,
        PAIRS=PAIRS[pairs],
        MASSES=tuple(partners(i, teachers, pairs) for i in range(views)),
        **of_teacher.constants(),
        **tile,
        device_of=losses,
    )
    over = one_over_pairs(weights, b, count(views, teachers, pairs), losses)
    returned = [no_gradient(v) if g is None else g for g, v in zip(gradients, student, strict=True)]
    extra = _teacher_statistics(of_teacher) if statistics else []
    return losses.sum() * over, returned, over / student_temperature, extra
