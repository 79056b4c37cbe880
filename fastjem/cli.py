"""The command line. A command's module is imported when it is called, so `fastjem --help` needs nothing but Python."""

import difflib
import importlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

from fastjem.arguments import outcome, run
from fastjem.errors import UserError
from fastjem.machine import keep_memory
from fastjem.printing import open_streams, say


class Command(NamedTuple):
    """A command: `module.function(options)` gives its exit code.

    `options` names the dataclass in the module that the words of the command line become. Without one the function
    takes the words themselves: doctor, methods and bench run where tyro isn't installed.
    """

    module: str
    options: str
    function: str
    about: str


COMMANDS = {
    "pretrain": Command(
        "fastjem.run", "Config", "main",
        "train an encoder on a folder of images",
    ),
    "evaluate": Command(
        "fastjem.commands.evaluate", "EvaluateOptions", "main",
        "how well a run's features tell classes apart: kNN, linear probe, effective rank",
    ),
    "embed": Command(
        "fastjem.commands.embed", "EmbedOptions", "main",
        "write a run's embeddings of many images as Parquet, .npz or CSV; neighbours and duplicates",
    ),
    "finetune": Command(
        "fastjem.commands.finetune", "FinetuneOptions", "main",
        "train a classifier on a run's encoder: its head alone, or all of it",
    ),
    "export": Command(
        "fastjem.commands.export", "ExportOptions", "main",
        "write a run's encoder as a folder that timm opens (and ONNX), and send it to the Hugging Face hub",
    ),
    "demo": Command(
        "fastjem.commands.demo", "DemoOptions", "main",
        "train on the embedded data set for some minutes and compare with no training",
    ),
    "report": Command(
        "fastjem.commands.report", "ReportOptions", "main",
        "what a run did, or several side by side, on one page",
    ),
    "views": Command(
        "fastjem.commands.views", "ViewsOptions", "main",
        "what a method's augmentations do to your own images, as a picture",
    ),
    "check-data": Command(
        "fastjem.commands.check_data", "CheckDataOptions", "main",
        "which files of a folder training would skip and why, sizes, counts, expected time of an epoch",
    ),
    "methods": Command(
        "fastjem.commands.methods", "", "main",
        "what pretrain can train with",
    ),
    "doctor": Command(
        "fastjem.commands.doctor", "", "main",
        "what is installed, and which implementation each operator has here",
    ),
    "bench": Command(
        "fastjem.commands.bench", "", "main",
        "time the operators on this machine against eager PyTorch, torch.compile and the hardware's floor",
    ),
    "completion": Command(
        "fastjem.completion", "", "main",
        "a script that completes commands, options and values in bash, zsh or fish",
    ),
    "kernels": Command(
        "fastjem.commands.kernels", "", "main",
        "write operators as a folder for Hugging Face's kernels library",
    ),
}  # fmt: skip


def usage() -> str:
    lines = ["usage: fastjem COMMAND [options]", ""]
    lines += [f"  {name:<11} {command.about}" for name, command in COMMANDS.items()]
    return "\n".join([*lines, "", "fastjem COMMAND --help says more; fastjem --version says which fastjem this is."])


def call(name: str, words: Sequence[str]) -> int:
    """Run the command with the words that follow its name; its exit code."""
    command = COMMANDS[name]
    try:
        module = importlib.import_module(command.module)
        function = getattr(module, command.function)
        if not command.options:
            return function(list(words))
        return run(getattr(module, command.options), name, function, words)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "fastjem":
            raise
        raise UserError(f"{error.name} is not installed; pip install 'fastjem[pretrain]'") from None


TRAINS = ("pretrain", "demo")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code."""
    name, *words = (sys.argv[1:] if argv is None else list(argv)) or ["--help"]
    open_streams()
    if argv is None and name in TRAINS:  # the process is ours, and ends with the run
        keep_memory()
    if name in COMMANDS:
        return outcome(name, lambda: call(name, words))
    return outcome("", lambda: about(name))


def about(name: str) -> int:
    """What `fastjem NAME` says where that is no command."""
    if name in ("-h", "--help", "help"):
        print(usage())
        return 0
    if name == "--version":
        from fastjem import __version__

        print(f"fastjem {__version__}")
        return 0
    near = difflib.get_close_matches(name, [*COMMANDS, "--help", "--version"], n=2, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(COMMANDS)}"
    say(f"fastjem: there is no command {name!r}; {hint} (fastjem --help)")
    return 2
