"""`fastjem methods`: what can be trained, what it rests on, and its options."""

import importlib
import inspect
import sys
from collections.abc import Sequence
from typing import Any

from fastjem.arguments import Parser
from fastjem.methods import FACTS, METHODS

COLUMNS = ("method", "family", "what prevents the trivial solution", "needs", "options with defaults", "paper")


def needs(method: Any) -> str:
    """What a method needs beside an encoder and two views; "-" for nothing."""
    queue = inspect.signature(method).parameters.get("queue")
    parts = {
        "momentum encoder": method.ema,
        "queue": queue is not None and queue.default,
        "multi-crop": method.views.small,
        "vision transformer": method.views.mask,
    }
    return ", ".join(name for name, needed in parts.items() if needed) or "-"


def options(method: Any) -> str:
    """Keyword arguments that --options takes; facts of the run aren't options."""
    parameters = inspect.signature(method).parameters.values()
    return " ".join(f"{p.name}={p.default}" for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in FACTS)


def paper(method: Any) -> str:
    return importlib.import_module(method.__module__).__doc__.splitlines()[0].partition(": ")[2].rstrip(".")


def main(argv: Sequence[str]) -> int:
    Parser("fastjem methods", description="what pretrain can train with").parse_args(argv)
    from rich.console import Console
    from rich.table import Table

    table = Table(*COLUMNS, show_lines=True)
    for name, method in METHODS.items():
        table.add_row(name, method.family, method.prevents_collapse, needs(method), options(method), paper(method))
    console = Console() if sys.stdout.isatty() else Console(width=160)  # a pipe is no terminal of 80 columns
    console.print(table)
    return 0
