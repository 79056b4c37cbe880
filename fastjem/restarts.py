"""A run that torchrun starts again after one of its ranks has died: it goes on, whether or not --resume was given.

torchrun's agents, one a machine, outlive the processes that they start. Who wrote to a run's folder is kept in it as
`.launch`: a launch that has one of these agents is the same one, started again, and any other launch is somebody else.
"""

import contextlib
import json
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from fastjem.checkpoints import write_atomically

FILE = ".launch"
PATIENCE = 60.0  # seconds for which a process of before, that is about to end, may still hold the folder's lock


@dataclass(frozen=True)
class Launch:
    """The processes that torchrun has started, this one among them."""

    number: str  # TORCHELASTIC_RUN_ID
    restart: int  # how often processes were started again: an agent counts its own alone, an attempt all before it
    agents: tuple[str, ...]  # of each rank, in their order
    workers: tuple[str, ...]  # the ranks' processes themselves
    earlier: tuple[str, ...] | None = None  # the agents of an attempt before, by what it has left in the run's folder

    @staticmethod
    def here(environment: Mapping[str, str] = os.environ) -> "Launch | None":
        """This process alone; None where torchrun hasn't started it."""
        number = environment.get("TORCHELASTIC_RUN_ID")
        if number is None:
            return None
        count = environment.get("TORCHELASTIC_RESTART_COUNT", "")
        restart = int(count) if count.isdigit() else 0
        return Launch(number, restart, (process(os.getppid()),), (process(os.getpid()),))

    def with_others(self, told: list[str]) -> "Launch":
        """told: of each rank what its `text` is."""
        each = [json.loads(text) for text in told]
        return Launch(
            self.number,
            max(one["restart"] for one in each),
            tuple(one["agents"][0] for one in each),
            tuple(one["workers"][0] for one in each),
        )

    def text(self) -> str:
        return json.dumps({name: value for name, value in vars(self).items() if name != "earlier"})

    def in_folder(self, out: Path) -> "Launch":
        """With what an attempt of this very launch, before this one, has left in a run's folder."""
        try:
            found = json.loads((out / FILE).read_text())
            agents, workers = set(found["agents"]), set(found["workers"])
            same = found["number"] == self.number and agents & set(self.agents)
            # A second call in the same process isn't another attempt.
            if not same or workers & set(self.workers):
                return replace(self, earlier=None)
            return replace(self, earlier=tuple(found["agents"]), restart=max(self.restart, found["restart"] + 1))
        except (OSError, ValueError, KeyError, TypeError):
            return self

    @property
    def patience(self) -> float:
        """Seconds for which the lock of a folder may be waited for."""
        return PATIENCE if self.restart or self.earlier else 0.0

    def write(self, out: Path) -> None:
        with contextlib.suppress(OSError):  # a full disk: the run's first checkpoint tells it
            write_atomically(out / FILE, self.text().encode())


def process(number: int) -> str:
    """A process's name that no later one has: its host, its number, and when it began, where Linux tells that."""
    began = ""
    with contextlib.suppress(OSError, IndexError):
        # The 22nd field; the 2nd is the program's name in brackets, which may hold spaces.
        began = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[19]
    return f"{socket.gethostname()}:{number}:{began}"


def told(launch: Launch, start: int, last: int) -> str:
    """In a line, from which step the run goes on, and how much of it is made again. last: that was logged."""
    now = len(launch.agents)
    ranks = len(launch.earlier or launch.agents)
    changed = "" if ranks == now else f", {now} rank{'s' * (now > 1)} in place of {ranks}"
    again = max(last - start, 0)
    repeated = f"repeating {again} step{'s' * (again != 1)}"
    if again:
        repeated += f" (step {last} was the last that was logged)"
    return f"restarted by torchrun (restart {launch.restart}{changed}): goes on from step {start}, {repeated}"


__all__ = ["FILE", "Launch", "told"]
