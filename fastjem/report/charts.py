"""Curves over training, as SVG whose colours are the page's: one figure a quantity, one colour a run."""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastjem.report.run import Run

POINTS = 400  # a curve is drawn through so many at most
LARGEST = 1e100  # figure that is drawn
# matplotlib takes no CSS variables: it draws in these colours, and `themed` puts the page's variables in their place.
INK, FAINT = "#0a0a01", "#0a0a02"  # --ink, --line
RUN = "#0a0b{:02x}"  # --run0, --run1, ...
STYLES = ("-", "--", ":")  # of the keys of a quantity


@dataclass(frozen=True)
class Quantity:
    """One chart: `keys` of metrics.jsonl (or knn.jsonl) and what each is called where there is more than one."""

    title: str
    unit: str  # of the vertical axis
    keys: dict[str, str]
    explained: str = ""
    percent: bool = False
    from_zero: bool = False
    knn: bool = False
    if_it_varies: bool = False  # a constant stands in the configuration
    teacher: bool = False  # for runs with a momentum encoder


QUANTITIES = (
    Quantity("Loss", "loss", {"loss": ""}),
    Quantity(
        "Nearest neighbours",
        "right labels (%)",
        {"knn": ""},
        "Share of images whose label their nearest other images tell, by the cosine of the encoder's embeddings; "
        "dotted: guessing.",
        percent=True,
        from_zero=True,
        knn=True,
    ),
    Quantity(
        "Effective rank",
        "directions",
        {"effective_rank": "embeddings", "projection_rank": "projections"},
        "Of a batch of one view; at most the smaller of batch and width. 1 is a collapse.",
        from_zero=True,
    ),
    Quantity(
        "Spread",
        "standard deviation",
        {"std": "projections", "embedding_std": "embeddings"},
        "Projections of length one, times the root of their width: 1 is evenly spread. Embeddings: as a share of "
        "their size. 0 is a collapse.",
        from_zero=True,
    ),
    Quantity(
        "Targets",
        "share (%)",
        {"teacher_entropy": "teacher's entropy", "prototype_usage": "prototypes in use"},
        "Entropy as a share of log K: 100 % is a teacher that has no opinion, 0 % one that gives every image the same.",
        percent=True,
        from_zero=True,
    ),
    Quantity("Learning rate", "learning rate", {"learning_rate": ""}),
    Quantity("Weight decay", "weight decay", {"weight_decay": ""}, if_it_varies=True),
    Quantity("Momentum encoder", "momentum", {"momentum": ""}, if_it_varies=True, teacher=True),
    Quantity("Gradient", "norm before clipping", {"gradient_norm": ""}, from_zero=True),
    Quantity("Speed", "images per second", {"images_per_second": ""}, from_zero=True),
    Quantity(
        "Waiting for data",
        "share of time (%)",
        {"data_wait": ""},
        "Time in which the step waited for the loader.",
        percent=True,
        from_zero=True,
    ),
)


def thin(x: np.ndarray, y: np.ndarray, points: int = POINTS) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(x, mean, lowest, highest) of at most `points` runs of neighbours; the last one ends where the curve ends."""
    parts = [part for part in np.array_split(np.arange(len(x)), min(points, len(x))) if len(part)]
    ends = np.array([x[part[-1]] for part in parts])
    mean, lowest, highest = (np.array([f(y[part]) for part in parts]) for f in (np.mean, np.min, np.max))
    return ends, mean, lowest, highest


def series(run: Run, quantity: Quantity, key: str, epochs: bool) -> tuple[np.ndarray, np.ndarray]:
    """(steps or epochs, figures) of the rows that have a figure of that name."""
    rows = run.knn if quantity.knn else run.rows
    found = [(row["step"], row[key]) for row in rows if isinstance(row.get(key), (int, float))]
    x, y = np.array(found, float).reshape(-1, 2).T
    y = np.where(np.abs(y) > LARGEST, np.nan, y)  # no axis has room for it
    if epochs:
        x = x / run.steps_per_epoch
    return x, y * 100 if quantity.percent else y


def in_epochs(runs: Sequence[Run]) -> bool:
    """Steps, unless all runs know their epochs and one has more than two of them."""
    lengths = [run.rows[-1]["step"] / run.steps_per_epoch for run in runs if run.rows and run.steps_per_epoch]
    return all(run.steps_per_epoch for run in runs) and max(lengths, default=0) > 2


@dataclass(frozen=True)
class Curve:
    colour: str
    style: str
    name: str  # "" where a quantity has one key only
    x: np.ndarray  # [N] steps or epochs
    y: np.ndarray  # [N]


def curves_of(quantity: Quantity, runs: Sequence[Run], epochs: bool) -> list[Curve]:
    """A curve for each run and key that has figures; none where they don't vary and that says nothing."""
    curves = []
    for i, run in enumerate(runs):
        if quantity.teacher and not run.has_teacher:
            continue
        for style, (key, name) in zip(STYLES, quantity.keys.items(), strict=False):
            x, y = series(run, quantity, key, epochs)
            if len(x):
                curves.append(Curve(RUN.format(i), style, name, x, y))
    if quantity.if_it_varies and len({value for curve in curves for value in curve.y}) == 1:
        return []
    return curves


def chart(quantity: Quantity, runs: Sequence[Run]) -> str | None:
    """The SVG, or None where no run has such figures."""
    epochs = in_epochs(runs)
    curves = curves_of(quantity, runs, epochs)
    if not curves:
        return None
    import matplotlib
    from matplotlib.figure import Figure

    settings: Any = {
        "svg.fonttype": "none", "svg.hashsalt": quantity.title, "font.family": "sans-serif", "font.size": 9,
        "text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.edgecolor": FAINT,
        "axes.spines.top": False, "axes.spines.right": False, "axes.formatter.useoffset": False,
    }  # fmt: skip
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(5.2, 2.7), layout="constrained")
        axes = figure.add_subplot()
        for curve in curves:
            _draw(axes, curve, spread=len(runs) == 1)
        if quantity.knn:
            for classes in sorted({row["classes"] for run in runs for row in run.knn}, reverse=True):
                axes.axhline(100 / classes, color=INK, linewidth=1, linestyle=":")  # guessing
        _label(axes, quantity, epochs, end=max(curve.x[-1] for curve in curves))
        _add_legend(figure, curves)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return themed(file.getvalue(), quantity.title)


def _draw(axes: Any, curve: Curve, spread: bool) -> None:
    """spread: shade what lies between the lowest and the highest of the points that are drawn as one."""
    ends, mean, lowest, highest = thin(curve.x, curve.y)
    if spread and len(curve.x) > POINTS:
        axes.fill_between(ends, lowest, highest, color=curve.colour, alpha=0.25, linewidth=0)
    marker = "o" if len(ends) <= 30 else None
    axes.plot(ends, mean, curve.style, color=curve.colour, linewidth=1.5, marker=marker, markersize=3)


def _label(axes: Any, quantity: Quantity, epochs: bool, end: float) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.grid(color=FAINT, linewidth=0.5)
    if quantity.from_zero:
        axes.set_ylim(bottom=0)
    axes.set_xlabel("epoch" if epochs else "step")
    axes.set_ylabel(quantity.unit)
    axes.xaxis.set_major_locator(MaxNLocator(7, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlim(0, end * 1.02 or 1)


def _add_legend(figure: Any, curves: Sequence[Curve]) -> None:
    """The line style of each key; colours are the runs', which the page names."""
    from matplotlib.lines import Line2D

    styles: dict[str, Any] = {curve.name: curve.style for curve in curves}
    if len(styles) > 1:
        lines = [Line2D([], [], color=INK, linestyle=style, linewidth=1.5) for style in styles.values()]
        figure.legend(lines, list(styles), loc="outside upper right", ncols=len(styles), frameon=False)


def themed(svg: str, title: str) -> str:
    """Inline, as wide as its place, in the page's font and colours, which follow light and dark."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', rf'\1 role="img" aria-label="{title}"', svg, count=1)
    svg = svg.replace(INK, "var(--ink)").replace(FAINT, "var(--line)")
    svg = re.sub(r"#0a0b([0-9a-f]{2})", lambda found: f"var(--run{int(found[1], 16) % 8})", svg)
    return re.sub(r"font: ([\d.]+)px [^;\"]*", r"font: \1px system-ui, sans-serif", svg)


def charts(runs: Sequence[Run]) -> list[tuple[Quantity, str]]:
    """Those of `QUANTITIES` that any run has figures for."""
    drawn = [(quantity, chart(quantity, runs)) for quantity in QUANTITIES]
    return [(quantity, svg) for quantity, svg in drawn if svg]
