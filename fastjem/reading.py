"""A file that a run left, or that somebody gave us, read whole: whatever is wrong with it is one UserError naming it.

The limit on its size is there because reading is all or nothing: the figures of a million logged steps take 200 MB.
"""

import contextlib
import json
import os
import stat
from collections.abc import Iterator
from typing import Any

from fastjem.errors import UserError

MOST = 2**30  # bytes


class Missing(UserError):
    """There is no such file."""


def content(path: str | os.PathLike[str], most: int = MOST) -> bytes:
    """The bytes of a regular file; a pipe would be waited for, and a device never ends."""
    try:
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):
            raise UserError(f"{path} is {'a folder' if stat.S_ISDIR(found.st_mode) else 'no regular file'}")
        if found.st_size > most:
            raise UserError(f"{path} has {found.st_size:,} bytes, more than the {most:,} that are read")
        with open(path, "rb") as file:
            return file.read(most)
    except (FileNotFoundError, NotADirectoryError):
        raise Missing(f"there is no file {path}") from None
    except (OSError, ValueError, MemoryError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} can't be read: {getattr(error, 'strerror', None) or error}") from None


def parsed(text: str | bytes, name: object) -> Any:
    """What JSON says; UserError for anything else. name: of the text's origin, for the message."""
    try:
        return json.loads(text.decode("utf-8-sig") if isinstance(text, bytes) else text)
    except RecursionError:
        why = "it is nested too deeply"
    except UnicodeDecodeError:
        why = "it is no UTF-8 text"
    except json.JSONDecodeError as error:
        why = f"line {error.lineno}, column {error.colno}: {error.msg}" if text.strip() else "it is empty"
    except (ValueError, MemoryError) as error:  # a number of thousands of digits
        why = str(error).partition(";")[0]
    raise UserError(f"{name} is no JSON: {why}")


def json_object(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A file that holds one JSON object."""
    found = parsed(content(path), path)
    if not isinstance(found, dict):
        raise UserError(f"{path} must hold values by name, got a JSON {type(found).__name__}")
    return found


def json_rows(path: str | os.PathLike[str]) -> tuple[list[dict[str, Any]], int]:
    """(the objects of a file that holds one a line, how many other lines there are).

    A last line without its end isn't counted: a kill cut it in two.
    """
    lines = content(path).split(b"\n")
    rows = []
    damaged = 0
    for i, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            row = parsed(line, path)
        except UserError:
            damaged += i < len(lines) - 1
            continue
        if isinstance(row, dict):
            rows.append(row)
        else:
            damaged += 1
    return rows, damaged


@contextlib.contextmanager
def named(path: object) -> Iterator[None]:
    """What goes wrong with what a file says is told with the file's name."""
    try:
        yield
    except UserError as error:
        if str(path) in str(error):
            raise
        raise UserError(f"{path}: {error}") from None


def why_not(error: OSError) -> str:
    """What the system said, in words, without the file's name."""
    return error.strerror or str(error) or type(error).__name__


__all__ = ["MOST", "Missing", "content", "json_object", "json_rows", "named", "parsed", "why_not"]
