"""What a run says of itself: figures to the loggers, alarms and broken files in words."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from fastjem import banner, values
from fastjem.build import Training
from fastjem.errors import UserError
from fastjem.health import Alarm
from fastjem.loggers import JSONLLogger, LoggedRun, Logger, name_of
from fastjem.reading import json_rows, why_not
from fastjem.terminal import TerminalLogger
from fastjem.trackers import Tracker, names_of


class Journal:
    """Loggers, alarm and messages of a run; only the first rank writes anything.

    Args:
        extra: loggers of the caller's, beside those of the configuration.

    Raises:
        UserError: for a logger that can't begin: `metrics.jsonl` on a full disk.
    """

    def __init__(self, training: Training, extra: Iterable[Logger] = ()):
        self.training = training
        self.last_row: dict[str, Any] = {}
        self.troubles: set[str] = set()  # of loggers, that have been told of
        self.unreadable = set(training.unreadable)
        self.alarm = Alarm(training.step.method.asymmetric)
        self.terminal = TerminalLogger()
        self.loggers: list[Logger] = []
        if training.ranks.first:
            names = names_of(training.config.log, tensorboard=training.config.tensorboard)
            self._begin([self.terminal, JSONLLogger(), *map(Tracker, names), *extra])

    def _begin(self, loggers: Sequence[Logger]) -> None:
        config = self.training.config
        run = LoggedRun(
            out=self.training.out,
            method=config.method,
            start=self.training.start,
            steps=self.training.steps,
            images_per_step=config.batch_size * config.accumulate,
            log_every=config.log_every,
            steps_per_epoch=self.training.steps_per_epoch,
            values=values.of(self.training),
            seen=last_step(self.training) if self.training.resumed else 0,
        )
        for logger in loggers:
            try:
                logger.begin(run)
            except OSError as error:
                raise UserError(f"{name_of(logger)} can't begin in {run.out}: {why_not(error)}") from error
            self.loggers.append(logger)

    def say(self, text: str | None) -> None:
        if text and self.loggers:
            self.terminal.say(text)

    def banner(self) -> None:
        """What the run is about to do, and what else there is to be told before its first step."""
        if self.loggers:
            self.terminal.banner(banner.title(self.training), banner.rows(self.training))
        for notice in self.training.notices:
            self.say(notice)

    def skip(self, files: Iterable[tuple[str, str]]) -> None:
        """Files that another image replaced, (path, reason): each is told of once in a run."""
        for path, reason in files:
            if path not in self.unreadable:
                self.unreadable.add(path)
                self.say(f"skipped {path}: {reason} ({len(self.unreadable)} so far)")

    def log(self, step: int, figures: Mapping[str, Any]) -> None:
        """The figures of a logged step, a row for every logger."""
        rate = figures["images_per_second"] * self.training.ranks.size
        row = {"step": step, "epoch": (step - 1) // self.training.steps_per_epoch, **figures, "images_per_second": rate}
        if self.unreadable:
            row["unreadable_files"] = len(self.unreadable)
        self.last_row = row
        self.say(self.alarm(step, figures))
        for logger in self.loggers:
            self._guarded(logger, lambda logger=logger: logger.log(dict(row)))
            self._tell(logger)

    def step(self, done: int) -> None:
        """A step was taken."""
        if self.loggers:
            self.terminal.step(done)

    def measured(self, step: int, figures: Mapping[str, float]) -> None:
        """What was measured along the way, for loggers that take it."""
        for logger in self.loggers:
            if take := getattr(logger, "measured", None):
                self._guarded(logger, lambda take=take: take(step, dict(figures)))

    def close(self) -> None:
        for logger in reversed(self.loggers):  # the terminal last: it tells of the others' troubles
            self._guarded(logger, logger.close)
            self._tell(logger)

    def _tell(self, logger: Logger) -> None:
        """Where a tracker has its figures, once it has begun."""
        for note in logger.told() if isinstance(logger, Tracker) else ():
            self.say(note)

    def _guarded(self, logger: Logger, work: Callable[[], None]) -> None:
        """A full disk, or a mistake in somebody's logger, is told of; the run matters more."""
        try:
            work()
        except OSError as error:
            if isinstance(logger, Tracker):
                return self._failed(logger, error)
            if str(error) not in self.troubles:  # a full disk refuses every row
                self.troubles.add(str(error))
                self.say(str(error))
        except Exception as error:
            self._failed(logger, error)

    def _failed(self, logger: Logger, error: Exception) -> None:
        reason = (str(error).splitlines() or [""])[0]
        text = f"the logger {name_of(logger)} failed ({type(error).__name__}: {reason}); the run goes on"
        if text not in self.troubles:  # it fails at every row
            self.troubles.add(text)
            self.say(text)


def last_step(training: Training) -> int:
    """Of the rows that were logged before the run is gone on with, those past its checkpoint too."""
    try:
        found, _ = json_rows(training.out / "metrics.jsonl")
    except UserError:
        return training.start
    steps = [row["step"] for row in found if isinstance(row.get("step"), int)]
    return max([training.start, *steps])
