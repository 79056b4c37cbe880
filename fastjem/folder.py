"""A run's folder: who may write to it, what it goes on from, and what is left of a run that took no step."""

import contextlib
import os
from pathlib import Path
from typing import Any

from fastjem import checkpoints, values
from fastjem import config as configuration
from fastjem.build import Training
from fastjem.errors import UserError
from fastjem.lock import Lock
from fastjem.prepare import ENCODER
from fastjem.printing import say
from fastjem.ranks import Ranks
from fastjem.reading import why_not
from fastjem.restarts import FILE as LAUNCH
from fastjem.restarts import Launch

# What a run writes before its first step is taken, or in taking it.
WRITTEN = (
    *checkpoints.OWN, LAUNCH, "report.html", checkpoints.LAST, "checkpoints/last-1.pt", checkpoints.LAST_IN_SHARDS,
    f"{checkpoints.LAST_IN_SHARDS}-1",
)  # fmt: skip


class Folder:
    """The folder of one run; the first rank alone writes to it, under the folder's lock.

    Args:
        new: there is no run yet; else this is one to go on with.
        launch: what torchrun has started, if it has.
    """

    def __init__(self, out: Path, ranks: Ranks, *, new: bool, launch: Launch | None = None):
        self.out = out
        self.ranks = ranks
        self.new = new
        self.launch = launch
        self.lock = Lock(out)
        self.made: list[Path] = []  # by this run; nothing else is ever removed

    def open(self) -> dict[str, Any] | None:
        """The checkpoint to go on from, if there is one.

        Raises:
            UserError: if a new run would fall upon another one, or that to go on with is being written.
        """
        with self.ranks.together():  # whoever holds the lock may still change what the others would read
            if self.ranks.first and self.new:
                check_free(self.out)
            elif self.ranks.first:
                self._begin_writing()
        if self.new:
            return None
        state: dict[str, Any] | None = None
        place = -1
        with self.ranks.together():
            if self.ranks.first:  # who alone compares the checksums of shards, and renames what is damaged
                found = checkpoints.find(self.out, say, set_aside=True, whole=False)
                if found is not None:
                    path, state = found
                    place = checkpoints.present(self.out).index(path)
        place = int(self.ranks.agree(float(place)))
        with self.ranks.together():
            if not self.ranks.first and place >= 0:
                state = checkpoints.read(checkpoints.present(self.out)[place], whole=False, checksums=False)
        return state

    def take(self, training: Training) -> None:
        """Write the configuration: that of a new run, or what a resumed one is told anew."""
        config = training.config
        with self.ranks.together():
            if not self.ranks.first:
                return
            if self.new:
                absent = [path for path in self._written() if not os.path.lexists(path)]
                exists = self.out.exists()
                self._begin_writing()
                self.made = absent if not (self.out / configuration.FILE).exists() else self._written()
                self.made += [self.out / "checkpoints", *([] if exists else [self.out])]
            kept = config.with_values(resume=False, new_data=False)
            text = values.text(kept, training.pixels, training.step.method.pool, values.of(training))
            path = self.out / configuration.FILE
            if self.new or path.read_bytes() != text.encode():
                try:
                    checkpoints.write_atomically(path, text.encode())
                except OSError as error:
                    raise UserError(f"--out {self.out}: {why_not(error)}") from None

    def _begin_writing(self) -> None:
        self.lock.acquire(self.launch.patience if self.launch else 0.0)
        if self.new:
            check_free(self.out)  # another run may have begun while this one was built
        checkpoints.clean(self.out)
        if self.launch:
            self.launch.write(self.out)

    def _written(self) -> list[Path]:
        return [self.out / name for name in WRITTEN]

    def close(self, *, discard: bool) -> None:
        """Give the lock back. discard: no step was taken, and what this run made goes."""
        for path in self.made if discard else []:
            with contextlib.suppress(OSError):  # a folder that holds something stays
                if path == self.out:
                    self.lock.release()
                if path.is_dir() and not path.is_symlink() and path.name.startswith("last"):
                    checkpoints.remove(path)
                elif path.is_dir() and not path.is_symlink():
                    path.rmdir()
                else:
                    path.unlink(missing_ok=True)
        self.lock.release()


def check_free(out: Path) -> None:
    """UserError if a run is there that has taken a step. One that was killed before it had is nobody's loss."""
    if (out / configuration.FILE).exists() and not is_untouched(out):
        raise UserError(f"{out} holds a run already; --resume goes on with it, another --out starts a new one")


def is_untouched(out: Path) -> bool:
    rows = out / "metrics.jsonl"
    if (out / ENCODER).exists() or (rows.exists() and rows.stat().st_size):
        return False
    try:
        state = checkpoints.load(out, say=None)
    except UserError:
        return False
    return state is not None and state["step"] == 0
