"""`teacher.lerp_(student, 1 - momentum)` for all pairs of tensors: one launch for each pair of dtypes, through a table.

The table of addresses is a pure function of what it is made of (addresses, sizes, layouts, dtypes), and cached under
exactly that: a call whose tensors are where they were copies nothing to the device, and can be captured in a CUDA
graph. A call on another stream needs no event of its own, because it writes the same teacher and so comes after the
first call already.
"""

import functools
import itertools
import operator
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launch, tiling
from ..arithmetic import compute_dtype
from ..layout import is_dense, layout
from . import reference


@triton.jit
def _blend(teacher, student, weight, index, mask):
    """lerp in torch's two forms: weight 0 leaves the teacher, weight 1 copies the student, both to the last bit."""
    t = tl.load(teacher + index, mask).to(weight.dtype)
    s = tl.load(student + index, mask).to(weight.dtype)
    difference = s - t
    blended = tl.where(weight < 0.5, t + weight * difference, s - difference * (1 - weight))
    tl.store(teacher + index, blended, mask)


@triton.jit
def _ema_update_kernel(
    table,  # [P, 4] int64: address of the teacher, of the student, elements, first block
    owners,  # [blocks] int64, the line of the table that a block works on
    momentum,  # 0-dim
    TEACHER: tl.constexpr,  # dtypes
    STUDENT: tl.constexpr,
    COMPUTE: tl.constexpr,
    ALIGNED: tl.constexpr,  # every address is a multiple of 16 bytes
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_block = tl.program_id(0)
    line = table + tl.load(owners + i_block) * 4
    teacher = tl.load(line).to(tl.pointer_type(TEACHER))
    student = tl.load(line + 1).to(tl.pointer_type(STUDENT))
    if ALIGNED:
        teacher = tl.multiple_of(teacher, 16)
        student = tl.multiple_of(student, 16)
    # int64, and a multiple of BLOCK that the compiler sees: of an offset read from the table it would know nothing.
    offset = (i_block - tl.load(line + 3)) * BLOCK
    teacher += offset
    student += offset
    inside = tl.minimum(tl.load(line + 2) - offset, BLOCK).to(tl.int32)
    whole = inside // VECTOR * VECTOR  # a mask that changes only between vectors keeps the 128-bit accesses
    weight = (1.0 - tl.load(momentum).to(tl.float64)).to(COMPUTE)
    index = tl.arange(0, BLOCK)
    _blend(teacher, student, weight, index, index < whole)
    if whole < inside:
        tail = whole + tl.arange(0, VECTOR)
        _blend(teacher, student, weight, tail, tail < inside)


class Batch(NamedTuple):
    """The tensors of one launch."""

    teacher: torch.dtype
    student: torch.dtype
    aligned: bool
    table: Tensor  # [P, 4] int64
    owners: Tensor  # [blocks] int64


class Plan(NamedTuple):
    batches: list[Batch]
    others: list[int]  # pairs that are left to the reference


def _refuse_ties(spans: list[tuple[int, int]]) -> None:
    spans.sort()
    for (_, end), (start, _) in itertools.pairwise(spans):
        if start < end:
            raise ValueError(
                "ema_update_: each teacher tensor must have memory of its own, got some memory twice (tied weights?)"
            )


@functools.lru_cache(maxsize=64)
def _plan(
    addresses: tuple[int, ...],  # [2 P], teachers, then students
    elements: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    strided: tuple[tuple, ...],  # (index, size, stride) of those that aren't contiguous
    device: torch.device,
) -> Plan:
    if launch.capturing(device):
        raise RuntimeError(
            "ema_update_: call it once with these tensors before capturing a CUDA graph, so that its table is there"
        )
    layouts = {i: layout(size, stride) for i, size, stride in strided}
    groups = {}  # lines of the table by (teacher's dtype, student's dtype, aligned)
    others = []
    spans = []  # the memory of each teacher tensor
    for t in range(len(addresses) // 2):
        s = t + len(addresses) // 2
        if elements[t] == 0 == elements[s]:
            continue
        known = dtypes[t] in launch.DTYPES and dtypes[s] in launch.DTYPES
        flat = layouts.get(t) == layouts.get(s) and is_dense(layouts.get(t, ()))
        if known and flat and elements[t] == elements[s]:
            aligned = addresses[t] % 16 == 0 == addresses[s] % 16
            line = (addresses[t], addresses[s], elements[t])
            groups.setdefault((dtypes[t], dtypes[s], aligned), []).append(line)
            spans.append((addresses[t], addresses[t] + elements[t] * dtypes[t].itemsize))
        else:
            others.append(t)
            spans.append((addresses[t], addresses[t] + 1))  # such tensors may interleave
    _refuse_ties(spans)
    batches = [Batch(t, s, aligned, *_tables(lines, device)) for (t, s, aligned), lines in groups.items()]
    return Plan(batches, others)


def _tables(lines: list[tuple[int, int, int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """`Batch.table` and `Batch.owners` from (teacher's address, student's address, elements) of each pair."""
    pairs = np.array(lines, np.int64)  # [P, 3]
    blocks = -(-pairs[:, 2] // tiling.elementwise(torch.float32)["BLOCK"])  # [P]
    first = np.cumsum(blocks) - blocks
    owners = np.repeat(np.arange(len(lines)), blocks)
    host = torch.from_numpy(np.concatenate([np.c_[pairs, first].ravel(), owners]))
    if device.type == "cuda":
        host = host.pin_memory()  # torch doesn't reuse it before the copy is done
    both = host.to(device, non_blocking=True)
    return both[: 4 * len(lines)].view(-1, 4), both[4 * len(lines) :]


_captured: list[Plan] = []  # CUDA graphs read their tables at every replay, so these are never freed
_dtype = operator.attrgetter("dtype")


def ema_update_(teacher: list[Tensor], student: list[Tensor], momentum: Tensor) -> None:
    both = [*teacher, *student]
    plan = _plan(
        tuple(map(Tensor.data_ptr, both)),
        tuple(map(Tensor.numel, both)),
        tuple(map(_dtype, both)),
        tuple([(i, x.size(), x.stride()) for i, x in enumerate(both) if not x.is_contiguous()]),
        momentum.device,
    )
    if launch.capturing(momentum.device):
        _captured.append(plan)
    for batch in plan.batches:
        launch.launch(
            _ema_update_kernel,
            (len(batch.owners),),
            batch.table,
            batch.owners,
            momentum,
            TEACHER=launch.DTYPES[batch.teacher],
            STUDENT=launch.DTYPES[batch.student],
            COMPUTE=launch.DTYPES[compute_dtype(batch.teacher)],
            ALIGNED=batch.aligned,
            **tiling.elementwise(torch.float32),
            device_of=momentum,
        )
    for i in plan.others:
        reference.ema_update_([teacher[i]], [student[i]], momentum)
