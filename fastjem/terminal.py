"""What a run shows on stderr: what it is about to do, how far it is, and what it has to say.

On a terminal that is a table and one line that is drawn anew, as wide as the terminal is at that moment; elsewhere
(a file, a pipe, a notebook, a job's log) plain lines, now and then.
"""

import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fastjem.loggers import LoggedRun
from fastjem.printing import is_terminal, printable, say

HEALTH = ("std", "effective_rank", "teacher_entropy", "prototype_usage")
WAITED = 0.2  # share of the time waited for data from which on that is shown
BETWEEN = 15.0  # seconds between two lines where there is no terminal, or
OF_RUN = 1 / 30  # this share of the time since the run began
WINDOW = 6  # rows from whose times the time that is left is told
LEAST_BAR, LARGEST_BAR = 8, 40  # columns


class Progress:
    """How far a run is, as text of any width."""

    def __init__(self, run: LoggedRun):
        self.run = run
        self.done = run.start
        self.row: Mapping[str, Any] = {}
        self.times: deque[tuple[int, float]] = deque(maxlen=WINDOW)
        self.ends_at: float | None = None  # by the monotonic clock, as far as one can tell

    def log(self, row: Mapping[str, Any]) -> None:
        now = time.monotonic()
        self.row = row
        self.done = max(self.done, row["step"])
        self.times.append((row["step"], now))
        first, then = self.times[0]
        seconds = self.run.images_per_step / max(row["images_per_second"], 1e-9)  # of a step
        if row["step"] > first:  # what is between steps, checkpoints and kNN, counts as well
            seconds = (now - then) / (row["step"] - first)
        self.ends_at = now + seconds * (self.run.steps - row["step"])

    def left(self) -> str:
        if self.ends_at is None or self.done >= self.run.steps:
            return ""
        return f"{duration(max(self.ends_at - time.monotonic(), 0))} left"

    def epoch(self) -> str:
        each = self.run.steps_per_epoch
        return f"epoch {min(self.done, self.run.steps - 1) // each + 1}/{-(-self.run.steps // each)}"

    def figures(self) -> dict[str, str]:
        """Of the last row, what is shown, by name."""
        row = self.row
        found = {"loss": f"loss {row['loss']:.4g}"} if "loss" in row else {}
        if "images_per_second" in row:
            rate = row["images_per_second"]
            found["rate"] = f"{rate:,.0f} img/s" if rate >= 10 else f"{rate:.1f} img/s"
        if row.get("data_wait", 0) > WAITED:
            found["waiting"] = f"waiting {row['data_wait']:.0%}"
        return found | {name: f"{name} {row[name]:.4g}" for name in HEALTH if name in row}

    def parts(self) -> dict[str, str]:
        """Everything in the order in which it is shown; "bar" is empty."""
        counted = f"{self.done}/{self.run.steps}"
        return {
            "method": self.run.method.rpartition(".")[2],
            "step": counted,
            "epoch": self.epoch(),
            "bar": "",
            "left": self.left() or ("" if self.row else "first step"),
            **self.figures(),
        }

    def fitting(self, width: int) -> tuple[dict[str, str], int]:
        """(what of `parts` fits in so many columns, those of the bar; 0: none)."""
        parts = {name: text for name, text in self.parts().items() if text}
        # The first of these is there however narrow it is.
        order = ["step", "left", "loss", "bar", "epoch", "rate", "method", "waiting", *HEALTH]
        chosen: set[str] = set()
        used = -1
        for name in order:
            columns = LEAST_BAR if name == "bar" else len(parts.get(name, ""))
            if columns and (used + 1 + columns <= width or not chosen):
                chosen.add(name)
                used += 1 + columns
        bar = min(LEAST_BAR + width - used, LARGEST_BAR) if "bar" in chosen else 0
        return {name: text for name, text in self.parts().items() if name in chosen}, bar

    def line(self) -> str:
        """All of it, where no bar is drawn."""
        shown = [text for name, text in self.parts().items() if text and name not in ("method", "step")]
        return "  ".join([f"step {self.done}/{self.run.steps}", *shown])

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        # A column stays free, as some terminals wrap a line that fills the last one.
        shown, bar = self.fitting(options.max_width - 1)
        styles = {"step": "bold", "left": "cyan", "loss": "green", "method": "bold"}
        cells: list[Any] = []
        for name, text in shown.items():
            cells.append(
                ProgressBar(total=self.run.steps, completed=self.done, width=bar)
                if name == "bar"
                else Text(printable(text, sys.stderr), style=styles.get(name, ""), no_wrap=True, overflow="crop")
            )
        table = Table.grid(padding=(0, 1, 0, 0), pad_edge=False)
        for _ in cells:
            table.add_column(no_wrap=True)
        table.add_row(*cells)
        yield table


def duration(seconds: float) -> str:
    """ "0:07", "12:34", "1:02:03", "2 d 03 h"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24} d {hours % 24:02} h"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class TerminalLogger:
    """The progress of a run, its banner, and the lines that it says."""

    def __init__(self) -> None:
        self.live: Any = None

    def begin(self, run: LoggedRun) -> None:
        self.progress = Progress(run)
        self.began = time.monotonic()
        self.said_at: float | None = None
        if is_terminal(sys.stderr):
            from rich.console import Console
            from rich.live import Live

            console = Console(stderr=True)
            if not console.is_dumb_terminal:
                self.live = Live(self.progress, console=console, refresh_per_second=4)
                self.live.start()

    def say(self, text: str) -> None:
        """A line that begins with `fastjem:`, above the bar."""
        if self.live:
            self.live.console.print(printable(f"fastjem: {text}", sys.stderr), markup=False, highlight=False)
        else:
            say(f"fastjem: {text}")

    def banner(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        """What the run is about to do, a line each; on a terminal long ones go on below themselves."""
        if not self.live:
            say(title)
            width = max(len(name) for name, _ in rows)
            for name, text in rows:
                say(f"  {name:<{width}}  {text}")
            return
        from rich.table import Table
        from rich.text import Text

        table = Table.grid(padding=(0, 2, 0, 0), pad_edge=False)
        for name, text in rows:
            shown = [printable(one, sys.stderr) for one in (name, text)]
            table.add_row(Text(f"  {shown[0]}", style="cyan"), Text(shown[1], overflow="fold"))
        self.live.console.print(Text(printable(title, sys.stderr), style="bold"))
        self.live.console.print(table)

    def step(self, done: int) -> None:
        """A step was taken, whose figures may not be known yet."""
        self.progress.done = done

    def log(self, row: Mapping[str, Any]) -> None:
        self.progress.log(row)
        if self.live:
            return
        now = time.monotonic()
        apart = max(BETWEEN, (now - self.began) * OF_RUN)
        if self.said_at is None or now - self.said_at > apart or row["step"] == self.progress.run.steps:
            self.said_at = now
            say(self.progress.line())

    def close(self) -> None:
        if self.live:
            self.live.stop()
            self.live = None


__all__ = ["Progress", "TerminalLogger", "duration"]
