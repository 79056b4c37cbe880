"""The report as a reader sees it: axes, lines, durations, pictures, contrast, and a browser's window."""

import itertools
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from images import make_folder
from test_report import Balanced

for package in ("timm", "torchvision", "safetensors", "matplotlib", "sklearn"):
    pytest.importorskip(package)
from fastjem.report import charts, page, pictures, style, tables  # noqa: E402
from fastjem.report.durations import durations, spoken  # noqa: E402
from fastjem.report.run import Embeddings, Run  # noqa: E402

CONFIG = {"method": "simclr", "backbone": "resnet18", "image_size": 32, "batch_size": 50, "accumulate": 2}
CONFIG |= {"data": "photos", "out": "runs/a"}
LOSS = charts.QUANTITIES[0]
WORDY = "resnet18_at-32-pixels.with_a_name_that_says_all_of_its_options.learning_rate-0.0003.temperature-0.2.seed-1"


def make_run(name: str = "a", steps: int = 37, planned: int = 37, **changes: Any) -> Run:
    """The run of a method that says everything, at 25 images a second: 4 seconds a step."""
    random = np.random.default_rng(len(name))
    rows = []
    for step in range(1, steps + 1):
        row = {name: random.uniform(0.2, 0.9) for name in ("teacher_entropy", "prototype_usage", "data_wait")}
        row |= {"std": 0.9, "projection_rank": 17.0, "embedding_std": 0.4, "effective_rank": random.uniform(5, 9)}
        row |= {"loss": 3 + 2 / step, "learning_rate": 1e-3 * step, "weight_decay": 1e-3 * step, "momentum": 0.9}
        rows.append({**row, "step": step, "images_per_second": 25.0, "gradient_norm": random.uniform(0.1, 0.7)})
    knn = [{"step": step, "classes": 4, "knn": 0.25 + step / 100, "images": 12} for step in range(0, steps + 1, 9)]
    environment = {"steps": planned, "steps_per_epoch": 10, "images": 1000}
    return Run(Path("/runs") / name, {**CONFIG, **changes}, rows, knn, environment)


def some_embeddings(root: Path, labelled: bool = False, n: int = 40) -> Embeddings:
    rows = np.random.default_rng(1).normal(size=(n, 8)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    files = [f"{i:04d}.png" for i in range(n)]
    labels = np.arange(n) % (3 if labelled else 1)
    classes = ["<i>ant", "bee & wasp", WORDY] if labelled else [""]
    return Embeddings(30, rows, list(range(n)), files, str(root), labels, classes, 4 * n, labelled)


def ticks(svg: str, axis: str) -> list[float]:
    """Where an axis has ticks, in the units of the picture: its grid's lines, in their order."""
    found = re.findall(r'd="M ([\d.]+) ([\d.]+) L ([\d.]+) ([\d.]+) " clip-path="[^"]*" style="[^"]*var\(--line\)', svg)
    lines = [tuple(map(float, line)) for line in found]
    if axis == "x":
        return [x0 for x0, _, x1, _ in lines if x0 == x1]
    return [y0 for _, y0, _, y1 in lines if y0 == y1]


@pytest.mark.parametrize("steps", [1, 2, 7, 19, 37, 101, 12_345])
def test_axes_end_with_a_tick(steps: int) -> None:
    run = make_run()
    run = replace(run, rows=[{"step": step, "loss": 4.03 + np.sin(step), "std": 1.0} for step in (1, steps)])
    for quantity in charts.QUANTITIES:
        drawn = charts.chart(quantity, [run])
        if drawn is None:
            continue
        left, bottom, right, _, _, top = (
            float(x)
            for x in re.findall(
                r"<g> <path d=\"M ([\d.]+) ([\d.]+) L ([\d.]+) ([\d.]+) L ([\d.]+) ([\d.]+)", drawn.svg
            )[1]
        )
        across, upwards = ticks(drawn.svg, "x"), ticks(drawn.svg, "y")
        assert (across[0], across[-1]) == (left, right), quantity.title
        assert (upwards[0], upwards[-1]) == (bottom, top), quantity.title
        assert 2 <= len(across) <= 8 and 2 <= len(upwards) <= 7


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.3, 0.31), (-4, 1e6), (1e-6, 1e-6), (0, 0), (-2, -2), (1e-7, 3)])
def test_ticks_hold_the_values(low: float, high: float) -> None:
    found = charts.ticks_of(low, high)
    assert found[0] <= low <= high <= found[-1] and 2 <= len(found) <= 7 and (np.diff(found) > 0).all()


def test_a_line_means_the_same_in_every_chart() -> None:
    """Projections are dashed wherever they are, and nothing else is; the page says so."""
    for quantity in charts.QUANTITIES:
        for key, line in quantity.keys.items():
            assert line == (charts.DASHED if key in ("std", "projection_rank") else charts.SOLID), key
    run = make_run(method="dino")
    dashed = {one.quantity.title: one.svg.count("stroke-dasharray: 5.92") for one in charts.charts([run, run])}
    assert dashed.pop("Effective rank") == dashed.pop("Spread") == 2 and not any(dashed.values()), dashed
    text = page.page([run], tsne=False)
    assert [text.count(f">{meaning}<") for meaning in map(page.html.escape, charts.MEANING.values())] == [1, 1, 1]
    without = replace(run, knn=[], rows=[{"step": 1, "loss": 1.0}])
    assert "dashed: " not in page.page([without], tsne=False)


def test_losses_of_methods_have_axes_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(charts, "QUANTITIES", charts.QUANTITIES[:3])
    runs = [make_run(), make_run("b", method="byol"), make_run("c")]
    drawn = {one.quantity.title: one for one in charts.charts(runs)}
    assert list(drawn)[:3] == ["Loss of simclr", "Loss of byol", "Nearest neighbours"]
    colours = {title: sorted(set(re.findall(r"stroke: var\(--run(\d)", one.svg))) for title, one in drawn.items()}
    assert colours["Loss of simclr"] == ["0", "2"] and colours["Loss of byol"] == ["1"]
    assert colours["Nearest neighbours"] == colours["Effective rank"] == ["0", "1", "2"]
    letters = re.findall(r">([A-Z])</text>", drawn["Loss of simclr"].svg)
    assert sorted(letters) == ["A", "C"]
    assert [one.quantity.title for one in charts.charts(runs[::2])][:2] == ["Loss", "Nearest neighbours"]
    assert ">loss<" not in page.page(runs, tsne=False) and ">loss<" in page.page(runs[::2], tsne=False)


def test_letters_at_the_ends_of_curves_keep_their_distance() -> None:
    random = np.random.default_rng(0)
    for n in (1, 2, 5, 12):
        for _ in range(20):
            heights = np.sort(random.uniform(0, 1, n)).tolist()
            moved = charts.apart(heights, 0.075)
            assert all(b - a >= 0.075 - 1e-9 for a, b in itertools.pairwise(moved))
            assert moved[0] >= -1e-9 and moved[-1] <= 1 + 1e-9
    assert charts.apart([0.1, 0.5, 0.9], 0.075) == pytest.approx([0.1, 0.5, 0.9])
    assert charts.apart([0.5, 0.5], 0.1) == pytest.approx([0.45, 0.55])


def test_a_run_that_diverged_is_said_and_stretches_no_axis(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(charts, "QUANTITIES", charts.QUANTITIES[:1])
    run = make_run()
    bad = make_run("bad", steps=3)
    losses = [4.0, 1e34, float("nan")]
    bad = replace(bad, rows=[{**row, "loss": loss} for row, loss in zip(bad.rows, losses, strict=True)])
    drawn = charts.chart(LOSS, [run, bad])
    assert drawn is not None
    assert "Run B: not a number in 1 of 3 rows, the first at epoch 0.3." in drawn.note
    assert "Run B: beyond the axis in 1 of 3 rows, the first at epoch 0.2." in drawn.note
    alone = charts.chart(LOSS, [run])
    assert alone is not None
    labels = [re.findall(r">([\d.]+)</text>", one.svg) for one in (drawn, alone)]
    assert labels[0] == labels[1] and "1e34" not in drawn.svg
    text = page.page([bad], tsne=False)
    assert "step 3: the loss is not a number" in text and "<dd>not a number</dd>" in text and "to go" not in text


def test_durations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(charts, "QUANTITIES", charts.QUANTITIES[:1])
    done = durations(make_run())
    assert done is not None and done.left is None
    assert (done.taken, done.per_epoch) == (pytest.approx(37 * 4), pytest.approx(40))
    stopped = make_run(planned=137)
    rates = [row | {"images_per_second": 50.0} if row["step"] > 17 else row for row in stopped.rows if row["step"] % 2]
    stopped = replace(stopped, rows=rates)  # every second step was logged
    monkeypatch.setattr("fastjem.report.durations.LATEST", 5)
    found = durations(stopped)
    assert found is not None and found.left == pytest.approx(100 * 2)
    assert found.taken == pytest.approx(17 * 4 + 20 * 2)
    assert "37 of 137 steps in 1 min 48 s, about 3 min to go" in page.page([stopped], tsne=False)
    assert "finished in 2 min 28 s" in page.page([make_run()], tsne=False)
    for rate in (0.0, -1.0, float("nan"), float("inf")):
        assert durations(replace(stopped, rows=[{"step": 5, "images_per_second": rate}])) is None
    assert durations(replace(stopped, rows=[])) is None


def test_seconds_in_words() -> None:
    said = {0.84: "0.84 s", 59.4: "59 s", 59.6: "1 min 0 s", 187: "3 min 7 s", 9600: "2 h 40 min", 90_000: "1 d 1 h"}
    assert {seconds: spoken(seconds) for seconds in said} == said
    about = {0.2: "about 1 s", 42.3: "about 42 s", 250: "about 4 min", 9600: "about 3 h", 3e6: "about 35 d"}
    assert {seconds: spoken(seconds, roughly=True) for seconds in about} == about


def test_images_without_classes_stand_in_the_picture(tmp_path: Path) -> None:
    root = make_folder(tmp_path, 30, classes=0)
    found = replace(some_embeddings(root), hidden=frozenset(["0001.png"]))  # and ten files aren't there
    svg = pictures.picture(found, tsne=False)
    shown = re.findall(r"<title>(\d+).png</title><image x=\"([\d.-]+)\" y=\"([\d.-]+)\"", svg)
    dots = re.findall(r"<circle[^>]*><title>(\d+).png", svg)
    assert sorted([name for name, _, _ in shown] + dots) == [f"{i:04d}" for i in range(40)]
    assert len(shown) > 10 and {"0001", *(f"{i:04d}" for i in range(30, 40))} <= set(dots)
    at = np.array([(float(x), float(y)) for _, x, y in shown])
    distance = np.abs(at[:, None] - at[None]).max(2) + 1e9 * np.eye(len(at))
    assert distance.min() >= pictures.SIDE * 2 / 3 - 0.1  # none is covered by more than a third of its side
    assert at.min() >= 0 and (at.max(0) + pictures.SIDE <= (pictures.WIDTH, pictures.HEIGHT)).all()
    assert "<image" not in pictures.picture(replace(some_embeddings(root, labelled=True)), tsne=False)


def luminance(colour: str) -> float:
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    channels = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", ["LIGHT", "DARK"])
def test_contrast(theme: str) -> None:
    """WCAG 2.2, level AA: text 4.5, what isn't text 3."""
    colours = dict(re.findall(r"--(\w+): (#\w+);", getattr(style, theme)))
    ink = [("ink", "paper"), ("ink", "card"), ("ink", "warn"), ("soft", "paper"), ("soft", "card"), ("link", "paper")]
    letters = [pair for i in range(charts.COLOURS) for pair in ((f"run{i}", "card"), ("on", f"run{i}"))]
    dots = [(f"class{i}", "card") for i in range(pictures.LEGEND)]
    assert len(colours) == 9 + charts.COLOURS + pictures.LEGEND
    for needed, pairs in ((4.5, ink + letters), (3.0, dots)):
        for one, other in pairs:
            light, dark = sorted((luminance(colours[one]), luminance(colours[other])), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= needed, (one, other)


class Valid(Balanced):
    """Names are used once, headings descend by one, images and strips have names, columns and rows have heads."""

    def __init__(self, text: str):
        self.names: list[str] = []
        self.levels: list[int] = []
        super().__init__(text)
        assert len(set(self.names)) == len(self.names)
        assert self.levels[0] == 1 and max(np.diff(self.levels)) <= 1 and self.levels.count(1) == 1

    def handle_starttag(self, tag: str, attributes: list) -> None:
        super().handle_starttag(tag, attributes)
        given = dict(attributes)
        if "id" in given and tag != "path":  # a marker of matplotlib
            self.names.append(given["id"])
        if re.fullmatch(r"h\d", tag):
            self.levels.append(int(tag[1]))
        assert tag != "img" or given["alt"]
        assert tag != "th" or given["scope"] in ("row", "col")
        assert "tabindex" not in given or given["aria-label"]
        assert tag not in BLOCKS or "p" not in self.stack[:-1], tag  # a parser would end the paragraph there


BLOCKS = ("p", "div", "table", "ul", "dl", "section", "h2", "h3", "details")


def several(root: Path, n: int = 6) -> list[Run]:
    methods = ("simclr", "byol", "dino")
    found = []
    for i in range(n):
        run = make_run(f"{WORDY}-{i}", method=methods[i % 3], options={"temperature": i})
        found.append(replace(run, embeddings=some_embeddings(root, labelled=i % 2 == 0), troubles=("<b>wrong",)))
    return found


@pytest.mark.parametrize("count", [1, 2, 6])
def test_the_page_is_sound(count: int, tmp_path: Path) -> None:
    runs = several(make_folder(tmp_path, 40, classes=0))[:count]
    text = page.page(runs, tsne=False)
    found = Valid(text)
    words = " ".join(found.text)
    for run in runs:
        assert run.name in words
    assert "<b>wrong" in words and "<i>ant" in words and "<i>ant" not in text
    for width in set(re.findall(r"scroll needs(\d+)", text)):  # each strip has its hint
        assert f".needs{width}>.hint" in text.partition("</style>")[0]
    assert len(text) < 1_500_000


def test_what_differs_stands_first() -> None:
    rows = {"a": ["1", "1"], "b": ["1", "<2>"], "c": ["", ""]}
    text = tables.table(rows, ["x", "y"], "settings")
    assert text.index(">b<") < text.index("<details>") < text.index(">a<") < text.index(">c<")
    assert "&lt;2&gt;" in text and "2 that are the same in all runs" in text
    assert "<details>" not in tables.table(rows, ["x"], "settings")


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update")


def test_a_browser_shows_it_within_its_window(tmp_path: Path) -> None:
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    runs = several(make_folder(tmp_path / "images", 40, classes=0))
    pages = {"one": runs[1:2], "six": runs}
    for name, shown in pages.items():
        (tmp_path / f"{name}.html").write_text(page.page(shown, tsne=False))
    overflow = "[document.documentElement.scrollWidth - innerWidth, document.querySelectorAll('.strip').length]"
    hint = "getComputedStyle(document.querySelector('.card .hint')).display"
    asked: list[str] = []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=list(QUIET))
        for width in (390, 1280):
            tab = browser.new_page(viewport={"width": width, "height": 900})
            tab.on("request", lambda request: asked.append(request.url))
            for name in pages:
                tab.goto((tmp_path / f"{name}.html").as_uri())
                wider, strips = tab.evaluate(overflow)
                assert wider <= 0 and strips >= 2, (name, width)
                if name == "one":
                    assert tab.evaluate(hint) == ("block" if width == 390 else "none"), width
            tab.close()
        browser.close()
    assert all(url.startswith(("file:", "data:")) for url in asked), asked
