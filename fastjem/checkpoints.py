"""Checkpoints and metrics that outlive a kill at any moment and a full disk: they are whole or not there."""

import contextlib
import io
import json
import os
import pickle
import re
import secrets
import time
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastjem import printing
from fastjem import sharded_checkpoints as sharded
from fastjem.atomic import (  # noqa: F401  # whoever writes into a run finds them here
    duplicate,
    flush_names,
    is_same,
    link,
    new_file,
    open_atomically,
    publish,
    remove,
    write_atomically,
)  # fmt: skip
from fastjem.errors import UserError
from fastjem.ranks import Ranks
from fastjem.reading import why_not

LAST = "checkpoints/last.pt"
LAST_IN_SHARDS = "checkpoints/last"  # the folder of a run whose weights are in shards
BEST = "checkpoints/best.pt"
NAMED = re.compile(r"last(?:-(\d+))?(\.pt)?")  # with how many checkpoints ago it was the last
CONFIGURATION = "config.yaml"
# What only the run itself writes, and nobody while it holds the lock but itself.
OWN = (CONFIGURATION, "metrics.jsonl", "knn.jsonl", "embeddings.npz", "environment.json", "encoder.safetensors")
PART = re.compile(r"(.+?)(\.[0-9a-f]{16})?\.part")  # the name of a temporary file, with that of its file in it
HOUR = 3600.0  # after which nobody writes a temporary file any more that hasn't grown


def clean(run: Path) -> None:
    """Remove the temporary files that a killed run left. For the holder of the run's lock only.

    Files that other commands write into the folder too (a report) are given an hour.
    """
    for folder in (run, run / "checkpoints"):
        for path in folder.glob("*.part"):
            name = PART.fullmatch(path.name)
            own = folder != run or (name is not None and name[1] in OWN)
            with contextlib.suppress(OSError):
                if own or time.time() - path.lstat().st_mtime > HOUR:
                    remove(path)


def save(run: Path, state: dict[str, Any]) -> str | None:
    """Write the checkpoint; what went wrong, in words, if the disk refused it (the one before is then still there)."""
    try:
        write_atomically(run / LAST, packed(state))
        if (run / LAST_IN_SHARDS).is_dir():  # of before the weights were whole
            remove(run / LAST_IN_SHARDS)
    except OSError as error:
        return f"the checkpoint at step {state['step']} could not be written ({why_not(error)})"
    return None


def save_in_shards(run: Path, state: dict[str, Any], keep: int, ranks: Ranks) -> str | None:
    """Write the checkpoint of a model in shards, and move the earlier ones on; a collective call.

    The folder gets its name once all ranks have written their shards and flushed them to the disk.

    Args:
        state: with this rank's DTensors; all else is the first rank's.
        keep: how many checkpoints there are then, see `keep_earlier`.

    Returns:
        On every rank what went wrong, in words, if a rank's disk refused it; the one before is then still there.
    """
    number = int(ranks.agree(float(secrets.randbits(52))))
    part = run / f"{LAST_IN_SHARDS}.{number:016x}.part"
    why: str | None = None
    try:
        if ranks.first:
            part.parent.mkdir(parents=True, exist_ok=True)
            part.mkdir()
    except OSError as error:
        why = why_not(error)
    if not ranks.any(why is not None)[0]:
        state, why = sharded.write(part, state, ranks)
    if ranks.first and why is None:
        try:
            write_atomically(part / sharded.STATE, packed(state))
            keep_earlier(run, keep)
            # At any moment there is a whole checkpoint: the last one has a second name, or is given one.
            last = run / LAST_IN_SHARDS
            publish(part, last, None if 1 in numbered(run) else last.with_name(f"{last.name}-1"))
            keep_earlier(run, keep, move=False)
        except OSError as error:
            why = why_not(error)
    (failed,) = ranks.any(why is not None)
    if not failed:
        return None
    if ranks.first:
        with contextlib.suppress(OSError):
            remove(part)
    return f"the checkpoint at step {state['step']} could not be written ({why or 'the first rank says why'})"


def packed(state: dict[str, Any]) -> bytes:
    """A file of it. torch's own writer ends the process when a disk fills up below it."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def earlier(run: Path, number: int) -> Path:
    """The checkpoint that was the last `number` checkpoints ago; the file's name where there is none."""
    named = run / LAST
    return numbered(run).get(number) or (named if number == 0 else named.with_name(f"last-{number}.pt"))


def keep_earlier(run: Path, count: int, *, move: bool = True) -> None:
    """Before a checkpoint is written: the last ones move on by a name, so that `count` are there once it is.

    At any moment each of them is whole and `load` finds the newest. A file that is no checkpoint isn't kept, and
    nothing moves for a checkpoint that could not be written: the last one is `last-1` already, in links to its bytes.

    move: False: those that are too many go, and no more.
    """
    there = numbered(run)
    with contextlib.suppress(OSError):
        for number in range(max(count, 1), max(count, 1) + 100):
            if number not in there:
                break
            remove(there[number])
    last, before = there.get(0), there.get(1)
    if count < 2 or not move or last is None or (before is not None and is_same(last, before)):
        return
    try:
        read(last, mmap=True)
    except UserError:
        return
    with contextlib.suppress(OSError):  # one more copy is wanted, not needed
        for number, path in sorted(there.items(), reverse=True):
            if 0 < number < count - 1:
                os.replace(path, path.with_name(f"last-{number + 1}{path.suffix}"))
            elif number:
                remove(path)
        before = last.with_name(f"last-1{last.suffix}")
        try:
            link(last, before)
        except OSError:  # a file system without links
            os.replace(last, before)


def keep_best(run: Path) -> str | None:
    """The last checkpoint is the best one, too, from now on; what went wrong, in words."""
    last = earlier(run, 0)
    best = run / BEST
    folder = best.with_suffix("")
    copy = folder if last.is_dir() else best
    try:
        try:
            link(last, copy)
        except OSError:  # a file system without links
            duplicate(last, copy)
        for other in (best, folder):
            if other != copy and other.exists():
                remove(other)
        flush_names(best.parent)
    except OSError as error:
        return f"{copy} could not be written ({why_not(error)})"
    return None


def run_of(path: Path) -> Path | None:
    """The run whose checkpoint this is, by its place, RUN/checkpoints/best.pt say; None where it is none."""
    folder = Path(os.path.abspath(path)).parent
    named = path.suffix == ".pt" or os.path.lexists(path / sharded.STATE)
    if not named or folder.name != "checkpoints" or not (folder.parent / CONFIGURATION).exists():
        return None
    return Path(os.path.normpath(path.parent / ".."))


def best(run: Path) -> Path | None:
    """The checkpoint that was kept as the best one, if there is one."""
    path = run / BEST
    found = [one for one in (path, path.with_suffix("")) if one.exists()]
    return max(found, key=lambda one: one.stat().st_mtime) if found else None


def numbered(run: Path) -> dict[int, Path]:
    """Checkpoints by how many checkpoints ago each was the last; the newer one where a file and a folder are."""
    return dict(reversed(in_order(run)))


def present(run: Path) -> list[Path]:
    """Checkpoints, files and folders, the newest first."""
    return [path for _, path in in_order(run)]


def in_order(run: Path) -> list[tuple[int, Path]]:
    """How many checkpoints ago each was the last, and its path; the newest first."""
    found = []
    for path in (run / LAST).parent.glob("last*"):
        match = NAMED.fullmatch(path.name)
        if match and (match[2] or path.is_dir()):
            with contextlib.suppress(OSError):
                found.append((int(match[1] or 0), -path.lstat().st_mtime, path))
    return [(number, path) for number, _, path in sorted(found)]


def goes_on(run: Path) -> str:
    """From which checkpoint a run goes on, in words."""
    with contextlib.suppress(Exception):
        step = read(present(run)[0], mmap=True)["step"]
        return f"the last checkpoint is of step {step}: --resume --out {run} goes on from there"
    return "there is no checkpoint yet"


def load(
    run: Path,
    say: Callable[[str], None] | None = printing.say,
    *,
    set_aside: bool = False,
    whole: bool = True,
) -> dict[str, Any] | None:
    """The last checkpoint of a run; where it is damaged, the one before it, and so on. None where there is none yet.

    Args:
        say: is told in a line which checkpoint was damaged, and which is taken for it.
        set_aside: rename what is damaged to `*.damaged`, so that it isn't kept in the place of a good one. For the
            holder of the run's lock.
        whole: see `read`.

    Raises:
        UserError: if there are some and all are damaged; it names the newest and says why.
    """
    found = find(run, say, set_aside=set_aside, whole=whole)
    return found and found[1]


def find(
    run: Path, say: Callable[[str], None] | None, *, set_aside: bool, whole: bool
) -> tuple[Path, dict[str, Any]] | None:
    """What `load` takes, and its path."""
    damaged: list[UserError] = []
    files: list[Path] = []
    for path in present(run):
        try:
            state = read(path, whole=whole)
        except UserError as error:
            damaged.append(error)
            files.append(path)
            continue
        if damaged and say:
            say(f"fastjem: {damaged[0]}; {path.name} is taken, of step {state['step']}")
        for file in files if set_aside else []:
            with contextlib.suppress(OSError):
                os.replace(file, f"{file}.damaged")
        return path, state
    if damaged:
        raise UserError(f"{damaged[0]}; no earlier one can be read, and without these files --resume starts at step 0")
    return None


def read(path: Path, *, mmap: bool = False, whole: bool = True, checksums: bool = True) -> dict[str, Any]:
    """A checkpoint's state, of a file or a folder.

    Args:
        mmap: the tensors' bytes are not looked at.
        whole: False: what lies in shards isn't read but for its checksums, and `sharded_checkpoints.fitted` reads a
            rank's part of it.
        checksums: False: those of shards aren't compared, where somebody has.

    Raises:
        UserError: for anything that isn't one, with the file's name and what is wrong with it.
    """
    if path.suffix == ".pt" or not path.is_dir():
        return read_file(path, mmap=mmap)
    if not os.path.lexists(path / sharded.STATE):
        raise UserError(f"{path} is no checkpoint: it has no {sharded.STATE}")
    state = read_file(path / sharded.STATE, mmap=mmap)
    sharded.check(path, state, checksums=checksums and not mmap)
    if whole and not mmap:
        return sharded.filled(path, state)
    state[sharded.SHARDS]["folder"] = str(path)
    return state


def read_file(path: Path, *, mmap: bool) -> dict[str, Any]:
    """The state in one file, see `read`."""
    try:
        if not path.is_file():
            raise UserError(f"{path} is no checkpoint: it is {'a folder' if path.is_dir() else 'no regular file'}")
        if not path.stat().st_size:
            raise UserError(f"{path} is no checkpoint: it is empty")
        open(path, "rb").close()
    except OSError as error:
        raise UserError(f"{path} can't be read: {why_not(error)}") from None
    try:
        state = contents(path, mmap=mmap)
    except MemoryError:
        raise
    except Exception as error:  # zipfile's, pickle's and torch's: a damaged file raises almost anything
        why = "it is cut off, damaged, or a file of another kind"
        if isinstance(error, pickle.UnpicklingError):
            why = "it holds objects that no checkpoint has"
        raise UserError(f"{path} is no checkpoint of fastjem's: {why}") from None
    if not is_state(state):
        raise UserError(f"{path} is no checkpoint of fastjem's: it holds other things than step, model and optimizer")
    return state


def contents(path: Path, *, mmap: bool) -> Any:
    """What `torch.save` wrote, once its checksums are found right: torch compares none of them."""
    if not mmap:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():
                raise zipfile.BadZipFile
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of formats that aren't ours
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)


def is_state(state: object) -> bool:
    """Whether it is what `save` writes."""
    if not isinstance(state, dict) or type(state.get("step")) is not int or state["step"] < 0:
        return False
    parts = [state.get(name) for name in ("model", "optimizer", "defaults")]
    if not all(isinstance(part, dict) and all(isinstance(name, str) for name in part) for part in parts):
        return False
    return all(isinstance(value, torch.Tensor) or name.endswith("_extra_state") for name, value in parts[0].items())  # type: ignore[union-attr]


class Metrics:
    """`metrics.jsonl`, one object a line. Opening it for a run that goes on from `step` cuts the rows past it."""

    def __init__(self, run: Path, step: int, name: str = "metrics.jsonl"):
        self.path = run / name
        kept = [line for line in self._lines() if is_row(line, step)]
        write_atomically(self.path, "".join(line + "\n" for line in kept).encode())
        flags = os.O_WRONLY | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
        self.file = open(os.open(self.path, flags), "a", encoding="utf-8")  # noqa: SIM115

    def _lines(self) -> list[str]:
        # A pipe in its place would be waited for, and it is replaced below.
        return self.path.read_text("utf-8", "replace").splitlines() if self.path.is_file() else []

    def write(self, row: dict[str, Any]) -> str | None:
        try:
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()
        except OSError as error:
            return f"{self.path.name} could not be written ({why_not(error)})"
        return None

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.file.close()


def is_row(line: str, last: int) -> bool:
    """Whether a line of metrics is whole, and of a step up to `last`; a kill may have cut it in two."""
    try:
        return json.loads(line)["step"] <= last
    except (ValueError, KeyError, TypeError, RecursionError):
        return False
