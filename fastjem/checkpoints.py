"""Files that are whole or not there: checkpoints and metrics that outlive a kill at any moment and a full disk."""

import contextlib
import errno
import io
import json
import os
import pickle
import re
import secrets
import stat
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch

from fastjem import printing
from fastjem.errors import UserError
from fastjem.reading import why_not

LAST = "checkpoints/last.pt"
# What only the run itself writes, and nobody while it holds the lock but itself.
OWN = ("config.yaml", "metrics.jsonl", "knn.jsonl", "embeddings.npz", "environment.json", "encoder.safetensors")
PART = re.compile(r"(.+?)(\.[0-9a-f]{16})?\.part")  # the name of a temporary file, with that of its file in it
HOUR = 3600.0  # after which nobody writes a temporary file any more that hasn't grown


def write_atomically(path: Path, content: bytes) -> None:
    """The old file or the new one, never a part; see `open_atomically`."""
    with open_atomically(path) as file:
        file.write(content)


@contextlib.contextmanager
def open_atomically(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, which is there once the block ends without an error: until then a temporary file beside it,
    flushed to the disk, then renamed.

    The temporary file has a name of its own, so that two writers don't meet in it; a link that somebody planted there
    isn't followed, and a link in the place of `path` is replaced itself. What is no file stays: renaming would put a
    file in the place of /dev/null.

    Raises:
        OSError: where nothing can be written, or a device, a pipe or a socket is there.
    """
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        kind = os.stat(path).st_mode
        if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)) or os.path.realpath(path).startswith("/proc/"):
            raise OSError(errno.EINVAL, "a device or a pipe is no place for a file", str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{secrets.token_hex(8)}.part")
    try:
        with open(new_file(part), "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:  # a full disk, Ctrl-C, a dead worker
        part.unlink(missing_ok=True)
        raise
    if os.name != "posix":  # a folder can't be opened there
        return
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name outlives a power cut too
    finally:
        os.close(folder)


def new_file(path: Path) -> int:
    """The descriptor of a file that nobody else has made, open for writing."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    for name in ("O_NOFOLLOW", "O_CLOEXEC", "O_BINARY"):  # some systems lack one or the other
        flags |= getattr(os, name, 0)
    return os.open(path, flags, 0o666)


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
                    path.unlink()


def save(run: Path, state: dict[str, Any]) -> str | None:
    """Write the checkpoint; what went wrong, in words, if the disk refused it (the one before is then still there)."""
    buffer = io.BytesIO()  # torch's own writer aborts the process when a disk fills up below it
    torch.save(state, buffer)
    try:
        write_atomically(run / LAST, buffer.getvalue())
    except OSError as error:
        return f"the checkpoint at step {state['step']} could not be written ({why_not(error)})"
    return None


def earlier(run: Path, number: int) -> Path:
    """The file of the checkpoint that was the last `number` checkpoints ago."""
    last = run / LAST
    return last if number == 0 else last.with_name(f"{last.stem}-{number}{last.suffix}")


def keep_earlier(run: Path, count: int) -> None:
    """Before a checkpoint is written: the last ones move on by a name, so that `count` are there once it is.

    At any moment each of them is whole and `load` finds the newest. A file that is no checkpoint isn't kept, and
    nothing moves for a checkpoint that could not be written: the last one is `last-1.pt` already.
    """
    last = run / LAST
    with contextlib.suppress(OSError):
        for number in range(max(count, 1), max(count, 1) + 100):
            if not earlier(run, number).exists():
                break
            earlier(run, number).unlink()
    before = earlier(run, 1)
    if count < 2 or not last.is_file() or (before.exists() and os.path.samefile(last, before)):
        return
    try:
        read(last, mmap=True)
    except UserError:
        return
    with contextlib.suppress(OSError):  # one more copy is wanted, not needed
        for number, path in sorted(numbered(run).items(), reverse=True):
            if 0 < number < count - 1:
                os.replace(path, earlier(run, number + 1))
        before.unlink(missing_ok=True)
        try:
            os.link(last, before)
        except OSError:  # a file system without links
            os.replace(last, before)


def numbered(run: Path) -> dict[int, Path]:
    """Files of checkpoints by how many checkpoints ago each was the last."""
    names = {path: re.fullmatch(r"last(?:-(\d+))?\.pt", path.name) for path in (run / LAST).parent.glob("last*.pt")}
    return {int(match[1] or 0): path for path, match in names.items() if match}


def present(run: Path) -> list[Path]:
    """Files of checkpoints, the newest first."""
    return [path for _, path in sorted(numbered(run).items())]


def load(
    run: Path, say: Callable[[str], None] | None = printing.say, *, set_aside: bool = False
) -> dict[str, Any] | None:
    """The last checkpoint of a run; where it is damaged, the one before it, and so on. None where there is none yet.

    Args:
        say: is told in a line which checkpoint was damaged, and which is taken for it.
        set_aside: rename what is damaged to `*.damaged`, so that it isn't kept in the place of a good one. For the
            holder of the run's lock.

    Raises:
        UserError: if there are some and all are damaged; it names the newest and says why.
    """
    damaged: list[UserError] = []
    files: list[Path] = []
    for path in present(run):
        try:
            state = read(path)
        except UserError as error:
            damaged.append(error)
            files.append(path)
            continue
        if damaged and say:
            say(f"fastjem: {damaged[0]}; {path.name} is taken, of step {state['step']}")
        for file in files if set_aside else []:
            with contextlib.suppress(OSError):
                os.replace(file, f"{file}.damaged")
        return state
    if damaged:
        raise UserError(f"{damaged[0]}; no earlier one can be read, and without these files --resume starts at step 0")
    return None


def read(path: Path, *, mmap: bool = False) -> dict[str, Any]:
    """A checkpoint's state. mmap: the tensors' bytes are not looked at.

    Raises:
        UserError: for anything that isn't one, with the file's name and what is wrong with it.
    """
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
