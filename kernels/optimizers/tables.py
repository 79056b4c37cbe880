"""The tables by which one launch updates many tensors: addresses, sizes, and which program works on what.

A table is a pure function of what it is made of (addresses, sizes, layouts, dtypes, groups), and cached under exactly
that, as that of `ema_update_` is (kernels/weights/ema_update.py): a step whose tensors are where they were copies
nothing to the device, and can be captured in a CUDA graph. Gradients are the exception, as `zero_grad` frees them and
training makes them anew at each step: their addresses aren't in the table, but in a vector beside it, which is all that
is copied to the device where they alone have moved, from pinned memory, so that nobody waits for it.
"""

import functools
import operator
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import launch, tiling
from ..layout import is_dense, layout

# Of a table's line: addresses of the parameter and of what is updated with it (at most four), of the step; then
# elements, group, the tensor's number, first block, first part, parts, blocks of a part.
COLUMNS = 12
MOST_PARTS = 256  # that the squares of a tensor are added in: every program of its update adds all of them again


class Batch(NamedTuple):
    """The tensors of one launch: of one dtype, with gradients of one dtype."""

    dtype: torch.dtype
    gradient: torch.dtype
    aligned: bool  # every address is a multiple of 16 bytes
    table: Tensor  # [P, COLUMNS] int64
    blocks: Tensor  # [blocks] int64, the line that a program of the update works on
    parts: Tensor  # [parts] int64, the line that a program of the squares' sums works on


class Launches(NamedTuple):
    batches: list[tuple[Batch, Tensor]]  # and the addresses of its gradients, int64, as the lines of its table
    others: list[int]  # tensors that are left to the reference


class _Plan(NamedTuple):
    """What holds as long as nothing but gradients moves."""

    batches: list[Batch]
    numbers: list[int]  # of the tensors of all batches, one after another
    others: list[int]


_dtype = operator.attrgetter("dtype")
_captured: list[Launches] = []  # CUDA graphs read their tables at every replay, so these are never freed


def plan(
    op: str,
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    others: Sequence[Sequence[Tensor]],
    groups: Sequence[int],
    steps: Sequence[Tensor] = (),
) -> Launches:
    """The launches for parameters, gradients, and lists of what is updated with them, of the first parameters.

    What isn't dense, or laid out otherwise than its parameter, is left to the reference.
    """
    kept = [x for one in (parameters, *others) for x in one]
    device = parameters[0].device
    addresses = list(map(Tensor.data_ptr, gradients))
    found = _plan(
        op,
        tuple(map(len, (parameters, *others))),
        tuple(map(Tensor.data_ptr, kept)),
        tuple(map(Tensor.numel, parameters)),
        tuple(map(_dtype, parameters)),
        tuple(map(_dtype, gradients)),
        tuple([(i, x.size(), x.stride()) for i, x in enumerate((*kept, *gradients)) if not x.is_contiguous()]),
        tuple([i for i, address in enumerate(addresses) if address % 16]),
        tuple(groups),
        tuple(map(Tensor.data_ptr, steps)),
        device,
    )
    of_gradients = _vector(op, tuple([addresses[i] for i in found.numbers]), device)
    parts = of_gradients.split([len(batch.table) for batch in found.batches])
    launches = Launches(list(zip(found.batches, parts, strict=True)), found.others)
    if launch.capturing(device):
        _captured.append(launches)
    return launches


@functools.lru_cache(maxsize=64)
def _plan(
    op: str,
    counts: tuple[int, ...],
    addresses: tuple[int, ...],  # of all tensors but gradients, list by list
    elements: tuple[int, ...],  # of the parameters
    dtypes: tuple[torch.dtype, ...],  # of the parameters
    gradient_dtypes: tuple[torch.dtype, ...],
    strided: tuple[tuple, ...],  # (number, size, stride) of those that aren't contiguous; gradients come last
    unaligned: tuple[int, ...],  # gradients whose addresses are no multiples of 16
    groups: tuple[int, ...],
    steps: tuple[int, ...],
    device: torch.device,
) -> _Plan:
    _refuse_capture(op, device)
    layouts = {i: layout(size, stride) for i, size, stride in strided}
    odd = frozenset(unaligned)
    first = np.cumsum([0, *counts[:-1]])
    lines: dict[tuple, list[list[int]]] = {}
    others = []
    for i, size in enumerate(elements):
        numbers = [int(begin) + i if i < count else None for begin, count in zip(first, counts, strict=True)]
        alike = {layouts.get(number, ()) for number in (*numbers, len(addresses) + i) if number is not None}
        if len(alike) > 1 or not is_dense(alike.pop()):
            others.append(i)
        else:
            where = [0 if number is None else addresses[number] for number in numbers]
            aligned = i not in odd and all(address % 16 == 0 for address in where)
            where += [0] * (4 - len(where))
            step = steps[i] if steps else 0
            lines.setdefault((dtypes[i], gradient_dtypes[i], aligned), []).append([*where, step, size, groups[i], i])
    batches = [
        Batch(dtype, gradient, aligned, *_tables(of, device)) for (dtype, gradient, aligned), of in lines.items()
    ]
    return _Plan(batches, [line[-1] for of in lines.values() for line in of], others)


@functools.lru_cache(maxsize=64)
def _vector(op: str, addresses: tuple[int, ...], device: torch.device) -> Tensor:
    """Addresses on the device."""
    _refuse_capture(op, device)
    return _to_device(np.array(addresses, np.int64), device)


def _refuse_capture(op: str, device: torch.device) -> None:
    """A table that a graph had copied would be read from the host at every replay, when the host has freed it."""
    if launch.capturing(device):
        raise RuntimeError(f"{op}: take a step with these tensors before capturing a CUDA graph, for its table")


def _to_device(numbers: np.ndarray, device: torch.device) -> Tensor:
    host = torch.from_numpy(numbers)
    if device.type == "cuda":
        host = host.pin_memory()  # torch doesn't reuse it before the copy is done
    return host.to(device, non_blocking=True)


def _tables(lines: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """`Batch.table`, `blocks` and `parts` of lines (five addresses, elements, group, the tensor's number)."""
    given = np.array(lines, np.int64)
    blocks = -(-given[:, 5] // tiling.optimizer()["BLOCK"])
    blocks_of_part = np.maximum(tiling.OPTIMIZER_PART, -(-blocks // MOST_PARTS))
    parts = -(-blocks // blocks_of_part)
    first_block = np.cumsum(blocks) - blocks
    first_part = np.cumsum(parts) - parts
    table = np.c_[given, first_block, first_part, parts, blocks_of_part]
    numbers = np.arange(len(lines))
    sections = [table.ravel(), np.repeat(numbers, blocks), np.repeat(numbers, parts)]
    on_device = _to_device(np.concatenate(sections), device)
    table, owners_of_blocks, owners_of_parts = on_device.split([len(section) for section in sections])
    return table.view(-1, COLUMNS), owners_of_blocks, owners_of_parts
