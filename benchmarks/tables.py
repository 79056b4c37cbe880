"""Results as a page for readers and a file for programs."""

import json
import os
import queue
import statistics
import subprocess
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, TypeVar

import torch

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

    pool = ThreadPoolExecutor(len(cores))
    try:
        for done in as_completed([pool.submit(on_a_core, item) for item in items]):
            yield done.result()
    finally:
        pool.shutdown(cancel_futures=True)


def over_seeds(rows: Sequence[dict[str, Any]], by: str, accuracies: Collection[str]) -> list[dict[str, Any]]:
    """A row for each value of the column `by`: numbers as means, and of accuracies the deviation between seeds where
    there are several. What failed with every seed keeps its error."""
    found = []
    for name in dict.fromkeys(row[by] for row in rows):
        own = [row for row in rows if row[by] == name]
        done = [row for row in own if "error" not in row]
        if not done:
            found.append(own[0])
            continue
        mean = dict(done[0])
        del mean["seed"]
        for key, value in mean.items():
            if isinstance(value, float | int):
                values = [row[key] for row in done if key in row]
                several = len(values) > 1 and key in accuracies
                mean[key] = f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if several else "")
        found.append(mean)
    return found


def beside_earlier(
    path: Path, settings: dict[str, Any], rows: list[dict[str, Any]], by: Sequence[str]
) -> tuple[list[dict[str, Any]], str]:
    """The rows behind those that a page has already, with the same settings and other values in the columns `by`; and
    the page's note.

    Args:
        path: without its suffix.
        settings: of the rows; a page may have others beside them.
    """
    file = with_suffix(path, ".json")
    before = json.loads(file.read_text()) if file.exists() else None
    if before is None or not settings.items() <= before["settings"].items():
        return rows, ""
    made = {tuple(row[column] for column in by) for row in rows}
    kept = [row for row in before["rows"] if tuple(row[column] for column in by) not in made]
    return kept + rows, before.get("note", "")


def with_suffix(path: Path, suffix: str) -> Path:
    """The page's file. Its name may have points of its own ("0.5-minutes"), which `Path.with_suffix` would cut off."""
    return path.with_name(path.name + suffix)


def describe(cores: Sequence[int]) -> dict[str, Any]:
    """The machine as the runs saw it: with `cores`, each run had one of them and a thread."""
    facts = machine.describe(torch.device("cpu"))
    return facts | ({"threads": 1, "side by side": len(cores)} if cores else {})


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
    path.parent.mkdir(parents=True, exist_ok=True)
    found = {"machine": facts, "run": now, "settings": settings, "rows": rows, **({"note": note} if note else {})}
    with_suffix(path, ".json").write_text(json.dumps(found, indent=1) + "\n")
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
    with_suffix(path, ".md").write_text("\n".join(lines) + "\n")
