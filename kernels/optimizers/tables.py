"""The tables by which one launch updates many tensors: addresses, sizes, and which program works on what.

A table is a pure function of what it is made of (addresses, sizes, layouts, dtypes, groups), and cached under exactly
that, as that of `ema_update_` is (kernels/weights/ema_update.py): a step whose tensors are where they were copies
nothing to the device, and can be captured in a CUDA graph.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import launch, tiling
from ..layout import is_dense, layout

# Of a table's line: addresses of the lists' tensors (at most five), of the step; then elements, group, the tensor's
# number, first block, first part, parts, blocks of a part.
COLUMNS = 13
MOST_PARTS = 256  # that the squares of a tensor are added in: every program of its update adds all of them again


class Batch(NamedTuple):
    """The tensors of one launch: of one dtype, with gradients of one dtype."""

    dtype: torch.dtype
    gradient: torch.dtype
    aligned: bool  # every address is a multiple of 16 bytes
    table: Tensor  # [P, COLUMNS] int64
    blocks: Tensor  # [blocks] int64, the line that a program of the update works on
    parts: Tensor  # [parts] int64, the line that a program of the squares' sums works on


class Plan(NamedTuple):
    batches: list[Batch]
    others: list[int]  # tensors that are left to the reference


_captured: list[Plan] = []  # CUDA graphs read their tables at every replay, so these are never freed


def plan(op: str, lists: Sequence[Sequence[Tensor]], groups: Sequence[int], steps: Sequence[Tensor] = ()) -> Plan:
    """The launches for tensors in lists (parameters, gradients, ...); a shorter list is of the first parameters.

    What isn't dense, or laid out otherwise than its parameter, is left to the reference.
    """
    tensors = [x for one in lists for x in one]
    device = lists[0][0].device
    found = _plan(
        op,
        tuple(map(len, lists)),
        tuple(map(Tensor.data_ptr, tensors)),
        tuple(map(Tensor.numel, lists[0])),
        tuple([x.dtype for one in lists[:2] for x in one]),
        tuple([(i, x.size(), x.stride()) for i, x in enumerate(tensors) if not x.is_contiguous()]),
        tuple(groups),
        tuple(map(Tensor.data_ptr, steps)),
        device,
    )
    if launch.capturing(device):
        _captured.append(found)
    return found


@functools.lru_cache(maxsize=64)
def _plan(
    op: str,
    counts: tuple[int, ...],
    addresses: tuple[int, ...],  # of all tensors, list by list
    elements: tuple[int, ...],  # of the parameters
    dtypes: tuple[torch.dtype, ...],  # of the parameters, then of the gradients
    strided: tuple[tuple, ...],  # (number, size, stride) of those that aren't contiguous
    groups: tuple[int, ...],
    steps: tuple[int, ...],
    device: torch.device,
) -> Plan:
    if launch.capturing(device):
        raise RuntimeError(f"{op}: take a step with these tensors before capturing a CUDA graph, for its table")
    layouts = {i: layout(size, stride) for i, size, stride in strided}
    first = np.cumsum([0, *counts[:-1]])
    lines: dict[tuple, list[list[int]]] = {}
    others = []
    for i, size in enumerate(elements):
        numbers = [int(begin) + i if i < count else None for begin, count in zip(first, counts, strict=True)]
        alike = {layouts.get(number, ()) for number in numbers if number is not None}
        if len(alike) > 1 or not is_dense(alike.pop()):
            others.append(i)
        else:
            where = [0 if number is None else addresses[number] for number in numbers]
            aligned = all(address % 16 == 0 for address in where)
            where += [0] * (5 - len(where))
            step = steps[i] if steps else 0
            lines.setdefault((dtypes[i], dtypes[counts[0] + i], aligned), []).append([*where, step, size, groups[i], i])
    batches = [
        Batch(dtype, gradient, aligned, *_tables(of, device)) for (dtype, gradient, aligned), of in lines.items()
    ]
    return Plan(batches, others)


def _tables(lines: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """`Batch.table`, `blocks` and `parts` of lines (six addresses, elements, group, the tensor's number)."""
    given = np.array(lines, np.int64)
    blocks = -(-given[:, 6] // tiling.optimizer()["BLOCK"])
    blocks_of_part = np.maximum(tiling.OPTIMIZER_PART, -(-blocks // MOST_PARTS))
    parts = -(-blocks // blocks_of_part)
    first_block = np.cumsum(blocks) - blocks
    first_part = np.cumsum(parts) - parts
    table = np.c_[given, first_block, first_part, parts, blocks_of_part]
    numbers = np.arange(len(lines))
    sections = [table.ravel(), np.repeat(numbers, blocks), np.repeat(numbers, parts)]
    host = torch.from_numpy(np.concatenate(sections))
    if device.type == "cuda":
        host = host.pin_memory()  # torch doesn't reuse it before the copy is done
    on_device = host.to(device, non_blocking=True)
    table, owners_of_blocks, owners_of_parts = on_device.split([len(section) for section in sections])
    return table.view(-1, COLUMNS), owners_of_blocks, owners_of_parts
