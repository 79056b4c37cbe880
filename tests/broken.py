"""Runs that are broken off as by a kill, and the rows that they logged."""

import json
from pathlib import Path
from typing import Any

import pytest

import fastjem


class Killed(BaseException):
    """Past everything that would end a run in order."""


class Until:
    """A logger that breaks a run off behind a step."""

    def __init__(self, step: int):
        self.step = step

    def begin(self, run: Any) -> None: ...
    def close(self) -> None: ...

    def log(self, row: dict[str, Any]) -> None:
        if row["step"] == self.step:
            raise Killed


def broken_off(until: int, **fields: Any) -> Path:
    """The folder of a run that has logged so many steps; a checkpoint may be of one more."""
    with pytest.raises(Killed):
        fastjem.pretrain(loggers=[Until(until)], **fields)
    return Path(fields["out"])


def rows(run: Path) -> list[dict[str, Any]]:
    """Of `metrics.jsonl`, without what a clock measured."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("images_per_second", "data_wait")} for line in lines]
