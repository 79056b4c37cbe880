"""Every command as a Python function: its signature and help are made of the dataclass of the command line's options.

`fastjem.NAME` is `function(NAME)`, made when it is first asked for. `python -m fastjem.api` prints the stub
`fastjem/__init__.pyi`, by which type checkers and editors see every keyword; tests/test_api.py holds the two equal.
"""

import contextlib
import dataclasses
import functools
import importlib
import inspect
import os
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from fastjem.errors import UserError, nearest

if typing.TYPE_CHECKING:
    from _typeshed import DataclassInstance


class Function(NamedTuple):
    """Where a function is; `options` is the dataclass in the module that its keywords become, if it takes one."""

    module: str
    options: str
    function: str


FUNCTIONS = {
    "pretrain": Function("fastjem.run", "Config", "pretrain"),
    "evaluate": Function("fastjem.commands.evaluate", "EvaluateOptions", "evaluate"),
    "embed": Function("fastjem.commands.embed", "EmbedOptions", "embed"),
    "finetune": Function("fastjem.commands.finetune", "FinetuneOptions", "finetune"),
    "export": Function("fastjem.commands.export", "ExportOptions", "export"),
    "views": Function("fastjem.commands.views", "ViewsOptions", "draw_views"),
    "check_data": Function("fastjem.commands.check_data", "CheckDataOptions", "check_data"),
    "load_encoder": Function("fastjem.runs", "", "load_encoder"),
    "load_classifier": Function("fastjem.classifiers", "", "load_classifier"),
}
SOURCES = ("data", "train", "test")  # fields that name sources of images: of several, a list in Python

COMMAND = r"fastjem [a-z][a-z-]* [^;:,()]*"  # a command line that a message advises: it stays one
SECTIONS = ("Args:", "Returns:", "Raises:")  # of a docstring
FLAG = r"(?<![\w-])--(?P<no>no-)?(?P<name>[a-z][a-z0-9]*(?:-[a-z0-9]+)*)"


def function(name: str) -> Callable[..., Any]:
    """The function `fastjem.NAME`.

    Raises:
        ModuleNotFoundError: where a package that it needs isn't installed, with how to install it.
    """
    place = FUNCTIONS[name]
    try:
        module = importlib.import_module(place.module)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "fastjem":
            raise
        text = f"fastjem.{name}: {error.name} is not installed; pip install 'fastjem[pretrain]'"
        raise ModuleNotFoundError(text, name=error.name) from None
    target = getattr(module, place.function)
    kind = getattr(module, place.options) if place.options else None
    signature = signature_of(target, kind)

    @functools.wraps(target)
    def call(*values: Any, **given: Any) -> Any:
        known = [option for option in signature.parameters if option not in ("config", "fields")]
        with in_words_of_python(name, known):
            for option in given:
                if option not in signature.parameters:
                    raise nearest("option", option, known)
            if kind is None or "config" in signature.parameters:  # it takes what the caller gives as it is
                return target(*values, **_joined(given))
            fields, objects = _taken_apart(kind, signature, values, given)
            return target(kind(**fields), **objects)

    call.__name__ = call.__qualname__ = name
    call.__module__ = "fastjem"
    call.__doc__ = documentation(target, kind, signature)
    call.__signature__ = signature  # type: ignore[attr-defined]
    call.__annotations__ = {option: parameter.annotation for option, parameter in signature.parameters.items()}
    call.__annotations__["return"] = signature.return_annotation
    del call.__wrapped__  # type: ignore[attr-defined]  # inspect would look through to the command's own
    return call


def _taken_apart(
    kind: "type[DataclassInstance]", signature: inspect.Signature, values: Sequence[Any], given: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the caller gave -> (the dataclass's fields, objects that have no place in it)."""
    try:
        bound = signature.bind_partial(*values, **given).arguments
    except TypeError as error:
        raise UserError(f"options are given by name, as in data=...: {error}") from None
    lacking = [option for option, p in signature.parameters.items() if p.default is p.empty and option not in bound]
    if lacking:
        raise UserError(f"needs {' and '.join(lacking)}")
    names = {field.name for field in dataclasses.fields(kind)}
    fields = {option: value for option, value in bound.items() if option in names}
    objects = {option: value for option, value in bound.items() if option not in names}
    return _joined(fields), objects


def _joined(given: dict[str, Any]) -> dict[str, Any]:
    """Several sources of images as the command line names them: ["a", "b"] -> "a,b"."""
    from fastjem.config import joined

    found = dict(given)
    for name in SOURCES:
        roots = given.get(name)
        if isinstance(roots, (list, tuple)) and roots and all(isinstance(one, (str, os.PathLike)) for one in roots):
            found[name] = joined(roots)
    return found


@contextlib.contextmanager
def in_words_of_python(name: str, known: Sequence[str]) -> Iterator[None]:
    """A UserError within speaks of the function and its keywords: "--batch-size must be at least 2, got 1" ->
    "pretrain: batch_size must be at least 2, got 1".
    """
    try:
        yield
    except UserError as error:
        text = as_keywords(str(error), known)
        if not text.startswith((f"{name}: ", f"{name} ")):
            text = f"{name}: {text}"
        error.args = (text, *error.args[1:])
        raise


def as_keywords(text: str, known: Sequence[str]) -> str:
    """The options of a text as keywords, --out as out and --no-report as report=False; those of command lines in it,
    and others than the known ones, stay.
    """

    def keyword(found: re.Match[str]) -> str:
        name = (found["name"] or "").replace("-", "_")
        if name not in known:
            return found[0]
        return f"{name}=False" if found["no"] else name

    return re.sub(f"{COMMAND}|{FLAG}", keyword, text)


def signature_of(target: Callable[..., Any], kind: "type[DataclassInstance] | None") -> inspect.Signature:
    """(run, *, option=default, ..., encoder=None): the dataclass's fields, and what else the target takes by name."""
    signature = inspect.signature(target, eval_str=True)
    if kind is None:
        return signature
    first, *others = signature.parameters.values()
    hints = typing.get_type_hints(kind)
    found: dict[str, inspect.Parameter] = {}
    if first.name == "config":
        found["config"] = first
    for field in dataclasses.fields(kind):
        where = inspect.Parameter.KEYWORD_ONLY
        if field.metadata.get("positional"):
            where = inspect.Parameter.POSITIONAL_OR_KEYWORD
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        elif default is dataclasses.MISSING:
            default = inspect.Parameter.empty
        accepted = accepted_by(field, hints[field.name])
        found[field.name] = inspect.Parameter(field.name, where, default=default, annotation=accepted)
    for own in others:
        if own.kind is not own.KEYWORD_ONLY:
            continue
        if own.name in found:  # an object in place of a name; without one the field's default holds
            own = own.replace(default=found[own.name].default)
        found[own.name] = own
    return signature.replace(parameters=sorted(found.values(), key=lambda parameter: parameter.kind))


def accepted_by(field: dataclasses.Field, hint: Any) -> Any:
    """What Python's callers may give for a field: its type, and what `fastjem.fields` makes that of."""
    import torch

    kinds: dict[str, Any] = {
        "path": os.PathLike[str], "pair": Sequence[Any], "sides": Sequence[int], "square": Sequence[int],
        "device": torch.device,
    }  # fmt: skip
    more = [kind for name, kind in kinds.items() if field.metadata.get(name)]
    if field.name in SOURCES and field.metadata.get("path"):
        more.append(Sequence[str | os.PathLike[str]])
    if typing.get_origin(hint) is dict:
        key, value = typing.get_args(hint)
        hint = Mapping[key, value]
    return typing.Union[(hint, *more)]  # of a list of types


def documentation(
    target: Callable[..., Any], kind: "type[DataclassInstance] | None", signature: inspect.Signature
) -> str:
    """The target's docstring, with a line for each option: "batch_size: images of one forward pass (256)"."""
    text = inspect.getdoc(target) or ""
    if kind is None:
        return text
    sections = {"": "", "Args": ""}  # what stands before the first, and what the target says of arguments of its own
    name = ""
    for line in text.splitlines():
        if line in SECTIONS:
            name = line[:-1]
        else:
            sections[name] = f"{sections.get(name, '')}{line}\n"
    own = {line.strip().partition(":")[0].partition(",")[0] for line in sections["Args"].splitlines()}
    lines = []
    for field in dataclasses.fields(kind):
        if field.name in own:  # the target tells of it
            continue
        about = as_keywords(field.metadata.get("help", ""), list(signature.parameters))
        default = signature.parameters[field.name].default
        shown = "" if default is inspect.Parameter.empty else f" (default: {default!r})"
        lines.append(f"    {field.name}: {about or field.name.replace('_', ' ')}{shown}\n")
    kept = [line for line in sections["Args"].splitlines(keepends=True) if not line.strip().startswith("options:")]
    sections["Args"] = "".join([*lines, *kept]).rstrip() + "\n"
    begin = sections.pop("")
    parts = [f"{name}:\n{text.rstrip()}\n" for name, text in sections.items()]
    return "\n".join([begin.rstrip() + "\n", *parts])


# What follows writes the stub.


HEAD = """# Written by `python -m fastjem.api`; tests/test_api.py holds it equal to what the functions take.

import os
from typing import Any, Literal

import torch
"""


def stub() -> str:
    """The text of `fastjem/__init__.pyi`."""
    imports: set[tuple[str, str]] = set()
    parts = [_stub_of(name, function(name), imports) for name in FUNCTIONS]
    lines = [f"from {module} import {attribute}" for module, attribute in sorted(imports)]
    return "\n".join([HEAD + "\n".join(lines), "", "__version__: str", "", *parts])


def _stub_of(name: str, made: Callable[..., Any], imports: set[tuple[str, str]]) -> str:
    signature = inspect.signature(made)
    parameters = list(signature.parameters.values())
    lines = []
    for i, parameter in enumerate(parameters):
        if parameter.kind is parameter.KEYWORD_ONLY and (not i or parameters[i - 1].kind is not parameter.kind):
            lines.append("    *,")
        default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
        if not default and parameters[0].name == "config":
            default = " = ..."  # needed where there is no config
        lines.append(f"    {parameter.name}: {_written(parameter.annotation, imports)}{default},")
    returned = _written(signature.return_annotation, imports)
    text = "\n".join(f"    {line}".rstrip() for line in (made.__doc__ or "").strip().splitlines())
    return "\n".join([f"def {name}(", *lines, f") -> {returned}:", f'    """{text.strip()}', '    """', ""])


def _written(hint: Any, imports: set[tuple[str, str]]) -> str:
    """A type as code; `imports` is told what has to be imported for it."""
    origin = typing.get_origin(hint)
    arguments = typing.get_args(hint)
    if hint is Any or hint is None or hint is types.NoneType or hint is Ellipsis:
        return {Any: "Any", Ellipsis: "..."}.get(hint, "None")
    if origin in (types.UnionType, typing.Union):
        last = sorted(arguments, key=lambda part: part is types.NoneType)
        return " | ".join(dict.fromkeys(_written(part, imports) for part in last))
    if origin is Literal:
        return f"Literal[{', '.join(map(repr, arguments))}]"
    if isinstance(hint, list):
        return f"[{', '.join(_written(part, imports) for part in hint)}]"
    kind = origin or hint
    name = kind.__name__
    if kind.__module__ in ("os", "torch"):  # "device" is a keyword of these functions, too
        name = f"{kind.__module__}.{name}"
    elif kind.__module__ != "builtins":
        imports.add((kind.__module__, name))
    return f"{name}[{', '.join(_written(part, imports) for part in arguments)}]" if arguments else name


if __name__ == "__main__":
    print(stub(), end="")
