"""Embeddings as a picture, nearest neighbours, and images as data URLs."""

import base64
import html
import io
import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from PIL import Image

from fastjem.data.source import decode_named
from fastjem.report.run import Embeddings
from fastjem.report.views import Sample

LEGEND = 20  # classes that still have a colour of their own and a legend
WIDTH, HEIGHT, MARGIN = 720, 520, 34
QUERIES, NEIGHBOURS = 8, 5


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
def file_thumbnail(root: str, name: str, size: int) -> str | None:
    """None where the file is gone or can't be read."""
    try:
        return thumbnail(decode_named(root, name), size)
    except Exception:  # whatever a decoder may raise
        return None


def colour(index: int, classes: int) -> str:
    """One of twenty that the page defines, or a hue: neighbours in the list of classes are then neighbours in hue."""
    if classes <= LEGEND:
        return f"var(--class{index})"
    return f"hsl({360 * index / classes:.0f} 65% 55%)"


def picture(embeddings: Embeddings, tsne: bool) -> str:
    """An SVG scatter of the embeddings in two dimensions; pointing at a dot shows the file's name.

    t-SNE (van der Maaten and Hinton 2008) of the unit vectors from their first principal components, or these alone.
    """
    rows = embeddings.rows
    if not np.isfinite(rows).all():
        return "<p>The embeddings are not finite.</p>"
    if len(rows) < 3:
        return "<p>Too few images for a picture.</p>"
    centred = torch.from_numpy(rows - rows.mean(0))
    u, s, _ = torch.linalg.svd(centred, full_matrices=False)
    components, share = (u[:, :50] * s[:50]).numpy(), (s.square() / s.square().sum().clamp(min=1e-30)).tolist()
    if components.shape[1] < 2 or s[1] <= 1e-6:
        return "<p>The embeddings lie in a point or on a line: there is nothing to draw.</p>"
    if tsne:
        from sklearn.manifold import TSNE

        perplexity = min(30.0, (len(rows) - 1) / 3)
        at = TSNE(2, perplexity=perplexity, init="pca", max_iter=500, random_state=0).fit_transform(components)
        names = (f"t-SNE, first axis (no unit; perplexity {perplexity:.0f})", "second axis")
    else:
        at = components[:, :2]
        names = tuple(f"{name} principal component ({x:.0%} of the variance)"
                      for name, x in zip(("first", "second"), share, strict=False))  # fmt: skip
    low, high = at.min(0), at.max(0)
    at = (at - low) / np.maximum(high - low, 1e-12)
    dots = []
    order = np.random.default_rng(0).permutation(len(at))  # no class is drawn over all others
    for i in order:
        x = MARGIN + 8 + at[i, 0] * (WIDTH - MARGIN - 16)
        y = HEIGHT - MARGIN - 8 - at[i, 1] * (HEIGHT - MARGIN - 16)
        fill = colour(int(embeddings.labels[i]), len(embeddings.classes)) if embeddings.labelled else "var(--run0)"
        name = html.escape(embeddings.files[i])
        dots.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{fill}"><title>{name}</title></circle>')
    frame = f'<rect x="{MARGIN}" y="1" width="{WIDTH - MARGIN - 1}" height="{HEIGHT - MARGIN}" class="frame"/>'
    labels = (
        f'<text x="{(WIDTH + MARGIN) / 2}" y="{HEIGHT - 10}" text-anchor="middle">{names[0]}</text>'
        f'<text transform="translate(20 {(HEIGHT - MARGIN) / 2}) rotate(-90)" text-anchor="middle">{names[1]}</text>'
    )
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" class="scatter" role="img" aria-label="Embeddings">'
        f"{frame}{labels}{''.join(dots)}</svg>{legend(embeddings)}"
    )


def legend(embeddings: Embeddings) -> str:
    shown = f"{len(embeddings.rows):,} of {embeddings.images:,} images"
    if not embeddings.labelled:
        return f'<p class="note">{shown}. Point at a dot for its file.</p>'
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
    if embeddings.labelled:  # one of each class in turn
        rank = np.zeros(len(rows), int)
        for label in np.unique(embeddings.labels):
            at = np.flatnonzero(embeddings.labels == label)
            rank[at] = np.arange(len(at))
        order = np.lexsort((embeddings.labels, rank))
        classes = min(len(embeddings.classes), len(rows))
        chosen = order[:classes][:: max(classes // queries, 1)] if classes >= queries else order
    else:
        chosen = np.arange(len(rows))[:: max(len(rows) // queries, 1)]
    lines = []
    for query in chosen[:queries]:
        cosine = rows @ rows[query]
        cosine[query] = -np.inf
        nearest = np.argsort(-cosine)[: min(most, len(rows) - 1)]
        cells = [cell(embeddings, query, None, True)]
        cells += [cell(embeddings, i, cosine[i], embeddings.labels[i] == embeddings.labels[query]) for i in nearest]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    heads = "<th>image</th>" + "".join(f"<th>{i + 1}</th>" for i in range(min(most, len(rows) - 1)))
    return f'<div class="scroll"><table class="images even"><tr>{heads}</tr>{"".join(lines)}</table></div>'


def cell(embeddings: Embeddings, i: int, cosine: float | None, same: bool) -> str:
    name = html.escape(embeddings.files[i])
    url = file_thumbnail(embeddings.root, embeddings.files[i], 112)
    image = tag(url, name) if url else f'<div class="gone" title="{name}">gone</div>'
    label = html.escape(embeddings.classes[embeddings.labels[i]]) if embeddings.labelled else ""
    if cosine is None:
        return f'<td class="query">{image}<small title="{label}">{label}</small></td>'
    value = "" if math.isinf(cosine) else f"{cosine:.2f} "
    mark = "" if same or not embeddings.labelled else ' class="other"'
    return f'<td{mark}>{image}<small title="{label}">{value}{label}</small></td>'


def tag(url: str, name: str, width: int = 96) -> str:
    """name: escaped already. Small pictures show their pixels."""
    pixels = ' class="pixels"' if url.startswith("data:image/png") else ""
    return f'<img src="{url}" alt="{name}" title="{name}" style="width:{width}px"{pixels}>'


def view_table(shown: Sequence[Sample], columns: Sequence[str]) -> str:
    """Rows are images, the first column the file itself; small views are drawn at their share of the large ones."""
    heads = "".join(f"<th>{html.escape(name)}</th>" for name in ("image", *columns))
    lines = []
    for sample in shown:
        cells = [f'<td class="query">{tag(thumbnail(sample.image, 112), html.escape(sample.path))}</td>']
        for name, view in zip(columns, sample.views, strict=True):
            width = round(96 * view.width / sample.views[0].width)
            cells.append(f"<td>{tag(thumbnail(view, 112), html.escape(name), width)}</td>")
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f'<div class="scroll"><table class="images"><tr>{heads}</tr>{"".join(lines)}</table></div>'
