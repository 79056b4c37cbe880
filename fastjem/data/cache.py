"""Where files that were made of the user's data are kept, and how they come to be there."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


def folder() -> Path:
    """$FASTJEM_CACHE, $XDG_CACHE_HOME/fastjem or ~/.cache/fastjem; it needn't be there.

    Raises:
        RuntimeError: for an account without a home.
    """
    if named := os.environ.get("FASTJEM_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastjem"


@contextlib.contextmanager
def written(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file to be written, which has its name when the block is left, and is gone if that is by an error: whoever
    reads finds the whole of it, and of several processes that write at once the last one's is kept.

    Raises:
        OSError: where it can't be written.
    """
    parent, name = os.path.split(os.fspath(path))
    os.makedirs(parent or ".", exist_ok=True)
    descriptor, part = tempfile.mkstemp(prefix=f".{name}.", suffix=".part", dir=parent or ".")
    try:
        with open(descriptor, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(part, 0o644)  # mkstemp's is for its owner alone
        os.replace(part, path)
    except BaseException:  # a full disk, Ctrl-C
        with contextlib.suppress(OSError):
            os.unlink(part)
        raise


@contextlib.contextmanager
def alone(path: str | os.PathLike[str]) -> Iterator[None]:
    """Of the processes that want to make a file one does; the others wait, and find it made. Where files can't be
    locked all of them make it, which `written` allows."""
    os.makedirs(os.path.dirname(os.fspath(path)) or ".", exist_ok=True)
    with open(f"{os.fspath(path)}.lock", "ab") as lock:
        try:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX)
        except (ImportError, OSError):  # another system's, or a file server without locks
            pass
        yield
