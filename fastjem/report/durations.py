"""How long a run took, and how long what is left of it will take."""

import math
from dataclasses import dataclass

from fastjem.report.run import Run

LATEST = 20  # logged rows whose pace tells how long the rest takes


@dataclass(frozen=True)
class Durations:
    """Seconds of training as the rows of metrics.jsonl tell them: checkpoints, kNN and waiting for data are part of
    them, what comes before the first step and after the last is not, nor a pause between a stop and a resume.
    """

    taken: float
    per_epoch: float | None  # None where the run didn't say how many steps an epoch has
    left: float | None  # of a run that has steps to go and a loss that is a number, at the pace of its last rows


def durations(run: Run) -> Durations | None:
    """None where no logged row tells a speed."""
    images = run.config.get("batch_size", 0) * run.config.get("accumulate", 1)
    spans = []  # (steps, seconds) that end with a logged row
    before = 0
    for row in run.rows:
        rate = row.get("images_per_second", 0.0)
        steps = row["step"] - before
        before = row["step"]
        if steps > 0 and 0 < rate < math.inf:
            spans.append((steps, steps * images / rate))
    taken = sum(seconds for _, seconds in spans)
    if not taken:
        return None
    steps = sum(steps for steps, _ in spans)
    per_epoch = taken / steps * run.steps_per_epoch if run.steps_per_epoch else None
    to_go = run.environment.get("steps", 0) - before
    if to_go <= 0 or not math.isfinite(run.rows[-1].get("loss", 0.0)):
        return Durations(taken, per_epoch, None)
    latest = spans[-LATEST:]
    pace = sum(seconds for _, seconds in latest) / sum(steps for steps, _ in latest)
    return Durations(taken, per_epoch, to_go * pace)


def spoken(seconds: float, *, roughly: bool = False) -> str:
    """In the two largest units that fit, or one of them: 0.8 s, 42 s, 3 min 5 s, 2 h 40 min, 3 d 4 h; about 3 min."""
    if seconds < 9.95:
        return f"about {math.ceil(seconds)} s" if roughly else f"{seconds:.2g} s"
    for size, unit, smaller, below in UNITS:
        whole = round(seconds / smaller)
        if whole < size // smaller:
            continue
        if roughly:
            return f"about {round(seconds / size):,} {unit}"
        rest = whole % (size // smaller)
        return f"{whole // (size // smaller):,} {unit} {rest} {below}"
    return f"{'about ' if roughly else ''}{round(seconds)} s"


UNITS = ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s"))  # seconds, and of the unit below
