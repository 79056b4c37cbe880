"""Results of `fastjem bench --steps` as JSON, as a Markdown page, and as a table in the terminal."""

from collections.abc import Sequence
from pathlib import Path

from fastjem.bench import report
from fastjem.bench.neighbours import BUSY
from fastjem.bench.report import aligned, as_markdown, seconds, versions

GOAL = 1e-3  # seconds of the host around model and loss in a step

LEGEND = """\
What a training step costs the host, for an encoder of a few tensors, narrow heads and 8 images of 32 pixels, with
AdamW and clipping. Around: all of it but model and loss, which is seeds, rates, dropping gradients, clipping, the
optimiser's step with the momentum encoder, queues and centres; the minimum, then the median. Whole: the same with
model and loss, forward and backward. Batch: from a loader's crops to the batch, which is colours, normalisation, masks.
Operators, tensors made and calls from Python into torch are those of "around", counted in a step in which torch's
dispatcher sees each. A GPU is idle as a step begins and isn't waited for, so that times are the host's alone; graph:
the host's time to launch the step as one CUDA graph. On a CPU times hold the arithmetic, too. Tensors: the parameters
that are trained, each of which costs some us. ~: other processes had a tenth of the CPUs."""


def lines_of(rows: Sequence[dict]) -> list[list[str]]:
    """A line per method."""
    has_graphs = any("graph" in row for row in rows)
    head = ["method", "tensors", "precision", "around", "median", "whole", "batch", "operators", "made", "calls"]
    lines = [head + ["graph"] * has_graphs]
    for row in rows:
        name = row["method"] + (" ~" if row.get("others", 0) > BUSY else "")
        if "absent" in row:
            lines.append([name, *["-"] * (len(lines[0]) - 1)])
            continue
        lines.append([
            name,
            str(row["parameters"]),
            row["precision"],
            seconds(row["around"]["minimum"]),
            seconds(row["around"]["median"]),
            seconds(row["whole"]["minimum"]),
            seconds(row["batch"]["minimum"]),
            str(row["operators"]),
            str(row["allocations"]),
            str(row["python_calls"]),
            *([seconds(row["graph"]["minimum"]) if row.get("graph") else "-"] * has_graphs),
        ])  # fmt: skip
    return lines


def over(rows: Sequence[dict]) -> list[dict]:
    """The rows of methods that miss `GOAL`, or that failed for another reason than a package that isn't there."""
    return [row for row in rows if failed(row) or ("around" in row and row["around"]["minimum"] > GOAL)]


def failed(row: dict) -> bool:
    return "absent" in row and not row["absent"].startswith(("ModuleNotFoundError", "ImportError"))


def verdict(rows: Sequence[dict]) -> list[str]:
    """Which methods take more than the goal; those that weren't timed, and why; why there is no graph."""
    slow = [f"{row['method']} ({seconds(row['around']['minimum'])})" for row in over(rows) if "around" in row]
    timed = sum("around" in row for row in rows)
    lines = [f"More than {seconds(GOAL)} around model and loss: {', '.join(slow)}."] if slow else []
    if timed and not slow:
        lines = [f"Around model and loss: less than {seconds(GOAL)} for each of {timed} methods."]
    lines += [f"Not timed: {row['method']}: {row['absent']}" for row in rows if "absent" in row]
    return lines + [f"No graph: {row['method']}: {row['no_graph']}" for row in rows if row.get("no_graph")]


def text(results: dict) -> str:
    """The table for the terminal."""
    return "\n".join([
        "",
        ", ".join(f"{key} {value}" for key, value in results["machine"].items()),
        versions(results["runs"][-1]),
        "",
        LEGEND,
        "",
        *aligned(lines_of(results["rows"])),
        "",
        *verdict(results["rows"]),
    ])  # fmt: skip


def markdown(results: dict) -> str:
    """The page."""
    return "\n".join([
        *report.page_head(results["machine"], ": a step's time on the host", LEGEND),
        *as_markdown(lines_of(results["rows"])),
        "",
        *(f"- {line}" for line in verdict(results["rows"])),
        "",
        "## Runs",
        "",
        *(f"{i}. {versions(run)}." for i, run in enumerate(results["runs"], 1)),
        "",
    ])  # fmt: skip


def merged(old: dict, new: dict) -> dict:
    """The rows of both, the newer one of each method, and the runs that these rows come from."""
    rows = {row["method"]: row for row in (*old["rows"], *new["rows"])}
    return report.with_runs(old, new, list(rows.values()))


def write(results: dict, folder: Path, name: str) -> list[Path]:
    """Write or update `folder/name.json` and `.md`; the paths."""
    return report.written(results, folder, name, merged, markdown)
