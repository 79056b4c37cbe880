"""What the README and the pages for a start show runs as it stands, and every method's page says its defaults."""

import json
import re
import shlex
from pathlib import Path

import pytest
from images import TINY, make_folder

from fastjem.cli import main

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "benchmarks/README.md",
    *sorted(ROOT.glob("docs/**/*.md")),
]
EXAMPLES = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("code", EXAMPLES, ids=range(len(EXAMPLES)))
def test_example(code):
    exec(compile(code, "README.md", "exec"), {})


@pytest.mark.parametrize("page", sorted(ROOT.glob("docs/getting-started-*.md")), ids=lambda page: page.stem)
def test_getting_started(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    """In order, in an empty folder with `photos/`; on the smallest backbone, without worker processes."""
    if "pretraining" in page.stem:
        pytest.importorskip("timm")
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / "photos", 48)
    names: dict = {}
    for kind, text in re.findall(r"```(sh|python)\n(.*?)```", page.read_text(), re.DOTALL):
        text = text.replace("resnet18", "test_resnet")
        if kind == "python":
            text = text.replace('out="runs/', 'workers=0, out="runs/')
            exec(compile(text, page.name, "exec"), names)
            continue
        for line in text.splitlines():
            program, *words = shlex.split(line)
            assert program == "fastjem", line
            # measuring takes a minute: tests/test_bench.py does it
            reads = words[0] in ("pretrain", "evaluate", "embed", "finetune")
            cheap = ["--workers", "0"] if reads else ["--list"] if words[0] == "bench" else []
            assert main([*words, *cheap]) == 0, line


@pytest.mark.parametrize("page", ["embedding", "finetuning"])
def test_what_the_pages_about_uses_of_an_encoder_show(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    pytest.importorskip("timm")
    import fastjem

    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / "photos", 48)
    fastjem.pretrain(**TINY, stem="standard", data="photos/", out="runs/simclr", max_steps=1)
    names: dict = {}
    for kind, text in re.findall(r"```(sh|python)\n(.*?)```", (ROOT / f"docs/{page}.md").read_text(), re.DOTALL):
        if kind == "python":
            exec(compile(text.replace('"runs/simclr", ', '"runs/simclr", workers=0, '), page, "exec"), names)
            continue
        for line in text.splitlines():
            assert main([*shlex.split(line)[1:], "--workers", "0"]) == 0, line


def test_a_method_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    """The class of docs/adding-a-method.md is imported from a file, and trained by the page's calls."""
    pytest.importorskip("timm")
    first, *calls = re.findall(r"```python\n(.*?)```", (ROOT / "docs/adding-a-method.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "alignuniform.py").write_text(first)
    make_folder(tmp_path / "photos", 48)
    for code in calls:
        code = code.replace("resnet18", "test_resnet").replace(
            'out="runs/', 'workers=0, max_steps=2, report=False, out="runs/'
        )
        exec(compile(code, "adding-a-method.md", "exec"), {})
    rows = [json.loads(line) for line in (tmp_path / "runs/alignuniform/metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] == pytest.approx(rows[-1]["loss_align"] + rows[-1]["loss_uniform"], rel=1e-5)


def test_what_the_page_about_encoders_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    pytest.importorskip("timm")
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / "photos", 48)
    names: dict = {}
    for code in re.findall(r"```python\n(.*?)```", (ROOT / "docs/encoders.md").read_text(), re.DOTALL):
        code = code.replace("resnet18", "test_resnet").replace("epochs=", "workers=0, report=False, epochs=")
        exec(compile(code, "encoders.md", "exec"), names)
    assert not names["encoder"].training


def test_what_the_page_about_weights_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    """In order; all routes give an image the same embedding."""
    for package in ("timm", "torchvision"):
        pytest.importorskip(package)
    import torch

    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / "photos", 6)
    names: dict = {}
    few = "workers=0, report=False, device='cpu', batch_size=2, max_steps=1"
    for kind, code in re.findall(r"```(sh|python)\n(.*?)```", (ROOT / "docs/weights.md").read_text(), re.DOTALL):
        if kind == "sh":
            assert main(shlex.split(code)[1:]) == 0
        else:
            exec(compile(code.replace("batch_size=16, epochs=1", few), "weights.md", "exec"), names)
    ours, timms = names["embeddings"][0], names["embedding"][0]
    torchvisions = names["model"].eval()(names["transform"](names["image"])[None])[0]
    torch.testing.assert_close(timms, ours, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torchvisions, ours, rtol=1e-4, atol=1e-5)
    assert names["tuned"].num_classes == 10


def test_every_method_has_its_page() -> None:
    module = pytest.importorskip("fastjem.methods")
    assert {page.stem for page in ROOT.glob("docs/methods/*.md")} == set(module.METHODS)
    index = (ROOT / "docs/methods.md").read_text()
    for name, method in module.METHODS.items():
        row = next(line for line in index.splitlines() if line.startswith(f"| [{name}](methods/{name}.md)"))
        optimizer, rate = re.split(r"[, (]+", row.split("|")[4].strip())[:2]
        assert optimizer.lower() == method.defaults.optimizer, name
        assert float(rate) == pytest.approx(method.defaults.learning_rate, rel=0.02), name
        page = (ROOT / f"docs/methods/{name}.md").read_text()
        said = dict(re.findall(r"^\| `(\w+)` \| (\S+) \|", page, re.MULTILINE))
        assert said == {option: str(default) or '""' for option, default in module.options_of(method).items()}, name
        presets = re.findall(r"^\| (\w+) \|(?:[^|]*\|){3}$", page, re.MULTILINE)
        assert set(presets) - {"preset"} == set(method.presets), name
        assert re.search(r"arXiv \d{4}\.\d{4,5}", page)


def test_narrower_heads_are_on_the_methods_own_page() -> None:
    module = pytest.importorskip("fastjem.methods")
    for name, method in module.METHODS.items():
        page = (ROOT / f"docs/methods/{name}.md").read_text()
        [said] = re.findall(r"an encoder below 2 M parameters has (.*) wide", page) or [""]
        assert set(re.findall(r"`(\w+)`", said)) == set(method.small_widths), name


def test_what_depends_on_the_layer_is_on_the_page_about_encoders_and_on_the_methods_own() -> None:
    module = pytest.importorskip("fastjem.methods")
    table = re.findall(r"^\| (\w+) \|((?: [\d.]+ \|){4}).*\|$", (ROOT / "docs/encoders.md").read_text(), re.MULTILINE)
    said = {name: tuple(float(cell) for cell in cells.split("|")[:4]) for name, cells in table}
    found = {}
    for name, method in module.METHODS.items():
        defaults = method.defaults
        rates = (defaults.drop_path_of(12), defaults.drop_path_of(24), defaults.layer_decay, defaults.patch_embed_rate)
        if rates == (0, 0, 1, 1):
            continue
        found[name] = rates
        page = (ROOT / f"docs/methods/{name}.md").read_text().lower()
        assert f"drop path {rates[0]:g}" in page and "runs of 10,000" in page, name
        assert f"layer decay {rates[2]:g}" in page or rates[2] == 1, name
        assert f"patch embedding at {rates[3]:g}" in page or rates[3] == 1, name
    assert said == found


def anchors(page: Path) -> set[str]:
    """What `#...` may name on a page, as GitHub makes it of a heading."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*?)\s*$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#:]*)#?([^):]*)\)", page.read_text()):
        file = page.parent / target if target else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), f"{target}#{anchor}"


def test_the_table_of_what_is_there_is_true():
    from fastjem import ops

    tiles = {"torch": "torch (products of tiles)"}
    cells = {
        "cpu": {"yes": "C++", "no": "reference (no C++ kernel yet)", **tiles},
        "cuda": {"yes": "Triton", "no": "reference (no Triton kernel yet)", **tiles},
    }
    named: set[str] = set()
    for row in re.findall(r"^\| `.*$", (ROOT / "README.md").read_text(), re.MULTILINE):
        names, reference, cpu, cuda = (cell.strip() for cell in row.strip("|").split("|"))
        assert reference == "yes"
        for name in re.findall(r"`(\w+)`", names):
            assert ops.implementations()[name] == {"cpu": cells["cpu"][cpu], "cuda": cells["cuda"][cuda]}, name
            named.add(name)
    assert {name for name in ops.implementations() if not name.endswith("_backward")} == named
