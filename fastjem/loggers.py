"""Where a run's figures go: `metrics.jsonl`, the terminal, TensorBoard, or an object of one's own."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from fastjem.checkpoints import Metrics
from fastjem.errors import UserError
from fastjem.printing import is_terminal, printable, say


@dataclass(frozen=True)
class LoggedRun:
    """What a logger is told of the run before its first row."""

    out: Path  # the run's folder
    method: str
    start: int  # the step that it goes on from; rows of later steps, of a run that was killed, are void
    steps: int  # of the whole run
    images_per_step: int
    log_every: int


@runtime_checkable
class Logger(Protocol):
    """Anything with these three; it lives on the first rank alone. `fastjem.pretrain(..., loggers=[mine])`."""

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


class TensorBoardLogger:
    """Scalars in the folder `tensorboard` of the run's folder."""

    def __init__(self) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError("--tensorboard needs the package tensorboard") from None
        self.make = SummaryWriter

    def begin(self, run: LoggedRun) -> None:
        self.board = self.make(str(run.out / "tensorboard"), purge_step=run.start)

    def log(self, row: Mapping[str, Any]) -> None:
        for name, value in row.items():
            self.board.add_scalar(name, value, row["step"])

    def close(self) -> None:
        self.board.close()


class TerminalLogger:
    """A progress bar on a terminal, now and then a line elsewhere; both on stderr. It also prints what a run says."""

    SHOWN = ("loss", "std", "effective_rank", "teacher_entropy", "prototype_usage")

    def begin(self, run: LoggedRun) -> None:
        self.run = run
        self.bar: Any = None
        if is_terminal(sys.stderr):
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[text]}"),
            )
            self.bar = Progress(*columns, console=Console(stderr=True))
            self.task = self.bar.add_task(run.method, total=run.steps, completed=run.start, text="")
            self.bar.start()

    def say(self, text: str) -> None:
        """A line that begins with `fastjem:`, above the bar."""
        if self.bar:
            self.bar.console.print(printable(f"fastjem: {text}", sys.stderr), markup=False, highlight=False)
        else:
            say(f"fastjem: {text}")

    def log(self, row: Mapping[str, Any]) -> None:
        step = row["step"]
        rate = row["images_per_second"]
        text = "  ".join(f"{name} {row[name]:.4g}" for name in self.SHOWN if name in row)
        text += f"  {rate:.0f} img/s  waiting {row['data_wait']:.0%}"
        if self.bar:
            self.bar.update(self.task, completed=step, text=text)
        elif step % (self.run.log_every * 10) == 0 or step == self.run.steps:
            minutes = (self.run.steps - step) * self.run.images_per_step / rate / 60
            say(f"step {step}/{self.run.steps}  {text}  {minutes:.1f} min left")

    def close(self) -> None:
        if self.bar:
            self.bar.stop()
