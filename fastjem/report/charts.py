"""Curves over training, as SVG whose colours are the page's.

A colour and a letter stand for a run; a solid line for the encoder's embeddings or the run as a whole, a dashed one for
the projections, a dotted one for a reference that is no measurement: in every chart.
"""

import html
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fastjem.report.run import Run

POINTS = 400  # a curve is drawn through so many at most
LARGEST = 1e100  # figure that is read
# matplotlib takes no CSS variables: it draws in these colours, and `themed` puts the page's variables in their place.
INK, FAINT = "#0a0a01", "#0a0a02"  # --ink, --line
RUN = "#0a0b{:02x}"  # --run0, --run1, ...
COLOURS = 8  # that the page has for runs
SOLID, DASHED, DOTTED = "-", "--", ":"
MEANING = {
    SOLID: "solid: the encoder’s embeddings, or the run as a whole",
    DASHED: "dashed: the projections, which the loss is computed of",
    DOTTED: "dotted: a reference, not a measurement",
}
LETTER_GAP = 0.075  # of a chart's height between the letters of two curves
SIZE = (4.8, 2.6)  # inches of 72 units; type of 11 units is then 10 pixels on a phone and 12 on a desk


@dataclass(frozen=True)
class Quantity:
    """One chart: `keys` of metrics.jsonl (or knn.jsonl), and the line that each is drawn with."""

    title: str
    unit: str  # of the vertical axis
    keys: dict[str, str]
    explained: str = ""
    percent: bool = False
    from_zero: bool = False
    knn: bool = False
    if_it_varies: bool = False  # a constant stands in the configuration
    teacher: bool = False  # for runs with a momentum encoder
    of_a_method: bool = False  # figures of two methods have no common axis


QUANTITIES = (
    Quantity(
        "Loss",
        "",
        {"loss": SOLID},
        "Tells whether a run learns; says nothing of which of two methods, or of two sets of options, is better.",
        of_a_method=True,
    ),
    Quantity(
        "Nearest neighbours",
        "right labels (%)",
        {"knn": SOLID},
        "Share of images whose label their nearest other images tell, by the cosine of the encoder's embeddings. "
        "Dotted: guessing.",
        percent=True,
        from_zero=True,
        knn=True,
    ),
    Quantity(
        "Effective rank",
        "directions",
        {"effective_rank": SOLID, "projection_rank": DASHED},
        "Of a batch of one view; at most the smaller of batch and width. 1 is a collapse.",
        from_zero=True,
    ),
    Quantity(
        "Spread",
        "standard deviation",
        {"embedding_std": SOLID, "std": DASHED},
        "Projections of length one, times the root of their width: 1 is evenly spread. Embeddings: as a share of "
        "their size. 0 is a collapse.",
        from_zero=True,
    ),
    Quantity(
        "Teacher's entropy",
        "share of log K (%)",
        {"teacher_entropy": SOLID},
        "100 % is a teacher that has no opinion, 0 % one that is sure of each image: a collapse where few prototypes "
        "are in use.",
        percent=True,
        from_zero=True,
    ),
    Quantity(
        "Prototypes in use",
        "share (%)",
        {"prototype_usage": SOLID},
        "Of the prototypes that a batch could use. One that falls towards 0 is a collapse.",
        percent=True,
        from_zero=True,
    ),
    Quantity("Learning rate", "", {"learning_rate": SOLID}, from_zero=True),
    Quantity("Weight decay", "", {"weight_decay": SOLID}, if_it_varies=True),
    Quantity("Momentum encoder", "momentum", {"momentum": SOLID}, if_it_varies=True, teacher=True),
    Quantity("Gradient", "norm before clipping", {"gradient_norm": SOLID}, from_zero=True),
    Quantity("Speed", "images per second", {"images_per_second": SOLID}, from_zero=True),
    Quantity(
        "Waiting for data",
        "share of time (%)",
        {"data_wait": SOLID},
        "Time in which the step waited for the loader.",
        percent=True,
        from_zero=True,
    ),
)


@dataclass(frozen=True, eq=False)
class Curve:
    run: int  # its place among the runs
    style: str
    x: np.ndarray  # [N] steps or epochs
    y: np.ndarray  # [N]


@dataclass(frozen=True)
class Chart:
    quantity: Quantity
    svg: str
    styles: frozenset[str]  # of its lines
    note: str = ""  # what the curves don't show


def thin(x: np.ndarray, y: np.ndarray, points: int = POINTS) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(x, mean, lowest, highest) of at most `points` runs of neighbours; the last one ends where the curve ends."""
    parts = [part for part in np.array_split(np.arange(len(x)), min(points, len(x))) if len(part)]
    ends = np.array([x[part[-1]] for part in parts])
    mean, lowest, highest = (np.array([f(y[part]) for part in parts]) for f in (np.mean, np.min, np.max))
    return ends, mean, lowest, highest


def series(run: Run, quantity: Quantity, key: str, epochs: bool) -> tuple[np.ndarray, np.ndarray]:
    """(steps or epochs, figures) of the rows that have a figure of that name; NaN for what no axis has room for."""
    rows = run.knn if quantity.knn else run.rows
    found = [(row["step"], row[key]) for row in rows if isinstance(row.get(key), (int, float))]
    x, y = np.array(found, float).reshape(-1, 2).T
    y = np.where(np.abs(y) < LARGEST, y, np.nan)
    if epochs:
        x = x / run.steps_per_epoch
    return x, y * 100 if quantity.percent else y


def in_epochs(runs: Sequence[Run]) -> bool:
    """Steps, unless all runs know their epochs and one has more than two of them."""
    lengths = [run.rows[-1]["step"] / run.steps_per_epoch for run in runs if run.rows and run.steps_per_epoch]
    return all(run.steps_per_epoch for run in runs) and max(lengths, default=0) > 2


def letter(i: int) -> str:
    """What run i of several is called in charts and tables: A to Z, then numbers."""
    return chr(ord("A") + i) if i < 26 else str(i + 1)


def curves_of(quantity: Quantity, runs: Sequence[Run], epochs: bool) -> list[Curve]:
    """A curve for each run and key that has figures; none where they don't vary and that says nothing."""
    curves = []
    for i, run in enumerate(runs):
        if quantity.teacher and not run.has_teacher:
            continue
        for key, style in quantity.keys.items():
            x, y = series(run, quantity, key, epochs)
            if len(x):
                curves.append(Curve(i, style, x, y))
    if quantity.if_it_varies and len({value for curve in curves for value in curve.y}) == 1:
        return []
    return curves


def ticks_of(low: float, high: float, most: int = 5) -> np.ndarray:
    """Round numbers, of which the first and the last are the ends of an axis that has room for both values."""
    from matplotlib.ticker import MaxNLocator

    if high - low < 1e-6 * max(abs(low), abs(high)):  # a constant, which no rounding error may spread over the axis
        low, high = sorted((low, high or 1.0, 2 * low))[::2]
    return np.asarray(MaxNLocator(most, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high))


def ticks_to(end: float, most: int = 6) -> np.ndarray:
    """Whole numbers from 0, and `end`, which is any number; what would touch its label is left out."""
    from matplotlib.ticker import MaxNLocator

    whole = np.asarray(MaxNLocator(most, integer=True, steps=[1, 2, 5, 10]).tick_values(0, end))
    step = whole[1] - whole[0]
    return np.array([*whole[whole < end - 0.55 * step], end])


def chart(quantity: Quantity, runs: Sequence[Run], only: Sequence[int] | None = None) -> Chart | None:
    """The curves of the runs, or of `only` those in these places; None where there is nothing to draw."""
    epochs = in_epochs(runs)
    every_curve = [curve for curve in curves_of(quantity, runs, epochs) if only is None or curve.run in only]
    curves = [curve for curve in every_curve if np.isfinite(curve.y).any()]
    if not curves:
        return None
    import matplotlib
    from matplotlib.figure import Figure

    settings: Any = {
        "svg.fonttype": "none", "svg.hashsalt": quantity.title, "font.family": "sans-serif", "font.size": 11,
        "text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.edgecolor": FAINT,
        "axes.spines.top": False, "axes.spines.right": False, "axes.formatter.useoffset": False,
        "xtick.major.size": 0, "ytick.major.size": 0, "xtick.major.pad": 7,
    }  # fmt: skip
    guesses = sorted({guess(row) for run in runs for row in run.knn}) if quantity.knn else []
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=SIZE, layout="constrained")
        axes = figure.add_subplot()
        for curve in curves:
            _draw(axes, curve, spread=len(runs) == 1)
        for share in guesses:
            axes.axhline(share, color=INK, linewidth=1.2, linestyle=DOTTED)
        sound = [curve for curve in curves if not diverged(runs[curve.run])] or curves
        _scale(axes, quantity, sound, epochs)
        for curve, line in zip(curves, axes.lines, strict=False):
            line.set_clip_on(curve not in sound)  # marks at the edge are whole
        if len(runs) > 1:
            _name(axes, curves)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    styles = {curve.style for curve in curves} | ({DOTTED} if guesses else set())
    svg = themed(file.getvalue(), described(quantity, curves, epochs, named=len(runs) > 1))
    note = _missing(every_curve, axes.get_ylim(), axes.get_xlabel(), named=len(runs) > 1)
    return Chart(quantity, svg, frozenset(styles), note)


def guess(row: dict[str, Any]) -> float:
    """Percent of the labels that naming the largest class, or any of equal ones, gets right."""
    share = row.get("majority", -1.0)
    return 100 * share if 0 <= share <= 1 else 100 / row["classes"]


def diverged(run: Run) -> bool:
    """Its figures then don't say how long the axes of others are."""
    return bool(run.rows) and not math.isfinite(run.rows[-1].get("loss", 0.0))


def _draw(axes: Any, curve: Curve, spread: bool) -> None:
    """spread: shade what lies between the lowest and the highest of the points that are drawn as one."""
    ends, mean, lowest, highest = thin(curve.x, curve.y)
    colour = RUN.format(curve.run)
    if spread and len(curve.x) > POINTS:
        axes.fill_between(ends, lowest, highest, color=colour, alpha=0.25, linewidth=0)
    marker = "o" if len(ends) <= 30 else None
    axes.plot(ends, mean, curve.style, color=colour, linewidth=1.6, marker=marker, markersize=3)


def _scale(axes: Any, quantity: Quantity, curves: Sequence[Curve], epochs: bool) -> None:
    """Axes that end with a tick each, and have room for the curves."""
    values = np.concatenate([curve.y[np.isfinite(curve.y)] for curve in curves])
    low = min(0.0, values.min()) if quantity.from_zero else values.min()
    high = values.max()
    if quantity.knn:  # the line of guessing, too
        high = max(high, *(line.get_ydata()[0] for line in axes.lines if line.get_linestyle() == DOTTED))
    ticks = ticks_of(low, high)
    axes.set_yticks(ticks)
    axes.set_ylim(ticks[0], ticks[-1])
    across = ticks_to(max(curve.x[-1] for curve in curves) or 1)
    axes.set_xticks(across, [f"{tick:,.0f}" if tick == round(tick) else f"{tick:.4g}" for tick in across])
    axes.set_xlim(0, across[-1])
    axes.set_xlabel("epoch" if epochs else "step")
    axes.grid(color=FAINT, linewidth=0.6)


def _name(axes: Any, curves: Sequence[Curve]) -> None:
    """Each curve's letter at its end; at the right edge none covers another."""
    low, high = axes.get_ylim()
    right = axes.get_xlim()[1]
    ends = []
    for curve in curves:
        at = np.flatnonzero(np.isfinite(curve.y))[-1]
        height = (curve.y[at] - low) / (high - low)
        ends.append((curve.x[at] / right, min(max(height, 0.0), 1.0), curve.run))
    at_edge = sorted((end for end in ends if end[0] > 0.97), key=lambda end: end[1])
    heights = apart([height for _, height, _ in at_edge], LETTER_GAP)
    placed = [(1.0, height, run) for height, (_, _, run) in zip(heights, at_edge, strict=True)]
    for x, y, run in placed + [end for end in ends if end[0] <= 0.97]:
        axes.annotate(
            letter(run), (x, y), xycoords="axes fraction", xytext=(5, 0), textcoords="offset points", va="center",
            color=RUN.format(run), fontweight="bold",
        )  # fmt: skip


def apart(heights: Sequence[float], gap: float) -> list[float]:
    """Ascending heights from 0 to 1, moved as little as a distance of `gap` needs: those that meet spread evenly about
    their mean (isotonic regression of heights that are `gap` apart already).
    """
    blocks: list[tuple[float, int]] = []  # (mean, members)
    for i, height in enumerate(heights):
        mean, members = height - i * gap, 1
        while blocks and blocks[-1][0] > mean:
            before, count = blocks.pop()
            mean = (mean * members + before * count) / (members + count)
            members += count
        blocks.append((mean, members))
    room = max(1 - (len(heights) - 1) * gap, 0.0)
    moved = [min(max(mean, 0.0), room) for mean, members in blocks for _ in range(members)]
    return [start + i * gap for i, start in enumerate(moved)]


def described(quantity: Quantity, curves: Sequence[Curve], epochs: bool, named: bool) -> str:
    """The chart in words, for who can't see it."""
    axis = "epochs" if epochs else "steps"
    parts = []
    for curve in curves:
        finite = curve.y[np.isfinite(curve.y)]
        whose = f"run {letter(curve.run)} " if named else ""
        of = " (projections)" if curve.style == DASHED else ""
        parts.append(f"{whose}from {finite[0]:.4g} to {finite[-1]:.4g} in {curve.x[-1]:.4g} {axis}{of}")
    what = ", ".join(filter(None, (quantity.title, quantity.unit)))
    return f"{what}: {'; '.join(parts)}"


def _missing(curves: Sequence[Curve], limits: tuple[float, float], unit: str, named: bool) -> str:
    """A sentence a run on the rows whose figures can't be drawn, or lie beyond the limits of the axis."""
    sentences: dict[tuple[int, str], str] = {}
    low, high = limits
    for curve in curves:
        whose = f"Run {letter(curve.run)}: " if named else ""
        gone = ~np.isfinite(curve.y)
        beyond = (curve.y < low) | (curve.y > high)
        for what, rows in (("not a number", gone), ("beyond the axis", beyond)):
            if rows.any() and (curve.run, what) not in sentences:
                first = f"the first at {unit} {curve.x[np.flatnonzero(rows)[0]]:.4g}"
                text = f"{whose}{what} in {rows.sum():,} of {len(rows):,} rows, {first}."
                sentences[curve.run, what] = text[0].upper() + text[1:]
    return " ".join(sentences.values())


def themed(svg: str, label: str) -> str:
    """Inline, as wide as its place, in the page's font and colours, which follow light and dark; without what every
    chart of a page would say again: names of groups, rules for all elements.
    """
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    named = f' role="img" aria-label="{html.escape(label)}"'
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', lambda found: found[1] + named, svg, count=1)
    svg = svg.replace(INK, "var(--ink)").replace(FAINT, "var(--line)")
    svg = re.sub(r"#0a0b([0-9a-f]{2})", lambda found: f"var(--run{int(found[1], 16) % COLOURS})", svg)
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    svg = re.sub(
        r"font: ([^;\"]*?)([\d.]+)px [^;\"]*", r"font: \1\2px system-ui, sans-serif", svg
    )  # matplotlib before 3.10
    return re.sub(r"\s*\n\s*", " ", svg)


def charts(runs: Sequence[Run]) -> list[Chart]:
    """Those of `QUANTITIES` that any run has figures for; one a method of those that methods can't share."""
    drawn: list[Chart | None] = []
    for quantity in QUANTITIES:
        methods = list(dict.fromkeys(str(run.config.get("method")) for run in runs))
        if not quantity.of_a_method or len(methods) == 1:
            drawn.append(chart(quantity, runs))
            continue
        for method in methods:
            members = [i for i, run in enumerate(runs) if str(run.config.get("method")) == method]
            explained = quantity.explained if method == methods[0] else ""
            one = replace(quantity, title=f"{quantity.title} of {method}", explained=explained)
            drawn.append(chart(one, runs, members))
    return [one for one in drawn if one]
