"""The page: one run, or several side by side. Everything is inline; no script, no outside resource."""

import html
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from fastjem.checkpoints import write_atomically
from fastjem.data.masking import mask_specs, masks_of_run
from fastjem.data.size import written
from fastjem.data.spread import spread
from fastjem.data.stages import Sizes
from fastjem.errors import UserError
from fastjem.health import Alarm
from fastjem.methods import preset_of, views_of
from fastjem.printing import printable, say
from fastjem.reading import why_not
from fastjem.report.charts import COLOURS, DASHED, DOTTED, MEANING, SOLID, Chart, charts, diverged, letter
from fastjem.report.durations import durations, spoken
from fastjem.report.pictures import neighbours, picture, view_table
from fastjem.report.run import Run, read
from fastjem.report.style import CSS
from fastjem.report.tables import Escaped, hints, scroller, table
from fastjem.report.views import samples, titles

VIEWED = 4  # images whose views are shown
WAITED = 0.2  # share of the time waited for data that is worth a word
NOT_SHOWN = ("out", "resume", "views")
# The first columns of several runs.
ORDER = ("method", "encoder", "pixels", "images", "progress", "epochs", "time", "time per epoch", "time to go")


def write(run: str | os.PathLike[str], *, tsne: bool = True, data: str | None = None, trusted: bool = False) -> Path:
    """`report.html` in the run's folder, whole or not at all; its path.

    What is wrong with the run's files is said, here and on the page.

    Args:
        tsne: draw the embeddings by t-SNE (seconds); False: by their two first principal components.
        data: where the images are, if not where the run says; links in this folder are followed.
        trusted: the files in the run's folder are this process's own: images are opened wherever they say.

    Raises:
        UserError: there is no run in the folder, or the page can't be written there.
    """
    found = read(run, data=data, trusted=trusted)
    return save(Path(run) / "report.html", [found], tsne)


def compare(
    runs: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str], *, tsne: bool = True, data: str | None = None
) -> Path:
    """One page for several runs: curves in the same charts, pictures and options next to each other; see `write`."""
    if not runs:
        raise UserError("report needs the folder of a run")
    return save(Path(out), [read(run, data=data) for run in runs], tsne)


def save(path: Path, runs: Sequence[Run], tsne: bool) -> Path:
    """The page of the runs, in the file `path`."""
    for trouble in (trouble for run in runs for trouble in run.troubles):
        say(f"fastjem: {trouble}")
    text = page(runs, tsne)
    try:
        write_atomically(path, text.encode("utf-8", "replace"))
    except OSError as error:
        raise UserError(f"{path} could not be written: {why_not(error)}") from None
    return path


def page(runs: Sequence[Run], tsne: bool) -> str:
    """The whole page."""
    names = [html.escape(name) for name in names_of(runs)]
    title = " and ".join(names) if len(runs) < 3 else f"{len(runs)} runs"
    marked = names if len(runs) == 1 else [f"{badge(i)}{name}" for i, name in enumerate(names)]
    pictures: dict[str, Callable[[Run], str]] = {
        "Embeddings": lambda run: scatter(run, tsne),
        "Nearest neighbours": nearest,
        "Views": seen,
    }
    parts = {"Training": curves(runs, marked)}
    if len(runs) == 1:
        parts["Images"] = cards(list(pictures), [make(runs[0]) for make in pictures.values()])
    else:
        for heading, make in pictures.items():
            parts[heading] = cards(marked, [make(run) for run in runs])
    parts["Configuration"] = options(runs, marked)
    parts["Where it ran"] = environment(runs, marked)
    links = "".join(f'<li><a href="#{anchor(heading)}">{heading}</a></li>' for heading in parts)
    sections = "".join(
        f'<section aria-labelledby="{anchor(heading)}"><h2 id="{anchor(heading)}">{heading}</h2>{content}</section>'
        for heading, content in parts.items()
    )
    written = time.strftime("%Y-%m-%d %H:%M")
    kind = ' class="several"' if len(runs) > 1 else ""
    body = (
        f"<body{kind}><header><h1>{title}</h1>{head(runs, marked)}</header>"
        f'<nav aria-label="parts of this page"><ul>{links}</ul></nav><main>{sections}</main>'
        f'<footer><p class="note">Written by fastjem on {written}.</p></footer></body>'
    )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{CSS}{hints(body)}</style></head>'
        f"{body}</html>\n"
    )


def anchor(heading: str) -> str:
    return heading.lower().replace(" ", "-")


def badge(i: int) -> Escaped:
    """The letter of run i in the colour of its curves."""
    return f'<i class="badge" style="background:var(--run{i % COLOURS})">{letter(i)}</i>'


def head(runs: Sequence[Run], marked: Sequence[Escaped]) -> str:
    """What became of the runs, in a sentence and figures or a table, and what is wrong."""
    if len(runs) > 1:
        texts = [f"{name}: {text}" for run, name in zip(runs, marked, strict=True) for text in warnings(run)]
        return summary(runs, marked) + "".join(f'<p class="warn">{text}</p>' for text in texts)
    texts = warnings(runs[0])
    tiles = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in figures(runs[0]).items())
    warned = "".join(f'<p class="warn">{text}</p>' for text in texts)
    return f'<p>{status(runs[0])}</p>{warned}<dl class="tiles">{tiles}</dl>'


def names_of(runs: Sequence[Run]) -> list[str]:
    """The folders' names, with as much of the path before them as tells them apart."""
    for depth in range(1, max(len(run.path.parts) for run in runs)):
        names = ["/".join(run.path.parts[-depth:]) for run in runs]
        if len(set(names)) == len(names):
            return names
    return [f"{i + 1}: {run.name}" for i, run in enumerate(runs)]


def facts(run: Run) -> dict[str, str]:
    """What was trained on what, by name."""
    config = run.config
    images = run.environment.get("images")
    found = {
        "method": str(config.get("method")),
        "encoder": str(config.get("backbone")),
        "pixels": ", then ".join(map(written, Sizes.of(config["image_size"]).pixels)),
    }
    return found | ({"images": f"{images:,}"} if images else {})


def progress(run: Run) -> str:
    steps = run.environment.get("steps", 0)
    done = run.rows[-1]["step"] if run.rows else 0
    if done and done == steps:
        return "finished"
    return f"{done:,} of {steps:,} steps" if steps else f"{done:,} steps"


def status(run: Run) -> Escaped:
    known = facts(run)
    data = f" on {known['images']} images" if "images" in known else ""
    time_taken = ""
    if spent := durations(run):
        time_taken = f" in {spoken(spent.taken)}"
        if spent.left is not None:
            time_taken += f", {spoken(spent.left, roughly=True)} to go"
    what = f"{known['method']}, {known['encoder']} at {known['pixels']} pixels{data}"
    return html.escape(f"{what}: {progress(run)}{time_taken}")


def warnings(run: Run) -> list[Escaped]:
    """What is wrong with its files, what its own alarm said, and a loader that is too slow."""
    alarm = Alarm(run.method is not None and run.method.asymmetric)
    complete = [row for row in run.rows if {"loss", "embedding_std", "effective_rank"} <= row.keys()]
    texts = [text for row in complete if (text := alarm(row["step"], row))]
    if diverged(run) and not texts:  # the alarm waits for a second row, which a run that gives up doesn't have
        texts.append(f"step {run.rows[-1]['step']}: the loss is not a number")
    waited = median(run, "data_wait")
    if waited > WAITED:
        texts.append(f"the steps waited for data {waited:.0%} of their time (the median): more --workers may help")
    return [html.escape(printable(text)) for text in (*run.troubles, *texts)]


def median(run: Run, key: str) -> float:
    return statistics.median([row[key] for row in run.rows if key in row] or [0.0])


def figures(run: Run) -> dict[str, Escaped]:
    """What a reader wants to know first, by name."""
    found = {}
    newest = run.rows[-1] if run.rows else {}
    if run.rows:
        found["steps"] = f"{newest['step']:,}"
        if run.steps_per_epoch:
            found["epochs"] = f"{newest['step'] / run.steps_per_epoch:.4g}"
    if spent := durations(run):
        found["time"] = spoken(spent.taken)
        if spent.per_epoch is not None:
            found["time per epoch"] = spoken(spent.per_epoch)
        if spent.left is not None:
            found["time to go"] = spoken(spent.left, roughly=True)
    if "loss" in newest:
        found["loss"] = number(newest["loss"], ".4g")
    if run.knn:
        whose = " of the momentum encoder" if run.config.get("teacher") else ""
        found[f"kNN{whose}, {run.knn[-1]['classes']} classes"] = f"{run.knn[0]['knn']:.1%} → {run.knn[-1]['knn']:.1%}"
    if run.rows:
        if "effective_rank" in newest:
            found["effective rank"] = number(newest["effective_rank"], ".1f")
        found["images per second"] = f"{median(run, 'images_per_second'):,.0f}"
        found["waiting for data"] = f"{median(run, 'data_wait'):.0%}"
    return found


def number(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else "not a number"


def summary(runs: Sequence[Run], marked: Sequence[Escaped]) -> str:
    """A table: a line for each run. What is the same for all stands in the sentence before it; losses, which compare
    within a method only, stand in it where there is one.
    """
    known = [facts(run) for run in runs]
    shared = {key: value for key, value in known[0].items() if all(one.get(key) == value for one in known)}
    rows = []
    for run, one in zip(runs, known, strict=True):
        row = {key: html.escape(value) for key, value in one.items() if key not in shared}
        row |= {"progress": progress(run)} | figures(run)
        row.pop("steps", None)
        if "method" not in shared:
            row.pop("loss", None)
        rows.append(row)
    columns = [column for column in ORDER if any(column in row for row in rows)]
    columns += [column for column in dict.fromkeys(column for row in rows for column in row) if column not in columns]
    heads = '<th scope="col">run</th>' + "".join(f'<th scope="col">{column}</th>' for column in columns)
    lines = []
    for name, row in zip(marked, rows, strict=True):
        cells = "".join(f"<td>{row.get(column, '')}</td>" for column in columns)
        lines.append(f'<tr><th scope="row"><div>{name}</div></th>{cells}</tr>')
    in_common = [f"{value} {key}" if key in ("pixels", "images") else f"{key} {value}" for key, value in shared.items()]
    sentence = f"<p>In all of them: {html.escape(', '.join(in_common))}.</p>" if in_common else ""
    content = f'<table class="summary"><thead><tr>{heads}</tr></thead><tbody>{"".join(lines)}</tbody></table>'
    return sentence + scroller(content, 200 + 80 * len(columns), "runs")


def curves(runs: Sequence[Run], marked: Sequence[Escaped]) -> str:
    drawn = charts(runs)
    if not drawn:
        return '<p class="note">No step has been logged yet.</p>'
    sections = []
    for one in drawn:
        notes = [text for text in (one.note, one.quantity.explained) if text]
        below = f'<p class="note">{" ".join(notes)}</p>' if notes else ""
        unit = f" <small>{one.quantity.unit}</small>" if one.quantity.unit else ""
        title = f"<h3>{html.escape(one.quantity.title)}{unit}</h3>"
        sections.append(f"<section>{title}{one.svg}{below}</section>")
    return f'{key(drawn, marked if len(runs) > 1 else [])}<div class="charts">{"".join(sections)}</div>'


def key(drawn: Sequence[Chart], marked: Sequence[Escaped]) -> str:
    """What colours, letters and lines mean: the same in every chart of the page."""
    used = frozenset().union(*(one.styles for one in drawn))
    items = [f"<li>{name}</li>" for name in marked]
    for style, meaning in MEANING.items():
        if style in used:
            dash = {SOLID: "", DASHED: ' stroke-dasharray="6 3"', DOTTED: ' stroke-dasharray="2 3"'}[style]
            line = f'<svg viewBox="0 0 30 8" class="line" aria-hidden="true"><path d="M0 4H30"{dash}/></svg>'
            items.append(f"<li>{line}{meaning}</li>")
    return f'<ul class="legend key" aria-label="meaning of the lines">{"".join(items)}</ul>'


def cards(heads: Sequence[Escaped], contents: Sequence[str]) -> str:
    """Sections side by side; views, up to ten pictures in a row, have a line of their own."""
    sections = (
        f'<section class="card{" wide" if head == "Views" else ""}"><h3>{head}</h3>{content}</section>'
        for head, content in zip(heads, contents, strict=True)
    )
    return f'<div class="side">{"".join(sections)}</div>'


def scatter(run: Run, tsne: bool) -> str:
    if run.embeddings is None:
        return '<p class="note">No embeddings have been saved yet.</p>'
    whose = " Of the momentum encoder." if run.config.get("teacher") else ""
    return picture(run.embeddings, tsne) + f'<p class="note">After step {run.embeddings.step:,}.{whose}</p>'


def nearest(run: Run) -> str:
    if run.embeddings is None:
        return '<p class="note">No embeddings have been saved yet.</p>'
    note = "By the cosine of their embeddings, which stands below each."
    if run.embeddings.labelled:
        note += " Framed: another class than the first image's."
    return f'{neighbours(run.embeddings)}<p class="note">{note}</p>'


def seen(run: Run) -> str:
    """The views that the run had of some images in its first epoch, and the mask if it has one."""
    config = run.config
    embeddings = run.embeddings
    if run.method is None:
        return '<p class="note">The method is no part of fastjem, so its views are not known here.</p>'
    if embeddings is None:
        return '<p class="note">No images have been saved yet.</p>'
    sizes = Sizes.of(config["image_size"])
    size = sizes.last
    patch = run.environment.get("patch", 1)
    preset = config.get("preset", "imagenet")
    views = views_of(
        config["method"], size, config.get("small_views"), config.get("recipe"), preset, config.get("large_views")
    )
    if views.sources > 1:
        return '<p class="note">Images of several sources belong together: fastjem views shows them.</p>'
    given = config.get("options") or {}
    if views.mask:  # an option may change how much is hidden, and how
        views = replace(views, mask=given.get("mask", views.mask), masking=given.get("masking", views.masking))
    specs = views.specs(
        size, patch=patch, blur=config.get("blur"), changes=config.get("view"), channels=config.get("channels", 3)
    )
    masks = mask_specs(views, size, patch)
    if config.get("mask"):
        masks = masks_of_run(specs, patch, config["mask"], config.get("masking") or "random")
    mask = masks[0] if masks else None
    # Evenly spread over the images first; the others stand in for files that can't be read.
    spread_first = [*spread(len(embeddings.files), VIEWED).tolist(), *range(len(embeddings.files))]
    order = dict.fromkeys(i for i in spread_first if embeddings.files[i] not in embeddings.hidden)
    shown = samples(
        ((embeddings.indices[i], embeddings.files[i]) for i in order),
        specs,
        levels=embeddings.levels,
        root=embeddings.root,
        images=VIEWED,
        seed=config.get("seed", 0),
        mask=mask,
    )
    if not shown:
        why = "not shown" if embeddings.hidden else "gone"
        return f'<p class="note">The images in {html.escape(embeddings.root)} are {why}.</p>'
    at_last = f", but of {written(size)} pixels, as the last ones have" if sizes.shares else ""
    return f'{view_table(shown, titles(views, mask is not None))}<p class="note">As in the first epoch{at_last}.</p>'


def options(runs: Sequence[Run], names: Sequence[Escaped]) -> str:
    named = dict.fromkeys(key for run in runs for key in (*run.config, *run.ran))
    keys = [key for key in named if key not in NOT_SHOWN]
    rows = {key.replace("_", " "): [option(run, key) for run in runs] for key in keys}
    return table(rows, names, "configuration")


def option(run: Run, key: str) -> str:
    asked = run.config.get(key)
    value = run.ran.get(key, asked)
    if key in run.ran and not isinstance(value, dict):
        text = "none" if value is None else str(value)
        if value == asked or key not in run.config:
            return text
        return f"{text} ({'not given' if asked is None else asked})"
    if isinstance(value, dict):
        return ", ".join(f"{name}={x}" for name, x in value.items())
    if value is not None:
        return str(value)
    if run.method is None:
        return ""
    preset = preset_of(run.method, run.config.get("preset", "imagenet"))
    defaults = asdict(preset.defaults or run.method.defaults)
    default = defaults.get(key)
    return "" if default is None else f"{default} (the method's)"


def environment(runs: Sequence[Run], names: Sequence[Escaped]) -> str:
    keys = list(dict.fromkeys(key for run in runs for key in run.environment))
    if not keys:
        return '<p class="note">Not recorded.</p>'
    rows = {key.replace("_", " "): [str(run.environment.get(key, "")) for run in runs] for key in keys}
    return table(rows, names, "where it ran")
