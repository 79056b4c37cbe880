"""What this process may use of its machine."""

import math
import os
import sys
from pathlib import Path

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h
QUOTA = Path("/sys/fs/cgroup/cpu.max")  # "QUOTA PERIOD" in microseconds, or "max PERIOD"; a container sees its own


def available_cores() -> int:
    """CPU cores that this process may run on, at least 1: its affinity where the system knows of one (Linux), else all
    of the machine's; no more than a container's quota of processor time is worth, rounded up.
    """
    has_affinity = hasattr(os, "sched_getaffinity")  # macOS and Windows don't
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    return max(min(cores, _quota()), 1)


def _quota() -> int:
    """Cores' worth of the quota of cgroup v2; more than any machine has where there is none."""
    unlimited = 2**31
    try:
        quota, period = QUOTA.read_text().split()
        return unlimited if quota == "max" else math.ceil(int(quota) / int(period))
    except (OSError, ValueError, ZeroDivisionError):
        return unlimited


def keep_memory() -> bool:
    """Let the process keep the memory that it frees, to use it again; whether that could be had (glibc).

    glibc takes blocks above 32 MiB from the system and gives them back each time, and the system clears each page
    anew: a third of a step at 224 pixels on the CPU. For a process that trains and then ends; nothing is changed where
    the environment says how malloc shall be.
    """
    import ctypes  # here, as `fastjem --help` has no use for it

    says_so = any(name.startswith("MALLOC_") or name in ("GLIBC_TUNABLES", "LD_PRELOAD") for name in os.environ)
    if not sys.platform.startswith("linux") or says_so:
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return bool(mallopt and mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1))  # -1: nothing is given back
