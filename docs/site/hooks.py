"""What the site shows of the repository outside of docs/: the README as its first page, and what pages link to there.

Links in the pages are those of the repository, so that they work on a code host too. Here each becomes the page of the
site that shows the file; a link to a file that is no page (a test, a folder) becomes its words alone.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
OUTSIDE = ("CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/README.md")
LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s:]*)\)")
CODE = re.compile(r"(^```.*?^```|`[^`\n]+`(?!\]))", re.DOTALL | re.MULTILINE)


def outside() -> dict[str, str]:
    """File of the repository -> the page that shows it, for those that aren't in docs/."""
    results = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("benchmarks/results/*.md"))
    return {"README.md": "index.md", **{name: name for name in (*OUTSIDE, *results)}}


def page_of(file: str) -> str | None:
    """The page that shows a file of the repository."""
    if file.startswith("docs/") and file.endswith(".md"):
        return file.removeprefix("docs/")
    return outside().get(file)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for file, uri in outside().items():
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / file)))
    return files


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The methods' pages, in the order of their table."""
    table = (ROOT / "docs/methods.md").read_text(encoding="utf-8")
    pages = [{name: uri} for name, uri in re.findall(r"^\| \[(\w+)\]\((methods/\w+\.md)\)", table, re.MULTILINE)]
    for part in config.nav or []:
        if "Methods" in part:
            part["Methods"] = ["methods.md", *pages]
    return config


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    here = {uri: file for file, uri in outside().items()}.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def shown(match: re.Match) -> str:
        words, target = match.groups()
        path, mark, anchor = target.partition("#")
        if not path:
            return match.group(0)
        file = posixpath.normpath(posixpath.join(posixpath.dirname(here), path))
        if not (ROOT / file).exists():
            return match.group(0)  # the build tells of it
        uri = page_of(file)
        if uri is None or files.get_file_from_path(uri) is None:
            return words
        return f"[{words}]({posixpath.relpath(uri, posixpath.dirname(page.file.src_uri) or '.')}{mark}{anchor})"

    # What is code stays as it is; a link whose words are code is a link.
    parts = CODE.split(markdown)
    return "".join(part if i % 2 else LINK.sub(shown, part) for i, part in enumerate(parts))
