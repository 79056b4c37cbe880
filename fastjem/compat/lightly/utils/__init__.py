"""`lightly.utils`: `scheduler`, `lars`, `debug`, `dist`, `optim`."""

import importlib
from typing import Any

from fastjem.compat.lightly.lookup import absent, files_of

globals().update(files_of("utils"))


def __getattr__(name: str) -> Any:
    if name in ("debug", "dist", "lars", "optim", "scheduler"):
        return importlib.import_module(f"{__name__}.{name}")
    raise absent(__name__, name)
