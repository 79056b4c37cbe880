"""`--log`: what trackers were given is read back from what they left, by their own readers where they have one."""

import json
import struct
import sys
import threading
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from images import TINY, make_folder

for package in ("timm", "torchvision", "safetensors"):
    pytest.importorskip(package)

import fastjem  # noqa: E402
from fastjem import trackers  # noqa: E402
from fastjem.commands.evaluate import EvaluateOptions, evaluate  # noqa: E402
from fastjem.errors import UserError  # noqa: E402
from fastjem.loggers import LoggedRun  # noqa: E402
from fastjem.trackers import Tracker  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS = list(range(1, 7))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_folder(tmp_path_factory.mktemp("images"), 32))


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Trackers that write to this folder alone."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", str(tmp_path / "mlruns"))
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    return tmp_path


def stopped_and_resumed(images: str, run: Path, log: str) -> None:
    """A run of six steps whose process was killed behind the fourth, when the third was saved last."""

    class Killed(Exception):
        pass

    class Kills:
        def log(self, step: int, figures: dict[str, Any]) -> None:
            if step == 4 and "loss" in figures:
                (run / "saved").mkdir()
                for name in ("last.pt", "last-1.pt"):
                    (run / "checkpoints" / name).rename(run / "saved" / name)

    fields = {
        **TINY,
        "data": images,
        "max_steps": 6,
        "checkpoint_steps": 3,
        "out": str(run),
        "log": log,
        "knn_every": 1,
    }
    first = fastjem.pretrain(**fields, loggers=[Kills()])
    assert first.finished
    for path in (run / "checkpoints").glob("*"):
        path.unlink()
    for path in (run / "saved").glob("*"):  # the checkpoint of step 3, while six steps have been logged
        path.rename(run / "checkpoints" / path.name)
    (run / "encoder.safetensors").unlink()
    second = fastjem.pretrain(out=str(run), resume=True)
    assert second.finished and second.steps == 6
    longer = fastjem.pretrain(out=str(run), resume=True, max_steps=8)
    assert longer.steps == 8


def wandb_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """(kind, record) of a run's file, in the layout of LevelDB's log behind seven bytes: blocks of 32 KiB of pieces
    with checksum, length and whether a record ends there."""
    from wandb.proto import wandb_internal_pb2

    content = path.read_bytes()
    assert content[:4] == b":W&B"
    at, whole = 7, b""
    while at + 7 <= len(content):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            record = wandb_internal_pb2.Record.FromString(whole)
            whole = b""
            yield record.WhichOneof("record_type"), record


def test_wandb(images: str, offline: Path) -> None:
    pytest.importorskip("wandb")
    run = offline / "run"
    stopped_and_resumed(images, run, "wandb")
    steps, accuracies, ids, rates = [], [], set(), set()
    for path in sorted((run / "wandb").glob("offline-run-*/*.wandb")):
        for kind, record in wandb_rows(path):
            if kind == "history":
                row = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
                steps += [row["step"]] if "loss" in row else []
                accuracies += [row["step"]] if "knn" in row else []
            elif kind == "run":
                ids.add(record.run.run_id)
                rates |= {item.value_json for item in record.run.config.update if item.key == "peak_learning_rate"}
    assert steps == [*STEPS, 7, 8], "none is missing, and none is there twice"
    assert accuracies == [0, 2, 4, 6, 8]
    assert ids == {json.loads((run / "trackers.json").read_text())["wandb"]["id"]}
    assert [float(rate) for rate in rates] == [pytest.approx(4e-3 * (16 / 256) ** 0.5)]


def test_mlflow(images: str, offline: Path) -> None:
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    run = offline / "run"
    stopped_and_resumed(images, run, "mlflow")
    kept = json.loads((run / "trackers.json").read_text())["mlflow"]
    client = MlflowClient(tracking_uri=kept["uri"])
    found = client.get_run(kept["id"])
    assert found.info.status == "FINISHED" and found.info.run_name == "run"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = client.get_metric_history(kept["id"], "loss")
    assert [(one.step, one.value) for one in losses] == [(row["step"], row["loss"]) for row in rows]
    assert [one.step for one in client.get_metric_history(kept["id"], "knn")] == [0, 2, 4, 6, 8]
    assert found.data.params["optimizer"] == "adamw" and found.data.params["options.temperature"] == "0.1"
    assert found.data.params["steps"] == "6" and found.data.tags["resumed.steps"] == "8"
    experiment = client.get_experiment_by_name("fastjem")
    assert len(client.search_runs([experiment.experiment_id])) == 1


def test_tensorboard(images: str, offline: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = offline / "run"
    stopped_and_resumed(images, run, "tensorboard")
    found = EventAccumulator(str(run / "tensorboard"))
    found.Reload()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(one.step, one.value) for one in found.Scalars("loss")] == [
        (row["step"], pytest.approx(row["loss"])) for row in rows
    ]
    assert [one.step for one in found.Scalars("knn")] == [0, 2, 4, 6, 8]
    assert "_hparams_/session_start_info" in found.PluginTagToContent("hparams")
    result = evaluate(EvaluateOptions(str(run), workers=0, device="cpu", log=True))
    found.Reload()
    (accuracy,) = found.Scalars("evaluation/encoder_knn")
    assert (accuracy.step, accuracy.value) == (8, pytest.approx(result["features"]["encoder"]["knn"]))
    assert len(found.Scalars("loss")) == len(rows), "and nothing that was there has gone"
    (run / "trackers.json").unlink()
    with pytest.raises(UserError, match=r"--log: the run in .* went to no tracker"):
        evaluate(EvaluateOptions(str(run), workers=0, device="cpu", log=True))


def test_the_old_switch_is_a_tracker_still(images: str, offline: Path) -> None:
    pytest.importorskip("tensorboard")
    fastjem.pretrain(**TINY, data=images, max_steps=1, tensorboard=True, out=str(offline / "run"))
    assert list((offline / "run/tensorboard").glob("events*"))


def test_trackio(images: str, offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a stand-in of its functions: the package itself goes with no environment that has all others."""
    said: list[tuple] = []

    class Run:
        def log(self, metrics: dict[str, Any], step: int | None = None) -> None:
            said.append((step, metrics.get("loss"), metrics.get("knn")))

        def finish(self) -> None:
            said.append(("finish",))

    def init(project: str, name: str, config: dict[str, Any], resume: str, **options: Any) -> Run:
        said.append(("init", project, name, config["optimizer"], resume))
        return Run()

    fake = types.ModuleType("trackio")
    fake.init = init  # type: ignore[attr-defined]
    fake.__spec__ = types.SimpleNamespace(name="trackio")  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "trackio", fake)
    stopped_and_resumed(images, offline / "run", "trackio")
    begun = [one for one in said if one[0] == "init"]
    assert len(begun) == 2, "the part that was repeated had been logged"
    assert begun[0] == begun[1] and begun[0][1] == "fastjem" and begun[0][3:] == ("adamw", "allow")
    assert [one[0] for one in said if len(one) == 3 and one[1] is not None] == [*STEPS, 7, 8]
    assert [one[0] for one in said if len(one) == 3 and one[2] is not None] == [0, 2, 4, 6, 8]
    assert said.count(("finish",)) == 2


def test_what_is_not_there_is_said_before_training(
    images: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    find = trackers.importlib.util.find_spec
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None if name == "trackio" else find(name))
    with pytest.raises(
        UserError, match=r"pretrain: log trackio: trackio isn't installed; pip install 'fastjem\[trackio\]'"
    ):
        fastjem.pretrain(**TINY, data=images, out=str(run), log="trackio")
    with pytest.raises(UserError, match="did you mean wandb"):
        fastjem.pretrain(**TINY, data=images, out=str(run), log=["tensorboard", "wanbd"])
    assert not run.exists()


def test_wandb_without_a_key_is_said_before_training(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    fake = sys.modules["wandb"]
    monkeypatch.setattr(fake, "setup", lambda: types.SimpleNamespace(settings=types.SimpleNamespace(mode="online")))
    monkeypatch.setattr(fake, "login", lambda **options: False)
    with pytest.raises(UserError, match="--log wandb: it has no API key; wandb login"):
        trackers.check(["wandb"])
    monkeypatch.setattr(fake, "login", lambda **options: True)
    trackers.check(["wandb"])


class Faulty:
    """A tracker that does as it is told."""

    package = "json"
    replaces = False
    refused = staticmethod(lambda: "")
    where = "somewhere"
    at = "begin"
    wait: threading.Event | None = None

    def act(self, name: str) -> None:
        if name != self.at:
            return
        if self.wait:
            self.wait.wait(30)
            return
        raise ConnectionError("no network\nand more")

    def begin(self, run: LoggedRun, kept: dict[str, Any]) -> dict[str, Any]:
        self.act("begin")
        return {}

    def log(self, step: int, figures: dict[str, Any]) -> None:
        self.act("log")

    def close(self, finished: bool) -> None:
        self.act("close")


@pytest.mark.parametrize("at", ["begin", "log", "close"])
def test_a_tracker_that_fails_is_said_once(
    at: str, images: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(trackers.TRACKERS, "mlflow", type("Fails", (Faulty,), {"at": at}))
    result = fastjem.pretrain(**TINY, data=images, max_steps=5, out=str(tmp_path), log="mlflow")
    err = capsys.readouterr().err
    assert result.finished
    assert err.count("the logger mlflow failed (ConnectionError: no network); the run goes on") == 1
    assert "and more" not in err


def test_a_tracker_that_hangs_keeps_nobody(
    images: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    let_go = threading.Event()
    monkeypatch.setitem(trackers.TRACKERS, "mlflow", type("Hangs", (Faulty,), {"at": "log", "wait": let_go}))
    monkeypatch.setattr(trackers, "WAIT", 0.2)
    result = fastjem.pretrain(**TINY, data=images, max_steps=5, out=str(tmp_path), log="mlflow")
    let_go.set()
    assert result.finished
    assert capsys.readouterr().err.count("the logger mlflow failed (TimeoutError: it has") == 1


def test_a_run_without_a_step_begins_no_tracker(tmp_path: Path) -> None:
    tracker = Tracker("tensorboard")
    tracker.begin(LoggedRun(tmp_path, "simclr", 0, 5, 16, 1))
    tracker.measured(0, {"knn": 0.5})
    tracker.close()
    assert not list(tmp_path.iterdir())


def test_an_object_with_log_alone_gets_everything(images: str, tmp_path: Path) -> None:
    class Mine:
        def __init__(self) -> None:
            self.said: list[tuple[int, dict[str, Any]]] = []

        def log(self, step: int, figures: dict[str, Any]) -> None:
            self.said.append((step, figures))

    mine = Mine()
    fastjem.pretrain(**{**TINY, "knn_every": 1}, data=images, max_steps=2, out=str(tmp_path), loggers=[mine])
    assert [step for step, figures in mine.said if "loss" in figures] == [1, 2]
    assert all("step" not in figures for _, figures in mine.said)
    assert [step for step, figures in mine.said if "knn" in figures] == [0, 2]
    majority = [figures["knn_majority"] for _, figures in mine.said if "knn" in figures]
    assert majority == [pytest.approx(11 / 32)] * 2  # of three classes of 32 images
