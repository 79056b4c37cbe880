"""fastjem: joint-embedding pretraining of image encoders at the speed of the hardware."""

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import Any

try:
    __version__ = version("fastjem")
except PackageNotFoundError:  # run from a source tree that isn't installed
    __version__ = "0+unknown"


# What is loaded when it is first asked for, as it needs more than torch: name -> (module, attribute).
LAZY = {
    "pretrain": ("fastjem.run", "pretrain"),
    "load_encoder": ("fastjem.runs", "load_encoder"),
}


def __getattr__(name: str) -> Any:
    if name not in LAZY:
        raise AttributeError(f"module 'fastjem' has no attribute {name!r}")
    module, attribute = LAZY[name]
    return getattr(importlib.import_module(module), attribute)
