"""Tensors that are written in place, many at once: everything is checked before anything is written.

A kernel is given addresses. It doesn't see that two of its targets are the same memory, of which one would be updated
twice, or that a target is also another one's source, which then depends on the order.
"""

import functools
import itertools
import operator
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastjem.functional import checks
from fastjem.functional.checks import PLAIN
from fastjem.kernels import plain
from fastjem.kernels.guard import holds_its_memory

_dtype = operator.attrgetter("dtype")
_right: dict[tuple, None] = {}  # what was found right of plain tensors, at most 64 lists of them, the oldest first


class _Block(NamedTuple):
    """The memory of one tensor, as addresses in bytes."""

    begin: int
    end: int
    size: tuple[int, ...]
    stride: tuple[int, ...] | None  # in elements; None: contiguous
    itemsize: int

    def units(self) -> np.ndarray:
        """The address / 2 of every pair of bytes, as no element has fewer, in ascending order where none is twice."""
        address = np.full(1, self.begin // 2)
        for length, stride in zip(self.size, self.stride or (), strict=bool(self.stride)):
            address = np.add.outer(address, np.arange(length) * (stride * self.itemsize // 2)).ravel()
        if self.stride is None:
            return np.arange(self.begin // 2, self.end // 2)
        return np.unique(np.add.outer(address, np.arange(self.itemsize // 2)))

    def repeats_itself(self) -> bool:
        """Whether two indices are one element, as in an expanded tensor."""
        if self.stride is None:
            return False
        extent = 1
        for stride, length in sorted((s, n) for n, s in zip(self.size, self.stride, strict=True) if n > 1):
            if stride < extent:  # dimensions interleave: rare, and only counting tells
                return len(self.units()) < np.prod(self.size) * (self.itemsize // 2)
            extent += stride * (length - 1)
        return False

    def meets(self, other: "_Block") -> bool:
        if self.begin >= other.end or other.begin >= self.end:
            return False
        if self.stride is None and other.stride is None:
            return True
        return np.intersect1d(self.units(), other.units(), assume_unique=True).size > 0


def _block(address: int, size: tuple[int, ...], stride: tuple[int, ...] | None, itemsize: int) -> _Block:
    strides = stride or ()
    last = sum((n - 1) * s for n, s in zip(size, strides, strict=True)) if stride else np.prod(size, dtype=int) - 1
    return _Block(address, address + (int(last) + 1) * itemsize, size, stride, itemsize)


def _check_memory(op: str, targets: list[_Block | None], sources: list[_Block | None]) -> None:
    """Each target is memory of its own, and of no other target's source. None: no elements."""
    for i, block in enumerate(targets):
        if block is not None and block.repeats_itself():
            checks.fail(op, "a tensor that is written must have memory for each element", f"an expanded one at {i}")
    ordered = sorted((block, i) for i, block in enumerate(targets) if block is not None)
    groups: list[list[tuple[_Block, int]]] = []  # of blocks whose ends cross each other
    end = -1
    for block, i in ordered:
        if block.begin < end:
            groups[-1].append((block, i))
        else:
            groups.append([(block, i)])
        end = max(end, block.end)
    for group in groups:
        if _are_apart([block for block, _ in group]):
            continue
        for (a, i), (b, j) in itertools.combinations(group, 2):
            if a.meets(b):
                contract = "each tensor that is written must have memory of its own"
                checks.fail(op, contract, f"some memory twice, at {min(i, j)} and {max(i, j)} (tied weights?)")
    _check_sources(op, groups, sources)


def _are_apart(blocks: list[_Block]) -> bool:
    """Whether no two blocks meet, for blocks in the order of their beginnings; a look at each pair of many is slow."""
    if len(blocks) < 2:
        return True
    contiguous = [block for block in blocks if block.stride is None]
    if any(a.end > b.begin for a, b in itertools.pairwise(contiguous)):
        return False
    units = np.sort(np.concatenate([block.units() for block in blocks]))
    return not (units[1:] == units[:-1]).any()


def _check_sources(op: str, groups: list[list[tuple[_Block, int]]], sources: list[_Block | None]) -> None:
    """No target is the source of another one."""
    begins = [group[0][0].begin for group in groups]
    ends = [max(block.end for block, _ in group) for group in groups]
    near: dict[int, list[tuple[_Block, int]]] = {}  # the sources between the ends of each group
    for j, block in enumerate(sources):
        if block is not None:
            for number in range(bisect_right(ends, block.begin), bisect_left(begins, block.end)):
                near.setdefault(number, []).append((block, j))
    for number, given in near.items():
        group = groups[number]
        written = {i: target for target, i in group}
        others = [(block, j) for block, j in given if written.get(j) != block]  # a pair may be one tensor
        if not others or (len(group) > 1 and _none_meets(group, others)):
            continue
        for (target, i), (block, j) in itertools.product(group, others):
            if target.meets(block):
                contract = "no tensor that is written may be another's source"
                checks.fail(op, contract, f"memory of target {i} as source {j}")


def _none_meets(a: list[tuple[_Block, int]], b: list[tuple[_Block, int]]) -> bool:
    units_of_a, units_of_b = (np.concatenate([block.units() for block, _ in blocks]) for blocks in (a, b))
    return not np.isin(units_of_a, units_of_b).any()


def check_update(
    op: str,
    targets: list[Tensor],
    sources: list[Tensor],
    check_dtypes: Callable[..., None] | None = None,
    seen: bytes | None = None,
) -> None:
    """ValueError unless each target may be written from the source of its number: devices, shapes, memory.

    Of tensors that are where they were, what was found is remembered: training checks the same ones at each step.

    Args:
        check_dtypes: is given `op` and the dtypes of a target and its source, and their number.
        seen: the tensors' `plain.facts`, the targets' first, where the caller has them.
    """
    if len(targets) != len(sources):
        checks.fail(op, "there must be as many tensors on both sides", f"{len(targets)} and {len(sources)}")
    if not targets:
        return
    if torch.compiler.is_compiling():
        both = [*targets, *sources]
        kind = both[0].device.type
        numbers = [0 if x.device == both[0].device else 1 for x in both]
        _check_pairs(op, [x.shape for x in both], [x.dtype for x in both], (kind, *numbers), check_dtypes)
        return
    seen = seen or plain.facts(targets, sources)
    if (op, seen, check_dtypes) in _right:
        return
    both = [*targets, *sources]
    devices = (both[0].device.type, *map(Tensor.get_device, both))
    facts = (tuple(map(Tensor.size, both)), tuple(map(_dtype, both)), devices)
    if not PLAIN.issuperset(map(type, both)):
        _check_pairs(op, *facts, check_dtypes)
        return
    contiguous = tuple(map(Tensor.is_contiguous, both))
    strides = () if all(contiguous) else tuple((i, both[i].stride()) for i, dense in enumerate(contiguous) if not dense)
    storages = [x.untyped_storage() for x in both]
    ends = tuple([storage.data_ptr() + storage.nbytes() for storage in storages])
    _check(op, tuple(map(Tensor.data_ptr, both)), ends, *facts, strides, check_dtypes)
    if any(map(Tensor.is_inference, targets)):
        check_inference_mode(op)
    elif seen is not None:
        while len(_right) >= 64:
            _right.pop(next(iter(_right)), None)
        _right[op, seen, check_dtypes] = None


def _length(x: Tensor) -> int:
    """Bytes from the beginning of x to the end of its last element."""
    if x.is_contiguous() or not x.numel():
        return x.nbytes
    return (1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))) * x.element_size()


def spans(tensors: Sequence[Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """Where the memory of tensors begins, in ascending order, and the furthest end of those up to there, in bytes."""
    given = [x for x in tensors if x.numel()]
    begins = np.fromiter(map(Tensor.data_ptr, given), np.int64, len(given))
    ends = begins + np.fromiter(map(_length, given), np.int64, len(given))
    order = np.argsort(begins)
    return begins[order], np.maximum.accumulate(ends[order])


def are_apart(written: tuple[np.ndarray, np.ndarray], sources: Sequence[Tensor]) -> bool:
    """Whether all sources hold their memory, and none reaches into the `spans` of what is written.

    Where not, they may still be right: `check_update` looks at each element.
    """
    if not (plain.plain((sources,)) or all(map(holds_its_memory, sources))):
        return False
    begins = np.fromiter(map(Tensor.data_ptr, sources), np.int64, len(sources))
    lengths = np.fromiter(map(_length, sources), np.int64, len(sources))
    before = np.searchsorted(written[0], begins + lengths) - 1  # the last that begins before a source ends
    some = before >= 0
    return not (written[1][before[some]] > begins[some]).any()


def check_inference_mode(op: str) -> None:
    """For one that would write an inference tensor."""
    if not torch.is_inference_mode_enabled():
        checks.fail(op, "outside of inference mode, what is written must be no inference tensor", "one")


def _check_pairs(
    op: str,
    sizes: Sequence[torch.Size],
    dtypes: Sequence[torch.dtype],
    devices: tuple,
    check_dtypes: Callable[..., None] | None,
) -> None:
    count = len(sizes) // 2
    for i in range(count):
        if sizes[i] != sizes[count + i]:
            came = f"{tuple(sizes[i])} and {tuple(sizes[count + i])} at {i}"
            checks.fail(op, "teacher and student must have the same shapes", came)
        if check_dtypes is not None:
            check_dtypes(op, dtypes[i], dtypes[count + i], i)
    kind, *numbers = devices
    if any(number != numbers[0] for number in numbers):
        came = " and ".join("cpu" if number < 0 else f"{kind}:{number}" for number in sorted({*numbers}))
        checks.fail(op, "tensors must be on one device", came)


@functools.lru_cache(maxsize=64)
def _check(
    op: str,
    addresses: tuple[int, ...],
    ends: tuple[int, ...],  # of the storages, as addresses
    sizes: tuple[torch.Size, ...],
    dtypes: tuple[torch.dtype, ...],
    devices: tuple,  # the first one's type, and of each its number, -1 on the host
    strides: tuple[tuple[int, tuple[int, ...]], ...],  # of those that aren't contiguous
    check_dtypes: Callable[..., None] | None,
) -> None:
    _check_pairs(op, sizes, dtypes, devices, check_dtypes)
    if devices[0] == "meta":
        return
    stride_of = dict(strides)
    blocks = [
        _block(address, tuple(size), stride_of.get(i), dtype.itemsize) if 0 not in size else None
        for i, (address, size, dtype) in enumerate(zip(addresses, sizes, dtypes, strict=True))
    ]
    for i, block in enumerate(blocks):
        if block is not None and (not block.begin or block.end > ends[i]):
            checks.fail(op, "a tensor's storage must hold its elements", f"a freed one at {i % (len(blocks) // 2)}")
    count = len(blocks) // 2
    _check_memory(op, blocks[:count], blocks[count:])
