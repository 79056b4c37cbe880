"""Commands as Python functions: what they take, what help says, errors in Python's words, the stub of type checkers."""

import dataclasses
import importlib
import inspect
import os
import pydoc
import subprocess
import sys
import typing
from pathlib import Path

import pytest
from images import make_folder

for package in ("timm", "torchvision", "safetensors", "tyro"):
    pytest.importorskip(package)

import torch  # noqa: E402

import fastjem  # noqa: E402
from fastjem import api  # noqa: E402
from fastjem.cli import COMMANDS  # noqa: E402
from fastjem.errors import UserError  # noqa: E402

WITH_OPTIONS = [name for name, place in api.FUNCTIONS.items() if place.options]


def kind_of(name: str) -> type:
    place = api.FUNCTIONS[name]
    return getattr(importlib.import_module(place.module), place.options)


def test_they_are_listed_and_loaded_when_asked_for() -> None:
    assert tuple(api.FUNCTIONS) == fastjem.FUNCTIONS
    assert set(api.FUNCTIONS) <= set(dir(fastjem)) and "__version__" in dir(fastjem)
    script = "import sys, fastjem; assert 'embed' in dir(fastjem); assert 'timm' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
    with pytest.raises(AttributeError, match="has no attribute 'emmbed'"):
        fastjem.emmbed  # noqa: B018


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fastjem.commands.evaluate", None)
    with pytest.raises(ModuleNotFoundError):
        api.function("evaluate")
    monkeypatch.delitem(sys.modules, "fastjem.commands.evaluate")
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.delitem(sys.modules, "fastjem.commands.views", raising=False)
    with pytest.raises(ModuleNotFoundError, match=r"fastjem.views: PIL is not installed; pip install 'fastjem\[pre"):
        api.function("views")


@pytest.mark.parametrize("name", WITH_OPTIONS)
def test_signature_and_help_have_every_option(name: str) -> None:
    function = getattr(fastjem, name)
    parameters = inspect.signature(function).parameters
    text = pydoc.render_doc(function)
    for field in dataclasses.fields(kind_of(name)):
        parameter = parameters[field.name]
        positional = field.metadata.get("positional")
        kinds = {True: parameter.POSITIONAL_OR_KEYWORD, None: parameter.KEYWORD_ONLY}
        assert parameter.kind == kinds[positional], field.name
        if field.default is not dataclasses.MISSING:
            assert parameter.default == field.default
        elif field.default_factory is not dataclasses.MISSING:
            assert parameter.default == field.default_factory()
        else:
            assert parameter.default is parameter.empty
        words = api.as_keywords(field.metadata.get("help", ""), list(parameters))
        own = isinstance(parameter.annotation, str) or field.name in ("method", "optimizer")  # told by the function
        assert own or f"\n        {field.name}: {words or field.name.replace('_', ' ')}" in text, field.name
    assert "options: as the command line takes them" not in text


def test_types_say_what_is_taken() -> None:
    parameters = inspect.signature(fastjem.embed).parameters
    assert set(typing.get_args(parameters["run"].annotation)) == {str, os.PathLike[str]}
    assert torch.device in typing.get_args(parameters["device"].annotation)
    assert inspect.signature(fastjem.pretrain).parameters["epochs"].annotation is int


def test_the_stub_is_what_the_functions_take() -> None:
    stub = Path(fastjem.__file__).with_name("__init__.pyi")
    assert stub.read_text() == api.stub(), "python -m fastjem.api > fastjem/__init__.pyi"
    compile(stub.read_text(), str(stub), "exec")


def test_every_command_is_a_function_or_has_no_use_as_one() -> None:
    commands = {name.replace("-", "_") for name in COMMANDS}
    # report, methods and kernels are packages of that name; demo, doctor, bench and completion are for people.
    of_people = {"demo", "doctor", "bench", "completion"}
    assert commands - set(api.FUNCTIONS) == {"report", "methods", "kernels", *of_people}


@pytest.mark.parametrize(
    ("name", "given", "says"),
    [
        ("pretrain", {"out": "x", "batch_size": 1}, "pretrain: batch_size must be at least 2, as every method"),
        ("pretrain", {"out": "x", "epochs": "3"}, "pretrain: epochs must be an integer, got str '3'"),
        ("pretrain", {"resume": True}, "pretrain: resume needs out, the folder of the run to go on with"),
        ("pretrain", {"out": "x", "data": ["a,b", "c"]}, "pretrain: of several data, none may have a comma"),
        ("evaluate", {"run": "x", "k": 0}, "evaluate: k must be at least 1, got 0"),
        ("evaluate", {"run": "x", "kk": 0}, "evaluate: there is no option 'kk'; did you mean k?"),
        ("evaluate", {"k": 3}, "evaluate: needs run"),
        ("evaluate", {"run": "nowhere"}, "evaluate: there is no run in nowhere"),
        ("embed", {"run": "x", "out": "a.txt"}, "embed: out must end in .parquet, .npz, .csv, got a.txt"),
        ("embed", {"run": "x", "neighbors": True}, "embed: neighbors must be an integer, got bool True"),
        ("finetune", {"run": "x", "percent": 0}, "finetune: percent must be above 0 and at most 100, got 0"),
        ("views", {"image_size": 4}, "views: image_size must be at least 8, got 4"),
        ("check_data", {"data": "x", "views": 0}, "check_data: views must be at least 1, got 0"),
        ("load_encoder", {"path": 3}, "load_encoder: a run is named by its path, got int 3"),
        ("load_classifier", {"path": "nowhere"}, "load_classifier: there is no classifier in nowhere"),
    ],
)
def test_errors_are_in_words_of_python(name: str, given: dict, says: str) -> None:
    with pytest.raises(UserError) as caught:
        getattr(fastjem, name)(**given)
    assert str(caught.value).startswith(says) and " --" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "values", "says"),
    [
        (
            "pretrain",
            ("photos",),
            "pretrain: config must be a Config, and options are given by name (data=...), got str",
        ),
        ("views", ("photos",), "views: options are given by name, as in data=...: too many positional arguments"),
        ("embed", ("run", "photos"), "embed: options are given by name, as in data=...: too many positional"),
    ],
)
def test_options_are_given_by_name(name: str, values: tuple, says: str) -> None:
    with pytest.raises(UserError) as caught:
        getattr(fastjem, name)(*values)
    assert str(caught.value).startswith(says)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("--out x; --overwrite writes it anew", "out x; overwrite writes it anew"),
        ("--no-report and --batch-size", "report=False and batch_size"),
        ("a: fastjem pretrain --resume --out a; --out", "a: fastjem pretrain --resume --out a; out"),
        ("--others stay, a--out too", "--others stay, a--out too"),
    ],
)  # fmt: skip
def test_options_become_keywords(text: str, expected: str) -> None:
    assert api.as_keywords(text, ["out", "overwrite", "report", "batch_size", "resume"]) == expected


def test_paths_and_lists_of_paths_are_taken(tmp_path: Path) -> None:
    a, b = (make_folder(tmp_path / name, 4) for name in "ab")
    assert fastjem.check_data([a, b], workers=1)["files"] == 8
    assert fastjem.views(data=a, out=tmp_path / "v.png", image_size=32, images=2) == tmp_path / "v.png"
    with pytest.raises(UserError, match="check_data: options are given by name"):
        fastjem.check_data(a, b)
