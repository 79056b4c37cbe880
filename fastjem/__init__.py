"""fastjem: joint-embedding pretraining of image encoders at the speed of the hardware."""

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import Any

try:
    __version__ = version("fastjem")
except PackageNotFoundError:  # run from a source tree that isn't installed
    __version__ = "0+unknown"


# The commands as functions, see `fastjem.api`: loaded when they are first asked for, as they need more than torch.
FUNCTIONS = (
    "pretrain", "evaluate", "embed", "finetune", "export", "views", "check_data", "load_encoder", "load_classifier",
)  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in FUNCTIONS:
        raise AttributeError(f"module 'fastjem' has no attribute {name!r}")
    made = importlib.import_module("fastjem.api").function(name)
    globals()[name] = made
    return made


def __dir__() -> list[str]:
    return sorted({*globals(), *FUNCTIONS} - {"annotations", "importlib"})
