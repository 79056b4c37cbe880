"""The command line of `fastjem pretrain`, generated from `Config`: one option a field, one line a mistake."""

import argparse
import dataclasses
import difflib
import sys
import types
import typing
from typing import Any, NoReturn

from fastjem.errors import UserError
from fastjem.pretrain import Config, Option, pretrain


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def option_value(text: str) -> Option:
    """ "true" -> True, "3" -> 3, "0.2" -> 0.2, anything else stays text."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def parser() -> argparse.ArgumentParser:
    made = _Parser("fastjem pretrain", description="Train an encoder on a folder of images.", allow_abbrev=False)
    hints = typing.get_type_hints(Config)
    for f in dataclasses.fields(Config):
        kind = hints[f.name]
        optional = isinstance(kind, types.UnionType)
        if optional:
            kind = next(k for k in typing.get_args(kind) if k is not type(None))
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        text = f.metadata.get("help", "")
        if not required and f.default not in (dataclasses.MISSING, None, False):
            text += f" (default {f.default})"
        flag, common = f"--{f.name.replace('_', '-')}", {"dest": f.name, "help": text.strip().replace("%", "%%")}
        common["default"] = argparse.SUPPRESS
        if kind is bool:
            made.add_argument(flag, action=argparse.BooleanOptionalAction, **common)
        elif typing.get_origin(kind) is dict:
            made.add_argument(flag, nargs="+", metavar="NAME=VALUE", **common)
        else:
            made.add_argument(flag, type=kind, required=required, metavar=kind.__name__.upper(), **common)
    return made


def parse(argv: list[str]) -> Config:
    """The configuration, or a UserError."""
    made = parser()
    known, rest = made.parse_known_args(argv)
    if rest:
        flags = [flag for action in made._actions for flag in action.option_strings]
        near = difflib.get_close_matches(rest[0].partition("=")[0], flags, n=2, cutoff=0.6)
        raise UserError(f"there is no option {rest[0]}" + (f"; did you mean {' or '.join(near)}?" if near else ""))
    fields: dict[str, Any] = vars(known)
    if "options" in fields:
        pairs = [item.partition("=") for item in fields["options"]]
        if wrong := [name for name, equals, _ in pairs if not equals]:
            raise UserError(f"--options takes NAME=VALUE, got {wrong[0]}")
        fields["options"] = {name: option_value(value) for name, _, value in pairs}
    return Config(**fields)


def main(argv: list[str]) -> int:
    try:
        result = pretrain(parse(argv))
    except UserError as error:
        print(f"fastjem pretrain: {' '.join(str(error).split())} (fastjem pretrain --help)", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    # As asked to: in order, with everything saved.
    return 0 if result.finished else 130
