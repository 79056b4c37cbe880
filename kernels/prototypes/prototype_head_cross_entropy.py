"""The cross-entropy of logits `features @ prototypes.T` that are never in memory: an attention and its gradient.

The softmax of a row, times the student's prototypes, is an attention: y for a teacher's row, u for a student's. They
give loss and features' gradient, `lse - <x, y> / temperature` and `u - y`, in one walk over the prototypes. The
prototypes' gradient `(P - Q).T @ X` is a second walk: each program owns prototypes and computes their logits as
`prototypes @ features.T`, so no product takes a transposed result. Nothing is added by two programs, so bits repeat;
where rows are few, their prototypes are split into parts, which are joined in a fixed order.

Features wider than a block are multiplied in chunks; each chunk of the result's columns is a program of its own.
"""

import torch
import triton
from torch import Tensor

from .. import launch, tiling
from ..arithmetic import compute_dtype
from . import reference
from .pairing import PAIRS, count
from .prototype_head_kernels import attend_kernel, prototypes_kernel, views_kernel
from .row_logsumexp import dense


def _parts(blocks: int, walk: int, chunks: int) -> int:
    """Into how many parts the walks of `blocks` programs are split: enough for two programs an SM of any GPU."""
    return max(1, min(walk, tiling.PROGRAMS // (blocks * chunks)))


def _attend(
    x: Tensor, keys: Tensor, values: Tensor | None, bias: Tensor | None, scale: float, gain: int, wanted: bool
) -> tuple[Tensor, Tensor | None, int]:
    """(lse [parts, V N], means [parts, V N, D] or None, parts) of rows [V N, D]; bias [V, K] or None."""
    (rows, d), k, compute = x.shape, len(keys), compute_dtype(x.dtype)
    views = 1 if bias is None else len(bias)
    tile = tiling.prototype_head(d, x.dtype, owner=False)
    chunks = tile["CHUNKS"] = tile["CHUNKS"] if wanted else 1
    row_blocks, key_blocks = triton.cdiv(rows // views, tile["BM"]), triton.cdiv(k, tile["BN"])
    per_part = triton.cdiv(key_blocks, _parts(row_blocks * views, key_blocks, chunks))
    parts = triton.cdiv(key_blocks, per_part)
    lse = torch.empty((parts, rows), dtype=compute, device=x.device)
    means = torch.empty((parts, rows, d), dtype=compute, device=x.device) if wanted else None
    launch.launch(
        attend_kernel,
        (row_blocks, parts * chunks, views),
        x,
        keys,
        values,
        bias,
        lse,
        means,
        rows // views,
        k,
        d,
        per_part,
        SCALE=scale,
        GAIN=gain,
        COMPUTE=launch.DTYPES[compute],
        **tile,
        device_of=x,
    )
    return lse, means, parts


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
    dtype = torch.promote_types(prototypes.dtype, teacher_prototypes.dtype)
    for v in (*student, *teacher):
        dtype = torch.promote_types(dtype, v.dtype)
    if dtype not in launch.DTYPES:
        arguments = (student_temperature, teacher_temperature, teacher_bias, pairs, weights, wanted)
        return reference.prototype_head_cross_entropy(inputs, teacher, teacher_prototypes, *arguments)
    compute, (b, d), (views, teachers) = compute_dtype(dtype), student[0].shape, (len(student), len(teacher))
    x, z = (torch.cat([v.to(dtype) for v in side]) for side in (student, teacher))  # [S B, D], [T B, D]
    own, other = (p.to(dtype).contiguous() for p in (prototypes, teacher_prototypes))
    bias = dense(teacher_bias, compute)
    if bias is not None and bias.dim() == 1:
        bias = bias[None]
    scales = 1 / student_temperature, 1 / teacher_temperature
    gain = launch.gain(dtype)
    largest = None
    if weights is not None:  # relative to the largest, so that half precision holds them
        weights = weights.to(compute)
        largest = weights.max()
        weights = weights / largest

    lse, means, parts = _attend(x, own, None, None, scales[0], gain, any(wanted[:-1]))
    teacher_part_lse, teacher_means, teacher_parts = _attend(z, other, own, bias, scales[1], gain, True)

    def empty(*shape: int, dtype: torch.dtype = compute) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device)

    student_lse, masses, teacher_lse, losses = empty(views, b), empty(views, b), empty(teachers, b), empty(b)
    gradient = empty(views, b, d, dtype=dtype) if any(wanted[:-1]) else None
    paired_rows = empty(teachers, b, d, dtype=dtype) if wanted[-1] else None
    launch.launch(
        views_kernel,
        (b,),
        x,
        lse,
        means,
        teacher_part_lse,
        teacher_means,
        weights,
        student_lse,
        teacher_lse,
        masses,
        paired_rows,
        gradient,
        losses,
        b,
        d,
        parts,
        teacher_parts,
        STUDENT_SCALE=scales[0],
        S=views,
        T=teachers,
        PAIRS=PAIRS[pairs],
        COMPUTE=launch.DTYPES[compute],
        **tiling.prototype_head_views(d),
        device_of=x,
    )

    of_prototypes = prototypes.new_empty(0)
    if wanted[-1]:
        tile = tiling.prototype_head(d, dtype, owner=True)
        k, chunks = len(own), tile["CHUNKS"]
        blocks = triton.cdiv(k, tile["BM"])
        parts = _parts(blocks, triton.cdiv(views * b, tile["BN"]), chunks)
        sums = empty(parts, k, d, dtype=compute if parts > 1 else prototypes.dtype)
        launch.launch(
            prototypes_kernel,
            (blocks, parts * chunks),
            x,
            own,
            student_lse,
            masses,
            z,
            other,
            bias,
            teacher_lse,
            paired_rows,
            sums,
            b,
            k,
            d,
            S=views,
            T=teachers,
            VIEWS=1 if bias is None else len(bias),
            STUDENT_SCALE=scales[0],
            TEACHER_SCALE=scales[1],
            GAIN=gain,
            COMPUTE=launch.DTYPES[compute],
            **tile,
            device_of=x,
        )
        of_prototypes = sums[0] if parts == 1 else sums.sum(0).to(prototypes.dtype)

    pairs_of_views = count(views, teachers, pairs)
    if weights is None:
        over = torch.full((), 1 / (b * pairs_of_views), dtype=compute, device=x.device)
    else:
        over = 1 / (weights.sum() * pairs_of_views)
    gradients = [
        gradient[i].to(v.dtype, copy=True) if w else v.new_empty(0)
        for i, (v, w) in enumerate(zip(student, wanted[:-1], strict=True))
    ]
    return losses.sum() * over, [*gradients, of_prototypes], over / student_temperature
