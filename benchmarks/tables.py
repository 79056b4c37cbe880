"""Results as a page for readers and a file for programs."""

import json
import os
import queue
import subprocess
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, TypeVar

from fastjem.bench import machine

Item = TypeVar("Item")
Found = TypeVar("Found")


def row_of(command: Sequence[str], core: int | None = None) -> dict[str, Any]:
    """The row that a process of its own prints behind "ROW "; without one, the last line of what it said, `error`.

    core: the process and its workers are bound to this one, with one thread each; None: the whole machine is theirs.
    """
    bound, threads = [], {}
    if core is not None:
        bound = ["taskset", "--cpu-list", str(core)]
        threads = {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*bound, *command], capture_output=True, text=True, env={**os.environ, **threads})
    found = [line[4:] for line in done.stdout.splitlines() if line.startswith("ROW ")]
    error = (done.stderr.strip().splitlines() or ["no output"])[-1]
    return json.loads(found[0]) if found else {"error": error}


def spread(work: Callable[[Item, int | None], Found], items: Sequence[Item], cores: Sequence[int]) -> Iterator[Found]:
    """`work(item, core)` of every item as it ends: one item a core at a time; without cores one after the other."""
    if not cores:
        yield from (work(item, None) for item in items)
        return
    free: queue.SimpleQueue[int] = queue.SimpleQueue()
    for core in cores:
        free.put(core)

    def on_a_core(item: Item) -> Found:
        core = free.get()
        try:
            return work(item, core)
        finally:
            free.put(core)

    with ThreadPoolExecutor(len(cores)) as pool:
        for done in as_completed([pool.submit(on_a_core, item) for item in items]):
            yield done.result()


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
