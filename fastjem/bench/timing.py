"""The one way to time: variants of one computation take turns on the same inputs, and ratios are taken within the run.

A machine's speed drifts (clocks, neighbours), so times of different runs don't compare; times taken in turns do.
"""

import gc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from time import monotonic, perf_counter

import torch
from torch import Tensor

from fastjem.bench.clocks import Call, Clock, EventClock, GraphClock, WallClock, copied, size, synchronize
from fastjem.bench.memory import peak
from fastjem.bench.neighbours import BUSY, OtherProcesses, wait_until_idle
from fastjem.capture import BrokenError

BLOCK_SECONDS = 0.02  # a turn is as many calls as fit in this
GRAPH_BELOW = 1e-3  # shorter calls are replayed from a CUDA graph: from Python their launches would be timed
MIN_ROUNDS, MAX_ROUNDS = 5, 25


class WrongResult(Exception):
    """A variant that computes something else: its time is worth nothing."""


@dataclass(frozen=True)
class Stats:
    """Seconds per call, over all calls of all rounds."""

    minimum: float
    p20: float
    median: float
    p80: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Stats":
        ordered = sorted(samples)

        def quantile(q: float) -> float:
            return ordered[round(q * (len(ordered) - 1))]

        return cls(ordered[0], quantile(0.2), median(ordered), quantile(0.8))


@dataclass
class Timing:
    """One variant: the first call (with all that is compiled or loaded in it), then each pass."""

    first_call: float  # seconds
    memory: int | None  # peak bytes beyond inputs, result and gradients
    method: str = ""
    passes: dict[str, Stats] = field(default_factory=dict)  # "total"; with a gradient also "forward", "backward"


@dataclass
class Comparison:
    """All variants of one run, and why those that are missing are missing."""

    variants: dict[str, Timing]
    absent: dict[str, str]
    wrong: list[str]  # those of the absent whose result was wrong
    rounds: int = 0
    others: float = 0.0  # the share of the CPUs that other processes had during the rounds

    def ratio(self, variant: str, baseline: str, which: str = "total") -> tuple[float, float]:
        """How many times faster `variant` is than `baseline`: by their minima, by their medians."""
        ours = self.variants[variant].passes[which]
        theirs = self.variants[baseline].passes[which]
        return theirs.minimum / ours.minimum, theirs.median / ours.median


def turns(names: Sequence[str], rounds: int) -> list[str]:
    """Who is timed when: every variant once a round, each round beginning with the next one."""
    return [names[(start + i) % len(names)] for start in range(rounds) for i in range(len(names))]


def compare(
    variants: dict[str, Callable],
    inputs: tuple,
    *,
    device: torch.device | str = "cpu",
    verify: Callable[[list[Tensor]], None] | None = None,
    clock: str = "device",
    rounds: int | None = None,
    budget: float = 5.0,
    patience: float = 0.0,
) -> Comparison:
    """Time `variant(*inputs)` and the backward pass to those inputs that require a gradient, the variants in turns.

    Args:
        variants: functions of the inputs; they return a tensor or, working in place on the first argument, nothing.
        inputs: tensors, or nested lists of them; they stay as they are.
        device: where the inputs are.
        verify: called once with a variant's result and gradients; where it raises WrongResult, the variant isn't timed.
        clock: "device" (on a GPU: graph replay where calls are short and capturable, else events with the L2 cache
            flushed) or "host" (the host's time per call, without waiting for the device).
        rounds: how many turns each variant gets; None: as many as `budget` (seconds) allows, from 5 to 25.
        patience: for at most so many seconds, wait for an idle machine, and begin again if it didn't stay so.
    """
    device = torch.device(device)
    result, calls, estimates = _prepare(variants, inputs, device, verify, clock)
    if not calls:
        return result

    # Clocks are of one kind for all variants: ratios of a graph replay and of calls from Python would mean nothing.
    graphs = device.type == "cuda" and clock == "device" and min(estimates.values()) < GRAPH_BELOW
    clocks = {}
    round_seconds = 0.0
    for name, call in calls.items():
        repeats = max(1, math.ceil(BLOCK_SECONDS / estimates[name]))
        clocks[name] = _clock(call, repeats, estimates[name], device, clock, graphs)
        result.variants[name].method = clocks[name].method
        round_seconds += repeats * estimates[name]
    result.rounds = rounds or max(MIN_ROUNDS, min(MAX_ROUNDS, int(budget / round_seconds)))

    all_samples, result.others = _take_turns_undisturbed(clocks, result.rounds, patience)
    for name, samples in all_samples.items():
        forward, backward = zip(*samples, strict=True)
        passes = {"total": forward}
        if calls[name].leaves:
            passes = {"total": [sum(pair) for pair in samples], "forward": forward, "backward": backward}
        result.variants[name].passes = {which: Stats.of(values) for which, values in passes.items()}
    return result


def _prepare(
    variants: dict[str, Callable],
    inputs: tuple,
    device: torch.device,
    verify: Callable[[list[Tensor]], None] | None,
    clock: str,
) -> tuple[Comparison, dict[str, Call], dict[str, float]]:
    """Each variant's first call and memory; what is to be timed, and roughly how many seconds a call takes."""
    result = Comparison({}, {}, [])
    calls = {}
    estimates = {}
    reused = copied(inputs)  # these may change in place; each variant's first call starts from `inputs`
    for name, function in variants.items():
        try:
            timing = _first_call(Call(function, copied(inputs)), device, verify)
            call = Call(function, reused)
            timing.memory, estimate = _warm_up(call, device, clock)
        except WrongResult as error:
            result.wrong.append(name)
            result.absent[name] = str(error)
        except Exception as error:  # out of memory, no compiler, a peer's limits: the others are still worth timing
            result.absent[name] = reason(error)
        else:
            result.variants[name] = timing
            calls[name] = call
            estimates[name] = estimate
    return result, calls, estimates


def _take_turns_undisturbed(
    clocks: dict[str, Clock], rounds: int, patience: float
) -> tuple[dict[str, list[tuple[float, float]]], float]:
    """The samples of the least disturbed of the attempts that patience allows, and what others had of the CPUs."""
    end = monotonic() + patience
    attempts = []
    while True:
        wait_until_idle(end - monotonic())
        others = OtherProcesses()
        samples = _take_turns(clocks, rounds)
        share = others.share()
        attempts.append((samples, share))
        if share < BUSY or monotonic() > end:
            return min(attempts, key=lambda attempt: attempt[1])


def _take_turns(clocks: dict[str, Clock], rounds: int) -> dict[str, list[tuple[float, float]]]:
    samples = {name: [] for name in clocks}
    gc.collect()
    gc.disable()  # a collection in the middle of a call is nobody's cost
    try:
        for name in turns(list(clocks), rounds):
            samples[name] += clocks[name].samples()
    finally:
        gc.enable()
    return samples


def reason(error: Exception) -> str:
    """The first line of it."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:160]


def _first_call(call: Call, device: torch.device, verify: Callable[[list[Tensor]], None] | None) -> Timing:
    synchronize(device)
    start = perf_counter()
    outputs = call.outputs()
    synchronize(device)
    timing = Timing(first_call=perf_counter() - start, memory=None)
    if verify:
        verify(outputs)
    return timing


def _warm_up(call: Call, device: torch.device, clock: str) -> tuple[int | None, float]:
    """Peak bytes beyond what the call returns, and roughly how many seconds a call takes."""
    measured: list[tuple[float, int]] = []

    def timed() -> list[Tensor]:
        start = perf_counter()
        outputs = call.fresh()
        measured.append((perf_counter() - start, size(outputs)))
        return outputs

    highest = peak(timed, device)
    seconds, returned = measured[-1]
    memory = None if highest is None else max(highest - returned, 0)
    if seconds < 0.2 or device.type == "cuda":
        by_events = device.type == "cuda" and clock == "device"
        sampler: Clock = EventClock(call, 3) if by_events else WallClock(call, 3, device)
        seconds = min(map(sum, sampler.samples()))
    return memory, max(seconds, 1e-7)


def _clock(call: Call, repeats: int, estimate: float, device: torch.device, clock: str, graphs: bool) -> Clock:
    """graphs: replay a CUDA graph of the call if it can be captured."""
    if device.type == "cpu" or clock == "host":
        most = 1000 if device.type == "cpu" else 30  # more launches than the queue holds would wait for the device
        return WallClock(call, min(repeats, most), device)
    if graphs:
        try:
            graph = GraphClock(call, 1, estimate)
            graph.repeats = max(3, math.ceil(BLOCK_SECONDS / max(estimate * len(graph.calls), 1e-6)) // 4)
            return graph
        except BrokenError:  # nothing that follows would be right
            raise
        except Exception:  # not capturable: it's timed from Python, and its row says so
            torch.cuda.synchronize()
    return EventClock(call, min(repeats, 100))
