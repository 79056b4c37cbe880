"""Peak memory of a call, in bytes beyond what was in use before it."""

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import torch


def peak(call: Callable[[], object], device: torch.device) -> int | None:
    """The most memory in use at any time during `call()`, less that before; None where the system doesn't tell.

    On a GPU torch's allocator knows. On the CPU it doesn't: C++ kernels and BLAS allocate behind its back, so that a
    count of torch's allocations (torch.profiler) would flatter our own kernels. There the system's count of resident
    pages is read (Linux: its high-water mark can be reset through /proc/self/clear_refs), after malloc_trim has given
    freed memory back. It is right to a few pages (64.0 for 64 MiB), takes 2 ms and needs no process of its own; what
    a library allocated at an earlier call and keeps for ever isn't seen.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = call()
        torch.cuda.synchronize()
        del kept
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _resident("VmRSS")
    except (OSError, AttributeError, KeyError):
        return None
    kept = call()
    after = _resident("VmHWM")
    del kept
    return max(after - before, 0)


def _resident(field: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) * 1024
