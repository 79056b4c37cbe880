"""Tables that fit a page of any width: what is wider than its place scrolls sideways there, and says so."""

import html
import re
from collections.abc import Sequence

Escaped = str  # safe within HTML
COLUMN = 150  # pixels that a run's values have at least


def scroller(content: Escaped, width: int, name: str) -> Escaped:
    """content, which needs `width` pixels, in a strip of its own, which the keyboard reaches; name: of the strip."""
    return (
        f'<div class="scroll needs{width}"><p class="hint" aria-hidden="true">scroll sideways for more &rarr;</p>'
        f'<div class="strip" tabindex="0" role="region" aria-label="{name}">{content}</div></div>'
    )


def hints(page: Escaped) -> str:
    """CSS for the strips of a page: a hint and a shade at the edge where what a strip holds is wider than it is."""
    rules = []
    for width in sorted({int(found) for found in re.findall(r'class="scroll needs(\d+)"', page)}):
        narrow = f"@container (max-width:{width - 1}px)"
        rules.append(f"{narrow}{{.needs{width}>.hint,.needs{width}::after{{display:block}}}}")
    return "@media screen{" + "\n".join(rules) + "}"


def table(rows: dict[str, list[str]], heads: Sequence[Escaped], name: str) -> Escaped:
    """rows: name -> one value a run. Of several runs, rows whose values differ come first and are marked; the others
    are folded.
    """
    several = len(heads) > 1
    differing = {key: values for key, values in rows.items() if len(set(values)) > 1}
    alike = {key: values for key, values in rows.items() if key not in differing}
    if not several:
        return _table(rows, [], name)
    parts = [_table(differing, heads, name)] if differing else ['<p class="note">The same in all runs.</p>']
    if alike:
        same = {key: values[:1] for key, values in alike.items()}
        count = f"{len(same)} that {'are' if len(same) > 1 else 'is'} the same in all runs"
        parts.append(f"<details><summary>{count}</summary>{_table(same, [], name)}</details>")
    return "".join(parts)


def _table(rows: dict[str, list[str]], heads: Sequence[Escaped], name: str) -> Escaped:
    """heads: of the columns, or none."""
    titles = ""
    if heads:
        columns = "".join(f'<th scope="col"><div>{head}</div></th>' for head in heads)
        titles = f"<thead><tr><td></td>{columns}</tr></thead>"
    lines = []
    for key, values in rows.items():
        mark = ' class="differs"' if len(set(values)) > 1 else ""
        cells = "".join(f"<td>{html.escape(value)}</td>" for value in values)
        lines.append(f'<tr{mark}><th scope="row">{html.escape(key)}</th>{cells}</tr>')
    columns = max(len(heads), 1)
    table = f'<table class="config">{titles}<tbody>{"".join(lines)}</tbody></table>'
    return scroller(table, COLUMN * (columns + 1), name) if heads else f'<div class="columns">{table}</div>'
