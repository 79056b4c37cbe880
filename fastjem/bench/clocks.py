"""What is timed (a `Call`), and three clocks that time it: the host's, CUDA events, CUDA graph replay.

Each clock's `samples()` are the seconds of (forward, backward) of a few calls in a row; `timing.compare` alternates the
variants' clocks.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from time import perf_counter
from typing import Any, Protocol

import torch
from torch import Tensor

from fastjem.capture import capturing

FLUSH_BYTES = 256 * 2**20  # five times the L2 cache of an H100
GRAPH_SECONDS = 200e-6  # the least work of one replay, so that the replay's own few microseconds don't count
MAX_SETS = 32


def tensors(tree: object) -> Iterator[Tensor]:
    """The tensors of nested tuples and lists, in order."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for branch in tree:
            yield from tensors(branch)


def copied(tree: Any, dtype: torch.dtype | None = None) -> Any:
    """The same nested tuples and lists of fresh copies, floating-point ones in `dtype` if it is given."""
    if isinstance(tree, Tensor):
        copy = tree.detach().clone()
        if dtype is not None and copy.is_floating_point():
            copy = copy.to(dtype)
        return copy.requires_grad_(tree.requires_grad)
    if isinstance(tree, (tuple, list)):
        return type(tree)(copied(branch, dtype) for branch in tree)
    return tree


def size(tree: Iterable) -> int:
    """Bytes of all tensors."""
    return sum(x.nbytes for x in tensors(tree))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Call:
    """`function(*inputs)`, and the gradients of its result for those inputs that require one."""

    def __init__(self, function: Callable, inputs: tuple):
        self.function = function
        self.inputs = inputs
        self.leaves = [x for x in tensors(inputs) if x.requires_grad]

    def forward(self) -> Tensor | None:
        return self.function(*self.inputs)

    def backward(self, result: Tensor | None) -> tuple[Tensor, ...]:
        if result is None or not self.leaves:
            return ()
        return torch.autograd.grad(result, self.leaves)

    def fresh(self) -> list[Tensor]:
        """What a call has to return anyway: its result and the gradients. Their memory is nobody's overhead."""
        result = self.forward()
        gradients = self.backward(result)
        return [*tensors(result), *gradients]

    def outputs(self) -> list[Tensor]:
        """All that the call computes. A function without a result works in place, on its first argument."""
        return [x.detach() for x in self.fresh() or tensors(self.inputs[0])]


class Clock(Protocol):
    method: str  # in words, for the report

    def samples(self) -> list[tuple[float, float]]:
        """Seconds of forward and backward, for each of a few calls."""
        ...


class WallClock:
    """The host's clock. On a GPU nothing waits for the device in between: the host's overhead per call is timed."""

    def __init__(self, call: Call, repeats: int, device: torch.device):
        self.call = call
        self.repeats = repeats
        self.device = device
        self.method = "host clock, same inputs again" if device.type == "cpu" else "host clock, device not waited for"

    def samples(self) -> list[tuple[float, float]]:
        spans = []
        synchronize(self.device)
        for _ in range(self.repeats):
            start = perf_counter()
            result = self.call.forward()
            middle = perf_counter()
            self.call.backward(result)
            end = perf_counter()
            spans.append((middle - start, end - middle))
        synchronize(self.device)
        return spans


def _elapsed(marks: list[tuple[torch.cuda.Event, ...]], calls: int) -> list[tuple[float, float]]:
    """Seconds of forward and backward of one call; `calls` of each lie between two events, which tell milliseconds."""
    torch.cuda.synchronize()
    return [
        (start.elapsed_time(middle) * 1e-3 / calls, middle.elapsed_time(end) * 1e-3 / calls)
        for start, middle, end in marks
    ]


def _events() -> tuple[torch.cuda.Event, ...]:
    """Before forward, between forward and backward, after backward."""
    return tuple(torch.cuda.Event(enable_timing=True) for _ in range(3))


class EventClock:
    """CUDA events around calls from Python; a large buffer is written before each call, which empties the L2 cache."""

    method = "events, L2 flushed before each call"

    def __init__(self, call: Call, repeats: int):
        self.call = call
        self.repeats = repeats

    def samples(self) -> list[tuple[float, float]]:
        device = next(tensors(self.call.inputs)).device
        flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
        marks = []
        for _ in range(self.repeats):
            start, middle, end = _events()
            flush.zero_()
            start.record()
            result = self.call.forward()
            middle.record()
            self.call.backward(result)
            end.record()
            marks.append((start, middle, end))
        return _elapsed(marks, 1)


class GraphClock:
    """Replay of a CUDA graph with one call on each of several sets of inputs, together larger than the L2 cache.

    The launches then cost the device a microsecond and the host nothing, as in a captured training step. Raises where
    the call can't be captured, because it waits for the device (`.item()`, boolean indexing) for example.
    """

    def __init__(self, call: Call, repeats: int, estimate: float):
        l2 = torch.cuda.get_device_properties("cuda").L2_cache_size
        one_set = size(call.inputs) + size(call.leaves)
        wanted = max(math.ceil(2 * l2 / one_set), math.ceil(GRAPH_SECONDS / estimate))
        self.calls = [Call(call.function, copied(call.inputs)) for _ in range(min(wanted, MAX_SETS))]
        self.repeats = repeats
        self.method = f"graph replay over {len(self.calls)} sets of inputs"

        stream = torch.cuda.Stream()  # its own, as capturing needs it
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for each in self.calls[:2]:
                each.fresh()
            _refuse_to_wait(call)
        torch.cuda.synchronize()
        self.forward = torch.cuda.CUDAGraph()
        self.backward = torch.cuda.CUDAGraph()
        with capturing(self.forward, stream, torch.cuda.graph_pool_handle()):
            results = [each.forward() for each in self.calls]
        self.differentiable = bool(call.leaves)
        if self.differentiable:
            with capturing(self.backward, stream, self.forward.pool()):
                # Held, as the next call of the capture would get the memory of gradients that nobody holds.
                self.gradients = [each.backward(result) for each, result in zip(self.calls, results, strict=True)]

    def samples(self) -> list[tuple[float, float]]:
        marks = []
        for _ in range(self.repeats):
            start, middle, end = _events()
            start.record()
            self.forward.replay()
            middle.record()
            if self.differentiable:
                self.backward.replay()  # after its forward each time: it may work in place on what forward left
            end.record()
            marks.append((start, middle, end))
        return _elapsed(marks, len(self.calls))


def _refuse_to_wait(call: Call) -> None:
    """Raise where a call waits for the device: found before capture, as a capture that fails can disturb later ones."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        call.fresh()
    finally:
        torch.cuda.set_sync_debug_mode("default")
