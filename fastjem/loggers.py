"""Where a run's figures go: `metrics.jsonl`, the terminal (`fastjem.terminal`), trackers of experiments
(`fastjem.trackers`), or an object of one's own.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from fastjem.checkpoints import Metrics
from fastjem.errors import UserError
from fastjem.fields import came


@dataclass(frozen=True)
class LoggedRun:
    """What a logger is told of the run before its first row."""

    out: Path  # the run's folder
    method: str
    start: int  # the step that it goes on from; rows of later steps, of a run that was killed, are void
    steps: int  # of the whole run
    images_per_step: int
    log_every: int
    steps_per_epoch: int = 1
    values: Mapping[str, Any] = field(default_factory=dict)  # that it trains with, as `ran` in its config.yaml
    seen: int = 0  # the last step that figures were logged of before it was gone on with


@runtime_checkable
class Logger(Protocol):
    """Anything with these three; it lives on the first rank alone. `fastjem.pretrain(..., loggers=[mine])`.

    One that also has `measured(step, figures)` is given what is measured along the way: kNN accuracy.
    """

    def begin(self, run: LoggedRun) -> None: ...

    def log(self, row: Mapping[str, Any]) -> None:
        """The figures of a logged step: at least step, epoch, loss, learning_rate, images_per_second."""

    def close(self) -> None: ...


class JSONLLogger:
    """`metrics.jsonl` in the run's folder, one object a logged step."""

    def begin(self, run: LoggedRun) -> None:
        self.metrics = Metrics(run.out, run.start)

    def log(self, row: Mapping[str, Any]) -> None:
        if problem := self.metrics.write(dict(row)):
            raise OSError(problem)

    def close(self) -> None:
        self.metrics.close()


class Plain:
    """An object that has `log(step, figures)` and nothing else that a run needs: it is given all figures there are."""

    def __init__(self, given: Any):
        self.given = given

    def begin(self, run: LoggedRun) -> None:
        """It needs no beginning."""

    def log(self, row: Mapping[str, Any]) -> None:
        figures = dict(row)
        self.given.log(figures.pop("step"), figures)

    def measured(self, step: int, figures: Mapping[str, Any]) -> None:
        self.given.log(step, dict(figures))

    def close(self) -> None:
        """It needs no end."""


def as_logger(given: Any) -> Logger:
    """The object itself if it is a `Logger`, or one around it if it has `log(step, figures)` alone.

    Raises:
        UserError: for what is neither.
    """
    if isinstance(given, Logger) and not isinstance(given, type):
        return given
    log = getattr(given, "log", None)
    if callable(log) and not isinstance(given, type) and _takes_two(log):
        return Plain(given)
    raise UserError(
        f"loggers must have log(step, figures), or begin, log and close (fastjem.loggers.Logger), got {came(given)}"
    )


def _takes_two(function: Any) -> bool:
    """Whether it can be called with two arguments, as far as its signature is known."""
    try:
        inspect.signature(function).bind(0, {})
    except TypeError:
        return False
    except ValueError:  # of a function in C nobody knows
        return True
    return True


def name_of(logger: Any) -> str:
    """What messages call a logger: the name of a tracker, or of an object's class."""
    given = logger.given if isinstance(logger, Plain) else logger
    return getattr(logger, "name", None) or type(given).__name__


__all__ = ["JSONLLogger", "LoggedRun", "Logger", "Plain", "as_logger", "name_of"]
