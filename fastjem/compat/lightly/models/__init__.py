"""`lightly.models`: modules and functions; backbones are timm's."""

import importlib
from typing import Any

from fastjem.compat.lightly.lookup import absent, files_of

globals().update(files_of("models"))


def __getattr__(name: str) -> Any:
    if name in ("modules", "utils"):
        return importlib.import_module(f"{__name__}.{name}")
    raise absent(__name__, name)
