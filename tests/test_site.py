"""The documentation site: that its pages are all in the navigation, and that what a page says of options is so.

`make docs` builds it and checks every link.
"""

import dataclasses
import re
from pathlib import Path

import pytest

from fastjem.commands.evaluate import EvaluateOptions
from fastjem.commands.export import ExportOptions
from fastjem.config import Config
from fastjem.methods import METHODS, options_of

ROOT = Path(__file__).parents[1]
NOT_IN_DOCS = {"index.md", "CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/README.md"}  # docs/site/hooks.py brings them


def navigation() -> set[str]:
    text = (ROOT / "mkdocs.yml").read_text()
    return set(re.findall(r"^ +- (?:[^:\n]+: )?([\w/.-]+\.md)$", text[text.index("\nnav:") :], re.MULTILINE))


def test_every_page_is_in_the_navigation() -> None:
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in ROOT.glob("docs/**/*.md")}
    listed = {page for page in pages if not page.startswith("methods/")}  # the hook lists the methods' pages
    assert navigation() - NOT_IN_DOCS == listed


def test_the_hook_finds_every_methods_page() -> None:
    table = (ROOT / "docs/methods.md").read_text()
    found = re.findall(r"^\| \[(\w+)\]\((methods/\w+\.md)\)", table, re.MULTILINE)
    assert {name for name, _ in found} == set(METHODS)
    assert all((ROOT / "docs" / page).exists() for _, page in found)


def options_said(page: Path) -> tuple[set[str], set[str]]:
    """Of our side of the page: the `--options` and the names of methods' own ones."""
    text = page.read_text()
    commands = re.findall(r"fastjem (?:pretrain|evaluate|export) (.*?)(?=^\w|^```)", text, re.DOTALL | re.MULTILINE)
    cells = [row.rsplit("|", 2)[1] for row in re.findall(r"^\| .* \|$", text, re.MULTILINE)]
    ours = "\n".join([*commands, *cells])
    own = [name for said in re.findall(r"--options ((?:\w+=[\w.]* ?)+)", ours) for name in re.findall(r"(\w+)=", said)]
    return set(re.findall(r"--[a-z][a-z-]*", ours)) - {"--nproc-per-node", "--options"}, set(own)


def test_coming_from_names_options_that_are_there() -> None:
    flags, own = options_said(ROOT / "docs/coming-from.md")
    kinds = (Config, EvaluateOptions, ExportOptions)
    known = {f"--{field.name.replace('_', '-')}" for kind in kinds for field in dataclasses.fields(kind)}
    assert len(flags) > 30 and flags <= known, flags - known
    assert len(own) > 15 and own <= {name for method in METHODS.values() for name in options_of(method)}


@pytest.mark.parametrize("name", ["dino", "dinov2", "dinov3", "simclr"])
def test_coming_from_gives_each_method_its_own_options(name: str) -> None:
    text = (ROOT / "docs/coming-from.md").read_text()
    for said in re.findall(rf"--method {name} [^\n]*(?:\n  [^\n]*)*?--options ((?:\w+=[\w.]* ?)+)", text):
        assert set(re.findall(r"(\w+)=", said)) <= set(options_of(METHODS[name])), said


@pytest.mark.exhaustive
def test_it_builds(tmp_path: Path) -> None:
    """Strictly: a link or an anchor that leads nowhere is an error. Pages ask no other host for anything."""
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path / "site"), strict=True))
    pages = sorted((tmp_path / "site").rglob("*.html"))
    assert len(pages) > 60
    for page in pages:
        for asked in re.findall(r'<(?:script|link|img|iframe)\b[^>]*?(?:src|href)="(https?:[^"]*)"', page.read_text()):
            assert 'rel="canonical"' in asked, (page, asked)
    reference = (tmp_path / "site/api/functional.html").read_text()
    import fastjem.functional as F

    assert [name for name in F.__all__ if f'id="fastjem.functional.{name}' not in reference] == []
