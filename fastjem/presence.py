"""Which ranks are there: each tells the others by the store how far it is and where it stands, a beat every second or
two, from a thread of its own. A step costs nothing, and no collective is made.

A rank that waits for others in a collective call is told after `timeout` seconds that somebody didn't come, and not who
it was. The beats tell it: a rank that has none any more (its process is stopped, its machine is gone), or one whose
program stands somewhere else than in a call that waits for the others.
"""

import contextlib
import json
import os
import signal
import sys
import sysconfig
import threading
import time
import types
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch.distributed as dist

from fastjem.errors import TimedOutError
from fastjem.printing import say

SECONDS = 2.0  # between beats, at most; an eighth of a shorter time-out
MOST = 10  # time-outs for which the first rank may work by itself
LIBRARIES = ("<", sysconfig.get_paths()["stdlib"], os.sep + "site-packages" + os.sep)  # where others' code lies
WAITS = (os.path.join("torch", "distributed", ""), os.path.join("torch", "autograd", "graph.py"), __file__)


class Beat(NamedTuple):
    """What a rank tells of itself."""

    number: int
    done: int  # steps that it has taken
    waits: bool  # for other ranks, as far as can be seen
    place: str


class Presence:
    """This rank among the others, from its making to `end`.

    Args:
        store: where ranks meet. The first rank's process, or torchrun's agent, keeps it.
        timeout: seconds that ranks wait for one another.
    """

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: float):
        self.rank = rank
        self.size = size
        self.timeout = timeout
        self.interval = min(SECONDS, timeout / 8)
        self.done = 0
        self.noticed = False  # that somebody hasn't come
        self.gone = False  # the store doesn't answer
        self.store = store
        self.own_store = cast(
            Any, store
        ).clone()  # the thread's: a call that waits keeps all others of its connection waiting
        self.meetings = 0
        self.number = 0
        self.main = threading.main_thread().ident
        self.parent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else 0  # the agent, without which we end
        self.over = threading.Event()
        self._tell()
        threading.Thread(target=self._beat, name="presence", daemon=True).start()

    def end(self) -> None:
        self.over.set()

    def meet(self) -> None:
        """Wait for the first rank, which may write or measure something by itself: as long as it lives, and at most
        `MOST` time-outs.

        Raises:
            TimedOutError: if it doesn't come.
        """
        self.meetings += 1
        key = f"meeting-{self.meetings}"
        if self.rank == 0:
            self.store.set(key, "")
            self.store.delete_key(f"meeting-{self.meetings - 8}")  # all have been there: steps are taken together
            return
        wait = Wait(self, key)
        # In a thread of its own: a store whose process is stopped keeps a call for ever, whatever its time-out is.
        thread = threading.Thread(target=wait.run, name="meeting", daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(self.interval)
            if thread.is_alive() and time.monotonic() - wait.answered_at > self.timeout:
                self.gone = True
                raise TimedOutError("the store of all ranks doesn't answer")
        if wait.error is not None:
            raise wait.error

    def claim(self, what: str) -> bool:
        """Whether this rank is the first that claims it, as far as can be known."""
        return self._guarded(lambda: self.store.add(what, 1)) in (None, 1)

    def beats(self) -> list[Beat]:
        """The last one of each rank."""
        found = self.store.multi_get([f"rank-{rank}" for rank in range(self.size)])
        return [Beat(*json.loads(text)) for text in found]

    def notice(self) -> None:
        """Somebody hasn't come; who it was, all that have noticed will be able to see."""
        if not self.noticed:
            self.noticed = True
            self._guarded(lambda: self.store.set("noticed", ""))
            self._guarded(lambda: self.store.set(f"noticed-{self.rank}", ""))

    def has_noticed(self, rank: int | None = None) -> bool:
        """Whether that rank, or any, has noticed that somebody hasn't come."""
        key = "noticed" if rank is None else f"noticed-{rank}"
        return bool(self._guarded(lambda: self.store.check([key])))

    def absent(self) -> str:
        """Which ranks the others wait for, in words. Takes a few beats."""
        before = self._guarded(self.beats)
        time.sleep(2.5 * self.interval)
        now = self._guarded(self.beats)
        if before is None or now is None:
            return "the rank that keeps the store of all (the first, or torchrun's agent) doesn't answer"
        silent: list[int] = []
        elsewhere: list[str] = []
        for rank, (old, new) in enumerate(zip(before, now, strict=True)):
            if rank == self.rank:
                continue
            if new.number == old.number:
                silent.append(rank)
            elif not new.waits:
                elsewhere.append(f"rank {rank} is at {new.place}")
        words = []
        if silent:
            names = ", ".join(map(str, silent))
            several = len(silent) > 1
            words.append(f"rank{'s' * several} {names} {'show' if several else 'shows'} no sign of life")
        words += elsewhere
        if not words:
            words = [f"all ranks wait, rank {rank} at {beat.place}" for rank, beat in enumerate(now[:4])]
        return "; ".join(words)

    def _guarded(self, call: Callable[[], Any]) -> Any:
        """What a call to the store gives; None where it doesn't answer, as a process that is stopped wouldn't."""
        if self.gone:
            return None
        found: list[Any] = []

        def ask() -> None:
            with contextlib.suppress(Exception):  # the store is gone
                found.append(call())

        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(max(5 * self.interval, 2.0))
        self.gone = thread.is_alive()
        return found[0] if found else None

    def _beat(self) -> None:
        while not self.over.wait(self.interval):
            try:
                self._tell()
            except Exception:  # the store has ended, and the run will, too
                return
            if self.parent and os.getppid() != self.parent:
                self.parent = 0
                os.kill(os.getpid(), signal.SIGTERM)  # as the agent itself would ask it to stop

    def _tell(self) -> None:
        self.number += 1
        frame = sys._current_frames().get(self.main or 0)
        waits, place = (False, "") if frame is None else position(frame)
        beat = Beat(self.number, self.done, waits or self.noticed, place)
        self.own_store.set(f"rank-{self.rank}", json.dumps(beat))


class Wait:
    """For a key that the first rank sets, as long as its beats go on.

    `answered_at` is when the store has said something last; `error` is what ends the wait before the key is there.
    """

    def __init__(self, presence: Presence, key: str):
        self.presence = presence
        self.key = key
        self.answered_at = time.monotonic()
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            self._wait()
        except Exception as error:
            self.error = error

    def _wait(self) -> None:
        here = self.presence
        began = alive_at = asked_at = self.answered_at
        told = here.timeout
        number = -1
        pause = 0.001
        # Not store.wait: torch prints a warning whenever its time is over.
        while not here.store.check([self.key]):
            time.sleep(pause)
            pause = min(1.5 * pause, here.interval / 8)
            now = self.answered_at = time.monotonic()
            if now < asked_at + here.interval:
                continue
            asked_at = now
            beat = here.beats()[0]
            if beat.number != number:
                number = beat.number
                alive_at = now
            if now - alive_at > here.timeout or now - began > MOST * here.timeout:
                raise TimedOutError("the first rank doesn't come")
            if now - began > told and here.rank == 1:
                say(
                    f"fastjem: step {here.done}: the first rank has been at work by itself for {now - began:.0f} s "
                    f"({beat.place}); the others wait for it"
                )
                told += here.timeout


def position(frame: types.FrameType | None) -> tuple[bool, str]:
    """Whether a program waits for other ranks there, and the place: the innermost line that isn't a library's."""
    stack = []
    while frame is not None:
        stack.append((frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name))
        frame = frame.f_back
    # A wait's innermost lines are torch's; behind a backward pass DDP waits in C++.
    waits = any(mark in name for name, _, _ in stack[:4] for mark in (WAITS[0], WAITS[2]))
    waits = waits or (bool(stack) and stack[0][0].endswith(WAITS[1]))
    for name, line, function in stack:
        if not any(mark in name for mark in LIBRARIES):
            return waits, f"{os.path.join(*name.split(os.sep)[-2:])}:{line}, {function}()"
    return waits, stack[0][2] if stack else ""


__all__ = ["Presence", "position"]
