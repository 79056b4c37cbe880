"""The command line. A command's module is imported when it is called, so `fastjem --help` needs nothing but Python."""

import argparse
import difflib
import importlib
import inspect
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """A user's mistake is one line and exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} ({self.prog} --help)\n")


def doctor(argv: Sequence[str]) -> int:
    """what is installed, and which implementation each operator has here"""
    parser = Parser("fastjem doctor", description=doctor.__doc__)
    parser.add_argument("--json", action="store_true", help="the same as data")
    arguments = parser.parse_args(argv)
    from fastjem.doctor import render, report

    found = report()
    print(json.dumps(found, indent=2) if arguments.json else render(found))
    return 0


def bench(argv: Sequence[str]) -> int:
    """time the operators on this machine against eager PyTorch, torch.compile and the hardware's floor"""
    return importlib.import_module("fastjem.bench").main(list(argv))


def pretrain(argv: Sequence[str]) -> int:
    """train an encoder on a folder of images"""
    return _of_dataclass("pretrain", "fastjem.run", argv)


def report(argv: Sequence[str]) -> int:
    """what a run did, or several side by side, on one page"""
    return _of_dataclass("report", "fastjem.report.page", argv)


def views(argv: Sequence[str]) -> int:
    """what a method's augmentations do to your own images, as a picture"""
    return _of_dataclass("views", "fastjem.report.views", argv)


def check_data(argv: Sequence[str]) -> int:
    """which files of a folder training would skip and why, sizes, counts, expected time of an epoch"""
    return _of_dataclass("check-data", "fastjem.data.check", argv)


def _of_dataclass(command: str, module: str, argv: Sequence[str]) -> int:
    """The module's dataclass `Config` says the options, its function `main(config)` gives the exit code."""
    try:
        arguments, code = (importlib.import_module(name) for name in ("fastjem.arguments", module))
        return arguments.run(code.Config, command, code.main, argv)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "fastjem":
            raise
        print(f"fastjem {command}: {error.name} is not installed; pip install 'fastjem[pretrain]'", file=sys.stderr)
        return 2


def evaluate(argv: Sequence[str]) -> int:
    """how well a run's features tell classes apart: kNN, linear probe, effective rank"""
    return _of_dataclass("evaluate", "fastjem.evaluation", argv)


def export(argv: Sequence[str]) -> int:
    """write a run's encoder as safetensors (and ONNX)"""
    return _of_dataclass("export", "fastjem.export", argv)


def demo(argv: Sequence[str]) -> int:
    """train on the embedded data set for some minutes and compare with no training"""
    return _of_dataclass("demo", "fastjem.demo", argv)


def methods(argv: Sequence[str]) -> int:
    """what pretrain can train with"""
    Parser("fastjem methods", description=methods.__doc__).parse_args(argv)
    try:
        from rich.console import Console
        from rich.table import Table
    except ModuleNotFoundError:
        print("fastjem methods: rich is not installed; pip install 'fastjem[pretrain]'", file=sys.stderr)
        return 2
    columns = ("method", "family", "what prevents the trivial solution", "needs", "options with defaults", "paper")
    table = Table(*columns, show_lines=True)
    for name, kind in importlib.import_module("fastjem.methods").METHODS.items():
        table.add_row(name, kind.family, kind.prevents_collapse, _needs(kind), _options(kind), _paper(kind))
    wide = Console() if sys.stdout.isatty() else Console(width=160)
    wide.print(table)
    return 0


def _needs(kind: Any) -> str:
    queue = inspect.signature(kind).parameters.get("queue")
    parts = {
        "momentum encoder": kind.ema,
        "queue": queue is not None and queue.default,
        "multi-crop": kind.views.small,
        "vision transformer": kind.views.mask,
    }
    return ", ".join(name for name, needed in parts.items() if needed) or "-"


def _options(kind: Any) -> str:
    """Keyword arguments that --options takes; facts of the run aren't options."""
    given = importlib.import_module("fastjem.methods").FACTS
    found = inspect.signature(kind).parameters.values()
    return " ".join(f"{p.name}={p.default}" for p in found if p.kind is p.KEYWORD_ONLY and p.name not in given)


def _paper(kind: Any) -> str:
    return importlib.import_module(kind.__module__).__doc__.splitlines()[0].partition(": ")[2].rstrip(".")


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "pretrain": pretrain,
    "evaluate": evaluate,
    "export": export,
    "demo": demo,
    "report": report,
    "views": views,
    "check-data": check_data,
    "methods": methods,
    "doctor": doctor,
    "bench": bench,
}


def usage() -> str:
    lines = ["usage: fastjem COMMAND [options]", ""]
    lines += [f"  {name:<11} {command.__doc__}" for name, command in COMMANDS.items()]
    return "\n".join([*lines, "", "fastjem COMMAND --help says more; fastjem --version says which fastjem this is."])


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code."""
    name, *rest = (sys.argv[1:] if argv is None else list(argv)) or ["--help"]
    if name in ("-h", "--help", "help"):
        print(usage())
        return 0
    if name == "--version":
        from fastjem import __version__

        print(f"fastjem {__version__}")
        return 0
    if command := COMMANDS.get(name):
        return command(rest)
    near = difflib.get_close_matches(name, [*COMMANDS, "--help", "--version"], n=2, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(COMMANDS)}"
    print(f"fastjem: there is no command {name!r}; {hint} (fastjem --help)", file=sys.stderr)
    return 2
