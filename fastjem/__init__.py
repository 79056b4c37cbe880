"""fastjem: joint-embedding pretraining of image encoders at the speed of the hardware."""

import importlib
from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("fastjem")
except PackageNotFoundError:  # run from a source tree that isn't installed
    __version__ = "0+unknown"


def __getattr__(name: str) -> object:
    """`fastjem.pretrain(...)` and `fastjem.load_encoder(path)` load what they need when they are first asked for."""
    if name == "pretrain":
        return importlib.import_module("fastjem.run").pretrain
    if name == "load_encoder":
        return importlib.import_module("fastjem.encoders").load
    raise AttributeError(f"module 'fastjem' has no attribute {name!r}")
