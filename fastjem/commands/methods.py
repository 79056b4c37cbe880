"""`fastjem methods`: what can be trained, what it rests on, and its options."""

import sys
from collections.abc import Sequence

from fastjem.arguments import Parser
from fastjem.methods import METHODS, Method, options_of
from fastjem.printing import is_terminal

COLUMNS = ("method", "family", "what prevents the trivial solution", "needs", "options with defaults", "paper")


def needs(method: type[Method]) -> str:
    """What a method needs beside an encoder and two views; "-" for nothing."""
    parts = {
        "momentum encoder": method.momentum,
        "queue": options_of(method).get("queue"),
        "multi-crop": method.views.small,
        "vision transformer": method.views.mask,
    }
    return ", ".join(name for name, needed in parts.items() if needed) or "-"


def main(argv: Sequence[str]) -> int:
    Parser("fastjem methods", description="what pretrain can train with").parse_args(argv)
    from rich.console import Console
    from rich.table import Table

    table = Table(*COLUMNS, show_lines=True)
    for name, method in METHODS.items():
        about = method.about
        options = " ".join(f"{option}={default}" for option, default in options_of(method).items())
        table.add_row(name, about.family, about.prevents_collapse, needs(method), options, about.paper)
    console = Console() if is_terminal(sys.stdout) else Console(width=160)  # a pipe is no terminal of 80 columns
    console.print(table)
    return 0
