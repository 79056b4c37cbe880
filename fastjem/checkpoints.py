"""Files that are whole or not there: checkpoints and metrics that outlive a kill at any moment and a full disk."""

import contextlib
import io
import json
import os
from pathlib import Path
from typing import Any

import torch

LAST = "checkpoints/last.pt"


def write_atomically(path: Path, content: bytes) -> None:
    """The old file or the new one, never a part: a temporary file beside it, flushed to the disk, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError:
        part.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name outlives a power cut too
    finally:
        os.close(folder)


def save(run: Path, state: dict[str, Any]) -> str | None:
    """Write the checkpoint; what went wrong, in words, if the disk refused it (the last one is then still there)."""
    buffer = io.BytesIO()  # torch's own writer aborts the process when a disk fills up below it
    torch.save(state, buffer)
    try:
        write_atomically(run / LAST, buffer.getvalue())
    except OSError as error:
        return (
            f"the checkpoint at step {state['step']} could not be written ({error.strerror}); the last good one stays"
        )
    return None


def load(run: Path) -> dict[str, Any] | None:
    path = run / LAST
    return torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None


class Metrics:
    """`metrics.jsonl`, one object a line. Opening it for a run that goes on from `step` cuts the rows past it."""

    def __init__(self, run: Path, step: int, name: str = "metrics.jsonl"):
        self.path = run / name
        rows = []
        if self.path.exists():
            for line in self.path.read_text().splitlines():
                try:
                    if json.loads(line)["step"] <= step:
                        rows.append(line)
                except (ValueError, KeyError):  # the line that a kill cut in two
                    continue
        write_atomically(self.path, "".join(line + "\n" for line in rows).encode())
        self.file = open(self.path, "a")  # noqa: SIM115

    def write(self, row: dict[str, Any]) -> str | None:
        try:
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()
        except OSError as error:
            return f"{self.path.name} could not be written ({error.strerror})"
        return None

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.file.close()
