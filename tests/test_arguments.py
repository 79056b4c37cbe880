"""A dataclass is a command line; a mistake on it is one line."""

import dataclasses
import errno
import os
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

pytest.importorskip("tyro")
from fastjem.arguments import Parser, outcome, parse, run
from fastjem.errors import UserError


@dataclass
class Config:
    """Look at runs."""

    runs: tuple[str, ...] = field(metadata={"help": "folders", "positional": True})
    out: str = field(metadata={"help": "where to"})
    image_size: int = field(default=32, metadata={"help": "pixels, 100 % of them"})
    rate: float | None = None
    blur: bool | None = None
    compile: bool = False
    features: Literal["encoder", "projector"] = "encoder"
    options: dict[str, Any] = field(default_factory=dict)


@pytest.mark.parametrize(
    ("line", "changes"),
    [
        ("a b --out x", {}),
        ("--out=x a b --image_size 8 --image-size -1", {"image_size": -1}),
        ("a b --out x --rate 3 --blur", {"rate": 3.0, "blur": True}),
        ("a b --out x --no-blur --compile", {"blur": False, "compile": True}),
        ("a b --out x --no-compile --blur False", {"blur": False}),
        ("a b --out x --options k=2 t=0.5 n=layer s=true", {"options": {"k": 2, "t": 0.5, "n": "layer", "s": True}}),
        ("a b --features projector --out x", {"features": "projector"}),
        ("a b --options k=2 --out x --options t=0.5", {"options": {"k": 2, "t": 0.5}}),  # pairs are added
        ("a b --options=k=2 t=1 --out x", {"options": {"k": 2, "t": 1}}),
    ],
)
def test_parse(line: str, changes: dict[str, Any]) -> None:
    assert parse(Config, "look", line.split()) == dataclasses.replace(Config(("a", "b"), "x"), **changes)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("a", "needs --out"),
        ("--out x", "needs RUNS"),
        ("a --out x --image-sise 3", "there is no option --image-sise; did you mean --image-size?"),
        ("a --out x --image 3", "there is no option --image; did you mean --image-size?"),
        ("a --out x --image-size four", "--image-size takes a whole number, got 'four'"),
        ("a --out x --rate fast", "--rate takes"),
        ("a --out x --rate", "--rate needs a value"),
        ("a --out x --options k", "--options takes NAME=VALUE, got k"),
        ("a --out x --features head", "head"),
        ("a --out=", "--out must not be empty"),
        ("a --out x --Image-Size 3", "did you mean --image-size?"),
        ("a --out x --blur=no", "--blur takes True or False, got no"),
        ("a --out x --rate nan", "--rate must be a number, got NaN"),
        ("a --out x --image-size 99999999999999999999", "--image-size must be below 2^63"),
        ("a --out x --options", "--options needs NAME=VALUE"),
        ("a --out x --options =2", "--options takes NAME=VALUE, got =2"),
        ("a --out x --options k=2 k=3", "got k twice"),
        ("a --out x --options k=2 --options k=3", "got k twice"),
    ],
)
def test_mistakes(line: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(Config, "look", lambda config: 0, line.split()) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.count("\n") == 1 and error.startswith("fastjem look: ") and says in error


def test_what_the_command_says_and_returns(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(Config, "look", lambda config: len(config.runs), ["a", "b", "--out", "x"]) == 2

    def broken(config: Config) -> int:
        raise UserError("two\nlines")

    assert run(Config, "look", broken, ["a", "--out", "x"]) == 2
    assert capsys.readouterr().err == "fastjem look: two lines (fastjem look --help)\n"


def test_an_empty_word_is_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    for words, says in ((["a", "", "--out", "x"], "RUNS must not be empty"), (["a", "--out", ""], "--out must not")):
        assert run(Config, "look", lambda config: 0, words) == 2
        assert says in capsys.readouterr().err


def ends(error: BaseException) -> int:
    def work() -> int:
        raise error

    return outcome("look", work)


def test_how_a_command_ends(capsys: pytest.CaptureFixture[str]) -> None:
    assert ends(KeyboardInterrupt()) == 130 and capsys.readouterr() == ("", "")
    assert ends(MemoryError()) != 0 and capsys.readouterr().err.count("\n") == 1
    assert ends(UserError("a\x1b]0;title\x07 \u202e\nfastjem: all is well")) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "\x1b" not in error and "\u202e" not in error
    with pytest.raises(OSError, match="Permission"):  # the program's own trouble keeps its trace
        ends(PermissionError(errno.EACCES, "Permission denied"))
    with pytest.raises(BrokenPipeError):  # neither stdout nor stderr has lost its reader
        ends(BrokenPipeError())


@pytest.mark.parametrize("lines", [1, 100_000])  # what fits the pipe's buffer, and what doesn't
def test_nobody_reads_any_more(lines: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as stream:
        monkeypatch.setattr("sys.stdout", stream)
        assert outcome("look", lambda: print("line\n" * lines) or 0) == 141
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a disk that is full")
@pytest.mark.parametrize("words", [[], ["--help"]])
def test_a_full_disk_behind_stdout(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = Parser("look")
    with open("/dev/full", "w") as stream:
        monkeypatch.setattr("sys.stdout", stream)
        assert outcome("look", lambda: (parser.parse_args(words) and print("done")) or 0) == 1
    assert capsys.readouterr().err == "fastjem look: the output can't be written: No space left on device\n"


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        parse(Config, "look", ["--help"])
    text = capsys.readouterr().out
    assert exit.value.code == 0
    for words in ("Look at runs.", "--image-size INT", "100 % of them (default: 32)", "--options NAME=VALUE", "RUNS"):
        assert words in text
