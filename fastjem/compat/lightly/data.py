"""`lightly.data`: the collate function of I-JEPA's masks."""

from typing import Any

from fastjem.compat.lightly.lookup import absent, files_of
from fastjem.compat.masks import IJEPAMaskCollator

__all__ = ["IJEPAMaskCollator"]

globals().update(files_of("data"))


def __getattr__(name: str) -> Any:
    raise absent(__name__, name)
