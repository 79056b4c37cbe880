"""Results as a page for readers and a file for programs."""

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastjem.bench import machine


def row_of(command: Sequence[str]) -> dict[str, Any]:
    """The row that a process of its own prints behind "ROW "; without one, the last line of what it said, `error`."""
    done = subprocess.run(command, capture_output=True, text=True)
    found = [line[4:] for line in done.stdout.splitlines() if line.startswith("ROW ")]
    error = (done.stderr.strip().splitlines() or ["no output"])[-1]
    return json.loads(found[0]) if found else {"error": error}


def write(
    path: Path,
    title: str,
    about: str,
    facts: dict[str, Any],
    settings: dict[str, Any],
    rows: Sequence[dict[str, Any]],
    table: Sequence[dict[str, Any]] | None = None,
    note: str = "",
) -> None:
    """PATH.json with the rows, and PATH.md with a table of them.

    Args:
        path: without its suffix.
        about: what the table's columns are.
        facts: of the machine. settings: of the run.
        table: what the page shows in place of the rows.
        note: what else is to be known of these rows, in both files.
    """
    now = machine.now()
    found = {"machine": facts, "run": now, "settings": settings, "rows": rows, **({"note": note} if note else {})}
    path.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    shown = rows if table is None else table
    keys = list(dict.fromkeys(key for row in shown for key in row))
    lines = [
        f"# {title}",
        "",
        *(f"- {key}: {value}" for key, value in {**facts, **now, **settings}.items()),
        "",
        about,
        "",
        *([note, ""] if note else []),
        "| " + " | ".join(keys) + " |",
        "|" + "---|" * len(keys),
        *("| " + " | ".join(str(row.get(key, "")) for key in keys) + " |" for row in shown),
    ]
    path.with_suffix(".md").write_text("\n".join(lines) + "\n")
