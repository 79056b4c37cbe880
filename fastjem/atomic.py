"""Files, and checkpoints in folders, that are whole or not there, whatever ends the process that writes them."""

import contextlib
import errno
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from fastjem import sharded_checkpoints as sharded


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
    part = part_beside(path)
    try:
        with open(new_file(part), "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:  # a full disk, Ctrl-C, a dead worker
        part.unlink(missing_ok=True)
        raise
    flush_names(path.parent)


def part_beside(path: Path) -> Path:
    """The name of a temporary file or folder beside another one, which nobody else has."""
    return path.with_name(f"{path.name}.{secrets.token_hex(8)}.part")


def flush_names(folder: Path) -> None:
    """What is in a folder under which name outlives a power cut, too."""
    if os.name != "posix":  # a folder can't be opened there
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def new_file(path: Path) -> int:
    """The descriptor of a file that nobody else has made, open for writing."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    for name in ("O_NOFOLLOW", "O_CLOEXEC", "O_BINARY"):  # some systems lack one or the other
        flags |= getattr(os, name, 0)
    return os.open(path, flags, 0o666)


def publish(part: Path, place: Path, aside: Path | None = None) -> None:
    """Give a checkpoint's folder that is whole its name, in the place of the file or folder that has it.

    No system call puts a folder in the place of another one: for a moment nobody has the name.

    aside: the name of what had it, from then on; None: it is removed.
    """
    if place.is_dir():
        away = aside or part_beside(place)
        os.replace(place, away)
        os.replace(part, place)
        if aside is None:
            remove(away)
    else:
        os.replace(part, place)
    with_ending(place).unlink(missing_ok=True)
    flush_names(place.parent)


def with_ending(folder: Path) -> Path:
    """The file of a checkpoint in the place of a folder."""
    return folder.with_name(f"{folder.name}.pt")


def remove(path: Path) -> None:
    """Remove a checkpoint: a file, or a folder, which has another name before its files are gone."""
    if path.is_symlink() or not path.is_dir():
        path.unlink()
        return
    if path.suffix != ".part":
        away = part_beside(path)
        os.replace(path, away)
        path = away
    sharded.remove(path)


def is_same(one: Path, other: Path) -> bool:
    """Whether two checkpoints are links to the same bytes."""
    files = [path / sharded.STATE if path.is_dir() else path for path in (one, other)]
    return all(path.is_file() for path in files) and os.path.samefile(*files)


def link(path: Path, copy: Path) -> None:
    """A second name for a checkpoint's bytes, in the place of what has the name; OSError where there can be none."""
    part = part_beside(copy)
    try:
        if path.is_dir():
            sharded.linked(path, part)
            publish(part, copy)
        else:
            os.link(path, part)
            os.replace(part, copy)
    except OSError:
        with contextlib.suppress(OSError):
            remove(part)
        raise


def duplicate(path: Path, copy: Path) -> None:
    """Another file, or folder, with the same bytes."""
    if path.is_file():
        with open(path, "rb") as source, open_atomically(copy) as file:
            shutil.copyfileobj(source, file)
        return
    part = part_beside(copy)
    try:
        part.mkdir()
        for one in path.iterdir():
            with open(one, "rb") as source, open_atomically(part / one.name) as file:
                shutil.copyfileobj(source, file)
        publish(part, copy)
    except OSError:
        with contextlib.suppress(OSError):
            remove(part)
        raise


__all__ = [
    "duplicate", "flush_names", "is_same", "link", "new_file", "open_atomically", "publish", "remove", "with_ending",
    "write_atomically",
]  # fmt: skip
