"""The command line of a dataclass, by tyro: one option a field, one line a mistake.

A field's help is `metadata["help"]`; `metadata["positional"]` makes it an argument without a name. A field that may be
None and isn't given stays None; `bool | None` takes `--name` and `--no-name`; a dict takes NAME=VALUE pairs.
"""

import argparse
import contextlib
import dataclasses
import difflib
import io
import itertools
import re
import sys
import types
import typing
from collections.abc import Callable, Sequence
from typing import Annotated, Any, NoReturn, TypeVar

from fastjem.errors import UserError

T = TypeVar("T")


class Parser(argparse.ArgumentParser):
    """For commands that run without tyro: a mistake on their command line is one line and exit code 2 as well."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} ({self.prog} --help)\n")


def value(text: str) -> bool | int | float | str:
    """ "true" -> True, "3" -> 3, "0.2" -> 0.2, anything else stays text."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def pairs(items: list[str]) -> dict[str, Any]:
    for item in items:
        if "=" not in item:
            raise ValueError(f"takes NAME=VALUE, got {item}")
    return {name: value(text) for name, _, text in (item.partition("=") for item in items)}


def parse(kind: type[T], command: str, argv: Sequence[str]) -> T:
    """`fastjem COMMAND argv...` -> an instance of the dataclass `kind`; --help prints and exits.

    Raises:
        UserError: for options that aren't there, missing ones, and values of another type; in one line.
    """
    import tyro

    hints, fields = typing.get_type_hints(kind), dataclasses.fields(kind)
    names = {f.name: f.name.upper() if f.metadata.get("positional") else _flag(f.name) for f in fields}
    argv = _spelt_out(argv, {names[f.name]: hints[f.name] for f in fields})
    surface, required = [], []  # the same fields, as tyro is to see them
    for f in fields:
        hint, marks, shown = hints[f.name], [], {"help": f.metadata.get("help", "")}
        if f.default is f.default_factory:  # both missing
            required.append(names[f.name])
        if isinstance(hint, types.UnionType):
            (kind_of_value,) = set(typing.get_args(hint)) - {types.NoneType}
            shown |= {"help_behavior_hint": ""}
            marks.append(_spec(1, kind_of_value.__name__.upper(), lambda x, kind=kind_of_value: _made(kind, x[0])))
        if typing.get_origin(hint) is dict:
            shown |= {"help_behavior_hint": ""}
            marks.append(_spec("*", "NAME=VALUE ...", pairs))
        if f.metadata.get("positional"):
            shown |= {"metavar": names[f.name]}
            marks.append(tyro.conf.Positional)
        annotation: Any = Annotated[(hint, tyro.conf.arg(**shown), *marks)]  # type: ignore[valid-type]
        copied = dataclasses.field(default=f.default, default_factory=f.default_factory)  # type: ignore[call-overload]
        surface.append((f.name, annotation, copied))
    seen, errors = dataclasses.make_dataclass(kind.__name__, surface, kw_only=True), io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            made = tyro.cli(seen, prog=f"fastjem {command}", description=(kind.__doc__ or "").strip(), args=argv)
    except SystemExit as exit:
        if not exit.code:
            raise
        raise UserError(_one_line(errors.getvalue(), required)) from None
    for f in fields:
        if f.metadata.get("positional") and names[f.name] in required and getattr(made, f.name) in ((), []):
            raise UserError(f"needs {names[f.name]}")
    return kind(**{f.name: getattr(made, f.name) for f in fields})


def run(kind: type[T], command: str, main: Callable[[T], int], argv: Sequence[str]) -> int:
    """Parse, call, and make one line and exit code 2 of a user's mistake."""
    try:
        return main(parse(kind, command, argv))
    except UserError as error:
        print(f"fastjem {command}: {' '.join(str(error).split())} (fastjem {command} --help)", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _made(kind: Callable[[str], Any], text: str) -> Any:
    return text == "True" if kind is bool else kind(text)


def _spec(nargs: Any, metavar: str, made: Callable[[list[str]], Any]) -> Any:
    """How tyro makes a value of words, where its own way would show or say more than a user wants."""
    import tyro

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=nargs,
        metavar=metavar,
        instance_from_str=made,
        is_instance=lambda x: True,
        str_from_instance=lambda x: [str(x)],
    )


def _spelt_out(argv: Sequence[str], hints: dict[str, Any]) -> list[str]:
    """Every option is one of ours, in full; `--no-blur` of a switch that may stay None is `--blur False`."""
    flags = {flag: hint for flag, hint in hints.items() if flag.startswith("--")}
    switches = {flag for flag, hint in flags.items() if hint == bool | None}
    off = {f"--no-{flag[2:]}": flag for flag, hint in flags.items() if hint is bool or flag in switches}
    known, out = [*flags, *off, "--help"], []
    for i, word in enumerate(argv):
        name, equals, text = word.partition("=")
        flag = name.replace("_", "-")
        if flag == "--" or not flag.startswith("--"):
            out.append(word)
        elif flag not in known:
            near = difflib.get_close_matches(flag, known, n=1, cutoff=0.6)
            raise UserError(f"there is no option {name}" + (f"; did you mean {near[0]}?" if near else ""))
        elif off.get(flag) in switches:
            out += [off[flag], "False"]
        elif flag in switches and not equals and (argv[i + 1 : i + 2] or [""])[0] not in ("True", "False"):
            out += [flag, "True"]
        else:
            out.append(flag + equals + text)
    return out


def _one_line(boxed: str, required: list[str]) -> str:
    """tyro's box -> what it says first, without frame, help text and reminder of --help."""
    title, *lines = [line.strip(" │") for line in boxed.strip("\n").splitlines()]
    if set(lines[0]) == {"-"}:  # where stdout isn't UTF-8 there are no frames, and a rule below the title
        del lines[0]
    said = " ".join(itertools.takewhile(lambda line: not line.startswith(("──", "----")), lines)) or title
    if said.startswith("Missing from"):
        missing = [name for name in required if re.search(rf"(^|[ \[]){name}\b", said)]
        return f"needs {' and '.join(missing)}"
    for pattern, words in (
        (r"Error parsing (\S+): takes", r"\1 takes"),
        (r"Error parsing (\S+): invalid literal for int.*: ", r"\1 takes a whole number, got "),
        (r"Error parsing (\S+): could not convert string to float: ", r"\1 takes a number, got "),
        (r"Missing value for argument '(\S+)'.*", r"\1 needs a value"),
        (r"Unrecognized options: (.*)", r"'\1' is one argument too many"),
    ):
        said = re.sub(rf"^{pattern}", words, said)
    return said
