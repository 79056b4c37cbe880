"""`make gpu-check`: canaries, tests and benchmarks on a machine with a GPU, each within its time.

A test's process may be killed by what it tests: a kernel that reads beyond its memory leaves a GPU context in which
nothing works any more, one that waits for itself never ends. So the tests run in processes that others replace, and
the results are in files at every moment, whatever ends the run.
"""

import argparse
import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

TESTS = Path(__file__).parent
ROOT = TESTS.parent
PARTS = ("canaries", "tests", "bench", "dali")
SECONDS = {"canaries": 170, "tests": 180, "bench": 140, "dali": 60}  # with 90 to build, under ten minutes
# Seconds of a test; one that compiles thirty kernels takes 15. A canary may compile a network, beside all others.
LONGEST = {"canaries": 160, "tests": 90, "dali": 60}
RESTARTS = 24
INTERRUPTED = 130
LINES_OF_FAILURES = 40

# The canaries, which are a part of their own, and tests of what is here.
OF_GPU_CHECK = {"test_gpu_canaries.py", "test_gpu_canaries_here.py", "test_gpu_check.py", "test_specialisations.py"}

# By number, with a process and an environment of its own each: (of the functions' names the beginning, environment).
BLOCKING = {"CUDA_LAUNCH_BLOCKING": "1"}  # an error is reported by the call that made it
NUMBERS = ("01", "02", "03", "04", "05", "06", "07", "08a", "08b", "09", "10a", "10b", "10c", "10d")
CANARIES = [(f"test_{number}_", BLOCKING if "03" <= number <= "07" else {}) for number in NUMBERS]


class Interrupted(Exception):
    """SIGINT or SIGTERM."""


@dataclass
class Process:
    """A worker: what it was given, and what it has told so far."""

    name: str
    folder: Path
    claims: Path | None
    only: str | None
    environment: dict[str, str]
    arguments: list[str]
    rest: list[str] = field(default_factory=list)
    running: tuple[str, float] | None = None  # a test, and since when
    group: list[str] = field(default_factory=list)  # what it hasn't done of its group
    handle: subprocess.Popen[bytes] | None = None
    read: int = 0  # bytes of its events

    @property
    def events(self) -> Path:
        return self.folder / f"{self.name}.jsonl"

    @property
    def log(self) -> Path:
        return self.folder / f"{self.name}.log"

    def start(self) -> None:
        plan = self.folder / f"{self.name}.json"
        claims = None if self.claims is None else str(self.claims)
        plan.write_text(
            json.dumps({"claims": claims, "events": str(self.events), "rest": self.rest, "only": self.only})
        )
        paths = [str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **self.environment}
        environment |= {"FASTJEM_GPU_WORKER": str(plan), "PYTHONPATH": os.pathsep.join(paths)}
        environment |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # of what is installed there nothing is needed
        words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "gpu_worker", *self.arguments]
        with self.events.open("ab") as events:
            events.write(b"\n")  # behind a line in whose middle the process before was killed
        with self.log.open("ab") as log:
            self.handle = subprocess.Popen(
                words, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=ROOT, start_new_session=True
            )

    def told(self) -> Iterator[dict[str, Any]]:
        """The events since the last look, those of whole lines."""
        if not self.events.exists():
            return
        with self.events.open("rb") as file:
            file.seek(self.read)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self.read += len(line)
                with contextlib.suppress(ValueError):  # empty, or half of one
                    yield json.loads(line)

    def kill(self) -> None:
        """It and what it has started."""
        if self.handle is not None and self.handle.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.handle.pid, signal.SIGKILL)
            self.handle.wait()


class Part:
    """The tests of one part, spread over processes; `file` has the outcomes at every moment."""

    def __init__(self, name: str, file: Path, processes: list[Process], seconds: float, longest: float) -> None:
        self.name = name
        self.file = file
        self.waiting = processes
        self.seconds = seconds
        self.longest = longest
        self.tests: dict[str, dict[str, Any]] = {}
        self.collected: dict[str, None] = {}
        self.verdict = "RUNNING"
        self.restarts = 0
        self.begin = time.monotonic()

    @property
    def counts(self) -> Counter[str]:
        counts = Counter(test["outcome"] for test in self.tests.values())
        counts["not run"] = len(self.collected.keys() - self.tests.keys())
        return counts

    def run(self) -> None:
        """To the end, or to that of its time; the verdict is there whatever happens."""
        self.begin = time.monotonic()
        running = self.waiting
        try:
            for process in running:
                process.start()
            while running:
                time.sleep(0.1)
                running = [process for process in running if self._goes_on(process)]
                self.write()
                self.progress(running)
                if time.monotonic() - self.begin > self.seconds:
                    self.verdict = "OUT OF TIME"
                    break
            else:
                bad = self.counts["failed"] or self.counts["not run"] or not self.tests
                self.verdict = "FAILED" if bad else "passed"
        except Interrupted:
            self.verdict = "INTERRUPTED"
            raise
        finally:
            for process in running:
                process.kill()
                self._hear(process)
            self.write()
            self.progress([])

    def _goes_on(self, process: Process) -> bool:
        """Look after one process: hear it, kill it where its test takes too long, replace it where it died."""
        self._hear(process)
        assert process.handle is not None
        if process.running and time.time() - process.running[1] > self.longest:
            process.kill()
            self._lost(process, f"took more than {self.longest:g} s")
        elif process.handle.poll() is None:
            return True
        else:
            self._hear(process)  # what it said last
            code = process.handle.returncode
            if process.running:
                self._lost(process, f"its process ended with {_signal(code)}")
            elif code not in (0, 1, 5) and not process.group:  # not by what a test did: nothing was begun
                self._failed(process.name, f"pytest ended with {_signal(code)}: {_last_line(process.log)}")
                return False
        if not (process.group or process.claims) or process.handle.returncode in (0, 1, 5):
            return False
        if self.restarts == RESTARTS:
            self._failed(process.name, f"{RESTARTS} processes were replaced already")
            return False
        self.restarts += 1
        process.rest = process.group
        process.start()
        return True

    def _hear(self, process: Process) -> None:
        for event in process.told():
            if "collected" in event:
                self.collected |= dict.fromkeys(event["collected"])
            elif "group" in event:
                process.group = event["group"]
            elif "begin" in event:
                process.running = event["begin"], event["at"]
                self.about(event["begin"], event["about"])
            else:
                process.running = None
                process.group = [nodeid for nodeid in process.group if nodeid != event["test"]]
                self.tests[event.pop("test")] = event

    def _lost(self, process: Process, why: str) -> None:
        """The test in which a process died or was killed."""
        assert process.running is not None
        nodeid, since = process.running
        process.running = None
        process.group = [other for other in process.group if other != nodeid]
        self.tests[nodeid] = {"outcome": "failed", "seconds": round(time.time() - since, 3), "why": why}

    def _failed(self, name: str, why: str) -> None:
        self.tests[name] = {"outcome": "failed", "seconds": 0.0, "why": why}

    def about(self, nodeid: str, text: str) -> None:
        """A test has begun."""

    def progress(self, running: list[Process]) -> None:
        """Called again and again, with the processes that go on."""

    def write(self) -> None:
        """The file, in one step: whoever reads it meanwhile finds it whole."""
        counts = {name: self.counts[name] for name in ("passed", "failed", "skipped", "not run")}
        content = {
            "part": self.name,
            "verdict": self.verdict,
            "seconds": round(time.monotonic() - self.begin, 1),
            **counts,
            "processes replaced": self.restarts,
            "tests": self.tests,
            "not run tests": sorted(self.collected.keys() - self.tests.keys()),
        }
        self.file.parent.mkdir(parents=True, exist_ok=True)
        new = self.file.with_suffix(".new")
        new.write_text(json.dumps(content, indent=1))
        new.replace(self.file)

    def report(self) -> str:
        """The failures, and why tests were skipped."""
        lines = [f"  FAILED {nodeid}: {t['why']}" for nodeid, t in self.tests.items() if t["outcome"] == "failed"]
        more = len(lines) - LINES_OF_FAILURES
        skipped = Counter(t["why"] for t in self.tests.values() if t["outcome"] == "skipped")
        return "\n".join([
            *lines[:LINES_OF_FAILURES],
            *([f"  and {more} more: {self.file}"] if more > 0 else []),
            *(f"  skipped {count}: {why}" for why, count in skipped.items()),
        ])  # fmt: skip


class Canaries(Part):
    """Their lines are printed in the order of the list, each when those before it have theirs."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.texts: dict[str, str] = {}
        self.printed: set[str] = set()

    def about(self, nodeid: str, text: str) -> None:
        self.texts[nodeid] = text

    def progress(self, running: list[Process]) -> None:
        unfinished = min((_number(f"::{process.only}") for process in running), default=sys.maxsize)
        for nodeid in sorted(self.tests, key=_number):
            if nodeid not in self.printed and _number(nodeid) <= unfinished:
                self.printed.add(nodeid)
                print(self.line(nodeid), flush=True)

    def line(self, nodeid: str) -> str:
        """`3 bf16 value and gradient of nt_xent decides ...: ok`"""
        test = self.tests[nodeid]
        decides, _, otherwise = self.texts.get(nodeid, "").partition(" If it fails: ")
        parameter = nodeid.partition("[")[2].rstrip("]")
        head = f"{_number(nodeid):2} {decides.rstrip('.')}{f' ({parameter})' if parameter else ''}"
        if test["outcome"] == "failed":
            return f"{head}: FAILED: {test['why']}\n   {otherwise}"
        return (
            f"{head}: "
            + {"passed": f"ok ({test['seconds']:.1f} s)", "skipped": f"skipped: {test['why']}"}[test["outcome"]]
        )


def _number(nodeid: str) -> int:
    found = re.search(r"::test_(\d+)", nodeid)
    return int(found.group(1)) if found else 0


def _signal(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"code {code}"


def _last_line(log: Path) -> str:
    return (log.read_text(errors="replace").strip().splitlines() or [""])[-1][:300]


def files_with_gpu_tests(folder: Path) -> list[str]:
    """Collecting all others would take each process half a minute."""
    found = (path for path in sorted(folder.glob("test_*.py")) if path.name not in OF_GPU_CHECK)
    return [str(path) for path in found if re.search(r"\bimplementation\b|mark\.gpu", path.read_text())]


def part_of(name: str, options: argparse.Namespace, folder: Path) -> Part:
    """The part, ready to run; `folder` is for its processes' files."""
    file = options.out / f"gpu-{name}.json"
    folder.mkdir()
    limits = (options.seconds or SECONDS[name], options.longest or LONGEST[name])
    more: list[str] = options.pytest
    if name == "canaries":
        arguments = [str(options.tests / "test_gpu_canaries.py"), *more]
        processes = [
            Process(f"{only}canary", folder, None, only, environment, arguments) for only, environment in CANARIES
        ]
        return Canaries(name, file, processes, *limits)
    if name == "dali":
        arguments = [str(options.tests / "test_dali.py"), str(options.tests / "test_gpu.py"), "-k", "dali", *more]
        return Part(name, file, [Process("dali", folder, None, None, {}, arguments)], *limits)
    claims = folder / "claims"
    claims.mkdir()
    arguments = [*files_with_gpu_tests(options.tests), *(["-m", options.mark] if options.mark else []), *more]
    processes = [Process(f"worker-{i}", folder, claims, None, {}, arguments) for i in range(options.processes)]
    return Part(name, file, processes, *limits)


def bench(options: argparse.Namespace) -> str:
    """`fastjem bench`, which writes its results after each case; INT lets it print its table, too."""
    words = [sys.executable, "-m", "fastjem", "bench", "--budget", "0.5", "--out", str(options.out)]
    process = subprocess.Popen([*words, *options.bench], cwd=ROOT)
    try:
        code = process.wait(options.seconds or SECONDS["bench"])
    except subprocess.TimeoutExpired:
        _interrupt(process)
        return "OUT OF TIME"
    except Interrupted:
        _interrupt(process)
        raise
    return "passed" if code == 0 else f"FAILED ({_signal(code)})"


def _interrupt(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGINT)
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def why_no_dali() -> str:
    said = subprocess.run([sys.executable, "-c", "import nvidia.dali"], capture_output=True, text=True)
    return "" if said.returncode == 0 else (said.stderr.strip().splitlines() or ["it doesn't load"])[-1]


def main(argv: list[str] | None = None) -> int:
    """0; 1 where anything failed or had no time; 130 after SIGINT or SIGTERM, with the results so far."""
    options = parser().parse_args(argv)

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise Interrupted

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    lines = []
    folder = Path(tempfile.mkdtemp(prefix="fastjem-gpu-check-"))
    bad, code = False, 0
    try:
        for name in sorted(set(options.parts), key=PARTS.index):
            start = time.monotonic()
            print(f"== {name}", flush=True)
            counts = ""
            verdict = "INTERRUPTED"
            part = None
            try:
                if name == "bench":
                    verdict = bench(options)
                elif name == "dali" and (why := why_no_dali()):
                    verdict = f"skipped: NVIDIA DALI: {why}"
                else:
                    part = part_of(name, options, folder / name)
                    part.run()
            finally:
                if part is not None:
                    print(part.report(), flush=True)
                    verdict = part.verdict
                    counts = ", ".join(f"{part.counts[of]} {of}" for of in ("passed", "failed", "skipped", "not run"))
                bad |= verdict != "passed" and not verdict.startswith("skipped")
                lines.append(f"{name:10} {time.monotonic() - start:6.1f} s  {verdict:12} {counts}".rstrip())
    except Interrupted:
        code = INTERRUPTED
    print("\n".join(["", *lines, f"results    {options.out}"]), flush=True)
    if bad or code:
        print(f"what the processes said: {folder}", flush=True)
    else:
        shutil.rmtree(folder, ignore_errors=True)
    return code or int(bad)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    add = parser.add_argument
    add("parts", nargs="*", choices=PARTS, default=PARTS[:3], help="default: canaries tests bench")
    add("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder for the results")
    add("--processes", type=int, default=12, help="that share the tests")
    add("--seconds", type=float, help=f"of each part; default: {SECONDS}")
    add("--longest", type=float, help=f"seconds after which a test's process is killed; default: {LONGEST}")
    add("--tests", type=Path, default=TESTS, help="folder of the tests")
    add("--mark", default="gpu and not exhaustive", help="which of them, as pytest's -m")
    add("--pytest", action="extend", type=shlex.split, default=[], metavar="WORDS", help="for pytest: '-k sinkhorn'")
    add("--bench", action="extend", type=shlex.split, default=[], metavar="WORDS", help="for fastjem bench: '--full'")
    return parser


if __name__ == "__main__":
    sys.exit(main())
