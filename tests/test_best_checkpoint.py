"""The checkpoint of the best kNN accuracy is kept: of the very step, over resumes, and opened by its path."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from images import TINY, make_folder

for package in ("timm", "torchvision", "safetensors"):
    pytest.importorskip(package)

import fastjem  # noqa: E402
from fastjem import checkpoints, resume  # noqa: E402
from fastjem.commands.evaluate import EvaluateOptions, evaluate  # noqa: E402
from fastjem.commands.export import ExportOptions, export  # noqa: E402
from fastjem.errors import UserError  # noqa: E402
from fastjem.given import open_weights  # noqa: E402
from fastjem.report.watch import SampleImages  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

A_STEP: dict[str, Any] = {**TINY, "knn_every": 0.5, "checkpoint_every": 1e9}  # two steps an epoch: kNN behind each


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_folder(tmp_path_factory.mktemp("images"), 32))


def train(out: Path, accuracies: Sequence[float], monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    """A run in which kNN finds these accuracies, one after the other."""
    found = iter(accuracies)
    monkeypatch.setattr(SampleImages, "knn", lambda *_: next(found))
    fastjem.pretrain(out=str(out), **options)
    assert not list(found)


def best_of(out: Path) -> tuple[int, float]:
    path = checkpoints.best(out)
    assert path is not None and path == out / "checkpoints/best.pt"
    state = checkpoints.read(path)
    assert state["best"]["step"] == state["step"]
    return state["step"], state["best"]["accuracy"]


def test_the_best_step_is_kept_over_resumes_and_ties_keep_the_earlier(
    images: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    train(out, [0.9, 0.5, 0.7, 0.7, 0.6], monkeypatch, **A_STEP, data=images, max_steps=4)  # 0.9 before any step
    assert best_of(out) == (2, 0.7) and checkpoints.load(out)["step"] == 4  # type: ignore[index]
    assert f"kNN was best at step 2, 70.0%; its checkpoint is {out}/checkpoints/best.pt" in capsys.readouterr().err
    other = tmp_path / "other"
    train(other, [0.1, 0.2, 0.3], monkeypatch, **{**A_STEP, "knn_every": 1}, data=images, max_steps=4, keep_best=False)
    assert checkpoints.best(other) is None
    assert "kNN was best" not in capsys.readouterr().err
    again: dict[str, Any] = {"resume": True}
    train(out, [0.7, 0.6], monkeypatch, **again, max_steps=6)
    assert best_of(out) == (2, 0.7)
    train(out, [0.8, 0.75], monkeypatch, **again, max_steps=8)
    assert best_of(out) == (7, 0.8)
    best = checkpoints.best(out)
    assert best is not None
    best.unlink()  # what isn't there is not held against the next
    train(out, [0.2], monkeypatch, **again, max_steps=9)
    assert best_of(out) == (9, 0.2) and "kNN was best" not in capsys.readouterr().err.splitlines()[-1]


def test_a_kill_before_the_best_was_kept_is_made_good(
    images: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def killed(run: Path) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "keep_best", killed)
        with pytest.raises(Killed):
            train(tmp_path, [0.0, 0.5], monkeypatch, **A_STEP, data=images, max_steps=4)
    assert checkpoints.best(tmp_path) is None
    train(tmp_path, [0.4, 0.4, 0.4], monkeypatch, resume=True)
    assert best_of(tmp_path) == (1, 0.5)


def test_a_run_without_classes_has_no_best(tmp_path: Path) -> None:
    make_folder(tmp_path / "flat", 32, classes=0)
    fastjem.pretrain(**A_STEP, data=str(tmp_path / "flat"), out=str(tmp_path / "run"), max_steps=2)
    assert checkpoints.best(tmp_path / "run") is None


def test_a_disk_that_refuses_the_best_leaves_the_one_before(
    images: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = checkpoints.save

    def refusing(run: Path, state: dict[str, Any]) -> str | None:
        return "no room" if state["step"] == 2 else save(run, state)

    monkeypatch.setattr(checkpoints, "save", refusing)
    train(tmp_path, [0.0, 0.5, 0.9, 0.6, 0.55], monkeypatch, **A_STEP, data=images, max_steps=4)
    assert best_of(tmp_path) == (3, 0.6)


def test_a_checkpoint_is_opened_by_its_path(images: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    train(run, [0.0, 0.5, 0.4, 0.3], monkeypatch, **A_STEP, data=images, max_steps=3)
    path = run / "checkpoints/best.pt"
    weights = checkpoints.read(path)["model"]
    name, tensor = next((name, x) for name, x in weights.items() if name.startswith("encoder.backbone."))
    for module in (fastjem.load_encoder(path), open_weights(str(path)).module):
        found = module.state_dict()[name.removeprefix("encoder.backbone.")]
        assert torch.equal(found, tensor)
        assert not torch.equal(found, checkpoints.load(run)["model"][name])  # type: ignore[index]
    result = evaluate(EvaluateOptions(str(path), workers=0, device="cpu"))
    assert result["step"] == 1 and (run / "evaluation-best.json").exists()
    assert not (run / "evaluation.json").exists()
    files = export(ExportOptions(str(path)))
    assert {file.parent for file in files} == {run / "export-best"}
    monkeypatch.chdir(path.parent)
    assert checkpoints.run_of(Path("best.pt")) == Path("..")
    assert checkpoints.run_of(Path("../checkpoints/last.pt")) == Path("..")
    path.write_bytes(b"")
    with pytest.raises(UserError, match=r"best\.pt is no checkpoint"):
        fastjem.load_encoder(path)


def test_other_ranks_are_told_where_batch_norms_see_other_images() -> None:
    with_norms = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    said = resume.other_ranks(with_norms, {"step": 3, "ranks": 4}, 2)
    assert said.startswith("4 ranks took the steps so far, and 2 from step 4 on: batch norms see a rank's images")
    synchronised = torch.nn.SyncBatchNorm.convert_sync_batchnorm(with_norms)
    for module, state, ranks in (
        (with_norms, {"step": 3, "ranks": 4}, 4),
        (with_norms, {"step": 3}, 2),  # of before it was noted
        (with_norms, None, 2),
        (synchronised, {"step": 3, "ranks": 4}, 2),
        (torch.nn.LayerNorm(2), {"step": 3, "ranks": 4}, 2),
    ):
        assert resume.other_ranks(module, state, ranks) == ""
