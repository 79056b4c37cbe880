"""`fastjem bench`: which cases, in which order, and where their results go."""

import argparse
import contextlib
import os
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fastjem import ops
from fastjem.arguments import PlainParser
from fastjem.bench import machine, report
from fastjem.bench.case import Case, dtype_name
from fastjem.bench.cases import cases
from fastjem.bench.timing import Comparison, compare, reason

QUICK_BUDGET, BUDGET = 0.3, 2.0  # seconds of sampling per case


def main(argv: list[str] | None = None) -> int:
    """Run `fastjem bench` with these arguments.

    Returns:
        0; 1 where ours failed or computed something else, or with --check was beaten; 2 for a mistake in the
        arguments; 130 where Ctrl-C (SIGINT) ended it early, with the results so far.
    """
    of_words = parser()
    try:
        options = of_words.parse_args(argv)
        device = torch.device(options.device)
        if device.type == "cuda" and not torch.cuda.is_available():
            of_words.error("--device cuda, but torch finds no GPU")
        if options.steps:
            return _steps(of_words, options, device)
        chosen, left_out = _choose(options, device)
        if not chosen:
            of_words.error(f"no case matches {options.filter!r} on {device.type} (--list shows all)")
    except SystemExit as stop:  # argparse has said why
        return int(stop.code or 0)
    if options.list:
        print("\n".join(case.name for case in chosen))
        return 0
    return _run(options, device, chosen, left_out)


def _steps(of_words: argparse.ArgumentParser, options: argparse.Namespace, device: torch.device) -> int:
    """`--steps`: methods in place of cases."""
    of_cases = ("dtype", "full", "compile", "loops")
    if given := [f"--{name}" for name in of_cases if getattr(options, name) not in (None, False)]:
        of_words.error(f"{given[0]} is about operators' cases, and --steps has a row for each method")
    from fastjem.commands import host_steps  # a whole run, which cases don't need
    from fastjem.methods import METHODS

    chosen = [name for name in METHODS if re.search(options.filter, host_steps.name_of(name))]
    if not chosen:
        of_words.error(f"no method matches {options.filter!r} (--steps --list shows all)")
    if options.list:
        print("\n".join(map(host_steps.name_of, chosen)))
        return 0
    return host_steps.run(options, device, chosen, QUICK_BUDGET / 3 if options.quick else options.budget / 3)


def _run(options: argparse.Namespace, device: torch.device, chosen: list[Case], left_out: int) -> int:
    """Measure the machine and the chosen cases, write and print the results; the exit code."""
    begin = time.perf_counter()
    described = machine.describe(device)
    run = machine.now()
    kept = ("filter", "dtype", "rounds", "quick", "full", "compile", "loops")
    run["options"] = {key: getattr(options, key) for key in kept}
    _say("measuring copy bandwidth and matrix products ...")
    ceilings = machine.ceilings(device, options.wait)
    run["ceilings"] = {"copy": {str(size): rate for size, rate in ceilings.copy.items()}, "matmul": ceilings.matmul}
    results: dict[str, Any] = {"machine": described, "runs": [run], "rows": []}
    rows = results["rows"]
    name = machine.slug(described) + ("-quick" if options.quick else "")
    written = []
    try:
        for row in _measured(options, device, chosen, ceilings):
            rows.append(row | {"run": run["date"]})
            run["seconds"] = round(time.perf_counter() - begin)
            if options.out:  # after each case: what ends the process leaves the rows before it
                written = report.write(results, Path(options.out), name)
    except KeyboardInterrupt:
        _say(f"stopped after {len(rows)} of {len(chosen)} cases")
    if not rows:
        return 130
    print(report.text(results))
    if left_out:
        print(f"{left_out} slow or less usual case{'s' * (left_out > 1)} left out; --full runs them too.")
    for path in written:
        print(f"wrote {path}")
    if len(rows) < len(chosen):
        return 130
    if options.check and (lost := report.beaten(rows)):
        names = "|".join(re.escape(f"{row['op']} {row['shape']} {row['dtype']}") for row in lost)
        print(f"{len(lost)} of {len(rows)} cases are beaten; to measure them again: --filter '^({names})$'")
        return 1
    return int(any("ours" in row["absent"] for row in rows))


def _measured(
    options: argparse.Namespace, device: torch.device, chosen: list[Case], ceilings: machine.Ceilings
) -> Iterator[dict]:
    """The rows of the chosen cases, each as soon as it is there."""
    on_gpu = device.type == "cuda"
    compiled = not (on_gpu or options.quick) if options.compile is None else options.compile
    loops = not on_gpu or options.loops
    budget = QUICK_BUDGET if options.quick else options.budget
    limits = {"rounds": options.rounds, "budget": budget, "patience": options.wait}
    with _cold_caches(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if compiled:
            with contextlib.suppress(Exception):  # what torch.compile imports at its first use is no case's cost
                torch.compile(lambda x: x + 1)(torch.ones(2, device=device))
        for i, case in enumerate(chosen, 1):
            start = time.perf_counter()
            yield measure(case, device, ceilings, compiled, loops, **limits)
            _say(f"[{i}/{len(chosen)}] {case.name}: {time.perf_counter() - start:.1f} s")


def measure(
    case: Case, device: torch.device, ceilings: machine.Ceilings, compiled: bool, loops: bool = True, **limits: Any
) -> dict:
    """Time one case: its row for the report. `limits` go to `compare`: rounds, budget, patience."""
    if compiled:
        torch._dynamo.reset()  # one formula at many shapes would meet dynamo's limit
    variants, absent = case.variants(compiled, loops)
    try:
        inputs = case.draw(device)
        verify = case.verifier(inputs)
        comparison = compare(variants, inputs, device=device, verify=verify, clock=case.clock, **limits)
    except Exception as error:  # too large for this machine, most likely; the other cases are still worth running
        comparison = Comparison({}, dict.fromkeys(variants, reason(error)), [])
    comparison.absent |= absent
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return row(case, device, comparison, ceilings)


def row(case: Case, device: torch.device, comparison: Comparison, ceilings: machine.Ceilings) -> dict:
    """One case's results in plain data: everything in seconds and bytes."""
    floor, bound_by = ceilings.floor(case.bytes, case.flops, case.dtype)
    return {
        "op": case.op,
        "shape": case.shape,
        "dtype": dtype_name(case.dtype),
        "runs_as": _runs_as(case, device),
        "clock": case.clock,
        "rounds": comparison.rounds,
        "others": round(comparison.others, 3),
        "bytes": case.bytes,
        "flops": case.flops,
        "floor": None if case.clock == "host" else floor,
        "floor_bound_by": None if case.clock == "host" else bound_by,
        "variants": {name: asdict(timing) for name, timing in comparison.variants.items()},
        "absent": comparison.absent,
        "wrong": comparison.wrong,
    }


def _runs_as(case: Case, device: torch.device) -> str:
    """Which implementations `ours` consists of: "C++", "C++ + reference"; a loss without operator is "torch"."""
    table = ops.implementations()
    kinds = {table[op][device.type].partition(" ")[0] if op in table else "torch" for op in (case.op, *case.uses)}
    return " + ".join(sorted(kinds))


@contextlib.contextmanager
def _cold_caches() -> Iterator[None]:
    """Compilers find an empty disk cache, so that first calls mean the same on every machine."""
    names = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
    before = {name: os.environ.get(name) for name in names}
    with tempfile.TemporaryDirectory(prefix="fastjem-bench-", ignore_cleanup_errors=True) as folder:
        os.environ.update({name: os.path.join(folder, name.lower()) for name in names})
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})


def _choose(options: argparse.Namespace, device: torch.device) -> tuple[list[Case], int]:
    """The cases to run, and how many of those that match wait for --full."""
    matching = [
        case
        for case in cases()
        if device.type in case.devices
        and re.search(options.filter, case.name)
        and (options.dtype is None or options.dtype == dtype_name(case.dtype))
    ]
    chosen = [case for case in matching if options.full or device.type not in case.full_only]
    return chosen, len(matching) - len(chosen)


def _rounds(value: str) -> int:
    if int(value) < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return int(value)


def _folder(value: str) -> str:
    if not value:
        raise argparse.ArgumentTypeError("must not be empty")
    return value


def _pattern(value: str) -> str:
    try:
        re.compile(value)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"not a regular expression: {error}") from None
    return value


def parser() -> argparse.ArgumentParser:
    parser = PlainParser(
        prog="fastjem bench",
        description="Time fastjem's operators against eager torch, torch.compile and those peers that are installed "
        "(lightly, torchvision, memeff, siglip-kernel, triton-augment, flash-kmeans ...), in turns.",
    )
    here = "cuda" if torch.cuda.is_available() else "cpu"
    add = parser.add_argument
    add("--filter", default="", type=_pattern, metavar="REGEX", help="only cases whose name matches, e.g. 'cosine|ema'")
    add("--device", choices=("cpu", "cuda"), default=here, help=f"here: {here}")
    add("--dtype", choices=("fp32", "bf16"), help="only cases with such inputs")
    add("--rounds", type=_rounds, metavar="N", help="turns of each variant; default: 5 to 25, as the time allows")
    add("--budget", type=float, default=BUDGET, metavar="S", help=f"seconds of sampling per case; default: {BUDGET:g}")
    add("--check", action="store_true", help="exit with 1 where anything is faster, and ours far from the floor")
    add("--quick", action="store_true", help="short: does everything run?")
    add("--full", action="store_true", help="slow and less usual cases too")
    add(
        "--compile", action=argparse.BooleanOptionalAction,
        help="torch.compile, too, or not; default: on the CPU, without --quick (on a GPU it takes minutes)",
    )  # fmt: skip
    add("--loops", action="store_true", help="on a GPU, too, peers that go through the batch in Python")
    add("--wait", type=float, default=0, metavar="S", help="per case, wait at most so long for an idle machine")
    add(
        "--steps", action="store_true", help="a training step's time on the host beside model and loss, of every method"
    )
    add("--out", type=_folder, metavar="DIR", help="write DIR/<machine>.json and .md; other cases' rows in them stay")
    add("--list", action="store_true", help="print the names of the cases, run nothing")
    return parser


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
