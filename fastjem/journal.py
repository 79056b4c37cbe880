"""What a run says of itself: figures to the loggers, alarms and broken files in words."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from fastjem.build import Training
from fastjem.errors import UserError
from fastjem.health import Alarm
from fastjem.loggers import JSONLLogger, LoggedRun, Logger, TensorBoardLogger, TerminalLogger
from fastjem.reading import why_not


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
            board = [TensorBoardLogger()] if training.config.tensorboard else []
            self._begin([self.terminal, JSONLLogger(), *board, *extra])

    def _begin(self, loggers: Sequence[Logger]) -> None:
        config = self.training.config
        run = LoggedRun(
            out=self.training.out,
            method=config.method,
            start=self.training.start,
            steps=self.training.steps,
            images_per_step=config.batch_size * config.accumulate,
            log_every=config.log_every,
        )
        for logger in loggers:
            try:
                logger.begin(run)
            except OSError as error:
                name = type(logger).__name__
                raise UserError(f"{name} can't begin in {run.out}: {why_not(error)}") from error
            self.loggers.append(logger)

    def say(self, text: str | None) -> None:
        if text and self.loggers:
            self.terminal.say(text)

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

    def close(self) -> None:
        for logger in reversed(self.loggers):  # the terminal last: it tells of the others' troubles
            self._guarded(logger, logger.close)

    def _guarded(self, logger: Logger, work: Callable[[], None]) -> None:
        """A full disk, or a mistake in somebody's logger, is told of; the run matters more."""
        try:
            work()
        except OSError as error:
            if str(error) not in self.troubles:  # a full disk refuses every row
                self.troubles.add(str(error))
                self.say(str(error))
        except Exception as error:
            self.say(f"the logger {type(logger).__name__} failed ({type(error).__name__}: {error}); the run goes on")
