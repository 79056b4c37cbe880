"""Values by name as YAML text: what a run keeps of itself, made to be read by people and by programs.

Read is what YAML 1.2 says of numbers and truth values: `1e-3` is a number, `on` and `2026-01-31` are texts. PyYAML by
itself follows YAML 1.1, for which it is the other way round; what is written is the same to both.
"""

import re
from collections.abc import Mapping
from functools import cache
from typing import Any, ClassVar

from fastjem.errors import UserError
from fastjem.reading import parsed

PLAIN = (  # tag, what has it, its first characters
    ("null", r"(?:~|null|Null|NULL|)", ["~", "n", "N", ""]),
    ("bool", r"(?:true|True|TRUE|false|False|FALSE)", list("tTfF")),
    ("int", r"[-+]?[0-9]+", list("-+0123456789")),
    (
        "float",
        r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))",
        list("-+.0123456789"),
    ),
)


@cache
def _classes() -> tuple[Any, Any]:
    """(loader, dumper), made when they are needed: nothing else needs PyYAML."""
    import yaml

    class Loader(yaml.SafeLoader):
        """YAML 1.2's plain values, and no aliases: a few lines of them may stand for gigabytes."""

        yaml_implicit_resolvers: ClassVar[Any] = {}

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                event = self.peek_event()
                raise yaml.MarkedYAMLError(None, None, "it has aliases", event.start_mark)
            return super().compose_node(parent, index)

    class Dumper(yaml.SafeDumper):
        """Quotes what either version of YAML would take for no text."""

        def ignore_aliases(self, data: Any) -> bool:
            return True

        def represent_sequence(self, tag: str, sequence: Any, flow_style: Any = None) -> Any:
            plain = not any(isinstance(one, list | dict) for one in sequence)
            return super().represent_sequence(tag, sequence, flow_style=plain)

    def integer(loader: Any, node: Any) -> int:  # 007 is 7: PyYAML's own would take it for octal
        return int(loader.construct_scalar(node))

    Loader.add_constructor("tag:yaml.org,2002:int", integer)
    for tag, pattern, first in PLAIN:
        for kind in (Loader, Dumper):
            kind.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(f"^{pattern}$"), first)
    return Loader, Dumper


def dumped(values: Mapping[str, Any]) -> str:
    """Text of which `loaded` makes the same values: numbers, texts, truth values, None, lists and mappings of them."""
    import yaml

    return yaml.dump(
        dict(values), Dumper=_classes()[1], sort_keys=False, default_flow_style=False, allow_unicode=True, width=120
    )


def loaded(text: bytes, name: object) -> dict[str, Any]:
    """The values of a file's text, which may be JSON, too.

    Args:
        name: of the file, for messages.

    Raises:
        UserError: for anything else than values by name, with the line.
    """
    found = parsed(text, name) if text.lstrip().startswith(b"{") else _parsed(text, name)
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise UserError(f"{name} must hold values by name, got {_kind(found)}")
    return found


def _kind(found: Any) -> str:
    return "names that are no text" if isinstance(found, dict) else f"a YAML {type(found).__name__}"


def _parsed(text: bytes, name: object) -> Any:
    import yaml

    if not text.strip():
        raise UserError(f"{name} is no YAML: it is empty")
    try:
        return yaml.load(text.decode("utf-8-sig"), Loader=_classes()[0])
    except UnicodeDecodeError:
        why = "it is no UTF-8 text"
    except RecursionError:
        why = "it is nested too deeply"
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        why = f"{where}{error.problem}"
    except (yaml.YAMLError, ValueError, MemoryError, OverflowError) as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
    raise UserError(f"{name} is no YAML: {why}")


__all__ = ["dumped", "loaded"]
