"""A run in a notebook: its page in a frame, or its figures in a few lines."""

import html
import os
from dataclasses import dataclass
from pathlib import Path

from fastjem.report.page import compare, figures, status, write
from fastjem.report.run import read


@dataclass(frozen=True)
class Shown:
    """A page that was written, which a notebook shows in a frame of its own, so that neither changes how the other
    looks.
    """

    path: Path
    height: int  # pixels

    def _repr_html_(self) -> str:
        page = html.escape(self.path.read_text(encoding="utf-8"))
        style = f"width:100%;height:{self.height}px;border:1px solid #8886;border-radius:6px"
        return f'<iframe srcdoc="{page}" title="{html.escape(str(self.path))}" style="{style}"></iframe>'


def show(
    *runs: str | os.PathLike[str], out: str | os.PathLike[str] | None = None, height: int = 720, data: str | None = None
) -> Shown:
    """Write the page of a run, or one page of several, and show it where this is a notebook's last line.

    Args:
        runs: their folders.
        out: the page of several; None: report.html in the working directory. That of one lies in its folder.
        height: of the frame, in pixels.
        data: where the images are, as in `write`.

    Raises:
        UserError: there is no run in a folder, or the page can't be written.
    """
    if len(runs) == 1 and out is None:
        return Shown(write(runs[0], data=data), height)
    return Shown(compare(runs, out or "report.html", data=data), height)


def brief(run: str | os.PathLike[str]) -> str:
    """HTML of what became of a run; its page isn't written anew. UserError where there is no run."""
    found = read(run)
    rows = "".join(f"<tr><th>{name}</th><td>{value}</td></tr>" for name, value in figures(found).items())
    page = found.path / "report.html"
    there = f"<p>Report: <code>{html.escape(os.path.relpath(page))}</code></p>" if page.exists() else ""
    return f"<p>{status(found)}</p><table>{rows}</table>{there}"
