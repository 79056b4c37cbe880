"""What the GPU tests would compile, found without a GPU: `pytest -m gpu -p specialisations --needed FILE`.

Triton compiles a kernel for each combination of dtypes, alignments and constexprs, and builds a launcher in C for each
combination of argument types. On a machine that has never run the tests that is most of their time. Here every test
that a GPU would run gets an operator of two halves: Triton's launcher, whose kernels are specialised for an H100 and
then neither compiled nor launched, and the reference, whose results the test sees. So the tests pass, and forward and
backward ask for the kernels that they would ask for.
"""

import contextlib
import hashlib
import heapq
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from gpu_worker import group_of
from torch import Tensor
from torch.utils._pytree import tree_map

ARCHITECTURE = 90
KERNEL_SECONDS, LAUNCHER_SECONDS = 0.415, 0.33  # of one core; measured on an idle machine, 2026-11-25

# What the running test has asked for so far: of its kernels the names with a hash, of launchers a hash.
needed: dict[str, set[str]] = {"kernels": set(), "launchers": set()}


@dataclass(frozen=True)
class Source:
    """A kernel as Triton would compile it."""

    source: Any
    options: dict[str, Any]

    def compile(self) -> Any:
        from triton.backends.compiler import GPUTarget
        from triton.compiler import compile

        return compile(self.source, target=GPUTarget("cuda", ARCHITECTURE, 32), options=self.options)


sources: dict[str, Source] = {}
compiles = False  # whether each is compiled when it is first asked for, as on a GPU: ten times as long


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, device_of: Tensor, **meta: Any) -> None:
    """In place of `launch.launch`: up to the moment in which Triton would compile."""
    from fastjem.kernels.launch import check_grid

    check_grid(grid)
    asked = kernel.warmup(*args, grid=grid, **meta)
    needed["kernels"].add(asked[0])
    needed["launchers"].add(asked[1])


def _specialised(
    self: Any, key: str, signature: Any, device: int, constexprs: Any, options: Any, attrs: Any, warmup: bool
) -> tuple[str, str]:
    """In place of `JITFunction._do_compile`."""
    from aot import SHARED_LIMIT
    from triton.backends.nvidia.driver import make_launcher

    source = self.ASTSource(self, signature, constexprs, attrs)
    places = {(self.arg_names.index(k),) if isinstance(k, str) else k: v for k, v in source.constants.items()}
    c = make_launcher(places, dict(source.signature), None)
    name = f"{self.fn.__name__} {_hash(key)}"
    sources[name] = Source(source, options.__dict__)
    if compiles:
        shared = sources[name].compile().metadata.shared
        assert shared <= SHARED_LIMIT[ARCHITECTURE], f"{name} wants {shared} bytes of shared memory"
    asked = name, _hash(c)
    self.device_caches[device][0][key] = asked
    return asked


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@contextlib.contextmanager
def specialising() -> Iterator[None]:
    """Within it launches specialise their kernels, and do nothing else."""
    import aot
    import triton
    from triton.runtime.jit import JITFunction

    from fastjem.kernels import launch as launching

    class Driver(aot.Driver):
        def get_current_device(self) -> int:
            return 1000 + self.arch  # Triton keeps what it has compiled by device, and here is nothing compiled

    drivers = triton.runtime.driver
    with (
        mock.patch.object(drivers, "_active", Driver(ARCHITECTURE)),
        mock.patch.object(JITFunction, "_do_compile", _specialised),
        mock.patch.object(launching, "launch", launch),
    ):
        yield


def of_two_halves(launcher: Callable, reference: Callable) -> Callable:
    """The launcher on copies of the arguments, as it may write into them; then the reference."""

    def run(*args: Any) -> Any:
        launcher(*tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, args))
        return reference(*args)

    return run


# As a plugin of pytest -----------------------------------------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--needed", metavar="FILE", help="add a line of JSON for each test: its kernels, its launchers")
    parser.addoption(
        "--compile-needed", action="store_true", help="compile them, too: a test whose kernel can't be fails"
    )


def pytest_configure(config: pytest.Config) -> None:
    global compiles
    compiles = config.getoption("compile_needed")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    for names in needed.values():
        names.clear()
    result = yield
    if file := item.config.getoption("needed"):
        found = {kind: sorted(names) for kind, names in needed.items()}
        with Path(file).open("a") as lines:
            lines.write(json.dumps({"test": item.nodeid, "group": group_of(item), **found}) + "\n")
    return result


def seconds(rows: list[dict[str, Any]], processes: int) -> float:
    """When the last of the processes has compiled what its tests need, if none finds another's kernels on the disk.

    Groups go as gpu_worker.py gives them away: the largest first, to whoever has nothing to do.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["group"], []).append(row)
    idle = [(0.0, i) for i in range(processes)]
    has: list[set[str]] = [set() for _ in range(processes)]
    for group in sorted(groups.values(), key=len, reverse=True):
        at, i = heapq.heappop(idle)
        for kind, each in (("kernels", KERNEL_SECONDS), ("launchers", LAUNCHER_SECONDS)):
            new = {name for row in group for name in row[kind]} - has[i]
            has[i] |= new
            at += each * len(new)
        heapq.heappush(idle, (at, i))
    return max(idle)[0]


def wanted() -> bool:
    """Whether this process is to find out, and not to test."""
    return os.environ.get("FASTJEM_SPECIALISE") == "1"


def register(library: torch.library.Library) -> None:
    """Every operator that has a Triton kernel, of two halves, for tensors in the host's memory."""
    from fastjem import ops

    for name in ops.OPERATORS:
        launcher, _ = ops.triton_launcher(name)
        if launcher:
            both = of_two_halves(ops.plain(launcher, name), ops.plain(ops.reference(name), name))
            library.impl(name, both, "CPU", allow_override=True)
