"""The command line of a dataclass, by tyro: one option a field, one line a mistake.

A field's help is `metadata["help"]`; `metadata["positional"]` makes it an argument without a name. A field that may be
None and isn't given stays None; `bool | None` takes `--name` and `--no-name`; a dict takes NAME=VALUE pairs.
"""

import argparse
import contextlib
import dataclasses
import difflib
import errno
import io
import itertools
import re
import select
import sys
import time
import types
import typing
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TextIO, TypeVar, cast

from fastjem.advice import advice
from fastjem.errors import ResourceError, ToldElsewhereError, UserError
from fastjem.fields import conformed
from fastjem.launchers import speaks
from fastjem.printing import forget_reader, say
from fastjem.reading import why_not

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

LAST_WORDS = 5.0  # seconds for the rank that tells: where one ends, torchrun ends the others at once
T = TypeVar("T", bound="DataclassInstance")


class PlainParser(argparse.ArgumentParser):
    """argparse's, but that a full disk behind --help isn't ignored."""

    def print_help(self, file: Any = None) -> None:
        print(self.format_help(), end="", file=file)


class Parser(PlainParser):
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
    """["k=2", "flip=false"] -> {"k": 2, "flip": False}."""
    found = {}
    for item in items:
        name, equals, text = item.partition("=")
        if not equals or not name:
            raise ValueError(f"takes NAME=VALUE, got {item}")
        if name in found:
            raise ValueError(f"takes one value a name, got {name} twice")
        found[name] = value(text)
    return found


def parse(kind: type[T], command: str, argv: Sequence[str]) -> T:
    """`fastjem COMMAND argv...` -> an instance of the dataclass `kind`; --help prints and exits.

    Raises:
        UserError: for options that aren't there, missing ones, and values of another type; in one line.
    """
    import tyro

    hints = typing.get_type_hints(kind)
    fields = dataclasses.fields(kind)
    shown = {field.name: _shown_name(field) for field in fields}
    required = [shown[field.name] for field in fields if field.default is field.default_factory]  # both missing
    for_tyro = dataclasses.make_dataclass(
        kind.__name__, [_for_tyro(field, hints[field.name]) for field in fields], kw_only=True
    )
    words = _spelt_out(argv, {shown[field.name]: hints[field.name] for field in fields})
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            parsed = tyro.cli(for_tyro, prog=f"fastjem {command}", description=(kind.__doc__ or "").strip(), args=words)
    except SystemExit as exit:
        if not exit.code:
            raise
        raise UserError(_one_line(errors.getvalue(), required)) from None
    values = {field.name: getattr(parsed, field.name) for field in fields}
    for field in fields:
        if field.metadata.get("positional") and shown[field.name] in required and values[field.name] in ((), []):
            raise UserError(f"needs {shown[field.name]}")
    # Only what was given: whoever needs to know can tell it from a default, which is filled in here.
    named = {word.partition("=")[0] for word in words}
    given = [name for name, option in shown.items() if not option.startswith("--") or option in named]
    given += [name for name, option in shown.items() if f"--no-{option[2:]}" in named]
    return kind(**conformed(kind, {name: values[name] for name in given}, shown.__getitem__))


def run(kind: type[T], command: str, main: Callable[[T], int], argv: Sequence[str]) -> int:
    """Parse and call `main`; the exit code, see `outcome`."""

    def work() -> int:
        try:
            options = parse(kind, command, argv)
        except UserError:
            if not speaks():  # all ranks parse the same words, and the first one tells what is wrong with them
                raise ToldElsewhereError from None
            raise
        return main(options)

    return outcome(command, work)


def outcome(command: str, work: Callable[[], int]) -> int:
    """The exit code of a command's work, whose output has reached whoever reads it.

    A user's mistake is one line and 2, and so is a machine that is too small (`fastjem.advice`); no space for what is
    printed is one line and 1; Ctrl-C is 130. Where nobody reads what is printed any more (`| head`) the command ends
    without a word, and with 141 as other programs do.
    """
    program = f"fastjem {command}".strip()
    try:
        try:
            return work()
        finally:  # behind --help, which raises SystemExit, too
            if sys.stdout is not None:
                sys.stdout.flush()
    except ToldElsewhereError as error:
        time.sleep(LAST_WORDS)
        return error.exit_code
    except UserError as error:
        hint = "" if isinstance(error, ResourceError) else f" ({program} --help)"
        say(f"{program}: {' '.join(str(error).split())}{hint}")
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        gone = [_reader_gone(stream) for stream in (sys.stdout, sys.stderr)]
        if not any(gone):
            raise
        return 141
    except OSError as error:
        if line := advice(error):
            say(f"{program}: {line}")
            return 2
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        forget_reader(cast(TextIO, sys.stdout))  # or Python says once more, as it ends, that nothing can be written
        say(f"{program}: the output can't be written: {why_not(error)}")
        return 1
    except Exception as error:
        line = advice(error)
        if line is None:
            raise
        say(f"{program}: {line}")
        return 2


def _reader_gone(stream: TextIO | None) -> bool:
    """Whether nobody reads a stream any more; what it still holds is then forgotten."""
    if stream is None:
        return False
    if not hasattr(select, "poll"):  # on Windows one can't ask
        return True
    try:
        poll = select.poll()
        poll.register(stream.fileno(), 0)
        gone = any(event & select.POLLERR for _, event in poll.poll(0))
    except (OSError, ValueError):  # a stream without a file descriptor
        return False
    if gone:
        forget_reader(stream)
    return gone


def _shown_name(field: dataclasses.Field) -> str:
    """`--image-size`, or `RUN` where it is given without a name."""
    if field.metadata.get("positional"):
        return field.name.upper()
    return f"--{field.name.replace('_', '-')}"


def _for_tyro(field: dataclasses.Field, hint: Any) -> tuple[str, Any, Any]:
    """The field as (name, annotation, default): where tyro's own way would show or say more than a user wants, the
    annotation says how a value is made of words.
    """
    import tyro

    marks: list[Any] = []
    about = {"help": field.metadata.get("help", "")}
    if words := _words_of_switch(hint):
        about["help_behavior_hint"] = ""
        marks.append(_primitive(1, f"[{'|'.join(words)}]", lambda given: _word_or_switch(given[0], words)))
    elif isinstance(hint, types.UnionType):  # X | None: tyro would offer the word None
        first, *others = [kind for kind in typing.get_args(hint) if kind is not types.NoneType]
        if not others:
            about["help_behavior_hint"] = ""
        shown = field.metadata.get("metavar", first.__name__.upper())
        marks.append(_primitive(1, shown, lambda words: _converted(first, words[0], *others)))
    if typing.get_origin(hint) is dict:
        about["help_behavior_hint"] = ""
        marks.append(_primitive("*", "NAME=VALUE ...", pairs))
    if field.metadata.get("positional"):
        about["metavar"] = _shown_name(field)
        marks.append(tyro.conf.Positional)
    annotation = Annotated[(hint, tyro.conf.arg(**about), *marks)]  # type: ignore[valid-type]
    default = dataclasses.field(default=field.default, default_factory=field.default_factory)  # type: ignore[call-overload]
    return field.name, annotation, default


def _words_of_switch(hint: Any) -> tuple[str, ...]:
    """("auto",) of `bool | Literal["auto"]`, a switch that takes a word too; empty for any other type."""
    parts = typing.get_args(hint)
    literals = [part for part in parts if typing.get_origin(part) is typing.Literal]
    return typing.get_args(literals[0]) if literals and bool in parts else ()


def _word_or_switch(word: str, words: Sequence[str]) -> bool | str:
    if word not in ("True", "False", *words):
        raise ValueError(f"takes {' or '.join(words)} or nothing, got {word}")
    return word if word in words else word == "True"


def _converted(kind: Callable[[str], Any], word: str, *others: Callable[[str], Any]) -> Any:
    """The word as the first of some types that takes it."""
    if others:
        with contextlib.suppress(ValueError):
            return kind(word)
        return _converted(others[0], word, *others[1:])
    if kind is not bool:
        return kind(word)
    if word not in ("True", "False"):
        raise ValueError(f"takes True or False, got {word}")
    return word == "True"


def _primitive(nargs: Any, metavar: str, made: Callable[[list[str]], Any]) -> Any:
    """A value of `nargs` words, shown as `metavar`, made by `made`."""
    import tyro

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=nargs,
        metavar=metavar,
        instance_from_str=made,
        is_instance=lambda x: True,
        str_from_instance=lambda x: [str(x)],
    )


def _spelt_out(argv: Sequence[str], hints: dict[str, Any]) -> list[str]:
    """The words with every option in full, as tyro takes them; hints: "--option" or "POSITIONAL" -> its type.

    An option that isn't there is a mistake (tyro would take the beginning of a name for it); `--blur` and `--no-blur`
    of a switch that may stay None become `--blur True` and `--blur False`, `--resume` becomes `--resume True`.
    """
    options = {name: hint for name, hint in hints.items() if name.startswith("--")}
    words_of = {name: ("True", "False", *_words_of_switch(hint)) for name, hint in options.items()}
    switches = {name for name, hint in options.items() if hint == bool | None or _words_of_switch(hint)}
    negations = {f"--no-{name[2:]}": name for name, hint in options.items() if hint is bool or name in switches}
    known = [*options, *negations, "--help"]
    words: list[str] = []
    pairs_of: dict[str, list[str]] = {}  # an option of NAME=VALUE pairs may be given again: pairs are added
    filled = words  # where words without a name go
    for word, following in itertools.zip_longest(argv, argv[1:]):
        name, equals, text = word.partition("=")
        option = name.replace("_", "-")
        if option == "--" or not option.startswith("--"):
            filled.append(word)
            continue
        filled = words
        if option not in known:
            near = difflib.get_close_matches(option.lower(), known, n=1, cutoff=0.6)
            raise UserError(f"there is no option {name}" + (f"; did you mean {near[0]}?" if near else ""))
        if typing.get_origin(options.get(option)) is dict:
            if not equals and (following is None or following.startswith("--")):
                raise UserError(f"{option} needs NAME=VALUE")
            filled = pairs_of.setdefault(option, [])
            filled += [text] if equals else []
        elif negations.get(option) in switches:
            words += [negations[option], "False"]
        elif option in switches and not equals and following not in words_of[option]:
            words += [option, "True"]
        else:
            words.append(option + equals + text)
    return words + [word for option, found in pairs_of.items() for word in (option, *found)]


# What tyro says of a mistake -> what we say, where ours is shorter.
SHORTER = (
    (r"Error parsing (\S+): takes", r"\1 takes"),
    (r"Error parsing (\S+): invalid literal for int.*: ", r"\1 takes a whole number, got "),
    (r"Error parsing (\S+): could not convert string to float: ", r"\1 takes a number, got "),
    (r"Missing value for argument '(\S+)'.*", r"\1 needs a value"),
    (r"Unrecognized options: (.*)", r"'\1' is one argument too many"),
)


def _one_line(boxed: str, required: list[str]) -> str:
    """tyro's box -> what it says first, without frame, help text and reminder of --help."""
    title, *lines = [line.strip(" │") for line in boxed.strip("\n").splitlines()]
    if set(lines[0]) == {"-"}:  # where stdout isn't UTF-8 there are no frames, and a rule below the title
        del lines[0]
    first = itertools.takewhile(lambda line: not line.startswith(("──", "----")), lines)
    message = " ".join(first) or title
    if message.startswith("Missing from"):
        missing = [name for name in required if re.search(rf"(^|[ \[]){name}\b", message)]
        return f"needs {' and '.join(missing)}"
    for pattern, words in SHORTER:
        message = re.sub(rf"^{pattern}", words, message)
    return message
