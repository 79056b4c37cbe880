"""The operator table: every family's operators, and which implementation PyTorch's dispatcher finds for each.

`CompositeExplicitAutograd` is the reference (plain torch, any device), `CPU` the C++ kernel, `CUDA` the Triton kernel.
The reference is the fake kernel as well, so torch.compile works with any of them. Operators never differentiate:
`autograd.py` turns them into losses, and `fastjem.functional` is what users call.

To add an operator, see docs/adding-an-op.md.
"""

import contextlib
import functools
import importlib
import importlib.util
from collections.abc import Callable

import torch
from torch.autograd import forward_ad

from fastjem.ops import direct, transforms
from fastjem.ops.forward_mode import refuse_forward_mode

try:
    import fastjem.kernels as kernels
    from fastjem.kernels import guard
except ModuleNotFoundError as error:
    raise ImportError(
        "fastjem is not installed: Python found its source folder, but kernels/ becomes fastjem.kernels only by "
        "installing. Run `pip install -e .` in the source folder, or leave it if fastjem is installed."
    ) from error

LIBRARY = torch.library.Library("fastjem", "DEF")

_FAMILIES = {name: importlib.import_module(f"fastjem.kernels.{name}") for name in kernels.FAMILIES}
_FAMILY_OF = {op: name for name, family in _FAMILIES.items() for op in family.OPERATORS}
OPERATORS = {op: operator for family in _FAMILIES.values() for op, operator in family.OPERATORS.items()}


def plain(implementation: Callable, name: str | None = None) -> Callable:
    """Run without autograd and autocast: inside a Python kernel both still act (autocast makes `@` bfloat16).

    Forward-mode differentiation is refused here, where every operator's every implementation passes.

    Args:
        name: the operator's, for that message; None: the implementation's.
    """
    called = name or getattr(implementation, "__name__", "an operator")

    @functools.wraps(implementation)
    def run(*args):
        if forward_ad._current_level >= 0:
            refuse_forward_mode(called, args)
        # By hand, as the two context managers take longer than a small loss (5 of 30 us).
        before = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)
        try:
            if not torch._C._is_any_autocast_enabled():
                return implementation(*args)
            with torch._C._DisableAutocast():
                return implementation(*args)
        finally:
            torch._C._set_grad_enabled(before)

    return run


def reference(name: str) -> Callable:
    """An operator's specification."""
    return _of_family(name, "reference")


def cpp_launcher(name: str) -> tuple[Callable | None, str]:
    """The function that calls an operator's C++ kernel, or None and the reason why there is none."""
    if not OPERATORS[name].cpu:
        return None, "no C++ kernel yet"
    try:
        importlib.import_module("fastjem.kernels._C")
    except ImportError as error:
        return None, f"the C++ extension doesn't load ({error}); it is built at installation if there is a C++ compiler"
    return guard.guarded(name, _of_family(name, "cpu"), on_cpu=True), ""


def triton_launcher(name: str) -> tuple[Callable | None, str]:
    """A function that launches an operator's Triton kernels, or None and the reason why there is none.

    The family's Triton code is imported at the first call.
    """
    if not OPERATORS[name].gpu:
        return None, "no Triton kernel yet"
    if torch.version.hip:  # ROCm's devices come under the CUDA key too, and no kernel was ever tried on one
        return None, "Triton kernels are for CUDA, and this torch is a build for ROCm"
    if importlib.util.find_spec("triton") is None:
        return None, "triton is not installed"

    def launch(*args):
        with _on_device_of(args):  # which tiles are chosen for
            return _of_family(name, "gpu")(*args)

    return guard.guarded(name, launch, on_cpu=False), ""


def _on_device_of(args: tuple) -> contextlib.AbstractContextManager:
    """The device of the first tensor that is on a GPU, among arguments and in lists of them, as the current one."""
    for argument in args:
        x = argument[0] if isinstance(argument, list) and argument else argument
        if isinstance(x, torch.Tensor) and x.is_cuda:
            return torch.cuda.device_of(x)
    return contextlib.nullcontext()


@functools.cache
def _of_family(name: str, module: str) -> Callable:
    """The operator's function in `reference.py`, `cpu.py` or `gpu.py` of its family."""
    return getattr(importlib.import_module(f"fastjem.kernels.{_FAMILY_OF[name]}.{module}"), name)


def _register(name: str) -> dict[str, str]:
    """Tell PyTorch of an operator; returns what runs where, as `implementations` does."""
    LIBRARY.define(name + OPERATORS[name].schema)
    specification = plain(reference(name), name)
    LIBRARY.impl(name, guard.guarded(name, specification, on_cpu=False), "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastjem::{name}", specification, lib=LIBRARY)
    operator = getattr(torch.ops.fastjem, name).default
    torch.library.register_vmap(f"fastjem::{name}", transforms.loop(operator), lib=LIBRARY)
    on_cpu, no_cpu = cpp_launcher(name)
    if on_cpu:
        LIBRARY.impl(name, plain(on_cpu, name), "CPU")
        direct.LAUNCHERS[name] = plain(_of_family(name, "cpu"), name)
    on_cuda, no_cuda = triton_launcher(name)
    if on_cuda:
        LIBRARY.impl(name, plain(on_cuda, name), "CUDA")
    own = {"cpu": "C++", "cuda": "Triton"} | dict.fromkeys(OPERATORS[name].tiles, "torch (products of tiles)")
    return {
        "cpu": own["cpu"] if on_cpu else f"reference ({no_cpu})",
        "cuda": own["cuda"] if on_cuda else f"reference ({no_cuda})",
    }


_IMPLEMENTATIONS = {name: _register(name) for name in OPERATORS}


def implementations() -> dict[str, dict[str, str]]:
    """For each operator, what runs on "cpu" and on "cuda".

    "C++", "Triton", "torch (products of tiles)", which is fast without a kernel of its own, or "reference (why)".
    """
    return {name: dict(where) for name, where in _IMPLEMENTATIONS.items()}
