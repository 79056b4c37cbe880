"""What this process may use of its machine."""

import math
import os
from pathlib import Path

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
