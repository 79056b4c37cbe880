"""A dataclass is a command line; a mistake on it is one line."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

pytest.importorskip("tyro")
from fastjem.arguments import parse, run
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


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        parse(Config, "look", ["--help"])
    text = capsys.readouterr().out
    assert exit.value.code == 0
    for words in ("Look at runs.", "--image-size INT", "100 % of them (default: 32)", "--options NAME=VALUE", "RUNS"):
        assert words in text
