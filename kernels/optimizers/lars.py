"""LARS in two launches: the squares of parameters and gradients in parts, then the update, which adds the parts.

Every program of the update adds its tensor's parts by itself, at most 256 of them and always in one order. A launch
between the two would cost more.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launch, tiling
from . import columns, reference, tables
from .elements import follow, gradient_factor, is_taken, tensor_at


@triton.jit
def _squares_kernel(
    table,  # [P, COLUMNS] int64
    gradients,  # [P] int64, their addresses
    owners,  # [parts] int64, the line of the table that a part is of
    sums,  # [parts, 2] float64, of the parameter and of the gradient
    settings,  # [G, SETTINGS] float64
    grad_scale,  # 0-dim, where SCALED
    DTYPE: tl.constexpr,
    GRADIENT: tl.constexpr,
    ALIGNED: tl.constexpr,
    SCALED: tl.constexpr,
    COLUMNS: tl.constexpr,
    SETTINGS: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_part = tl.program_id(0)
    i_line = tl.load(owners + i_part)
    line = table + i_line * COLUMNS
    size = tl.load(line + 11) * BLOCK
    offset = (i_part - tl.load(line + 9)) * size
    parameter = tensor_at(line, 0, DTYPE, ALIGNED) + offset
    gradient = tensor_at(gradients, i_line, GRADIENT, ALIGNED) + offset
    row = settings + tl.load(line + 6) * SETTINGS
    unscale = gradient_factor(grad_scale, SCALED).to(DTYPE)
    decay = tl.where(tl.load(row + 9) != 0, tl.load(row + 2), 0.0).to(DTYPE)
    inside = tl.minimum(tl.load(line + 5) - offset, size).to(tl.int32)
    whole = inside // VECTOR * VECTOR  # a mask that changes only between vectors keeps the 128-bit accesses
    index = tl.arange(0, BLOCK)
    of_parameter = tl.zeros([BLOCK], DTYPE)
    of_gradient = tl.zeros([BLOCK], DTYPE)
    for begin in range(0, whole, BLOCK):
        mask = index < whole - begin
        p = tl.load(parameter + begin + index, mask, 0).to(DTYPE)
        g = tl.load(gradient + begin + index, mask, 0).to(DTYPE) * unscale + decay * p
        of_parameter += p * p
        of_gradient += g * g
    tail = whole + tl.arange(0, VECTOR)
    p = tl.load(parameter + tail, tail < inside, 0).to(tl.float64)
    g = tl.load(gradient + tail, tail < inside, 0).to(tl.float64) * unscale + decay * p
    tl.store(sums + 2 * i_part, tl.sum(of_parameter.to(tl.float64), 0) + tl.sum(p * p, 0))
    tl.store(sums + 2 * i_part + 1, tl.sum(of_gradient.to(tl.float64), 0) + tl.sum(g * g, 0))


@triton.jit
def _squares_of(line, sums, GIVEN: tl.constexpr, MOST_PARTS: tl.constexpr):
    """The squares' sums of a tensor and of its gradient: of its parts, or as they are given by the tensor's number."""
    if GIVEN:
        of_tensor = sums + 2 * tl.load(line + 7)
        return tl.load(of_tensor), tl.load(of_tensor + 1)
    part = tl.arange(0, MOST_PARTS)
    of_parts = sums + 2 * (tl.load(line + 9) + part)
    mask = part < tl.load(line + 10)
    return tl.sum(tl.load(of_parts, mask, 0), 0), tl.sum(tl.load(of_parts + 1, mask, 0), 0)


@triton.jit
def _norms_kernel(table, sums, norms, COLUMNS: tl.constexpr, MOST_PARTS: tl.constexpr):
    line = table + tl.program_id(0) * COLUMNS
    of_parameter, of_gradient = _squares_of(line, sums, False, MOST_PARTS)
    number = tl.load(line + 7)
    tl.store(norms + 2 * number, of_parameter)
    tl.store(norms + 2 * number + 1, of_gradient)


@triton.jit
def _ratio(line, row, sums, GIVEN: tl.constexpr, MOST_PARTS: tl.constexpr):
    """Of the tensor's rate to its group's; columns of `row` as columns.LARS."""
    of_parameter, of_gradient = _squares_of(line, sums, GIVEN, MOST_PARTS)
    parameter = tl.sqrt(of_parameter)
    gradient = tl.sqrt(of_gradient)
    decay = tl.load(row + 2)
    beside = tl.where(tl.load(row + 9) != 0, 0.0, decay)  # what the gradient's norm lacks of it
    ratio = tl.load(row + 4) * parameter / (gradient + beside * parameter + tl.load(row + 5))
    ratio = tl.where((parameter > 0) & (gradient > 0), ratio, 1.0)
    clipped = ratio / tl.load(row)
    ratio = tl.where(tl.load(row + 8) != 0, tl.where(clipped > 1, 1.0, clipped), ratio)
    adapts = tl.load(row + 7)
    return tl.where((adapts == 2) | ((adapts == 1) & (decay != 0)), ratio, 1.0)


@triton.jit
def _update(
    parameter, gradient, buffer, teacher, follows, taken, unscale, decay, ratio, momentum, nesterov, rate, weight,
    index, mask, BUFFER: tl.constexpr,
):  # fmt: skip
    p = tl.load(parameter + index, mask)
    step = (tl.load(gradient + index, mask).to(p.dtype) * unscale + decay * p) * ratio
    if BUFFER:
        before = tl.load(buffer + index, mask)
        after = momentum * before + step
        step = tl.where(nesterov, step + momentum * after, after)
        tl.store(buffer + index, tl.where(taken, after, before), mask)
    updated = tl.where(taken, p - rate * step, p)
    tl.store(parameter + index, updated, mask)
    if follows:
        follow(teacher, updated, weight, index, mask)


@triton.jit
def _lars_kernel(
    table,  # [P, COLUMNS] int64
    gradients,  # [P] int64, their addresses
    owners,  # [blocks] int64, the line of the table that a block works on
    sums,  # [parts, 2] float64, of the squares; GIVEN: [P, 2]
    settings,  # [G, SETTINGS] float64
    grad_scale,  # 0-dim, where SCALED
    found_inf,  # 0-dim, where CHECKED
    DTYPE: tl.constexpr,
    GRADIENT: tl.constexpr,
    ALIGNED: tl.constexpr,
    BUFFER: tl.constexpr,  # whether there is momentum
    GIVEN: tl.constexpr,
    SCALED: tl.constexpr,
    CHECKED: tl.constexpr,
    COLUMNS: tl.constexpr,
    SETTINGS: tl.constexpr,
    MOST_PARTS: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_block = tl.program_id(0)
    i_line = tl.load(owners + i_block)
    line = table + i_line * COLUMNS
    offset = (i_block - tl.load(line + 8)) * BLOCK
    parameter = tensor_at(line, 0, DTYPE, ALIGNED) + offset
    gradient = tensor_at(gradients, i_line, GRADIENT, ALIGNED) + offset
    buffer = tensor_at(line, 1, DTYPE, ALIGNED) + offset
    teacher = tensor_at(line, 2, DTYPE, ALIGNED) + offset
    follows = tl.load(line + 2) != 0
    row = settings + tl.load(line + 6) * SETTINGS
    taken = is_taken(found_inf, CHECKED)
    ratio = _ratio(line, row, sums, GIVEN, MOST_PARTS).to(DTYPE)
    unscale = gradient_factor(grad_scale, SCALED).to(DTYPE)
    rate = tl.load(row).to(DTYPE)
    momentum = tl.load(row + 1).to(DTYPE)
    decay = tl.load(row + 2).to(DTYPE)
    weight = (1.0 - tl.load(row + 3)).to(DTYPE)
    nesterov = tl.load(row + 6) != 0
    inside = tl.minimum(tl.load(line + 5) - offset, BLOCK).to(tl.int32)
    whole = inside // VECTOR * VECTOR
    index = tl.arange(0, BLOCK)
    _update(
        parameter, gradient, buffer, teacher, follows, taken, unscale, decay, ratio, momentum, nesterov, rate, weight,
        index, index < whole, BUFFER,
    )  # fmt: skip
    if whole < inside:
        tail = whole + tl.arange(0, VECTOR)
        _update(
            parameter, gradient, buffer, teacher, follows, taken, unscale, decay, ratio, momentum, nesterov, rate,
            weight, tail, tail < inside, BUFFER,
        )  # fmt: skip


def _add_squares(batch: tables.Batch, gradients: Tensor, settings: Tensor, grad_scale: Tensor | None) -> Tensor:
    """[parts, 2] float64."""
    sums = torch.empty(len(batch.parts), 2, dtype=torch.float64, device=batch.table.device)
    if not len(batch.parts):
        return sums
    launch.launch(
        _squares_kernel,
        (len(batch.parts),),
        batch.table,
        gradients,
        batch.parts,
        sums,
        settings,
        settings if grad_scale is None else grad_scale,
        DTYPE=launch.DTYPES[batch.dtype],
        GRADIENT=launch.DTYPES[batch.gradient],
        ALIGNED=batch.aligned,
        SCALED=grad_scale is not None,
        COLUMNS=tables.COLUMNS,
        SETTINGS=len(columns.LARS),
        **tiling.optimizer(),
        device_of=sums,
    )
    return sums


def lars_norms(
    parameters: list[Tensor], gradients: list[Tensor], settings: Tensor, groups: list[int], grad_scale: Tensor | None
) -> Tensor:
    launches = tables.plan("lars_norms", parameters, gradients, [], groups)
    settings = settings.contiguous()
    norms = torch.zeros(len(parameters), 2, dtype=torch.float64, device=parameters[0].device)
    for batch, of_gradients in launches.batches:
        launch.launch(
            _norms_kernel,
            (len(batch.table),),
            batch.table,
            _add_squares(batch, of_gradients, settings, grad_scale),
            norms,
            COLUMNS=tables.COLUMNS,
            MOST_PARTS=tables.MOST_PARTS,
            device_of=norms,
        )
    for i in launches.others:
        of_one = [parameters[i]], [gradients[i]], settings, groups[i : i + 1], grad_scale
        norms[i] = reference.lars_norms(*of_one)[0]
    return norms


def lars_(
    parameters: list[Tensor], gradients: list[Tensor], buffers: list[Tensor], teachers: list[Tensor], settings: Tensor,
    groups: list[int], norms: Tensor | None, grad_scale: Tensor | None, found_inf: Tensor | None,
) -> None:  # fmt: skip
    launches = tables.plan("lars_", parameters, gradients, [buffers, teachers], groups)
    settings = settings.contiguous()
    for batch, of_gradients in launches.batches:
        if not len(batch.blocks):  # tensors without elements
            continue
        launch.launch(
            _lars_kernel,
            (len(batch.blocks),),
            batch.table,
            of_gradients,
            batch.blocks,
            _add_squares(batch, of_gradients, settings, grad_scale) if norms is None else norms.contiguous(),
            settings,
            settings if grad_scale is None else grad_scale,
            settings if found_inf is None else found_inf,
            DTYPE=launch.DTYPES[batch.dtype],
            GRADIENT=launch.DTYPES[batch.gradient],
            ALIGNED=batch.aligned,
            BUFFER=bool(buffers),
            GIVEN=norms is not None,
            SCALED=grad_scale is not None,
            CHECKED=found_inf is not None,
            COLUMNS=tables.COLUMNS,
            SETTINGS=len(columns.LARS),
            MOST_PARTS=tables.MOST_PARTS,
            **tiling.optimizer(),
            device_of=settings,
        )
    for i in launches.others:
        one = slice(i, i + 1)
        given = None if norms is None else norms[one]
        reference.lars_(
            parameters[one], gradients[one], buffers[one], teachers[one], settings, groups[one], given, grad_scale,
            found_inf,
        )  # fmt: skip
