"""Signals to a run: end behind the step, end out of an endless wait, save and go on."""

import contextlib
import signal
import threading
import time
import types
from collections.abc import Iterator
from typing import Any

GRACE = 3.0  # seconds that a batch, or the preparation of a run, may still take once somebody has asked to stop
ENDS = (signal.SIGTERM, signal.SIGINT)


class Stopped(BaseException):
    """Raised out of a wait that didn't end within `GRACE` seconds of a request to stop."""


class Stop:
    """SIGTERM and Ctrl-C ask the loop to end after its step; a second Ctrl-C ends it at once. SIGUSR1 asks to save.

    A wait (for the loader's workers, for a file server) may never end by itself: within `waiting()` a request to stop
    raises `Stopped` once `GRACE` seconds of waiting have passed. Elsewhere a signal only leaves a note: a step isn't
    torn.
    """

    def __init__(self) -> None:
        self.signal: int | None = None  # the one that asked for an end
        self.save_asked = False
        self.in_wait = False
        self.wait_began = 0.0
        self.nudged = False  # by this class, and not by somebody
        self.over = threading.Event()
        self.old_handlers: dict[int, Any] = {}

    def __enter__(self) -> "Stop":
        handlers: dict[int, Any] = dict.fromkeys(ENDS, self.ask)
        if hasattr(signal, "SIGUSR1"):  # Windows has none
            handlers[signal.SIGUSR1] = self.ask_to_save
        with contextlib.suppress(ValueError):  # not in the main thread: signals are the caller's business
            for number, handler in handlers.items():
                self.old_handlers[number] = signal.signal(number, handler)
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        for number, handler in self.old_handlers.items():
            signal.signal(number, handler)

    def ask(self, number: int, frame: types.FrameType | None) -> None:
        """The handler of SIGTERM and SIGINT."""
        if self.nudged:
            self.nudged = False
            # Among ranks a run goes on to its next logged step: a wait of that time that has just begun may end.
            if self.in_wait and time.monotonic() - self.wait_began > 0.9 * GRACE:
                raise Stopped
        elif self.signal is None:
            self.signal = number
            threading.Thread(target=self._nudge, args=(number, threading.get_ident()), daemon=True).start()
        elif number == signal.SIGINT:
            raise KeyboardInterrupt

    def _nudge(self, number: int, thread: int) -> None:
        """The signal again every `GRACE` seconds: it interrupts a wait in C, which a note doesn't."""
        while not self.over.wait(GRACE):
            self.nudged = True
            if hasattr(signal, "pthread_kill"):
                signal.pthread_kill(thread, number)
            else:
                signal.raise_signal(number)

    def ask_to_save(self, number: int, frame: types.FrameType | None) -> None:
        """The handler of SIGUSR1."""
        self.save_asked = True

    def saves(self) -> bool:
        """Whether somebody has asked to save since this was called last."""
        asked = self.save_asked
        self.save_asked = False
        return asked

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """A block that may wait for ever, and that a request to stop may break off."""
        self.wait_began = time.monotonic()
        self.in_wait = True
        try:
            yield
        finally:
            self.in_wait = False

    def hold_back(self, name: str) -> None:
        """Let the present handler of a signal run within `waiting()` only.

        torch's handler of SIGCHLD raises wherever the program is when a loader's worker dies: in the middle of an
        optimiser's step, too. The next wait for data notices the same within 5 seconds.
        """
        number = getattr(signal, name, None)
        if number is None:
            return
        handler = signal.getsignal(number)
        if not callable(handler):
            return
        with contextlib.suppress(ValueError):  # not in the main thread
            signal.signal(number, lambda number, frame: handler(number, frame) if self.in_wait else None)
            self.old_handlers[number] = handler


__all__ = ["Stop", "Stopped"]
