"""Everything a run depends on: filled in by the command line or `fastjem.pretrain(...)`, kept in the run's folder."""

from fastjem.config.checks import CHANGES_NUMBERS, MAY_CHANGE, MOST_VIEWS, check, check_resumed, projector_widths
from fastjem.config.file import FILE, read, read_options
from fastjem.config.options import OUT, Config, Option, from_fields, joined

__all__ = [
    "CHANGES_NUMBERS",
    "FILE",
    "MAY_CHANGE",
    "MOST_VIEWS",
    "OUT",
    "Config",
    "Option",
    "check",
    "check_resumed",
    "from_fields",
    "joined",
    "projector_widths",
    "read",
    "read_options",
]
