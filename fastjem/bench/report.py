"""Results as JSON, as a Markdown page, and as a table in the terminal.

A machine has one file, which later runs update row by row: each row was measured in one run, all its variants in turns,
and says which run that was.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from fastjem.atomic import write_atomically
from fastjem.bench.neighbours import BUSY

LOST = 0.98  # ratios below it are listed as losses; what is nearer to 1 is noise
BEATEN = 0.97  # ratios below it fail `--check`,
NEAR_FLOOR = 0.75  # unless the least that any code needs is such a share of our time
NOISY = 1.5  # a median so many times the minimum says that the machine had other things to do

LEGEND = """\
Times are minima of forward and backward together (of the call, where nothing is differentiated), the variants in turns
on the same inputs. 1.50x (1.45): ours is 1.50 times faster by minima, 1.45 by medians. ~: noisy, some variant's median
is more than 1.5 times its minimum, or other processes had a tenth of the CPUs. Floor: the share of our time that the
least number of bytes takes at the measured copy bandwidth, or the matrix products at the measured rate, whichever is
longer (above 100 % where an op mostly reads or works in place, which is faster than copying). MiB: peak beyond inputs,
result and gradients. (host): what a call on tiny tensors costs the host. Runs as: C++, Triton, or reference, which is
plain torch where there is no kernel yet. Before they are timed, each variant's result and gradients are compared with
the eager formula's in float32."""


def seconds(value: float) -> str:
    """Three digits: 8.12 us, 27.1 ms, 1.88 s."""
    for unit, name in ((1, "s"), (1e-3, "ms"), (1e-6, "us")):
        if value >= unit * 0.9995 or name == "us":
            digits = 2 if value / unit < 9.995 else 1 if value / unit < 99.95 else 0
            return f"{value / unit:.{digits}f} {name}"
    raise AssertionError


def mebibytes(value: int | None) -> str:
    return "?" if value is None else f"{value / 2**20:.1f}"


def name_of(row: dict) -> str:
    totals = [timing["passes"]["total"] for timing in row["variants"].values()]
    noisy = row["others"] > BUSY or any(total["median"] > NOISY * total["minimum"] for total in totals)
    host = " (host)" if row["clock"] == "host" else ""
    return f"{row['op']} {row['shape']} {row['dtype']}{host}{' ~' if noisy else ''}"


def ratio(row: dict, baseline: str, which: str = "total") -> tuple[float, float] | None:
    """How many times faster ours is than the baseline: by minima, by medians. None where one of the two is missing."""
    ours, theirs = (row["variants"].get(name, {}).get("passes", {}).get(which) for name in ("ours", baseline))
    if not ours or not theirs:
        return None
    return theirs["minimum"] / ours["minimum"], theirs["median"] / ours["median"]


def baselines(rows: Sequence[dict]) -> list[str]:
    """All that ours is compared with in these rows, eager and compile first."""
    names = {name for row in rows for name in (*row["variants"], *row["absent"])} - {"ours"}
    first = [name for name in ("eager", "compile") if name in names]
    return first + sorted(names - set(first))


def summary(rows: Sequence[dict], short: bool = False) -> list[list[str]]:
    """A line per case: our time, each baseline's (unless `short`) with the two ratios, share of the floor, memory."""
    others = baselines(rows)
    lines = [["case", "runs as", "ours", *others, "floor", f"MiB: {' / '.join(['ours', *others])}"]]
    for row in rows:
        variants = row["variants"]
        if "ours" in variants:
            ours = variants["ours"]["passes"]["total"]["minimum"]
            time = seconds(ours)
            floor = f"{row['floor'] / ours:.0%} {row['floor_bound_by']}" if row["floor"] else "-"
        else:
            time = "WRONG" if "ours" in row["wrong"] else "FAILED"
            floor = "-"
        cells = [_compared(row, other, short) for other in others]
        memory = [mebibytes(variants[name]["memory"]) if name in variants else "-" for name in ("ours", *others)]
        lines.append([name_of(row), row["runs_as"], time, *cells, floor, " / ".join(memory)])
    return lines


def _compared(row: dict, other: str, short: bool) -> str:
    """`27.1 ms 1.50x (1.45)`: the other's time (unless `short`) and the two ratios."""
    if other not in row["variants"]:
        why = row["absent"].get(other, "")
        said = next((words for words in ("not installed", "left out") if why.startswith(words)), "-")
        return "wrong" if other in row["wrong"] else said
    time = "" if short else seconds(row["variants"][other]["passes"]["total"]["minimum"]) + " "
    both = ratio(row, other)
    return time + (f"{both[0]:.2f}x ({both[1]:.2f})" if both else "")


def losses(rows: Sequence[dict]) -> list[str]:
    """Where something else is faster than ours, or ours is missing: one line each."""
    lines = []
    for row in rows:
        name = f"{name_of(row)}, {row['runs_as']}"
        if "ours" in row["absent"]:
            lines.append(f"{name}: ours is missing: {row['absent']['ours']}")
        for other in baselines([row]):
            if (both := ratio(row, other)) and both[0] < LOST:
                lines.append(f"{name}: {other} is {1 / both[0]:.2f}x faster ({1 / both[1]:.2f}x by medians)")
    return lines


def beaten(rows: Sequence[dict]) -> list[dict]:
    """The rows that `--check` fails: ours is missing, or something else is faster and ours far from the floor."""

    def is_beaten(row: dict) -> bool:
        if "ours" not in row["variants"]:
            return True
        ours = row["variants"]["ours"]["passes"]["total"]["minimum"]
        ratios = [both[0] for other in baselines([row]) if (both := ratio(row, other))]
        return any(value < BEATEN for value in ratios) and (row["floor"] or 0) < NEAR_FLOOR * ours

    return [row for row in rows if is_beaten(row)]


def text(results: dict) -> str:
    """The table for the terminal."""
    rows = results["rows"]
    run = results["runs"][-1]
    lost = losses(rows)
    return "\n".join([
        "",
        ", ".join(f"{key} {value}" for key, value in results["machine"].items()),
        versions(run),
        _ceilings(run),
        "",
        LEGEND,
        "",
        *aligned(summary(rows, short=True)),
        "",
        "Where something else is faster:" if lost else "Nothing else is faster in any case.",
        *(f"  {line}" for line in lost),
    ])  # fmt: skip


def page_head(machine: dict, subject: str, legend: str) -> list[str]:
    """A page's first lines: whose results, of what, and how to read them."""
    facts = (f"- {key.replace('_', ' ')}: {value}" for key, value in machine.items())
    return [f"# {machine.get('gpu') or machine['cpu']}{subject}", "", *facts, "", *legend.splitlines(), ""]


def markdown(results: dict) -> str:
    """The page: summary, losses, every pass of every variant, what is absent, the runs."""
    rows = results["rows"]
    runs = results["runs"]
    numbers = {run["date"]: str(i) for i, run in enumerate(runs, 1)}
    missing = [f"- {name_of(row)}, {name}: {why}" for row in rows for name, why in row["absent"].items()]
    return "\n".join([
        *page_head(results["machine"], "", LEGEND),
        *as_markdown(summary(rows)),
        "",
        "## Where something else is faster",
        "",
        *([f"- {line}" for line in losses(rows)] or ["Nowhere."]),
        "",
        "## Every pass",
        "",
        "Minima; of the total also median and spread. Others: the share of the CPUs that other processes had.",
        "The first call is one forward and backward with all that is compiled or loaded in it.",
        "",
        *as_markdown(passes(rows, numbers)),
        *(["", "## Not timed", "", *missing] if missing else []),
        "",
        "## Runs",
        "",
        *(f"{number}. {versions(run)}. {_ceilings(run)}" for number, run in enumerate(runs, 1)),
        "",
    ])  # fmt: skip


def passes(rows: Sequence[dict], numbers: dict[str, str]) -> list[list[str]]:
    """A line per case and variant; numbers: date of a run -> its number on the page."""
    head = "case, run, variant, timed by, rounds, others, first call, forward, backward, total, median, p20 - p80, MiB"
    lines: list[list[str]] = [[*head.split(", ")]]
    for row in rows:
        for variant, timing in row["variants"].items():
            stats = timing["passes"]
            total = stats["total"]
            lines.append([
                name_of(row),
                numbers[row["run"]],
                variant,
                timing["method"],
                str(row["rounds"]),
                f"{row['others']:.0%}",
                seconds(timing["first_call"]),
                *(seconds(stats[p]["minimum"]) if p in stats else "" for p in ("forward", "backward")),
                seconds(total["minimum"]),
                seconds(total["median"]),
                f"{seconds(total['p20'])} - {seconds(total['p80'])}",
                mebibytes(timing["memory"]),
            ])  # fmt: skip
    return lines


def merged(old: dict, new: dict) -> dict:
    """The rows of both, the newer one of each case, and the runs that these rows come from."""
    rows = {(row["op"], row["shape"], row["dtype"]): row for row in (*old["rows"], *new["rows"])}
    return with_runs(old, new, list(rows.values()))


def with_runs(old: dict, new: dict, rows: list[dict]) -> dict:
    """Results of these rows, with those of both's runs that they come from."""
    used = {row["run"] for row in rows}
    runs = {run["date"]: run for run in (*old["runs"], *new["runs"]) if run["date"] in used}
    return {"machine": new["machine"], "runs": list(runs.values()), "rows": rows}


def write(results: dict, folder: Path, name: str) -> list[Path]:
    """Write or update `folder/name.json` and `.md`; the paths."""
    return written(results, folder, name, merged, markdown)


def written(
    results: dict, folder: Path, name: str, merge: Callable[[dict, dict], dict], page_of: Callable[[dict], str]
) -> list[Path]:
    """As `write`, of any results: how they go with older ones, and what the page says."""
    data = folder / f"{name}.json"
    page = folder / f"{name}.md"
    if data.exists():
        results = merge(load(data), results)
    write_atomically(data, dumps(results).encode())
    write_atomically(page, page_of(results).encode())
    return [data, page]


def dumps(results: dict) -> str:
    return json.dumps(results, indent=1) + "\n"


def load(path: Path) -> dict:
    return json.loads(Path(path).read_text())


def versions(run: dict) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    return f"{run['date']}, commit {run['commit'] or 'unknown'}, load average {run['load_average']}, {versions}"


def _ceilings(run: dict) -> str:
    rates = run["ceilings"]
    copy = ", ".join(f"{rate / 1e9:.3g} GB/s at {int(size) >> 20} MiB" for size, rate in rates["copy"].items())
    matmul = ", ".join(f"{dtype} {rate / 1e12:.3g} TFLOP/s" for dtype, rate in rates["matmul"].items())
    return f"Copy, read + written: {copy}. Matrix products: {matmul}."


def aligned(lines: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]


def as_markdown(lines: list[list[str]]) -> list[str]:
    head, *body = (f"| {' | '.join(line)} |" for line in lines)
    return [head, "|---" * len(lines[0]) + "|", *body]
