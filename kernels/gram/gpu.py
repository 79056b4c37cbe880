"""Gram matrices on a GPU: a program makes a tile of both, and what is left of them is their difference.

Rows are read as they came, and products divided by the lengths of both. A tile's squares are summed; the differences,
over the length of the row that they will be multiplied with, are the weights of the gradient, for a band of rows at a
time. They are symmetric but for that length, so a tile off the diagonal is written twice, the second time transposed.
The weights' product with the rows is torch's: of bfloat16 weights where rows are, otherwise of float32 ones, as over
lengths as they come float16 hasn't the range.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launch, tiling
from ..arithmetic import scalar_like
from ..contrastive.rows import lengths, through_unit_rows
from ..contrastive.tiles import similarities
from . import tiles


@triton.jit
def _errors(s, t, NEGATIVES: tl.constexpr):
    """The differences of two tiles of similarities; and again, where the student's count."""
    idle = s != s  # a placeholder, never read: all of them count
    if NEGATIVES == "clamp":
        idle = s <= 0
    if NEGATIVES == "clamp_teacher":
        idle = (s <= 0) & (t <= 0)
    error = s - t
    counted = error
    if NEGATIVES != "keep":
        error = tl.where(idle, 0.0, s) - tl.where(t <= 0, 0.0, t)
        counted = tl.where(idle, 0.0, error)
    return error, counted


@triton.jit(do_not_specialize=["P", "first_block", "stop", "s_weights"])
def gram_kernel(
    student,  # [G, P, D]
    teacher,  # [G, P, D]
    student_lengths,  # [G, P] float32; None: rows are taken as they are
    teacher_lengths,  # [G, P] float32, or None
    weights,  # [G, rows of the band, P], rows s_weights * 8 apart; or None
    squares,  # [programs, BM] float32, 0 before: the sums of a tile's rows
    P,
    D,
    first_block,  # the band of rows begins with this block, and ends before the row `stop`
    stop,
    s_weights,
    NEGATIVES: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    first = first_block * BM
    row_blocks = tl.cdiv(stop - first, BM)
    tiles_of_group = row_blocks * tl.cdiv(P, BN)
    group = tl.program_id(0) // tiles_of_group
    tile = tl.program_id(0) % tiles_of_group
    block_a = tile % row_blocks
    start_b = tile // row_blocks * BN
    block_b = (start_b - first) // BM  # where the columns are as rows, if they are in the band
    if (start_b < first) | (block_b >= block_a):  # otherwise the transposed tile's program does this one
        i_a = first + block_a * BM + tl.arange(0, BM)
        i_b = start_b + tl.arange(0, BN)
        row = launch.row_start(group, P, 1)
        x = student + row * D
        y = teacher + row * D
        # the first i_a stands in for rows that are loaded already (b_a), which WHOLE = False doesn't read
        s = similarities(x, x, i_a, i_a, i_b, stop, P, D, False, BLOCK_D)
        t = similarities(y, y, i_a, i_a, i_b, stop, P, D, False, BLOCK_D)
        over_a = tl.full([BM], 1.0, tl.float32)
        over_b = tl.full([BN], 1.0, tl.float32)
        if student_lengths is not None:
            over_a = 1 / tl.load(student_lengths + row + i_a, i_a < stop, 1.0)
            over_b = 1 / tl.load(student_lengths + row + i_b, i_b < P, 1.0)
            t_over_a = 1 / tl.load(teacher_lengths + row + i_a, i_a < stop, 1.0)
            t_over_b = 1 / tl.load(teacher_lengths + row + i_b, i_b < P, 1.0)
            s = s * over_a[:, None] * over_b[None, :]
            t = t * t_over_a[:, None] * t_over_b[None, :]
        error, counted = _errors(s, t, NEGATIVES)
        valid = (i_a < stop)[:, None] & (i_b < P)[None, :]
        error = tl.where(valid, error, 0.0)  # beyond the rows, 0 times an infinity
        mirrored = (start_b < stop) & (block_b > block_a)
        # sums of rows: that of a whole tile, a sum of sums, doesn't compile for sm_100 (Triton 3.6)
        at = launch.row_start(tl.program_id(0), BM, 1) + tl.arange(0, BM)
        tl.store(squares + at, tl.sum(error * error, 1) * tl.where(mirrored, 2.0, 1.0))
        if weights is not None:
            band = launch.row_start(group, stop - first, 1) - first
            # whole words of 8, up to the end of a row's memory: the padding of a row may be written, nobody reads it
            at = launch.row_start(band + i_a, s_weights, 8)[:, None] + i_b[None, :]
            mask = (i_a < stop)[:, None] & (i_b < s_weights * 8)[None, :]
            tl.store(weights + at, (counted * over_b[None, :]).to(weights.dtype.element_ty), mask)
            if mirrored:
                at = launch.row_start(band + i_b, s_weights, 8)[None, :] + i_a[:, None]
                mask = (i_a < s_weights * 8)[:, None] & (i_b < P)[None, :]
                tl.store(weights + at, (counted * over_a[:, None]).to(weights.dtype.element_ty), mask)


def gram_loss(
    student: Tensor,  # [G, P, D]
    teacher: Tensor,  # [G, P, D]
    normalize: bool,
    negatives: str,
    wanted: list[bool],
) -> tuple[Tensor, list[Tensor], Tensor]:
    if student.dtype == torch.float64:
        return tiles.gram_loss(student, teacher, normalize, negatives, wanted)
    x = student.contiguous()
    y = teacher.contiguous()
    groups, patches, d = x.shape
    x_lengths = lengths(x.view(-1, d)).view(groups, patches) if normalize else None
    y_lengths = lengths(y.view(-1, d)).view(groups, patches) if normalize else None
    dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
    rows, at_once = tiling.gram_bands(groups, patches, dtype)
    memory = (
        torch.empty(at_once, rows, triton.cdiv(patches, 8) * 8, dtype=dtype, device=x.device) if wanted[0] else None
    )
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    gradients = []  # of bands
    for begin in range(0, groups, at_once):
        some = slice(begin, begin + at_once)
        both = x[some], y[some]
        both_lengths = (None, None) if x_lengths is None or y_lengths is None else (x_lengths[some], y_lengths[some])
        factors = x[some].to(dtype) if wanted[0] else x[some]
        for first in range(0, patches, rows):
            stop = min(first + rows, patches)
            weights = None if memory is None else memory[: len(factors), : stop - first, :patches]
            total += _squares(both, both_lengths, weights, first, stop, negatives)
            if weights is None:
                continue
            sums = _products(weights, factors)
            if x_lengths is None:
                gradients.append((sums / patches).to(x.dtype).view(-1, d))
            else:
                raw = x[some, first:stop].reshape(-1, d)
                divisors = x_lengths[some, first:stop].reshape(-1)
                gradients.append(through_unit_rows(sums.view(-1, d), raw, divisors, x.dtype, divided=False))
    loss = (total / (groups * patches**2)).float()
    gradient = x.new_empty(0)
    if wanted[0]:
        gradient = (gradients[0] if len(gradients) == 1 else torch.cat(gradients)).view(x.shape)
    scale = scalar_like(x, 4 / (groups * patches * (patches if normalize else 1)))
    return loss, [gradient], scale


def _squares(
    rows: tuple[Tensor, Tensor],  # [G, P, D], of the student and of the teacher
    row_lengths: tuple[Tensor | None, Tensor | None],
    weights: Tensor | None,
    first: int,
    stop: int,
    negatives: str,
) -> Tensor:
    """0-dim float64, the sum of the squares of a band's differences; and its weights are written."""
    x, _ = rows
    groups, patches, d = x.shape
    tile = tiling.gram_weights(x.dtype)
    programs = groups * triton.cdiv(stop - first, tile["BM"]) * triton.cdiv(patches, tile["BN"])
    squares = torch.zeros(programs, tile["BM"], dtype=torch.float32, device=x.device)
    launch.launch(
        gram_kernel, (programs,), *rows, *row_lengths, weights, squares, patches, d, first // tile["BM"], stop,
        0 if weights is None else weights.stride(1) // 8, NEGATIVES=negatives, **tile, device_of=x,
    )  # fmt: skip
    return squares.sum(dtype=torch.float64)


def _products(weights: Tensor, rows: Tensor) -> Tensor:
    """`weights @ rows` [G, band, D] in float32, of weights [G, band, P] and rows [G, P, D]."""
    if weights.dtype == torch.float32 or not rows.is_cuda:
        return weights.float() @ rows.float()
    return torch.bmm(weights, rows, out_dtype=torch.float32)
