"""Embeddings as a picture, nearest neighbours, and images as data URLs."""

import base64
import html
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from PIL import Image

from fastjem.data.levels import Levels
from fastjem.data.picture import shown
from fastjem.data.source import decode_named
from fastjem.report.run import Embeddings
from fastjem.report.tables import scroller
from fastjem.report.views import Sample

LEGEND = 20  # classes that still have a colour of their own and a legend
WIDTH, HEIGHT = 720, 520
SIDE = 46  # of a thumbnail in the picture of the embeddings
MOST_THUMBNAILS = 120  # in it; the others are dots
QUERIES, NEIGHBOURS = 8, 5
CELL = 88  # of an image in a table; the page of several runs shows it smaller
PICTURE = 144  # pixels of its file, as screens have more than one for each of the page


def data_url(image: Image.Image, *, lossless: bool) -> str:
    """PNG for small pictures, whose pixels are the point; JPEG for photographs."""
    file = io.BytesIO()
    image.save(file, "PNG") if lossless else image.save(file, "JPEG", quality=85)
    kind = "png" if lossless else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def thumbnail(image: Image.Image, size: int) -> str:
    """At most `size` pixels on the longer side; never enlarged, which the page does."""
    image = image.copy()
    image.thumbnail((size, size))
    return data_url(image, lossless=max(image.size) <= 64)


@lru_cache(256)
def file_thumbnail(root: str, name: str, size: int, levels: Levels | None = None) -> str | None:
    """None where the image of the source at `root` is gone or can't be read."""
    try:
        return thumbnail(shown(decode_named(root, name, levels)), size)
    except Exception:  # whatever a decoder may raise
        return None


def colour(index: int, classes: int) -> str:
    """One of twenty that the page defines, or a hue: neighbours in the list of classes are then neighbours in hue."""
    if classes <= LEGEND:
        return f"var(--class{index})"
    return f"oklch(0.62 0.15 {360 * index / classes:.0f})"  # one lightness, which both light and dark paper can bear


@dataclass(frozen=True)
class Plane:
    """Embeddings in two dimensions."""

    at: np.ndarray  # [N, 2], from 0 to 1
    names: tuple[str, str]  # of the axes


def in_a_plane(rows: np.ndarray, tsne: bool) -> Plane | str:
    """The rows [N, D] in two dimensions, or a sentence that says why they can't be shown so.

    t-SNE (van der Maaten and Hinton 2008) of the unit vectors from their first principal components, or these alone.
    """
    if not np.isfinite(rows).all():
        return "The embeddings are not finite."
    if len(rows) < 3:
        return "Too few images for a picture."
    u, s, _ = torch.linalg.svd(torch.from_numpy(rows - rows.mean(0)), full_matrices=False)
    components = (u[:, :50] * s[:50]).numpy()
    if components.shape[1] < 2 or s[1] <= 1e-6:
        return "The embeddings lie in a point or on a line: there is nothing to draw."
    if tsne:
        from sklearn.manifold import TSNE

        perplexity = min(30.0, (len(rows) - 1) / 3)
        at = TSNE(2, perplexity=perplexity, init="pca", max_iter=500, random_state=0).fit_transform(components)
        names = (f"first t-SNE axis (no unit; perplexity {perplexity:.0f})", "second")
    else:
        at = components[:, :2]
        first, second = (s.square() / s.square().sum().clamp(min=1e-30)).tolist()[:2]
        names = (
            f"first principal component ({first:.0%} of the variance)",
            f"second principal component ({second:.0%} of the variance)",
        )
    low = at.min(0)
    return Plane((at - low) / np.maximum(at.max(0) - low, 1e-12), names)


def picture(embeddings: Embeddings, tsne: bool) -> str:
    """An SVG scatter of the embeddings in two dimensions, dots by class; without classes the images themselves stand
    where they have room. Pointing at either shows the file's name.
    """
    plane = in_a_plane(embeddings.rows, tsne)
    if isinstance(plane, str):
        return f"<p>{plane}</p>"
    edge = 10 if embeddings.labelled else SIDE / 2 + 4
    at = edge + plane.at * (WIDTH - 2 * edge, HEIGHT - 2 * edge)
    at[:, 1] = HEIGHT - at[:, 1]
    thumbnails = {} if embeddings.labelled else _thumbnails(embeddings, at)
    marks = []
    for i in np.random.default_rng(0).permutation(len(at)):  # no class is drawn over all others
        if i not in thumbnails:
            marks.append(_dot(embeddings, i, at[i], small=bool(thumbnails)))
    for i, url in thumbnails.items():
        marks.append(_image(embeddings, i, at[i], url))
    frame = f'<rect x="0.5" y="0.5" width="{WIDTH - 1}" height="{HEIGHT - 1}" class="frame"/>'
    what = f"{len(at):,} embeddings in a plane" + ("" if embeddings.labelled else ", shown by their images")
    axes = f"Across: {plane.names[0]}; upwards: {plane.names[1]}."
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" class="scatter" role="img" aria-label="{what}">'
        f'{frame}{"".join(marks)}</svg>{legend(embeddings, bool(thumbnails))}<p class="note">{axes}</p>'
    )


def _dot(embeddings: Embeddings, i: int, at: np.ndarray, small: bool) -> str:
    fill = colour(int(embeddings.labels[i]), len(embeddings.classes)) if embeddings.labelled else "var(--run0)"
    name = html.escape(embeddings.files[i])
    label = f" ({html.escape(embeddings.classes[embeddings.labels[i]])})" if embeddings.labelled else ""
    radius = 2.5 if small else 4.5
    return f'<circle cx="{at[0]:.1f}" cy="{at[1]:.1f}" r="{radius}" fill="{fill}"><title>{name}{label}</title></circle>'


def _image(embeddings: Embeddings, i: int, at: np.ndarray, url: str) -> str:
    x, y = at - SIDE / 2
    pixels = ' class="pixels"' if url.startswith("data:image/png") else ""
    return (
        f'<g><title>{html.escape(embeddings.files[i])}</title><image x="{x:.1f}" y="{y:.1f}" width="{SIDE}" '
        f'height="{SIDE}" preserveAspectRatio="xMidYMid slice" href="{url}"{pixels}/></g>'
    )


def _thumbnails(embeddings: Embeddings, at: np.ndarray) -> dict[int, str]:
    """Data URLs of images that cover one another by a third of a side at most, by their index; at: [N, 2] places."""
    found: dict[int, str] = {}
    taken = np.empty((0, 2))
    for i in np.random.default_rng(0).permutation(len(at)).tolist():
        if len(found) == MOST_THUMBNAILS:
            break
        if embeddings.files[i] in embeddings.hidden or (np.abs(taken - at[i]).max(1, initial=0) < SIDE * 2 / 3).any():
            continue
        url = file_thumbnail(embeddings.root, embeddings.files[i], 2 * SIDE, embeddings.levels)
        if url:
            found[i] = url
            taken = np.concatenate([taken, at[i : i + 1]])
    return found


def legend(embeddings: Embeddings, thumbnails: bool = False) -> str:
    """What the dots' colours stand for, and how many images these are."""
    shown = f"{len(embeddings.rows):,} of {embeddings.images:,} images"
    if not embeddings.labelled:
        small = "; those that others would cover are dots" if thumbnails else ""
        return f'<p class="note">{shown}{small}. Point at one for its file.</p>'
    classes = embeddings.classes
    if len(classes) > LEGEND:
        text = f"{shown}, {len(classes):,} classes by hue. Point at a dot for its file."
        return f'<p class="note">{text}</p>'
    items = "".join(
        f'<li><i class="dot" style="background:{colour(i, len(classes))}"></i>{html.escape(name)}</li>'
        for i, name in enumerate(classes)
    )
    return f'<ul class="legend">{items}</ul><p class="note">{shown}. Point at a dot for its file.</p>'


def neighbours(embeddings: Embeddings, queries: int = QUERIES, most: int = NEIGHBOURS) -> str:
    """A table of images: a query and those whose embeddings are nearest to it by cosine, the class of each below."""
    rows = embeddings.rows
    if len(rows) < 2 or not np.isfinite(rows).all():
        return "<p>Too few images, or embeddings that are not finite.</p>"
    most = min(most, len(rows) - 1)
    lines = []
    for query in _queries(embeddings, queries):
        cosine = rows @ rows[query]
        cosine[query] = -np.inf
        nearest = np.argsort(-cosine)[:most]
        cells = [cell(embeddings, query, None, True)]
        for i in nearest:
            cells.append(cell(embeddings, i, float(cosine[i]), embeddings.labels[i] == embeddings.labels[query]))
        lines.append(f"<tr>{''.join(cells)}</tr>")
    heads = ["image", *(str(i + 1) for i in range(most))]
    return scroller(image_table(heads, lines, "even"), len(heads) * (CELL + 8), "nearest neighbours")


def _queries(embeddings: Embeddings, most: int) -> np.ndarray:
    """Images evenly over the data, and with labels of as many classes as there are or `most` allows."""
    images = len(embeddings.rows)
    if not embeddings.labelled:
        return np.arange(images)[:: max(images // most, 1)][:most]
    turn = np.zeros(images, int)  # the first image of each class, then the second of each, ...
    for label in np.unique(embeddings.labels):
        members = np.flatnonzero(embeddings.labels == label)
        turn[members] = np.arange(len(members))
    order = np.lexsort((embeddings.labels, turn))
    classes = min(len(embeddings.classes), images)
    if classes >= most:
        order = order[:classes][:: max(classes // most, 1)]
    return order[:most]


def cell(embeddings: Embeddings, i: int, cosine: float | None, same: bool) -> str:
    """One image with its class and cosine; None: it is the query. same: its class is the query's."""
    name = html.escape(embeddings.files[i])
    hidden = embeddings.files[i] in embeddings.hidden
    url = None if hidden else file_thumbnail(embeddings.root, embeddings.files[i], PICTURE, embeddings.levels)
    image = tag(url, name) if url else f'<div class="gone" title="{name}">{"not shown" if hidden else "gone"}</div>'
    label = html.escape(embeddings.classes[embeddings.labels[i]]) if embeddings.labelled else ""
    if cosine is None:
        return f'<td class="query">{image}<small title="{label}">{label}</small></td>'
    value = "" if math.isinf(cosine) else f"{cosine:.2f} "
    mark = "" if same or not embeddings.labelled else ' class="other"'
    return f'<td{mark}>{image}<small title="{label}">{value}{label}</small></td>'


def tag(url: str, name: str, share: float = 1.0) -> str:
    """name: escaped already; share: of a table's pictures' width. Small pictures show their pixels."""
    pixels = ' class="pixels"' if url.startswith("data:image/png") else ""
    narrower = f' style="width:{100 * share:.0f}%"' if share < 1 else ""
    return f'<img src="{url}" alt="{name}" title="{name}"{narrower}{pixels}>'


def view_table(shown: Sequence[Sample], columns: Sequence[str]) -> str:
    """Rows are images, the first column the file itself; small views are drawn at their share of the large ones."""
    lines = []
    for sample in shown:
        cells = [f'<td class="query">{tag(thumbnail(sample.image, PICTURE), html.escape(sample.path))}</td>']
        for name, view in zip(columns, sample.views, strict=True):
            share = view.width / sample.views[0].width
            cells.append(f"<td>{tag(thumbnail(view, PICTURE), html.escape(name), share)}</td>")
        lines.append(f"<tr>{''.join(cells)}</tr>")
    heads = ["image", *map(html.escape, columns)]
    return scroller(image_table(heads, lines), len(heads) * (CELL + 8), "views")


def image_table(heads: Sequence[str], lines: Sequence[str], kind: str = "") -> str:
    """heads, lines: escaped already."""
    titles = "".join(f'<th scope="col">{head}</th>' for head in heads)
    return f'<table class="images {kind}"><thead><tr>{titles}</tr></thead><tbody>{"".join(lines)}</tbody></table>'
