"""Text that isn't ours on a terminal: names of files, what a decoder says, values from a file that somebody gave us.

A file may be called anything but "/" and NUL: by control characters its name could move the cursor, colour the
terminal, set its title or forge a line of ours, and bytes that are no text can't be printed at all.
"""

import contextlib
import io
import os
import sys
from typing import TextIO


def printable(text: object, file: TextIO | None = None) -> str:
    r"""`text` in one line in which every character shows as itself or as a visible escape (`\n`, `\x1b`, `\u202e`).

    Escaped is what `str.isprintable` calls so: control characters, those that change the direction of writing, line
    separators, spaces other than " ", and halves of surrogate pairs, by which Python holds the bytes of a file's name
    that are no text; they show as the bytes they are.

    Args:
        file: what the stream's encoding lacks is escaped too; None: the text may hold any character.
    """
    shown = "".join(character if character.isprintable() else _escaped(character) for character in str(text))
    encoding = getattr(file, "encoding", None)
    return shown.encode(encoding, "backslashreplace").decode(encoding) if encoding else shown


def _escaped(character: str) -> str:
    undecodable = 0xDC80 <= ord(character) <= 0xDCFF  # a byte of 0x80 to 0xff, as os.fsdecode holds it
    return f"\\x{ord(character) - 0xDC00:02x}" if undecodable else character.encode("unicode_escape").decode()


def say(text: object, file: TextIO | None = None) -> None:
    """Print one line, made `printable`, at once; on stderr if no file is given.

    Where nobody reads any more (`| head`) this line and all that follow on the stream are dropped: that is no error.
    """
    stream = sys.stderr if file is None else file
    if stream is None:  # a program without a terminal, such as pythonw, has no streams
        return
    try:
        print(printable(text, stream), file=stream, flush=True)
    except BrokenPipeError:
        forget_reader(stream)
    except OSError:
        # Notices go to stderr: a full disk behind it, or a terminal that has gone, ends no run. What somebody asked for
        # goes to stdout, and is an error.
        if stream is not sys.stderr:
            raise


def is_terminal(stream: TextIO | None) -> bool:
    """Whether it is one; a program may have no streams, a closed one, or an object of a notebook's in its place."""
    try:
        return stream is not None and stream.isatty()
    except (AttributeError, ValueError):
        return False


def open_streams() -> None:
    """For a program's start: streams that its caller has closed (`>&-`) lead to nowhere, and a character that a
    terminal's encoding lacks shows as an escape in tables and help texts, too.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


def forget_reader(stream: TextIO) -> None:
    """Lead a stream whose reader has gone to nowhere, so that what it still holds is no error when Python ends."""
    with contextlib.suppress(OSError, ValueError):  # a stream without a file descriptor of its own
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
