"""`fastjem bench --steps`: what a training step costs the host beside model and loss, for every method.

A step seeds the generators, sets the rates, drops gradients, clips, updates weights and momentum copies and moves
queues and centres. All that is some tens of calls into torch, whatever the encoder: on a GPU, which runs a small
encoder in a millisecond, it is what the GPU waits for. Here each method has an encoder of a few tensors and narrow
heads, so that a step is next to nothing but these calls.
"""

import argparse
import gc
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastjem import step_graph
from fastjem.bench import machine, step_report
from fastjem.bench.clocks import synchronize
from fastjem.bench.neighbours import OtherProcesses, wait_until_idle
from fastjem.bench.timing import reason
from fastjem.build import Training
from fastjem.capture import BrokenError
from fastjem.commands.tiny_runs import crops_of, finished, tiny_run
from fastjem.data.batch import Batch
from fastjem.errors import UserError
from fastjem.stepping import Work, seed_generators

WARM = 3  # steps before those that are measured
LEAST = 20  # steps that are measured


class Operators(TorchDispatchMode):
    """Counts operators, and the tensors that they make."""

    def __init__(self) -> None:
        super().__init__()
        self.on = False
        self.calls = 0
        self.tensors = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        if self.on:
            self.calls += 1
            self.tensors += len(made_by(func, result))
        return result


def made_by(operator: Any, result: Any) -> list[Tensor]:
    """Of what an operator returns the tensors that it has made: no arguments again, and no looks at them."""
    several = result if isinstance(result, tuple) else (result,)
    kinds = operator._schema.returns
    return [
        x
        for kind, one in zip(kinds, several, strict=len(kinds) == len(several))
        if kind.alias_info is None
        for x in tree_leaves(one)
        if isinstance(x, Tensor)
    ]


class PythonCalls(TorchFunctionMode):
    """Counts calls from Python into torch: functions, methods of tensors and their attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.on = False
        self.calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += self.on
        return func(*args, **kwargs or {})


class Around(Work):
    """A step's work that knows what of it is model and loss; behind these a GPU is waited for."""

    def __init__(self, training: Training, *counters: Operators | PythonCalls) -> None:
        super().__init__(training)
        self.within = 0.0  # seconds that steps have been in model and loss
        self.counters = counters

    def forward_backward(self, batch: Batch, *, synchronise: bool) -> tuple[Tensor, dict[str, Any]]:
        begin = time.perf_counter()
        self.count(False)
        found = super().forward_backward(batch, synchronise=synchronise)
        synchronize(self.training.ranks.device)
        self.count(True)
        self.within += time.perf_counter() - begin
        return found

    def count(self, on: bool) -> None:
        for counter in self.counters:
            counter.on = on


def step(work: Work, done: int, batch: Batch) -> None:
    """All of a step, from its seed to what moves behind it."""
    seed_generators(work.training.config.seed, done, work.training.ranks)
    work.begins(done)
    work.take([batch])


def counted(training: Training, batch: Batch, done: int, *, keep_gradients: bool = False) -> dict[str, int]:
    """Operators, tensors that they make and calls from Python in one step beside model and loss.

    With all that goes past torch's dispatcher (`fastjem.ops.direct`), as a mode watches.
    """
    operators, calls = Operators(), PythonCalls()
    work = Around(training, operators, calls)
    work.keep_gradients = keep_gradients
    with calls, operators:
        work.count(True)
        step(work, done, batch)
        work.count(False)
    return {"operators": operators.calls, "allocations": operators.tensors, "python_calls": calls.calls}


def taken_apart(training: Training, batch: Batch, budget: float, rounds: int | None) -> dict[str, list[float]]:
    """Seconds of the host, step by step: of a whole step, of what is around model and loss, and of `finish`.

    A GPU is idle as each step begins, and isn't waited for within the times that are returned.

    Args:
        budget: seconds that the steps may take; at least `LEAST` are taken.
        rounds: so many steps, whatever they take; None: as the budget allows.
    """
    device = training.ranks.device
    crops = crops_of(training)
    plain, around = Work(training), Around(training)
    found: dict[str, list[float]] = {"whole": [], "around": [], "batch": []}
    end = time.perf_counter() + budget
    done = WARM
    gc.collect()
    gc.disable()  # a collection in the middle of a step is nobody's cost
    try:
        while len(found["around"]) < (rounds or LEAST) or (rounds is None and time.perf_counter() < end):
            for part, work in (("whole", plain), ("around", around)):
                synchronize(device)
                around.within = 0.0
                begin = time.perf_counter()
                step(work, done, batch)
                found[part].append(time.perf_counter() - begin - around.within)
                done += 1
            synchronize(device)
            begin = time.perf_counter()
            finished(training, crops, done)
            found["batch"].append(time.perf_counter() - begin)
    finally:
        gc.enable()
    return found


def by_graph(training: Training, batch: Batch, steps: int) -> tuple[list[float], str]:
    """Seconds that the host takes to launch a step as one CUDA graph; and, without any, why there is none."""
    if why := step_graph.why_not(training):
        return [], why
    device = training.ranks.device
    work = Work(training)
    graph = step_graph.of_run(training, work, lambda _: None)
    assert graph is not None
    found: list[float] = []
    try:
        for done in range(step_graph.WARM + 2 + steps):
            synchronize(device)
            begin = time.perf_counter()
            seed_generators(training.config.seed, done, training.ranks)
            work.begins(done)
            graph.take([batch])
            found.append(time.perf_counter() - begin)
    except UserError as error:
        if isinstance(error.__cause__, BrokenError):
            raise
        return [], str(error)
    return found[-steps:], ""


def measured(
    name: str, device: torch.device, *, budget: float, rounds: int | None = None, patience: float = 0.0
) -> dict[str, Any]:
    """A method's row: seconds of the host, and what was counted; or, where it can't be had, why."""
    torch.manual_seed(0)
    row: dict[str, Any] = {"method": name, "device": device.type}
    try:
        with tiny_run(name, device) as (training, batch):
            plain = Work(training)
            for done in range(WARM):
                step(plain, done, batch)
            counts = counted(training, batch, WARM)
            wait_until_idle(patience)
            others = OtherProcesses()
            seconds = taken_apart(training, batch, budget, rounds)
            row |= {
                "parameters": len(plain.parameters),
                "precision": training.precision,
                "steps": len(seconds["around"]),
                "others": round(others.share(), 3),
                **counts,
                **{part: {"minimum": min(times), "median": median(times)} for part, times in seconds.items()},
            }
            if device.type == "cuda":
                times, row["no_graph"] = by_graph(training, batch, LEAST)
                row["graph"] = {"minimum": min(times), "median": median(times)} if times else None
    except Exception as error:  # timm isn't there, most likely; the other methods are still worth timing
        if isinstance(error.__cause__, BrokenError):  # but nothing that follows would be right
            raise
        row["absent"] = reason(error)
    return row


def name_of(method: str) -> str:
    """What `--filter` matches and `--list` prints."""
    return f"step {method}"


def run(options: argparse.Namespace, device: torch.device, methods: Sequence[str], budget: float) -> int:
    """Measure these methods, write and print the results; the exit code of `fastjem bench`.

    Args:
        budget: seconds of sampling per method.
    """
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more would only wait for each other, on tensors as small as these
    try:
        return _run(options, device, methods, budget)
    finally:
        torch.set_num_threads(threads)


def _run(options: argparse.Namespace, device: torch.device, methods: Sequence[str], budget: float) -> int:
    begin = time.perf_counter()
    this = machine.now() | {"options": {key: getattr(options, key) for key in ("filter", "rounds", "quick")}}
    results: dict[str, Any] = {"machine": machine.describe(device), "runs": [this], "rows": []}
    rows = results["rows"]
    name = f"host-{machine.slug(results['machine'])}" + ("-quick" if options.quick else "")
    written: list[Path] = []
    try:
        for i, method in enumerate(methods, 1):
            start = time.perf_counter()
            row = measured(method, device, budget=budget, rounds=options.rounds, patience=options.wait)
            rows.append(row | {"run": this["date"]})
            this["seconds"] = round(time.perf_counter() - begin)
            if options.out:  # after each method: what ends the process leaves the rows before it
                written = step_report.write(results, Path(options.out), name)
            took = time.perf_counter() - start
            print(f"[{i}/{len(methods)}] {name_of(method)}: {took:.1f} s", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        print(f"stopped after {len(rows)} of {len(methods)} methods", file=sys.stderr, flush=True)
    if not rows:
        return 130
    print(step_report.text(results))
    for path in written:
        print(f"wrote {path}")
    if len(rows) < len(methods):
        return 130
    if options.check and step_report.over(rows):
        return 1
    return int(any(map(step_report.failed, rows)))
