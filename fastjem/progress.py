"""What a run says while it trains: `metrics.jsonl`, TensorBoard, the progress line, alarms; and what it is told."""

import contextlib
import signal
import sys
import types
from pathlib import Path
from typing import Any

from fastjem import checkpoints, dist
from fastjem.errors import UserError
from fastjem.methods import METHODS
from fastjem.train import Alarm


class Reporter:
    """Metrics, progress, alarms: on the first rank only."""

    def __init__(self, config: Any, out: Path, start: int, steps: int, per_epoch: int, ranks: dist.Ranks):
        self.config, self.steps, self.per_epoch, self.ranks = config, steps, per_epoch, ranks
        self.last, self.bad = {}, set()
        self.alarm = Alarm(getattr(METHODS[config.method], "asymmetric", False))
        self.metrics = checkpoints.Metrics(out, start) if ranks.first else None
        self.board: Any = None
        if config.tensorboard and ranks.first:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise UserError("--tensorboard needs the package tensorboard") from None
            self.board = SummaryWriter(str(out / "tensorboard"), purge_step=start)
        self.bar: Any = None
        if ranks.first and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[text]}"),
            )
            self.bar = Progress(*columns, console=Console(stderr=True))
            self.task = self.bar.add_task(config.method, total=steps, completed=start, text="")
            self.bar.start()

    def say(self, text: str | None) -> None:
        if text and self.ranks.first:
            if self.bar:
                self.bar.console.print(f"fastjem: {text}", markup=False, highlight=False)
            else:
                print(f"fastjem: {text}", file=sys.stderr, flush=True)

    def unreadable(self, files: list[tuple[str, str]]) -> None:
        for path, reason in files:
            if path not in self.bad:
                self.bad.add(path)
                self.say(f"skipped {path}: {reason} ({len(self.bad)} so far)")

    def log(self, step: int, figures: dict[str, Any]) -> None:
        figures["images_per_second"] *= self.ranks.size
        row = {"step": step, "epoch": (step - 1) // self.per_epoch, **figures}
        if self.bad:
            row["unreadable_files"] = len(self.bad)
        self.last = row
        self.say(self.alarm(step, figures) if self.ranks.first else None)
        if self.metrics:
            self.say(self.metrics.write(row))
        if self.board:
            for name, value in row.items():
                self.board.add_scalar(name, value, step)
        names = ("loss", "std", "effective_rank", "teacher_entropy", "prototype_usage")
        text = "  ".join(f"{name} {figures[name]:.4g}" for name in names if name in figures)
        left = (self.steps - step) * self.config.batch_size * self.config.accumulate / figures["images_per_second"]
        text += f"  {figures['images_per_second']:.0f} img/s  waiting {figures['data_wait']:.0%}"
        if self.bar:
            self.bar.update(self.task, completed=step, text=text)
        elif self.ranks.first and (step % (self.config.log_every * 10) == 0 or step == self.steps):
            print(f"step {step}/{self.steps}  {text}  {left / 60:.1f} min left", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.bar:
            self.bar.stop()
        if self.metrics:
            self.metrics.close()
        if self.board:
            self.board.close()


class Stop:
    """SIGTERM and Ctrl-C ask the loop to end after its step; a second Ctrl-C ends it at once."""

    signal: int | None = None

    def __enter__(self) -> "Stop":
        self.old = {}
        for number in (signal.SIGTERM, signal.SIGINT):
            with contextlib.suppress(ValueError):  # not in the main thread: the caller's business
                self.old[number] = signal.signal(number, self.ask)
        return self

    def ask(self, number: int, frame: types.FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number

    def __exit__(self, *_: object) -> None:
        for number, handler in self.old.items():
            signal.signal(number, handler)
