"""AdamW in two launches: every tensor's step is counted, and its corrections computed; then the update."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launch, tiling
from . import columns, reference, tables
from .elements import follow, gradient_factor, is_taken, tensor_at


@triton.jit
def _count_kernel(
    table,  # [P, COLUMNS] int64
    corrections,  # [P, 2] float64: of the rate, by the first average's bias; of the root of the second one
    settings,  # [G, SETTINGS] float64
    found_inf,  # 0-dim, where CHECKED
    CHECKED: tl.constexpr,
    COLUMNS: tl.constexpr,
    SETTINGS: tl.constexpr,
):
    i = tl.program_id(0)
    line = table + i * COLUMNS
    row = settings + tl.load(line + 6) * SETTINGS
    step = tensor_at(line, 4, tl.float32, False)
    t = tl.load(step) + is_taken(found_inf, CHECKED).to(tl.float32)
    tl.store(step, t)
    power = t.to(tl.float64)
    tl.store(corrections + 2 * i, 1 / (1 - tl.exp(power * tl.log(tl.load(row + 1)))))
    tl.store(corrections + 2 * i + 1, 1 / tl.sqrt(1 - tl.exp(power * tl.log(tl.load(row + 2)))))


@triton.jit
def _update(
    parameter, gradient, average, square, teacher, follows, taken, unscale, kept, new_average, old_square, new_square,
    rate, root, eps, weight, index, mask,
):  # fmt: skip
    p = tl.load(parameter + index, mask)
    g = tl.load(gradient + index, mask).to(p.dtype) * unscale
    m = tl.load(average + index, mask)
    v = tl.load(square + index, mask)
    after = m + new_average * (g - m)
    squares = old_square * v + new_square * (g * g)
    updated = kept * p - rate * (after / (tl.sqrt(squares) * root + eps))
    updated = tl.where(taken, updated, p)
    tl.store(average + index, tl.where(taken, after, m), mask)
    tl.store(square + index, tl.where(taken, squares, v), mask)
    tl.store(parameter + index, updated, mask)
    if follows:
        follow(teacher, updated, weight, index, mask)


@triton.jit
def _adamw_kernel(
    table,  # [P, COLUMNS] int64
    gradients,  # [P] int64, their addresses
    owners,  # [blocks] int64, the line of the table that a block works on
    corrections,  # [P, 2] float64
    settings,  # [G, SETTINGS] float64, its columns as columns.ADAMW
    grad_scale,  # 0-dim, where SCALED
    found_inf,  # 0-dim, where CHECKED
    DTYPE: tl.constexpr,
    GRADIENT: tl.constexpr,
    ALIGNED: tl.constexpr,
    SCALED: tl.constexpr,
    CHECKED: tl.constexpr,
    COLUMNS: tl.constexpr,
    SETTINGS: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_block = tl.program_id(0)
    i_line = tl.load(owners + i_block)
    line = table + i_line * COLUMNS
    offset = (i_block - tl.load(line + 8)) * BLOCK
    parameter = tensor_at(line, 0, DTYPE, ALIGNED) + offset
    gradient = tensor_at(gradients, i_line, GRADIENT, ALIGNED) + offset
    average = tensor_at(line, 1, DTYPE, ALIGNED) + offset
    square = tensor_at(line, 2, DTYPE, ALIGNED) + offset
    teacher = tensor_at(line, 3, DTYPE, ALIGNED) + offset
    follows = tl.load(line + 3) != 0
    row = settings + tl.load(line + 6) * SETTINGS
    taken = is_taken(found_inf, CHECKED)
    lr = tl.load(row)
    beta2 = tl.load(row + 2)
    unscale = gradient_factor(grad_scale, SCALED).to(DTYPE)
    kept = (1.0 - lr * tl.load(row + 4)).to(DTYPE)
    new_average = (1.0 - tl.load(row + 1)).to(DTYPE)
    old_square = beta2.to(DTYPE)
    new_square = (1.0 - beta2).to(DTYPE)
    rate = (lr * tl.load(corrections + 2 * i_line)).to(DTYPE)
    root = tl.load(corrections + 2 * i_line + 1).to(DTYPE)
    eps = tl.load(row + 3).to(DTYPE)
    weight = (1.0 - tl.load(row + 5)).to(DTYPE)
    inside = tl.minimum(tl.load(line + 5) - offset, BLOCK).to(tl.int32)
    whole = inside // VECTOR * VECTOR  # a mask that changes only between vectors keeps the 128-bit accesses
    index = tl.arange(0, BLOCK)
    _update(
        parameter, gradient, average, square, teacher, follows, taken, unscale, kept, new_average, old_square,
        new_square, rate, root, eps, weight, index, index < whole,
    )  # fmt: skip
    if whole < inside:
        tail = whole + tl.arange(0, VECTOR)
        _update(
            parameter, gradient, average, square, teacher, follows, taken, unscale, kept, new_average, old_square,
            new_square, rate, root, eps, weight, tail, tail < inside,
        )  # fmt: skip


def adamw_(
    parameters: list[Tensor], gradients: list[Tensor], averages: list[Tensor], squares: list[Tensor],
    steps: list[Tensor], teachers: list[Tensor], settings: Tensor, groups: list[int], grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:  # fmt: skip
    launches = tables.plan("adamw_", parameters, gradients, [averages, squares, teachers], groups, steps)
    settings = settings.contiguous()
    sizes = {"COLUMNS": tables.COLUMNS, "SETTINGS": len(columns.ADAMW)}
    checked = settings if found_inf is None else found_inf
    for batch, of_gradients in launches.batches:
        corrections = torch.empty(len(batch.table), 2, dtype=torch.float64, device=settings.device)
        launch.launch(
            _count_kernel,
            (len(batch.table),),
            batch.table,
            corrections,
            settings,
            checked,
            CHECKED=found_inf is not None,
            **sizes,
            device_of=settings,
        )
        if not len(batch.blocks):  # tensors without elements, whose steps count all the same
            continue
        launch.launch(
            _adamw_kernel,
            (len(batch.blocks),),
            batch.table,
            of_gradients,
            batch.blocks,
            corrections,
            settings,
            settings if grad_scale is None else grad_scale,
            checked,
            DTYPE=launch.DTYPES[batch.dtype],
            GRADIENT=launch.DTYPES[batch.gradient],
            ALIGNED=batch.aligned,
            SCALED=grad_scale is not None,
            CHECKED=found_inf is not None,
            **sizes,
            **tiling.optimizer(),
            device_of=settings,
        )
    for i in launches.others:
        one = slice(i, i + 1)
        reference.adamw_(
            parameters[one], gradients[one], averages[one], squares[one], steps[one], teachers[one], settings,
            groups[one], grad_scale, found_inf,
        )  # fmt: skip
