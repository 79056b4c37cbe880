"""Foreign text on a terminal: nothing in it moves the cursor, forges a line or ends the program."""

import io
import os
import subprocess
import sys

import pytest

from fastjem.printing import is_terminal, printable, say


@pytest.mark.parametrize(
    "text, shown",
    [
        ("photo 1.jpg", "photo 1.jpg"),
        ("Größe-猫-🐈.jpg", "Größe-猫-🐈.jpg"),
        ("a\nfastjem: all is well\r", r"a\nfastjem: all is well\r"),
        ("\x1b[31mred\x1b]0;title\x07", r"\x1b[31mred\x1b]0;title\x07"),
        ("\x00\t\x7f\x85\x9b1m", r"\x00\t\x7f\x85\x9b1m"),
        ("\u202egpj.exe\u2066\u200f\u2028", r"\u202egpj.exe\u2066\u200f\u2028"),
        (os.fsdecode(b"caf\xe9.jpg"), r"caf\xe9.jpg"),
        ("\ud800", r"\ud800"),
        ("C:\\new", "C:\\new"),
    ],
)
def test_every_character_is_seen(text: str, shown: str) -> None:
    assert printable(text) == shown


@pytest.mark.parametrize("encoding, shown", [("ascii", r"\xe9 \u732b"), ("latin-1", r"é \u732b"), ("utf-8", "é 猫")])
def test_what_the_terminal_cannot_print_is_escaped(encoding: str, shown: str) -> None:
    raw = io.BytesIO()
    terminal = io.TextIOWrapper(raw, encoding=encoding)
    say("é 猫", terminal)
    assert raw.getvalue().decode(encoding) == f"{shown}\n"


def test_a_line_goes_to_stderr(capsys) -> None:
    say(ValueError("a\x1bb"))
    assert capsys.readouterr().err == "a\\x1bb\n"


def test_a_reader_that_has_gone_is_no_error() -> None:
    """As in `| head -1`: what follows is dropped, and the program goes on to its own end."""
    program = "import sys; from fastjem.printing import say\nfor i in range(9): say(i, sys.stdout)\nsay('end')"
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([sys.executable, "-c", program], stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "end\n")


class Full(io.TextIOWrapper):
    """A file on a full disk."""

    def write(self, text: str) -> int:
        raise OSError(28, os.strerror(28))


def test_a_notice_that_cannot_be_written_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    full = Full(io.BytesIO())
    monkeypatch.setattr(sys, "stderr", full)
    say("step 10")
    monkeypatch.setattr(sys, "stdout", full)
    monkeypatch.setattr(sys, "stderr", None)
    with pytest.raises(OSError, match="No space"):
        say("what was asked for", sys.stdout)
    say("step 20")
    assert not is_terminal(None) and not is_terminal(full)


def test_streams_that_are_closed_or_poor_end_no_command() -> None:
    code = (
        "import sys; from fastjem.printing import is_terminal, open_streams, say\n"
        "if sys.argv[1:]: sys.stdout = sys.stderr = None\n"
        "open_streams(); print('\\u2026'); print('\\u2026', file=sys.stderr); assert not is_terminal(sys.stderr)"
    )
    poor = {"PYTHONIOENCODING": "ascii:strict"}
    for more in ([], ["closed"]):
        run = subprocess.run(
            [sys.executable, "-c", code, *more],
            capture_output=True,
            timeout=60,
            env=poor,
        )
        assert run.returncode == 0, run.stderr
        assert run.stdout.split() == ([] if more else [b"\\u2026"])
