"""The page: one run, or several side by side. Everything is inline; no script, no outside resource."""

import html
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
from fastjem.report.charts import charts
from fastjem.report.pictures import neighbours, picture, view_table
from fastjem.report.run import Run, read
from fastjem.report.style import CSS
from fastjem.report.views import samples, titles

VIEWED = 4  # images whose views are shown
WAITED = 0.2  # share of the time waited for data that is worth a word
NOT_SHOWN = ("out", "resume", "views")
Escaped = str  # safe within HTML


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
    body = [f"<h1>{title}</h1>"]
    if len(runs) == 1:
        body += [f"<p>{status(runs[0])}</p>", *(f'<p class="warn">{text}</p>' for text in warnings(runs[0]))]
        tiles = "".join(f"<div>{name}<b>{value}</b></div>" for name, value in figures(runs[0]).items())
        body.append(f'<div class="tiles">{tiles}</div>')
    else:
        body.append(summary(runs, names))
        for run, name in zip(runs, names, strict=True):
            body += [f'<p class="warn">{name}: {text}</p>' for text in warnings(run)]
    body += ["<h2>Training</h2>", curves(runs)]
    pictures: dict[str, Callable[[Run], str]] = {
        "Embeddings": lambda run: scatter(run, tsne),
        "Nearest neighbours": nearest,
        "Views": seen,
    }
    if len(runs) == 1:
        body += ["<h2>Images</h2>", cards(list(pictures), [make(runs[0]) for make in pictures.values()])]
    else:
        for heading, make in pictures.items():
            body += [f"<h2>{heading}</h2>", cards(names, [make(run) for run in runs])]
    body += ["<h2>Configuration</h2>", options(runs, names)]
    body += ["<h2>Where it ran</h2>", environment(runs, names)]
    written = time.strftime("%Y-%m-%d %H:%M")
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{CSS}</style></head>'
        f'<body>{"".join(body)}<p class="note">Written by fastjem on {written}.</p></body></html>\n'
    )


def names_of(runs: Sequence[Run]) -> list[str]:
    """The folders' names, with as much of the path before them as tells them apart."""
    for depth in range(1, max(len(run.path.parts) for run in runs)):
        names = ["/".join(run.path.parts[-depth:]) for run in runs]
        if len(set(names)) == len(names):
            return names
    return [f"{i + 1}: {run.name}" for i, run in enumerate(runs)]


def status(run: Run) -> Escaped:
    config = run.config
    steps = run.environment.get("steps", 0)
    done = run.rows[-1]["step"] if run.rows else 0
    of_all = f" of {steps:,}" if steps else ""
    progress = "finished" if done and done == steps else f"{done:,}{of_all} steps"
    images = run.environment.get("images")
    data = f" on {images:,} images" if images else ""
    sizes = ", then ".join(map(written, Sizes.of(config["image_size"]).pixels))
    what = f"{config.get('method')}, {config.get('backbone')} at {sizes} pixels{data}"
    return html.escape(f"{what}: {progress}")


def warnings(run: Run) -> list[Escaped]:
    """What is wrong with its files, what its own alarm said, and a loader that is too slow."""
    alarm = Alarm(run.method is not None and run.method.asymmetric)
    complete = [row for row in run.rows if {"loss", "embedding_std", "effective_rank"} <= row.keys()]
    texts = [text for row in complete if (text := alarm(row["step"], row))]
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
        if "loss" in newest:
            found["loss"] = f"{newest['loss']:.4g}"
    if run.knn:
        whose = " of the momentum encoder" if run.config.get("teacher") else ""
        found[f"kNN{whose}, {run.knn[-1]['classes']} classes"] = f"{run.knn[0]['knn']:.1%} → {run.knn[-1]['knn']:.1%}"
    if run.rows:
        if "effective_rank" in newest:
            found["effective rank"] = f"{newest['effective_rank']:.1f}"
        found["images per second"] = f"{median(run, 'images_per_second'):,.0f}"
        found["waiting for data"] = f"{median(run, 'data_wait'):.0%}"
    return found


def summary(runs: Sequence[Run], names: Sequence[Escaped]) -> str:
    """A table: a line for each run, with the colour that its curves have."""
    rows = [figures(run) for run in runs]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = ["<tr><th>run</th><th></th>" + "".join(f"<th>{column}</th>" for column in columns) + "</tr>"]
    for i, (run, name, row) in enumerate(zip(runs, names, rows, strict=True)):
        swatch = f'<i class="dot" style="background:var(--run{i % 8})"></i>'
        cells = "".join(f"<td>{row.get(column, '')}</td>" for column in columns)
        lines.append(f"<tr><td>{swatch}{name}</td><td>{status(run)}</td>{cells}</tr>")
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>'


def curves(runs: Sequence[Run]) -> str:
    drawn = charts(runs)
    if not drawn:
        return '<p class="note">No step has been logged yet.</p>'
    sections = []
    for quantity, svg in drawn:
        note = f'<p class="note">{quantity.explained}</p>' if quantity.explained else ""
        sections.append(f"<section><h3>{quantity.title}</h3>{svg}{note}</section>")
    return f'<div class="charts">{"".join(sections)}</div>'


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
    return table({key.replace("_", " "): [option(run, key) for run in runs] for key in keys}, names)


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
    return table({key.replace("_", " "): [str(run.environment.get(key, "")) for run in runs] for key in keys}, names)


def table(rows: dict[str, list[str]], names: Sequence[Escaped]) -> str:
    """rows: name -> one value a run; rows whose values differ are marked."""
    heads = ""
    if len(names) > 1:
        heads = "<tr><th></th>" + "".join(f"<th>{name}</th>" for name in names) + "</tr>"
    lines = []
    for name, values in rows.items():
        mark = ' class="differs"' if len(set(values)) > 1 else ""
        cells = "".join(f"<td>{html.escape(value)}</td>" for value in values)
        lines.append(f"<tr{mark}><td>{html.escape(name)}</td>{cells}</tr>")
    return f'<div class="scroll"><table class="config">{heads}{"".join(lines)}</table></div>'
