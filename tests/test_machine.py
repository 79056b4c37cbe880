"""What a process may use of its machine."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastjem import machine

ROOT = Path(__file__).parents[1]


def available(monkeypatch, tmp_path, affinity, count, quota):
    if affinity is None:
        monkeypatch.delattr(os, "sched_getaffinity", raising=False)  # as on macOS and Windows
    else:
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(affinity)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: count)
    path = tmp_path / "cpu.max"
    if quota is not None:
        path.write_text(quota)
    monkeypatch.setattr(machine, "QUOTA", path)
    return machine.available_cores()


@pytest.mark.parametrize(
    ("affinity", "count", "quota", "expected"),
    [
        (3, 64, None, 3),
        (None, 8, None, 8),
        (None, None, None, 1),  # a system that doesn't tell
        (64, 64, "max 100000\n", 64),
        (64, 64, "250000 100000\n", 3),  # two and a half cores
        (64, 64, "1000 100000\n", 1),
        (2, 64, "800000 100000\n", 2),
        (4, 4, "nonsense", 4),
        (4, 4, "1 0", 4),
    ],
)
def test_available_cores(monkeypatch, tmp_path, affinity, count, quota, expected):
    assert available(monkeypatch, tmp_path, affinity, count, quota) == expected


def test_nothing_else_asks_the_system_for_cores():
    """`os.sched_getaffinity` isn't there on every system, and `os.cpu_count` counts cores that are others'."""
    askers = set()
    for folder in ("fastjem", "kernels", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            names = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
            if names & {"sched_getaffinity", "cpu_count", "process_cpu_count"}:
                askers.add(path.relative_to(ROOT).as_posix())
    assert askers == {"fastjem/machine.py"}


FAULTS = """
import resource, sys, torch
from fastjem.machine import keep_memory
assert sys.argv[1] == "no" or keep_memory()
for i in range(30):
    if i == 10:
        begin = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(24 << 20)  # 96 MiB, freed at once
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - begin)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
def test_memory_that_is_kept_is_not_cleared_again() -> None:
    """Pages that the system has to hand out for 20 blocks of 96 MiB, after ten others."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MALLOC_", "LD_PRELOAD"))}

    def faults(kept: str) -> int:
        done = subprocess.run([sys.executable, "-c", FAULTS, kept], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    before, after = faults("no"), faults("yes")
    assert after < 200 < before  # with huge pages: 48 a block


def test_memory_is_kept_only_where_nobody_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    assert not machine.keep_memory()
