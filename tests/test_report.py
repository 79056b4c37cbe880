"""The report and the picture of views: true, self-contained, and never in the way of the run."""

import json
import re
import shutil
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from images import make_folder

for package in ("timm", "torchvision", "safetensors", "matplotlib", "sklearn"):
    pytest.importorskip(package)
from PIL import Image  # noqa: E402

import fastjem  # noqa: E402
from fastjem import checkpoints, report  # noqa: E402
from fastjem import config as configuration  # noqa: E402
from fastjem.cli import main  # noqa: E402
from fastjem.commands.views import LINE, MARGIN, ViewsOptions, draw_views  # noqa: E402
from fastjem.data import masks  # noqa: E402
from fastjem.data.batch import finish  # noqa: E402
from fastjem.data.loaders import Budget, Order  # noqa: E402
from fastjem.data.loaders.torch import TorchLoader  # noqa: E402
from fastjem.data.masking import MASKINGS, MASKINGS_OF_RUNS, drawn_masks, mask_specs, masks_of_run  # noqa: E402
from fastjem.data.pixels import Pixels  # noqa: E402
from fastjem.data.source import open_source  # noqa: E402
from fastjem.data.views import MaskSpec  # noqa: E402
from fastjem.errors import UserError  # noqa: E402
from fastjem.methods import METHODS, views_of  # noqa: E402
from fastjem.report import charts, page, pictures, views, watch  # noqa: E402
from fastjem.report.run import Embeddings, Run, read  # noqa: E402
from fastjem.yaml_text import loaded  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = {"backbone": "test_resnet", "image_size": 32, "batch_size": 16, "workers": 0, "device": "cpu", "log_every": 1}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Path:
    """Three epochs on three classes, one of them with an ugly name."""
    images = make_folder(tmp_path_factory.mktemp("images"), 48)
    (images / "class0").rename(images / "<b>&'\"")
    out = tmp_path_factory.mktemp("runs") / "a"
    fastjem.pretrain(**TINY, data=str(images), out=str(out), epochs=3, knn_every=1, checkpoint_steps=3)
    return out


def fields_of(run: Path) -> dict[str, object]:
    """The run's configuration as `fastjem.pretrain` takes it."""
    config, _, _ = configuration.read(run)
    return asdict(config)


class Balanced(HTMLParser):
    """Every element is closed in order, and nothing is fetched from anywhere."""

    VOID = ("meta", "img", "br", "circle", "path", "rect", "use", "line")

    def __init__(self, text: str):
        super().__init__()
        self.stack, self.text = [], []
        self.feed(text)
        assert not self.stack

    def handle_starttag(self, tag: str, attributes: list) -> None:
        for name, value in attributes:
            if name in ("src", "href", "xlink:href"):
                assert value.startswith(("data:image/", "#")), value
        assert tag not in ("script", "link", "iframe")
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attributes: list) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def words(path: Path) -> str:
    text = path.read_text()
    assert not re.search(r"url\((?!#)|@import", text)
    assert "#0a0a0" not in text and "#0a0b" not in text  # stand-ins for the page's colours
    return " ".join(Balanced(text).text)


def test_a_run_leaves_its_report(run: Path) -> None:
    text = words(run / "report.html")
    charted = ("Loss", "Learning rate", "Effective rank", "Speed", "Waiting for data", "right labels (%)")
    told = ("simclr, test_resnet at 32 pixels on 48 images: finished", "t-SNE", "large 2", "torch")
    for part in (*charted, *told):
        assert part in text, part
    assert "Momentum encoder" not in text  # SimCLR has none
    assert "<b>&'\"/0000.png" in text and "<b>&'\"" not in (run / "report.html").read_text()
    rows = [json.loads(line) for line in (run / "knn.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 3, 6, 9] and rows[0]["classes"] == 3
    assert all(0 <= row["knn"] <= 1 for row in rows)
    assert read(run).embeddings.step == 9


def test_watching_changes_nothing_and_a_resumed_run_lacks_nothing(run: Path, tmp_path: Path) -> None:
    config = fields_of(run)
    blind = {**config, "report": False, "knn_every": 0.0, "out": str(tmp_path / "blind")}
    fastjem.pretrain(**blind)
    assert not (tmp_path / "blind" / "report.html").exists()
    one, other = (checkpoints.load(path)["model"] for path in (run, tmp_path / "blind"))
    assert all(torch.equal(one[name], other[name]) for name in one)

    class Killed(BaseException):
        pass

    def kill(self, done: int) -> None:
        original(self, done)
        if done == 6:  # measured, but not in a checkpoint yet
            raise Killed

    original, cut = watch.Watch.after_step, tmp_path / "cut"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(watch.Watch, "after_step", kill)
        with pytest.raises(Killed):
            fastjem.pretrain(**{**config, "report": False, "out": str(cut)})
    assert len((cut / "knn.jsonl").read_text().splitlines()) == 3
    fastjem.pretrain(**{**config, "report": False, "out": str(cut), "resume": True})
    assert (cut / "knn.jsonl").read_text() == (run / "knn.jsonl").read_text()


def test_a_broken_report_ends_no_run(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no room\nat all")

    monkeypatch.setattr(watch, "write", fail)
    monkeypatch.setattr(watch.SampleImages, "embed", fail)
    config = {**fields_of(run), "out": str(tmp_path / "a"), "epochs": 1}
    assert fastjem.pretrain(**config).finished
    assert capsys.readouterr().err.count("the report is incomplete (RuntimeError: no room)") == 1


def test_knn_without_itself_is_the_plain_loop() -> None:
    random = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(40, 6, generator=random, dtype=torch.float64), dim=1)
    labels = torch.randint(0, 4, (40,), generator=random)
    right = 0
    for i in range(40):
        votes = [0.0] * 4
        for j in sorted((j for j in range(40) if j != i), key=lambda j: -(rows[i] @ rows[j]).item())[:5]:
            votes[labels[j]] += np.exp((rows[i] @ rows[j]).item() / 0.07)
        right += votes.index(max(votes)) == labels[i]
    assert watch.knn_without_itself(rows, labels, 5) == pytest.approx(right / 40)
    assert 0.05 < right / 40 < 0.95


def test_images_are_chosen_evenly() -> None:
    labels = np.repeat(np.arange(10), 500)
    assert np.bincount(labels[watch.choose(labels, 200)]).tolist() == [20] * 10
    flat = watch.choose(np.zeros(5000, int), 200)
    assert len(flat) == 200 and flat[0] == 0 and flat[-1] == 4975
    many = np.repeat(np.arange(1000), 30)  # too many classes to show all
    assert np.unique(np.bincount(many[watch.choose(many)])).tolist() == [0, 20]
    few = np.repeat(np.arange(1000), 3)
    assert set(np.bincount(few[watch.choose(few)])) == {0, 3} and len(watch.choose(few)) == 999
    assert len(watch.choose(np.arange(7))) == 7


def test_probe_leaves_out_what_cannot_be_read(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, 12, classes=0)
    (folder / "0003.png").write_bytes(b"")
    probe = watch.SampleImages(open_source(folder), Pixels(16))
    assert len(probe.images) == 11 and 3 not in probe.indices and not probe.labelled
    encoder = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.BatchNorm1d(768)).train()
    before = encoder[1].running_mean.clone()
    rows = probe.embed(encoder)
    assert encoder.training and torch.equal(encoder[1].running_mean, before)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(11))


def copy_of(run: Path, to: Path, **changes: object) -> Path:
    shutil.copytree(run, to)
    config = loaded((to / "config.yaml").read_bytes(), "config.yaml") | changes
    (to / "config.yaml").write_text(json.dumps(config))
    return to


def test_runs_side_by_side(run: Path, tmp_path: Path) -> None:
    other = copy_of(run, tmp_path / "other" / "a", method="byol", seed=7)
    out = report.compare([run, other], tmp_path / "both.html")
    text = words(out)
    assert "other/a" in text and f"{run.parent.name}/a" in text and "Momentum encoder" in text
    html = out.read_text()
    assert f"<title>{run.parent.name}/a and other/a</title>" in html
    assert html.count('aria-label="Loss of ') == 2 and html.count('aria-label="Effective rank') == 1
    assert html.count("Embeddings") >= 2
    marked = re.findall(r'<tr class="differs"><th scope="row">([^<]*)', html)
    assert {"method", "seed"} <= set(marked) and "batch size" not in marked
    with pytest.raises(UserError, match="no run in"):
        report.compare([run, tmp_path], tmp_path / "both.html")
    with pytest.raises(UserError, match="could not be written"):
        report.compare([run], run / "config.yaml" / "x.html")


def test_what_is_missing_is_said(run: Path, tmp_path: Path) -> None:
    bare = copy_of(run, tmp_path / "bare")
    for name in ("metrics.jsonl", "knn.jsonl", "embeddings.npz", "environment.json"):
        (bare / name).unlink()
    text = words(report.write(bare))
    assert "No step has been logged yet" in text and "No embeddings have been saved yet" in text
    moved = copy_of(run, tmp_path / "moved")
    with np.load(moved / "embeddings.npz") as file:
        arrays = dict(file)
    np.savez(moved / "embeddings.npz", **{**arrays, "root": "/nowhere"})
    text = words(report.write(moved))
    assert "The images in /nowhere are gone" in text and "gone" in text
    with open(moved / "metrics.jsonl", "a") as file:
        file.write('{"step": 10, "lo')  # the line that a kill cut in two
    words(report.write(moved, tsne=False))


def test_long_runs_keep_their_extremes_and_say_epochs(run: Path) -> None:
    rows = [{"step": s, "loss": 1.0 + (s == 5000)} for s in range(1, 20_001)]
    long = Run(run, {}, rows, [], {"steps_per_epoch": 100})
    x, y = charts.series(long, charts.QUANTITIES[0], "loss", True)
    at, _, low, high = charts.thin(x, y)
    assert len(at) == charts.POINTS and at[-1] == 200 and high.max() == 2 and low.min() == 1
    svg = charts.chart(charts.QUANTITIES[0], [long]).svg
    assert ">epoch<" in svg and len(svg) < 100_000
    assert ">step<" in charts.chart(charts.QUANTITIES[0], [Run(run, {}, rows[:150], [], {"steps_per_epoch": 100})]).svg


def test_the_alarm_of_the_run_is_on_the_page(run: Path, tmp_path: Path) -> None:
    bad = copy_of(run, tmp_path / "bad")
    rows = [json.loads(line) for line in (bad / "metrics.jsonl").read_text().splitlines()]
    collapsed = "".join(json.dumps({**row, "std": 0.01, "data_wait": 0.5}) + "\n" for row in rows)
    (bad / "metrics.jsonl").write_text(collapsed)
    text = words(report.write(bad, tsne=False))
    assert "the run is collapsing" in text and "waited for data 50%" in text


@pytest.mark.parametrize(("classes", "items"), [(1, 0), (10, 10), (20, 20), (1000, 0)])
def test_a_legend_only_where_it_can_be_read(classes: int, items: int) -> None:
    random = np.random.default_rng(0)
    labels = np.arange(max(classes, 30)) % classes
    rows = random.normal(size=(len(labels), 8)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    files = [f"{i}.png" for i in range(len(labels))]
    names = [f"class {i}" for i in range(classes)]
    found = Embeddings(0, rows, list(range(len(labels))), files, "/", labels, names, len(labels), classes > 1)
    svg = pictures.picture(found, tsne=False)
    assert svg.count("<li>") == items and svg.count("<circle") == len(labels)
    Balanced(svg)
    fills = set(re.findall(r'fill="((?:var|oklch)[^"]*)"', svg))
    assert len(fills) == (1 if classes == 1 else min(classes, 361))
    # an axis each: a point far away along the first component is at the right or left edge
    assert "the variance" in svg


@pytest.mark.parametrize("what", ["constant", "nan", "two"])
def test_degenerate_embeddings_are_said_not_drawn(what: str) -> None:
    rows = np.full((2 if what == "two" else 9, 4), np.nan if what == "nan" else 0.5, np.float32)
    n = len(rows)
    found = Embeddings(0, rows, list(range(n)), ["x"] * n, "/", np.zeros(n, int), [""], n, False)
    assert pictures.picture(found, tsne=True).startswith("<p>")
    Balanced(pictures.neighbours(found))


def test_the_views_shown_are_the_views_trained_on(tmp_path: Path) -> None:
    folder = open_source(make_folder(tmp_path, 6, classes=0))
    specs = views_of("dino", 32, 2).specs(32)
    specs = [replace(spec, mean=(0, 0, 0), std=(1, 1, 1)) for spec in specs]
    batch = next(iter(TorchLoader(folder, specs, Order(samples=6, batch=6, seed=5, start=3, stop=4), Budget())))
    shown = views.samples([(i, folder.name(i)) for i in range(6)], specs, root=folder.root, images=6, seed=5, epoch=3)
    trained = [(255 * x).round().to(torch.uint8) for x in finish(batch, specs, "cpu").views]
    loaded = [{tuple(view[row].flatten().tolist()) for row in range(6)} for view in trained]
    for v in range(4):
        drawn = {tuple(np.array(one.views[v]).transpose(2, 0, 1).flatten().tolist()) for one in shown}
        assert drawn == loaded[v]


def test_masked_patches_are_grey() -> None:
    view = Image.fromarray(np.full((32, 32, 3), 255, np.uint8))
    for mask in masks.SAMPLERS:
        pixels = np.array(views.masked(view, MaskSpec(0, (4, 4), 0.75, mask), seed=0, epoch=0, sample=0))
        patches = pixels.reshape(4, 8, 4, 8, 3).swapaxes(1, 2).reshape(16, -1)
        assert (patches == views.GREY[0]).all(1).sum() == 12 and (patches == 255).all(1).sum() == 4


def test_the_mask_shown_is_the_mask_trained_on(tmp_path: Path) -> None:
    """The report's grey patches are those that a batch of the first epoch hides."""
    folder = open_source(make_folder(tmp_path, 6, classes=0))
    found = views_of("data2vec", 32)
    specs = found.specs(32, patch=4)
    mask = mask_specs(found, 32, 4)[0]
    batch = next(iter(TorchLoader(folder, specs, Order(samples=6, batch=6, seed=5, stop=1), Budget())))
    trained = finish(batch, specs, "cpu", masks=[mask], seed=5)
    files = [(i, folder.name(i)) for i in trained.index.tolist()]
    shown = views.samples(files, specs, root=folder.root, images=6, seed=5, mask=mask)
    for sample, hidden in zip(shown, trained.masks[0].hidden, strict=True):
        patches = np.array(sample.views[-1]).reshape(8, 4, 8, 4, 3).swapaxes(1, 2).reshape(64, -1)
        assert ((patches == views.GREY[0]).all(1) == hidden.flatten().numpy()).all()


@pytest.mark.parametrize("mask", MASKINGS)
def test_a_picture_of_every_mask(mask: str, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "images", 2, classes=0)
    options = ViewsOptions(folder, tmp_path / "views.png", mask=mask, image_size=64, images=2, patch_size=8)
    out = draw_views(options)
    with Image.open(out) as sheet:
        last = np.array(sheet)[:, -(96 + MARGIN) : -MARGIN]
    share = (last == views.GREY[0]).all(2).sum() / (2 * 96 * 96)
    assert 0.05 < share < 0.9, share


@pytest.mark.parametrize("masking", MASKINGS_OF_RUNS)
def test_a_picture_of_a_runs_mask_is_what_training_draws(masking: str, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "images", 1, classes=0)
    options = ViewsOptions(
        folder, tmp_path / "views.png", large_views=3, small_views=1, mask="0.6", masking=masking, image_size=96,
        images=1, patch_size=8, seed=4,
    )  # fmt: skip
    found = views_of("simclr", 96, 1, large_views=3)
    assert views.titles(found, True) == ["large 1", "large 2", "large 3", "small 1", "masked"]
    with Image.open(draw_views(options)) as sheet:
        last = np.array(sheet)[LINE + MARGIN : LINE + MARGIN + 96, -(96 + MARGIN) : -MARGIN]
    spec = masks_of_run(found.specs(96, patch=8), 8, 0.6, masking)[0]
    hidden = drawn_masks(spec, 4, 0, torch.zeros(1, dtype=torch.long)).hidden[0]
    patches = last.reshape(12, 8, 12, 8, 3).swapaxes(1, 2).reshape(144, -1)
    assert ((patches == views.GREY[0]).all(1) == hidden.flatten().numpy()).all()


@pytest.mark.parametrize("method", METHODS)
def test_a_picture_of_every_methods_views(method: str, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "images", 5, classes=0)
    (folder / "0000.png").write_bytes(b"")  # another takes its place
    found = views_of(method, 32)
    data = ",".join([str(folder)] * found.sources)
    options = ViewsOptions(data, tmp_path / "views.png", method=method, image_size=32, images=3, patch_size=8)
    out = draw_views(options)
    assert len(views.titles(found, found.mask > 0)) == found.large + found.small + bool(found.mask)
    with Image.open(out) as sheet:
        assert sheet.height == LINE + MARGIN + 3 * (96 + LINE + MARGIN)
        whole = MARGIN + (1 + found.large + bool(found.mask)) * (96 + MARGIN)
        assert sheet.width >= whole and (found.small > 0) == (sheet.width > whole)


def test_mistakes_are_said(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "images", 3, classes=0)
    for changes, words in (
        ({"method": "dyno"}, "did you mean dino"),
        ({"recipe": "byoll"}, "did you mean byol"),
        ({"images": 0}, "at least 1"),
        ({"out": tmp_path / "x.pdf"}, "must end in"),
        ({"out": folder / "0000.png" / "x.png"}, "--out"),
        ({"data": tmp_path / "nowhere"}, "not a folder"),
        ({"method": "data2vec", "image_size": 50}, "no multiple"),
        ({"mask": "1.5"}, "a share of the patches between 0 and 1"),
        ({"mask": "randon"}, "did you mean random"),
        ({"mask": "random", "masking": "block"}, "is for a share of the patches: --mask 0.75"),
        ({"mask": "0.5", "masking": "blocks"}, "did you mean block"),
        ({"mask": "0.5", "method": "mae"}, "--mask: mae masks its images by itself"),
        ({"large_views": 3, "method": "pirl"}, "--large-views: pirl compares a view and the pieces"),
        ({"large_views": 1}, "--large-views must be at least 2"),
    ):
        with pytest.raises(UserError, match=words):
            draw_views(ViewsOptions(**{"data": folder, "out": tmp_path / "v.png", "image_size": 32, **changes}))
    for file in folder.iterdir():
        file.write_bytes(b"")
    with pytest.raises(UserError, match="can be read"):
        draw_views(ViewsOptions(folder, tmp_path / "v.png"))


def test_names_tell_runs_apart(run: Path) -> None:
    runs = [Run(Path(path), {}, [], []) for path in ("/x/one/a", "/x/two/a", "/x/two/b")]
    assert page.names_of(runs) == ["one/a", "two/a", "two/b"]
    assert page.names_of(runs[1:]) == ["a", "b"]
    assert page.names_of(runs[:1] * 2) == ["1: a", "2: a"]


def test_commands(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["report", str(run)]) == 0 and capsys.readouterr().out == f"{run / 'report.html'}\n"
    assert main(["report", str(run), str(run)]) == 0 and "1: a" in words(tmp_path / "report.html")
    data = loaded((run / "config.yaml").read_bytes(), "config.yaml")["data"]
    assert main(["views", "--data", data, "--method", "byol", "--image-size", "32", "--no-blur"]) == 0
    assert (tmp_path / "views.png").exists()
    capsys.readouterr()
    for line, says in (
        (["report"], "needs RUNS"),
        (["report", "nowhere"], "no run in nowhere"),
        (["views", "--data", data, "--method", "dyno"], "did you mean dino"),
        (["views", "--data", data, "--sead", "1"], "did you mean --seed"),
    ):
        assert main(line) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and says in error, error
