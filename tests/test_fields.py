"""Values that are held to the annotations of a dataclass's fields, from Python, a command line or a file."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

from fastjem.errors import UserError
from fastjem.fields import conform, conformed


@dataclass
class Options:
    out: str = field(default="a", metadata={"path": True})
    data: str | None = field(default=None, metadata={"path": True})
    name: str = "n"
    size: int = field(default=8, metadata={"square": True})
    image: int | str = field(default=8, metadata={"sides": True})
    rate: float | None = None
    blur: bool | None = None
    device: str = field(default="auto", metadata={"device": True})
    kind: Literal["a", "b"] = "a"
    switch: bool | Literal["auto"] = False
    given: dict[str, bool | int | float | str | list[float]] = field(default_factory=dict)
    runs: list[str] = field(default_factory=list)
    pair: tuple[float, float] = (0.0, 1.0)
    many: tuple[float, ...] = ()


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("out", Path("runs/a"), "runs/a"),
        ("data", Path("runs/a"), "runs/a"),
        ("data", None, None),
        ("size", np.int64(3), 3),
        ("size", torch.tensor(3), 3),
        ("size", (32, 32), 32),
        ("size", [np.int32(32), 32], 32),
        ("image", 32, 32),
        ("image", (32, 32), 32),
        ("image", [np.int32(32), 48], "32x48"),
        ("image", "32x48", "32x48"),
        ("rate", np.float32(0.5), 0.5),
        ("rate", 3, 3.0),
        ("rate", np.int64(3), 3.0),
        ("rate", torch.tensor(0.5), 0.5),
        ("rate", None, None),
        ("blur", np.bool_(True), True),
        ("blur", False, False),
        ("device", torch.device("cpu"), "cpu"),
        ("device", torch.device("cuda", 1), "cuda:1"),
        ("kind", "b", "b"),
        (
            "given",
            {"k": np.int64(2), "t": np.float32(0.5), "s": "x", "b": True},
            {"k": 2, "t": 0.5, "s": "x", "b": True},
        ),
        ("given", {"scale": (0.5, 1)}, {"scale": [0.5, 1.0]}),
        ("given", {"scale": np.array([0.5, 1.0])}, {"scale": [0.5, 1.0]}),
        ("runs", ("a", "b"), ["a", "b"]),
        ("pair", [0, 2], (0.0, 2.0)),
        ("many", np.arange(3), (0.0, 1.0, 2.0)),
    ],
)
def test_what_is_as_good_becomes_what_is_said(name: str, given: Any, expected: Any) -> None:
    options = Options(**{name: given})
    conform(options)
    found = getattr(options, name)
    assert found == expected and type(found) is type(expected)
    if isinstance(expected, (dict, list, tuple)):
        values = [list(x.values()) if isinstance(x, dict) else list(x) for x in (found, expected)]
        assert [type(x) for x in values[0]] == [type(x) for x in values[1]]


@pytest.mark.parametrize(
    ("name", "given", "says"),
    [
        ("size", "16", "size must be an integer, got str '16'"),
        ("switch", "yes", "switch must be True or False or one of auto, got str 'yes'"),
        ("switch", 1, "switch must be True or False or one of auto, got int 1"),
        ("out", "a\0b", r"out must be a path, got str 'a\x00b'"),
        ("data", Path("a\0b"), "data must be a path"),
        ("size", True, "size must be an integer, got bool True"),
        ("size", np.bool_(True), "size must be an integer, got bool"),
        ("size", torch.tensor(True), "size must be an integer, got Tensor"),
        ("size", 16.0, "size must be an integer, got float 16.0"),
        ("size", None, "size must be an integer, got NoneType None"),
        ("size", (32, 48), "one number"),
        ("size", (32,), "one number"),
        ("image", (32,), "image must be a number of pixels, or height and width, got tuple (32,)"),
        ("image", (32, 48, 3), "or height and width, got tuple (32, 48, 3)"),
        ("image", (32, 48.0), "or height and width, got tuple (32, 48.0)"),
        ("image", (True, 48), "or height and width, got tuple (True, 48)"),
        ("image", b"@@", "image must be"),
        ("rate", "0.1", "rate must be a number or None, got str '0.1'"),
        ("rate", float("nan"), "must be a number, got NaN"),
        ("rate", 1j, "rate must be a number or None, got complex"),
        ("rate", np.zeros(3), "rate must be a number or None, got ndarray"),
        ("blur", 1, "blur must be True or False or None, got int 1"),
        ("out", "", "out must not be empty"),
        ("data", "", "data must not be empty"),
        ("data", b"x", "data must be text or None, got bytes"),
        ("name", Path("x"), "name must be text, got PosixPath"),
        ("name", torch.device("cpu"), "name must be text, got device"),
        ("kind", "c", "kind must be one of a, b, got str 'c'"),
        ("kind", ["a"], "kind must be one of a, b"),
        ("given", [("a", 1)], "given must be a dict of values by name, got list"),
        ("given", {1: 2}, "given must be a dict of values by name, got dict"),
        ("given", {"a": float("nan")}, "given a must be a number, got NaN"),
        ("given", {"a": None}, "given a must be"),
        ("given", {"a": ["x"]}, "given a must be"),
        ("runs", "abc", "runs must be a list, got str"),
        ("runs", ["a", ""], "runs must not be empty"),
        ("pair", (1, 2, 3), "pair must be 2 values, got 3"),
        ("many", [1, "2"], "many must be a list"),
    ],
)
def test_what_would_have_to_be_guessed_is_refused(name: str, given: Any, says: str) -> None:
    with pytest.raises(UserError) as error:
        conform(Options(**{name: given}), "pretrain: {}".format)
    assert str(error.value).startswith("pretrain: ") and says in str(error.value) and "\n" not in str(error.value)


def test_a_number_of_thousands_of_digits() -> None:
    for name, says in (("size", "size must be below 2^63"), ("rate", "rate must be a number or None, got int")):
        with pytest.raises(UserError, match=says.replace("^", r"\^")):
            conform(Options(**{name: 10**5000}))  # whose digits Python refuses to print


def test_only_what_is_given_is_looked_at() -> None:
    assert conformed(Options, {"size": np.int64(3), "unknown": 1}) == {"size": 3}
    before = Options()
    conform(before)
    assert before == Options() and dataclasses.asdict(before) == dataclasses.asdict(Options())
