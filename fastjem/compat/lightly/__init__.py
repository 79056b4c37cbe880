"""lightly's paths for what fastjem has: change the import of a script, and it runs with ours.

    sed 's/from lightly/from fastjem.compat.lightly/; s/import lightly/import fastjem.compat.lightly as lightly/'

The names are those of lightly 1.6.0, in its packages `loss`, `models`, `models.modules`, `models.utils`, `transforms`,
`data` and `utils`, and in its files (`lookup.py`). A name of lightly's that isn't here is an ImportError that says what
to use instead.
"""

import importlib
from typing import Any

from fastjem.compat.lightly import lookup

lookup.register()

PACKAGES = ("data", "loss", "models", "transforms", "utils")


def __getattr__(name: str) -> Any:
    if name in PACKAGES:
        return importlib.import_module(f"{__name__}.{name}")
    raise lookup.absent(__name__, name)
