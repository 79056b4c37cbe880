"""Other processes on the machine: how much of the CPUs they have, and waiting until they have none (on Linux)."""

import os
import time
from pathlib import Path

BUSY = 0.1  # the share of the CPUs from which on others disturb a measurement


class OtherProcesses:
    """What all other processes had of the CPUs since it was made."""

    def __init__(self):
        self.start = _cpu_seconds()

    def share(self) -> float:
        """From 0 to 1; 0 where the system doesn't tell."""
        everything, idle, ours = (now - before for now, before in zip(_cpu_seconds(), self.start, strict=True))
        if everything <= 0:
            return 0.0
        return max(0.0, everything - idle - ours) / everything


def wait_until_idle(patience: float) -> None:
    """Return when others left the CPUs alone for a second, or after `patience` seconds."""
    end = time.monotonic() + patience
    while time.monotonic() < end:
        others = OtherProcesses()
        time.sleep(1)
        if others.share() < BUSY:
            return


def _cpu_seconds() -> tuple[float, float, float]:
    """Of all CPUs since the system's start: all time, idle time, and this process's."""
    try:
        # user, nice, system, idle, iowait, irq, softirq, steal
        ticks = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    except OSError:
        return 0.0, 0.0, 0.0
    second = os.sysconf("SC_CLK_TCK")
    return sum(ticks) / second, (ticks[3] + ticks[4]) / second, time.process_time()
