"""One writer for a run's folder: a second one is refused, and whoever only reads isn't kept out."""

import contextlib
import errno
import os
import socket
import stat
import time
from pathlib import Path

from fastjem.errors import UserError
from fastjem.reading import why_not

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

FILE = ".lock"
UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # of a file system that has no locks
WAIT = 0.2  # seconds between two tries
held_here: set[str] = set()  # folders that this process has locked: POSIX locks don't keep out their own process


class HeldError(UserError):
    """Another process writes to the folder."""


class Lock:
    """The lock of a run's folder, from `acquire` to `release` or to the process's end, however it ends.

    It is a POSIX lock on the file `.lock`: it works on network file systems, and a forked worker that outlives a killed
    run doesn't keep it, as it would with `flock`.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.path = folder / FILE
        self.key = os.path.realpath(folder)
        self.descriptor: int | None = None

    def acquire(self, patience: float = 0.0) -> None:
        """Make the folder if need be, and take the lock.

        Args:
            patience: seconds for which somebody who holds it is waited for, as he is about to end.

        Raises:
            UserError: if somebody holds it, with who, or if the folder can't be written to.
        """
        if self.key in held_here:
            raise UserError(f"{self.folder} is being written by another run of this process (pid {os.getpid()})")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            until = time.monotonic() + patience
            while not self._taken_now(wait=time.monotonic() < until):
                pass
        except OSError as error:
            raise UserError(f"--out {self.folder}: {why_not(error)}") from None
        held_here.add(self.key)

    def _taken_now(self, *, wait: bool) -> bool:
        try:
            return self._taken()
        except HeldError:
            if not wait:
                raise
            time.sleep(WAIT)
            return False

    def _taken(self) -> bool:
        """Whether the file that was locked is still the folder's: its last holder may have removed it in between."""
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
        descriptor = os.open(self.path, flags, 0o666)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise UserError(f"{self.path} is no regular file; fastjem locks a run's folder by it")
            self._lock(descriptor)
            if not (self.path.exists() and os.path.samestat(os.fstat(descriptor), os.stat(self.path))):
                os.close(descriptor)
                return False
            os.ftruncate(descriptor, 0)
            with contextlib.suppress(OSError):  # a full disk: the lock holds without a name in it
                os.write(descriptor, f"pid {os.getpid()} on {socket.gethostname()}\n".encode())
        except BaseException:
            os.close(descriptor)
            raise
        self.descriptor = descriptor
        return True

    def _lock(self, descriptor: int) -> None:
        try:
            if fcntl is not None:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            else:
                import msvcrt

                msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        except OSError as error:
            if error.errno in UNSUPPORTED:
                return
            if error.errno not in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
                raise
            holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip() if fcntl is not None else ""
            raise HeldError(
                f"{self.folder} is being written by another run ({holder or 'its name is not known'}); "
                "stop that one, or choose another --out"
            ) from None

    def release(self) -> None:
        """Give the lock back and remove its file; once or twice is the same."""
        if self.descriptor is None:
            return
        with contextlib.suppress(OSError):
            self.path.unlink()  # while it is held: whoever opened it before sees that it is gone, and tries again
        os.close(self.descriptor)
        self.descriptor = None
        held_here.discard(self.key)


__all__ = ["FILE", "Lock"]
