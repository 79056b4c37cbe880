"""One of several processes that share the tests of a run, as a plugin of pytest; gpu_check.py starts them.

All collect the same tests. A group of them (a file's, for one operator) belongs to the first process that creates
its file in the folder of claims, so whoever is done early takes more. What happens goes to a file line by line, as it
happens: when a kernel takes its process along, the lines before tell which test that was.
"""

import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

PLAN = "FASTJEM_GPU_WORKER"  # names a JSON file: `claims`, `events`, `rest`, `only`
CONTEXT_LOST = 70  # the exit code of a process whose GPU answers nothing any more


class Worker:
    """`claims`: a folder, or None where the process has `only` the tests of such names; `rest`: tests to begin with."""

    def __init__(self, plan: dict[str, Any]) -> None:
        self.claims = Path(plan["claims"]) if plan["claims"] else None
        self.rest: list[str] = plan["rest"]
        self.only: str | None = plan["only"]
        self.events = open(plan["events"], "a")  # noqa: SIM115
        self.outcome: dict[str, Any] = {}

    def tell(self, **event: Any) -> None:
        self.events.write(json.dumps(event) + "\n")
        self.events.flush()

    def groups(self, items: list[pytest.Item]) -> Iterator[list[pytest.Item]]:
        """The groups that are this process's, one when the one before is done."""
        by_id = {item.nodeid: item for item in items}
        if self.rest:
            yield [by_id[nodeid] for nodeid in self.rest if nodeid in by_id]
        if self.claims is None:
            if items and not self.rest:
                yield items
            return
        groups: dict[str, list[pytest.Item]] = {}
        for item in items:
            groups.setdefault(group_of(item), []).append(item)
        # The largest first: one that is begun last would be waited for.
        for i, group in enumerate(sorted(groups.values(), key=len, reverse=True)):
            try:
                os.close(os.open(self.claims / str(i), os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                continue
            yield group

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        if self.only is not None:
            items[:] = [item for item in items if item.name.startswith(self.only)]

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.tell(test=report.nodeid, outcome="failed", seconds=0.0, why=first_line(report.longreprtext))

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        if session.config.option.collectonly:
            return True
        self.tell(collected=[item.nodeid for item in session.items])
        for group in self.groups(session.items):
            self.tell(group=[item.nodeid for item in group])
            for item, following in zip(group, [*group[1:], None], strict=True):
                self.tell(begin=item.nodeid, at=time.time(), about=about(item))
                start = time.perf_counter()
                self.outcome = {"outcome": "passed", "why": ""}
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
                self.tell(test=item.nodeid, seconds=round(time.perf_counter() - start, 3), **self.outcome)
                if self.outcome["outcome"] == "failed" and not gpu_answers():
                    os._exit(CONTEXT_LOST)
        return True

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.outcome = {"outcome": "failed", "why": first_line(report.longreprtext)}
        elif report.skipped and self.outcome["outcome"] == "passed":
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(getattr(report, "wasxfail", ""))
            self.outcome = {"outcome": "skipped", "why": reason.removeprefix("Skipped: ")}


def pytest_configure(config: pytest.Config) -> None:
    if plan := os.environ.get(PLAN):
        _end_with_the_runner()
        config.pluginmanager.register(Worker(json.loads(Path(plan).read_text())), "gpu-worker")


def _end_with_the_runner() -> None:
    """Killed, it can't end its processes, and a GPU that they go on to use is no other run's."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def group_of(item: pytest.Item) -> str:
    """A file's tests of one operator on one implementation share kernels; a test of no operator goes with its function.

    A process compiles what its groups need. By function and operator 12 processes would compile for 125 seconds, by
    operator and dtype for 98, by operator alone for 106, as one operator has the most; by file and operator for 91.
    """
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    op = parameters["case"].op if "case" in parameters else parameters.get("op", "")
    file, _, function = item.nodeid.partition("[")[0].partition("::")
    implementation = getattr(parameters.get("implementation"), "name", "")
    return f"{file} {op or function} {implementation}"


def about(item: pytest.Item) -> str:
    return " ".join((getattr(getattr(item, "function", None), "__doc__", None) or "").split())


def first_line(text: str) -> str:
    """What pytest says was wrong: the first line that begins with E."""
    lines = [line[1:].strip() for line in text.splitlines() if line.startswith("E ")]
    return (lines or text.strip().splitlines()[-1:] or [""])[0][:300]


def gpu_answers() -> bool:
    """False after an illegal access: in this process every later call to CUDA fails as well."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True
