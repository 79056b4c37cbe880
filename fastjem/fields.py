"""Values of a dataclass's fields, held to their annotations: from Python, from a command line, or from a file.

A value that is as good as what the annotation says becomes that: `np.int64(3)` -> 3, `np.float32(0.5)` -> 0.5, a tuple
-> a list; where a field's metadata has `"path": True`, `Path("runs/a")` -> "runs/a"; where it has `"square": True`,
`(32, 32)` -> 32; where it has `"sides": True`, that and `(32, 48)`, height and width, -> "32x48"; where it has
`"pair": True`, `(0, 4095)` -> "0,4095"; where it has `"device": True`, `torch.device("cpu")` -> "cpu". What would
have to be guessed is refused: "16" and True are no numbers.
"""

import dataclasses
import math
import operator
import os
import reprlib
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fastjem.errors import UserError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

NAMES: dict[Any, str] = {
    bool: "True or False",
    int: "an integer",
    float: "a number",
    str: "text",
    types.NoneType: "None",
    list: "a list",
    Sequence: "a list",
    tuple: "a list",
    dict: "a dict of values by name",
}
MOST = 2**63 - 1  # an integer that nobody else can hold is a mistake


def conform(given: "DataclassInstance", name_of: Callable[[str], str] = str) -> None:
    """Every field of a dataclass's object in the type of its annotation, in place.

    Args:
        name_of: a field's name -> what messages call it.

    Raises:
        UserError: for the first field that has another type; a text that is empty is none.
    """
    values = vars(given).copy()
    for name, value in conformed(type(given), values, name_of).items():
        object.__setattr__(given, name, value)


def conformed(
    kind: "type[DataclassInstance]", values: Mapping[str, Any], name_of: Callable[[str], str] = str
) -> dict[str, Any]:
    """The values of some fields of a dataclass in the types of its annotations; see `conform`."""
    hints = typing.get_type_hints(kind)
    found = {}
    for field in dataclasses.fields(kind):
        if field.name not in values:
            continue
        value = values[field.name]
        if value is field.default:  # what the dataclass itself says needs no check
            found[field.name] = value
            continue
        try:
            found[field.name] = _as(hints[field.name], _plain(value, field.metadata))
        except _Refused as error:
            raise UserError(f"{name_of(field.name)} {error}") from None
        except (TypeError, ValueError, OverflowError):
            raise UserError(f"{name_of(field.name)} must be {_said(hints[field.name])}, got {came(value)}") from None
    return found


def came(value: Any) -> str:
    """A value with its type, as far as one line takes it: "str '16'"."""
    try:
        text = " ".join(reprlib.repr(value).split())
    except Exception:  # the repr of somebody's object, or of an integer of thousands of digits
        text = "that can't be shown"
    return f"{type(value).__name__} {text}"


class _Refused(ValueError):
    """A value of the right type that a field can't have, with the reason in words."""


def _plain(value: Any, metadata: Mapping[str, Any]) -> Any:
    """What stands for a value of another type: a path for its text, a square for its side, a rectangle
    for the text of both, a device for its name.
    """
    if metadata.get("path") and isinstance(value, (str, os.PathLike)):
        path = os.fsdecode(value)
        if "\0" in path:  # the system takes a path to end there, and Python raises
            raise _Refused(f"must be a path, got {came(path)}")
        return path
    if metadata.get("square") and isinstance(value, Sequence) and not isinstance(value, str):
        if len(value) != 2 or value[0] != value[1]:
            raise _Refused(f"must be one number, as images are square, got {came(value)}")
        return value[0]
    if metadata.get("sides") and isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray)):
        return _sides(value)
    if metadata.get("pair"):
        to_list = getattr(value, "tolist", None)
        value = to_list() if to_list else value  # an array
        if isinstance(value, Sequence) and not isinstance(value, str):
            return ",".join(map(str, value))
    if metadata.get("device") and type(value).__name__ == "device":  # torch.device; this module needs no torch
        return str(value)
    return value


def _sides(value: Sequence[Any]) -> int | str:
    """Height and width -> a number where they are the same, else text."""
    try:
        sides = [_as(int, side) for side in value]
    except (TypeError, ValueError, OverflowError):
        sides = []
    if len(sides) != 2:
        raise _Refused(f"must be a number of pixels, or height and width, got {came(value)}")
    return sides[0] if sides[0] == sides[1] else "x".join(map(str, sides))


def _as(hint: Any, value: Any) -> Any:
    """The value as the annotation says; TypeError, ValueError or OverflowError where it isn't one."""
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        return _as_any(typing.get_args(hint), value)
    if origin is typing.Literal:
        return _as_one_of(hint, value)
    if origin is dict:
        return _as_dict(typing.get_args(hint)[1], value)
    if hint is Any:
        return value
    if hint is Sequence:
        return _as_items(list, (Any,), value)
    if origin in (list, tuple):
        return _as_items(origin, typing.get_args(hint), value)
    return _as_scalar(hint, value)


def _as_any(hints: Sequence[Any], value: Any) -> Any:
    """The first of the annotations that the value has exactly, or else can become."""
    for hint in hints:
        if type(value) is hint:
            return _as(hint, value)
    refused: _Refused | None = None
    for hint in sorted(hints, key=lambda hint: hint is float):  # an integer stays one where it may
        try:
            return _as(hint, value)
        except _Refused as error:
            # What isn't one of some words may be meant for another of the annotations: all of them are said.
            refused = refused if typing.get_origin(hint) is typing.Literal else error
        except (TypeError, ValueError, OverflowError):
            continue
    raise refused or TypeError


def _as_one_of(hint: Any, value: Any) -> Any:
    for choice in typing.get_args(hint):
        if type(value) is type(choice) and value == choice:
            return choice
    raise _Refused(f"must be {_said(hint)}, got {came(value)}")


def _as_dict(hint: Any, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise TypeError
    found = {}
    for name, item in value.items():
        try:
            found[str(name)] = _as(hint, item)
        except _Refused as error:
            raise _Refused(f"{name} {error}") from None
        except (TypeError, ValueError, OverflowError):
            raise _Refused(f"{name} must be {_said(hint)}, got {came(item)}") from None
    return found


def _as_items(kind: type, hints: Sequence[Any], value: Any) -> Any:
    """A list or tuple of items of one annotation; hints: (item,), (item, ...) or (item, item) for a pair."""
    if hasattr(value, "tolist"):  # an array
        value = value.tolist()
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        raise TypeError
    any_length = kind is list or Ellipsis in hints
    if not any_length and len(value) != len(hints):
        raise _Refused(f"must be {len(hints)} values, got {len(value)}")
    return kind(_as(hints[0], item) for item in value)


def _as_scalar(kind: Any, value: Any) -> Any:
    if kind is types.NoneType:
        if value is not None:
            raise TypeError
        return None
    if kind is str:
        if not isinstance(value, str):
            raise TypeError
        if not value:
            raise _Refused("must not be empty")
        return str(value)
    # NumPy's truth values and tensors of them aren't Python's bool
    is_bool = isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool")
    if is_bool != (kind is bool) or isinstance(value, (str, bytes)):
        raise TypeError  # int(True) and float("16") would be numbers
    if kind is bool:
        return bool(value)
    return _as_integer(value) if kind is int else _as_number(value)


def _as_integer(value: Any) -> int:
    whole = operator.index(value)
    if abs(whole) > MOST:
        raise _Refused("must be below 2^63")
    return whole


def _as_number(value: Any) -> float:
    number = float(value)
    if math.isnan(number):
        raise _Refused("must be a number, got NaN")
    return number


def _said(hint: Any) -> str:
    """An annotation in words: "an integer or None"."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        *parts, last = dict.fromkeys(_said(part) for part in typing.get_args(hint))
        return f"{', '.join(parts)} or {last}"
    if typing.get_origin(hint) is typing.Literal:
        return f"one of {', '.join(map(str, typing.get_args(hint)))}"
    return NAMES.get(typing.get_origin(hint) or hint, str(hint))
