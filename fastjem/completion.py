"""`fastjem completion SHELL`: a script with which bash, zsh or fish complete fastjem's commands, options and values.

The script is made once and holds every word, so that completing runs no Python. It is written by shtab, from argparse
parsers that are made of the commands' dataclasses as tyro's are.
"""

import argparse
import dataclasses
import importlib
import types
import typing
from collections.abc import Iterable, Sequence
from typing import Any

from fastjem.arguments import Parser
from fastjem.cli import COMMANDS
from fastjem.errors import UserError

SHELLS = ("bash", "zsh", "fish")


def parser() -> Parser:
    parser = Parser("fastjem completion", description="a script that completes fastjem's commands, options and values")
    parser.add_argument("shell", choices=SHELLS)
    return parser


def main(argv: Sequence[str]) -> int:
    print(script(parser().parse_args(argv).shell))
    return 0


def script(shell: str) -> str:
    """The script for a shell.

    Raises:
        UserError: where shtab isn't installed.
    """
    try:
        import shtab
    except ModuleNotFoundError:
        raise UserError("shtab is not installed; pip install 'fastjem[pretrain]'") from None
    text = shtab.complete(whole_parser(), shell=shell)
    # Beside a file in zsh's $fpath and `eval`, `source <(fastjem completion zsh)` is a way in as well, as in bash.
    return text.replace("$zsh_eval_context[-1] == eval ", "$zsh_eval_context[-1] == (eval|file) ")


def whole_parser() -> argparse.ArgumentParser:
    """One parser of all commands. It is never given a command line: it says what words there are."""
    whole = argparse.ArgumentParser("fastjem")
    whole.add_argument("--version", action="store_true", help="which fastjem this is")
    commands = whole.add_subparsers(dest="command")
    values = values_of_names()
    for name, command in COMMANDS.items():
        module = importlib.import_module(command.module)
        if not command.options:
            given = module.parser()
            of_command = commands.add_parser(name, help=command.about, parents=[given], add_help=False)
            for action in of_command._actions:
                add_values(action, values)
            continue
        of_command = commands.add_parser(name, help=command.about)
        kind = getattr(module, command.options)
        hints = typing.get_type_hints(kind)
        for field in dataclasses.fields(kind):
            add_option(of_command, field, hints[field.name], values)
    return whole


def values_of_names() -> dict[str, Sequence[str]]:
    """Option or argument -> the words that may follow it, where its own type and help don't list them."""
    from fastjem.data.views import RECIPES
    from fastjem.methods import METHODS
    from fastjem.optim import OPTIMIZERS

    presets = sorted({preset for method in METHODS.values() for preset in method.presets})
    return {
        "method": sorted(METHODS),
        "name": sorted(METHODS),
        "preset": presets,
        "recipe": sorted(RECIPES),
        "optimizer": list(OPTIMIZERS),
        "backbone": ["resnet18", "resnet50", "vit_base", "vit_small", "vit_tiny"],
    }


def add_option(parser: argparse.ArgumentParser, field: dataclasses.Field, hint: Any, values: dict) -> None:
    """An option (or argument, where it is given without a name) of a dataclass, as `fastjem.arguments` has it."""
    name = field.name.replace("_", "-")
    about = field.metadata.get("help", "").replace("%", "%%")
    if field.metadata.get("positional"):
        action = parser.add_argument(field.name, nargs="*", help=about)
    elif hint in (bool, bool | None):
        parser.add_argument(f"--{name}", action="store_true", help=about)
        parser.add_argument(f"--no-{name}", action="store_true", help=f"not: {about}" if about else None)
        return
    else:
        nargs = "?" if bool in typing.get_args(hint) else "*" if typing.get_origin(hint) is dict else None
        action = parser.add_argument(f"--{name}", nargs=nargs, help=about)
        action.choices = tuple(literals(hint)) or listed(about) or None
    add_values(action, values)
    if field.metadata.get("path") or field.metadata.get("positional"):
        add_files(action)


def add_values(action: argparse.Action, values: dict[str, Sequence[str]]) -> None:
    if action.dest in values:
        action.choices = values[action.dest]
    if action.metavar in ("DIR", "PATH", "FILE"):
        add_files(action)


def add_files(action: argparse.Action) -> None:
    import shtab

    action.complete = shtab.FILE  # type: ignore[attr-defined]


def literals(hint: Any) -> Iterable[str]:
    """The words of a Literal, alone or beside other types."""
    if typing.get_origin(hint) is typing.Literal:
        yield from (str(word) for word in typing.get_args(hint))
    elif typing.get_origin(hint) in (typing.Union, types.UnionType):
        for part in typing.get_args(hint):
            yield from literals(part)


def listed(about: str) -> tuple[str, ...]:
    """("auto", "cpu", "cuda") of the help "where: auto | cpu | cuda"."""
    words = about.rpartition(": ")[2].split(" | ")
    return tuple(words) if len(words) > 1 and all(word and " " not in word for word in words) else ()
