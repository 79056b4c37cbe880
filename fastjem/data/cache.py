"""Where files that were made of the user's data are kept, and how they come to be there."""

import contextlib
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from fastjem.checkpoints import HOUR, new_file

LOCK, PART = ".lock", ".part"  # endings of what stands beside a file while it is made


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
    with filled(path) as part, open(part, "w+b") as file:
        yield file


@contextlib.contextmanager
def filled(path: str | os.PathLike[str]) -> Iterator[str]:
    """`written` by others: the name of an empty file that they write to."""
    parent, name = os.path.split(os.fspath(path))
    os.makedirs(parent or ".", exist_ok=True)
    part = os.path.join(parent, f".{name}.{secrets.token_hex(8)}{PART}")
    os.close(new_file(Path(part)))  # read by whom the user's umask lets read: it may be a copy of their images
    try:
        yield part
        with open(part, "rb") as file:
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
        lock = open(f"{os.fspath(path)}{LOCK}", "ab")  # noqa: SIM115
        fcntl.flock(lock, fcntl.LOCK_EX)
        for left in os.listdir(parent or "."):
            part = os.path.join(parent, left)
            if left.startswith(f".{name}.") and left.endswith(PART) and is_left(part):
                os.unlink(part)
    except (ImportError, OSError):  # another system's, a file server without locks, a folder that is read-only
        pass
    try:
        yield
    finally:
        if lock is not None:
            with contextlib.suppress(OSError):
                os.unlink(lock.name)  # whoever waits for it has it open
            with contextlib.suppress(ImportError, OSError):
                import fcntl

                fcntl.flock(lock, fcntl.LOCK_UN)  # a fork of meanwhile has it open, too, and would keep it
            lock.close()


def is_left(part: str | os.PathLike[str]) -> bool:
    """Whether nobody has written to the file for so long that whoever began it is gone; OSError where there is none."""
    return time.time() - os.stat(part).st_mtime > HOUR


def is_made(path: str | os.PathLike[str]) -> bool:
    """Whether some process, this one perhaps, is `alone` with the file at this moment, or may be."""
    return _is_locked(f"{os.fspath(path)}{LOCK}", unknown=True)


def is_used(path: str | os.PathLike[str]) -> bool:
    """Whether some process has the file open by `used`, as far as that can be known."""
    return _is_locked(path, unknown=False)


def used(path: str | os.PathLike[str]) -> BinaryIO:
    """The file, open, so that nobody takes it for one that may go; until it is closed."""
    file = open(path, "rb")  # noqa: SIM115
    with contextlib.suppress(ImportError, OSError):
        import fcntl

        fcntl.flock(file, fcntl.LOCK_SH)
    return file


def _is_locked(path: str | os.PathLike[str], *, unknown: bool) -> bool:
    """unknown: what it is where nothing can be locked."""
    try:
        import fcntl

        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    except (ImportError, OSError):
        return unknown
    return False
