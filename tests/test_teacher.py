"""The momentum encoder in place of the trained one, and runs that only their owner's modules can open."""

import json
from pathlib import Path

import pytest
import torch
from images import BYOLS, TINY, make_folder
from torch import Tensor, nn

for package in ("timm", "torchvision", "safetensors", "tyro"):
    pytest.importorskip(package)
from safetensors import safe_open  # noqa: E402

import fastjem  # noqa: E402
from fastjem import checkpoints, exports  # noqa: E402
from fastjem.cli import main  # noqa: E402
from fastjem.commands.evaluate import EvaluateOptions, evaluate  # noqa: E402
from fastjem.commands.export import ExportOptions, export  # noqa: E402
from fastjem.errors import UserError  # noqa: E402
from fastjem.given import Given, open_weights  # noqa: E402
from fastjem.methods import BYOL, SimCLR  # noqa: E402
from fastjem.report.run import read  # noqa: E402
from fastjem.runs import open_run  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_folder(tmp_path_factory.mktemp("images"), 32))


@pytest.fixture(scope="module")
def run(images: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """BYOL's: its momentum encoder lags behind."""
    out = tmp_path_factory.mktemp("byol") / "run"
    fastjem.pretrain(**TINY, **BYOLS, data=images, out=str(out), max_steps=2)
    return out


def weights_of(run: Path, prefix: str) -> dict[str, Tensor]:
    state = checkpoints.load(run)
    assert state is not None
    return exports.below(prefix, state["model"])


def same(module: nn.Module, weights: dict[str, Tensor]) -> bool:
    state = module.state_dict()
    return state.keys() == weights.keys() and all(torch.equal(state[name], weights[name]) for name in weights)


def test_the_momentum_encoder_is_opened_where_it_is_asked_for(run: Path, tmp_path: Path) -> None:
    trained = weights_of(run, "encoder.backbone.")
    copy = weights_of(run, "teacher.encoder.backbone.")
    assert any(not torch.equal(trained[name], copy[name]) for name in copy)
    assert same(fastjem.load_encoder(run), trained)
    assert same(fastjem.load_encoder(run, teacher=True), copy)
    assert same(exports.open_encoder(run, teacher=True).encoder, copy)
    assert same(open_weights(str(run), teacher=True).module, copy)
    assert same(Given(str(run), teacher=True).encoder.backbone, copy)
    opened = open_run(run, teacher=True)
    assert opened.projector is not None and same(opened.projector, weights_of(run, "teacher.projector."))
    assert opened.teacher and not open_run(run).teacher

    file = tmp_path / "teacher.safetensors"
    assert main(["export", str(run), "--teacher", "--out", str(file)]) == 0
    assert same(fastjem.load_encoder(file), copy) and same(fastjem.load_encoder(file, teacher=True), copy)
    with safe_open(file, "pt") as content:
        assert content.metadata()["teacher"] == "true"
    with safe_open(run / "encoder.safetensors", "pt") as content:
        assert "teacher" not in content.metadata()


def test_figures_say_whose_they_are(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["evaluate", str(run), "--workers", "0", "--device", "cpu", "--features", "both"]
    assert main(line) == 0
    assert "momentum encoder" not in capsys.readouterr().out
    assert main([*line, "--teacher"]) == 0
    assert "momentum encoder" in capsys.readouterr().out
    trained, copy = (json.loads((run / name).read_text()) for name in ("evaluation.json", "evaluation-teacher.json"))
    assert (trained["teacher"], copy["teacher"]) == (False, True)
    for kind in ("encoder", "projector"):
        assert trained["features"][kind]["rankme"] != copy["features"][kind]["rankme"]
    exported = tmp_path / "x.safetensors"
    export(ExportOptions(str(run), str(exported), teacher=True))
    train = str(Path(trained["train"]))
    again = evaluate(EvaluateOptions(str(exported), train, workers=0, device="cpu"))
    assert again["teacher"] and again["features"]["encoder"] == copy["features"]["encoder"]
    assert (tmp_path / "evaluation-teacher.json").exists()


def test_a_run_may_be_watched_by_its_momentum_encoder(
    images: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """kNN, pictures and what is written at the end; nothing of the training changes."""
    common = {**TINY, **BYOLS, "data": images, "max_steps": 2, "knn_every": 1, "report": True}
    fastjem.pretrain(**common, out=str(tmp_path / "trained"))
    fastjem.pretrain(**common, teacher=True, out=str(tmp_path / "copy"))
    assert "of the momentum encoder on 32 images" in capsys.readouterr().err
    one, other = (checkpoints.load(tmp_path / name) for name in ("trained", "copy"))
    assert one is not None and other is not None
    assert all(torch.equal(one["model"][name], other["model"][name]) for name in one["model"])
    assert same(
        fastjem.load_encoder(tmp_path / "copy/encoder.safetensors", teacher=True),
        weights_of(tmp_path / "copy", "teacher.encoder.backbone."),
    )
    rows = [json.loads(line) for line in (tmp_path / "copy/knn.jsonl").read_text().splitlines()]
    assert [row["teacher"] for row in rows] == [True] * len(rows)
    embedded = read(tmp_path / "copy").embeddings
    trained = read(tmp_path / "trained").embeddings
    assert embedded is not None and trained is not None and (embedded.rows != trained.rows).any()
    assert "Of the momentum encoder" in (tmp_path / "copy/report.html").read_text()
    assert "kNN of the momentum encoder" in (tmp_path / "copy/report.html").read_text()
    assert "momentum encoder" not in (tmp_path / "trained/report.html").read_text().partition("Configuration")[0]


def test_what_has_no_momentum_encoder_says_so(run: Path, images: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    fastjem.pretrain(**TINY, data=images, out=str(out), max_steps=1)
    with pytest.raises(UserError, match="has no momentum encoder, as simclr was trained"):
        fastjem.load_encoder(out, teacher=True)
    with pytest.raises(UserError, match="holds one encoder, the trained one"):
        fastjem.load_encoder(run / "encoder.safetensors", teacher=True)
    with pytest.raises(UserError, match="a run's folder alone has a momentum encoder"):
        open_weights("timm/resnet18.a1_in1k", teacher=True)
    with pytest.raises(UserError, match="teacher: simclr has no momentum encoder; momentum_encoder gives it one"):
        fastjem.pretrain(**TINY, data=images, out=str(tmp_path / "x"), max_steps=1, teacher=True)
    assert not (tmp_path / "x").exists()
    fastjem.pretrain(**TINY, data=images, out=str(tmp_path / "y"), max_steps=1, teacher=True, momentum_encoder=True)
    assert same(
        fastjem.load_encoder(tmp_path / "y", teacher=True), weights_of(tmp_path / "y", "teacher.encoder.backbone.")
    )


class Mine(BYOL):
    """A method of the user's own."""


class Small(nn.Module):
    """An encoder of the user's own, which doesn't say how wide its embeddings are."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 12), nn.BatchNorm1d(12))

    def forward(self, images: Tensor) -> Tensor:
        return self.body(images)


def test_a_run_of_ones_own_method_is_read_by_everybody(images: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    fields = {**TINY, **BYOLS, "method": Mine, "data": images, "out": str(out)}
    fastjem.pretrain(**fields, max_steps=1)
    assert open_run(out).projector is None
    for teacher, prefix in ((False, "encoder.backbone."), (True, "teacher.encoder.backbone.")):
        assert same(exports.open_encoder(out, teacher=teacher).encoder, weights_of(out, prefix))
        assert same(Given(str(out), teacher=teacher).encoder.backbone, weights_of(out, prefix))
    assert evaluate(EvaluateOptions(str(out), workers=0, device="cpu"))["step"] == 1
    distilled = {**TINY, "data": images, "method": "distill", "options": {"given": str(out), "teacher": True}}
    assert fastjem.pretrain(**distilled, out=str(tmp_path / "student"), max_steps=1).finished
    with pytest.raises(UserError, match="this run was begun with a method of its owner's"):
        fastjem.pretrain(out=str(out), resume=True, max_steps=2)
    assert fastjem.pretrain(out=str(out), resume=True, max_steps=2, method=Mine).steps == 2


def test_a_module_of_ones_own_is_opened_with_it(images: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    fields = {**TINY, **BYOLS, "data": images, "out": str(out), "backbone": Small()}
    fastjem.pretrain(**fields, max_steps=1)
    for path in (out, out / "encoder.safetensors"):
        with pytest.raises(UserError, match=r"fastjem.load_encoder\(path, encoder=...\)"):
            fastjem.load_encoder(path)
        module = Small()
        opened = open_run(path, encoder=module)
        assert opened.encoder is module and not module.training and same(module, weights_of(out, "encoder.backbone."))
        assert opened.pixels == open_run(out, encoder=Small()).pixels
    assert same(fastjem.load_encoder(out, encoder=Small(), teacher=True), weights_of(out, "teacher.encoder.backbone."))
    with pytest.raises(UserError, match="the weights don't fit the Linear that was given: weight is nothing"):
        fastjem.load_encoder(out, encoder=nn.Linear(2, 2))
    options = EvaluateOptions(str(out), features="both", workers=0, device="cpu")
    assert evaluate(options, encoder=Small())["features"]["projector"]["dimensions"] == 256
    (file,) = export(ExportOptions(str(out), str(tmp_path / "x.safetensors")), encoder=Small())
    assert torch.equal(
        fastjem.load_encoder(file, encoder=Small())(IMAGES), fastjem.load_encoder(out, encoder=Small())(IMAGES)
    )
    with pytest.raises(UserError, match="this run was begun with an encoder of its owner's"):
        fastjem.pretrain(out=str(out), resume=True, max_steps=2)
    assert fastjem.pretrain(out=str(out), resume=True, max_steps=2, backbone=Small()).steps == 2


def test_a_method_of_ones_own_that_is_made_already_resumes(images: str, tmp_path: Path) -> None:
    fields = {**TINY, "data": images, "out": str(tmp_path), "encoder": Small()}
    fastjem.pretrain(**fields, method=SimCLR(12, dim=8), max_steps=1)
    assert fastjem.pretrain(
        out=str(tmp_path), resume=True, max_steps=2, encoder=Small(), method=SimCLR(12, dim=8)
    ).finished
