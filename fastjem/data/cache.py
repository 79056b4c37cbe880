"""Where files that were made of the user's data are kept, and how they come to be there."""

import contextlib
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

HOUR = 3600.0  # after which nobody writes a file any more that hasn't grown


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
    part = os.path.join(parent, f".{name}.{secrets.token_hex(8)}.part")
    file = open(part, "x+b")  # noqa: SIM115  # read by whom the user's umask lets read: it may be a copy of their images
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:  # a full disk, Ctrl-C
        with contextlib.suppress(OSError):
            os.unlink(part)
        raise


@contextlib.contextmanager
def alone(path: str | os.PathLike[str]) -> Iterator[None]:
    """Of the processes of a machine that want to make a file one does; the others wait, and find it made. Where nothing
    can be locked all of them make it, which `written` allows.

    Who makes it removes what one that was killed has left of it, an hour later: on a file server, of which each machine
    has locks of its own, another one may be writing.
    """
    parent, name = os.path.split(os.fspath(path))
    lock = None
    try:
        import fcntl

        os.makedirs(parent or ".", exist_ok=True)
        lock = open(f"{os.fspath(path)}.lock", "ab")  # noqa: SIM115
        fcntl.flock(lock, fcntl.LOCK_EX)
        for left in os.listdir(parent or "."):
            part = os.path.join(parent, left)
            if left.startswith(f".{name}.") and left.endswith(".part") and time.time() - os.stat(part).st_mtime > HOUR:
                os.unlink(part)
    except (ImportError, OSError):  # another system's, a file server without locks, a folder that is read-only
        pass
    try:
        yield
    finally:
        if lock is not None:
            with contextlib.suppress(OSError):
                os.unlink(lock.name)  # whoever waits for it has it open
            lock.close()
