"""The cross-entropy of logits `features @ prototypes.T` that are never in memory: an attention and its gradient.

The softmax of a row, times the student's prototypes, is an attention: y for a teacher's row, u for a student's. They
give loss and features' gradient, `lse - <x, y> / temperature` and `u - y`, in one walk over the prototypes. The
prototypes' gradient `(P - Q).T @ X` is a second walk: each program owns prototypes and computes their logits as
`prototypes @ features.T`, so no product takes a transposed result. Nothing is added by two programs, so bits repeat;
where rows are few, their prototypes are split into parts, which are joined in a fixed order.

Features wider than a block are multiplied in chunks; each chunk of the result's columns is a program of its own.
"""

import functools
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .. import chips, launch, tiling
from ..arithmetic import compute_dtype, no_gradient
from . import reference
from .pairing import PAIRS, count, one_over_pairs
from .prototype_head_kernels import attend_kernel, prototypes_kernel, views_kernel
from .row_logsumexp import dense


class _Side(NamedTuple):
    """The student or the teacher: rows, what their logits are made with, and their softmax in parts."""

    rows: Tensor  # [V B, D]
    prototypes: Tensor  # [K, D]
    bias: Tensor | None  # [1, K] for all views or [V, K]
    scale: float
    lse: Tensor  # [parts, V B]
    means: Tensor | None  # [parts, V B, D]: the softmax of a part of the prototypes @ the student's prototypes


def _pivot_stays(columns: int) -> bool:
    """Whether `attend_kernel` moves a row's pivot in a branch, with so many columns of the means in a program.

    The branch takes registers. On sm_90 and sm_100 a program of 256 columns has them; of fewer columns, two programs
    of an SM wouldn't; and on sm_80 it spills.
    """
    return columns == 256 and chips.current().capability in (90, 100)


def _parts(blocks: int, walk: int, chunks: int) -> int:
    """Into how many parts the walks of `blocks` programs are split, so that there are programs enough."""
    return max(1, min(walk, tiling.PROGRAMS // (blocks * chunks)))


def _attend(
    rows: Tensor, keys: Tensor, values: Tensor | None, bias: Tensor | None, scale: float, wanted: bool
) -> _Side:
    """Softmax over the prototypes `keys`, in parts; and its product with `values` (None: the keys), if wanted."""
    n, d = rows.shape
    k = len(keys)
    compute = compute_dtype(rows.dtype)
    views = 1 if bias is None else len(bias)
    tile = tiling.prototype_head(d, rows.dtype, owner=False)
    if not wanted:
        tile["CHUNKS"] = 1
    row_blocks = triton.cdiv(n // views, tile["BM"])
    key_blocks = triton.cdiv(k, tile["BN"])
    blocks_of_part = triton.cdiv(key_blocks, _parts(row_blocks * views, key_blocks, tile["CHUNKS"]))
    parts = triton.cdiv(key_blocks, blocks_of_part)
    lse = torch.empty((parts, n), dtype=compute, device=rows.device)
    means = torch.empty((parts, n, d), dtype=compute, device=rows.device) if wanted else None
    launch.launch(
        attend_kernel,
        (row_blocks, parts * tile["CHUNKS"], views),
        rows,
        keys,
        values,
        bias,
        lse,
        means,
        n // views,
        k,
        d,
        blocks_of_part,
        scale,
        GAIN=launch.gain(rows.dtype),
        COMPUTE=launch.DTYPES[compute],
        STAYS=_pivot_stays(tile["BLOCK_D"]),
        **tile,
        device_of=rows,
    )
    return _Side(rows, keys, bias, scale, lse, means)


class _Joined(NamedTuple):
    """What the parts of all views give, by image."""

    losses: Tensor  # [B]
    student_lse: Tensor  # [S, B]
    teacher_lse: Tensor  # [T, B]
    masses: Tensor  # [S, B]: the weight of a row, times the teacher views that it is paired with
    paired: Tensor | None  # [T, B, D]: the weighted sum of the student's rows that a teacher's row is paired with
    gradient: Tensor | None  # [S, B, D], of the student's rows


def _join(
    student: _Side,
    teacher: _Side,
    views: int,
    teachers: int,
    pairs: str,
    weights: Tensor | None,
    wanted: tuple[bool, bool],  # gradients of rows, and what those of prototypes need
) -> _Joined:
    x, compute = student.rows, student.lse.dtype
    b, d = len(x) // views, x.shape[1]
    joined = _Joined(
        losses=student.lse.new_empty(b),
        student_lse=student.lse.new_empty(views, b),
        teacher_lse=student.lse.new_empty(teachers, b),
        masses=student.lse.new_empty(views, b),
        paired=x.new_empty(teachers, b, d) if wanted[1] else None,
        gradient=x.new_empty(views, b, d) if wanted[0] else None,
    )
    launch.launch(
        views_kernel,
        (b,),
        x,
        student.lse,
        student.means,
        teacher.lse,
        teacher.means,
        weights,
        joined.student_lse,
        joined.teacher_lse,
        joined.masses,
        joined.paired,
        joined.gradient,
        joined.losses,
        b,
        d,
        len(student.lse),
        len(teacher.lse),
        student.scale,
        S=views,
        T=teachers,
        PAIRS=PAIRS[pairs],
        COMPUTE=launch.DTYPES[compute],
        **tiling.prototype_head_views(d),
        device_of=x,
    )
    return joined


def _prototypes_gradient(student: _Side, teacher: _Side, joined: _Joined, dtype: torch.dtype) -> Tensor:
    """[K, D] in the dtype, by programs that own prototypes and walk over all rows."""
    k, d = student.prototypes.shape
    views, b = joined.student_lse.shape
    tile = tiling.prototype_head(d, student.rows.dtype, owner=True)
    blocks = triton.cdiv(k, tile["BM"])
    parts = _parts(blocks, triton.cdiv(views * b, tile["BN"]), tile["CHUNKS"])
    sums = torch.empty(
        (parts, k, d), dtype=dtype if parts == 1 else student.lse.dtype, device=student.prototypes.device
    )
    launch.launch(
        prototypes_kernel,
        (blocks, parts * tile["CHUNKS"]),
        student.rows,
        student.prototypes,
        joined.student_lse,
        joined.masses,
        teacher.rows,
        teacher.prototypes,
        teacher.bias,
        joined.teacher_lse,
        joined.paired,
        sums,
        b,
        k,
        student.scale,
        teacher.scale,
        d,
        S=views,
        T=len(joined.teacher_lse),
        VIEWS=1 if teacher.bias is None else len(teacher.bias),
        GAIN=launch.gain(student.rows.dtype),
        COMPUTE=launch.DTYPES[student.lse.dtype],
        **tile,
        device_of=sums,
    )
    return sums[0] if parts == 1 else sums.sum(0).to(dtype)


def prototype_head_cross_entropy(
    inputs: list[Tensor],
    teacher: list[Tensor],
    teacher_prototypes: Tensor,
    student_temperature: float,
    teacher_temperature: float,
    teacher_bias: Tensor | None,
    pairs: str,
    weights: Tensor | None,
    wanted: list[bool],
) -> tuple[Tensor, list[Tensor], Tensor]:
    *student, prototypes = inputs
    dtype = functools.reduce(torch.promote_types, [v.dtype for v in (*inputs, *teacher, teacher_prototypes)])
    if dtype not in launch.DTYPES:
        arguments = (student_temperature, teacher_temperature, teacher_bias, pairs, weights, wanted)
        return reference.prototype_head_cross_entropy(inputs, teacher, teacher_prototypes, *arguments)
    compute = compute_dtype(dtype)
    views, teachers, images = len(student), len(teacher), len(student[0])
    x = torch.cat([v.to(dtype) for v in student])  # [S B, D]
    z = torch.cat([v.to(dtype) for v in teacher])  # [T B, D]
    w = prototypes.to(dtype).contiguous()
    teacher_w = teacher_prototypes.to(dtype).contiguous()
    bias = dense(teacher_bias, compute)
    if bias is not None and bias.dim() == 1:
        bias = bias[None]
    if weights is not None:  # relative to the largest, so that half precision holds them
        weights = weights.to(compute)
        weights = weights / weights.max()
    rows_wanted = any(wanted[:-1])
    of_student = _attend(x, w, None, None, 1 / student_temperature, rows_wanted)
    of_teacher = _attend(z, teacher_w, w, bias, 1 / teacher_temperature, True)
    joined = _join(of_student, of_teacher, views, teachers, pairs, weights, (rows_wanted, wanted[-1]))

    gradients = [no_gradient(v) for v in inputs]
    for i, view in enumerate(student):
        if wanted[i]:
            gradients[i] = joined.gradient[i].to(view.dtype, copy=True)
    if wanted[-1]:
        gradients[-1] = _prototypes_gradient(of_student, of_teacher, joined, prototypes.dtype)
    over = one_over_pairs(weights, images, count(views, teachers, pairs), joined.losses)
    return joined.losses.sum() * over, gradients, over / student_temperature
