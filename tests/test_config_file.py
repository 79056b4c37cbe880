"""`config.yaml`: what ran, what was given, and all that a resumed run needs; and the precision among it."""

import itertools
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from images import TINY, make_folder

for package in ("timm", "torchvision", "safetensors"):
    pytest.importorskip(package)

import fastjem  # noqa: E402
from fastjem import checkpoints, precision  # noqa: E402
from fastjem import config as configuration  # noqa: E402
from fastjem.errors import UserError  # noqa: E402
from fastjem.methods import SimCLR  # noqa: E402
from fastjem.report.page import option  # noqa: E402
from fastjem.report.run import read  # noqa: E402
from fastjem.yaml_text import dumped, loaded  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_folder(tmp_path_factory.mktemp("images"), 32))


VALUES = {
    "texts": ["", "a b", "on", "yes", "1e-3", "0x10", "1_000", "2026-01-31", "1:30", "null", "~", "- a", "#", "é"],
    "bytes and lines": ["\udcff", "\n", " a "],
    "numbers": [0, -7, 2**70, 0.1, 1e-06, 1e300, math.inf, 5e-324],
    "none": None,
    "truth": [True, False],
    "empty": {"list": [], "mapping": {}},
    "nested": {"a": [{"b": [1, [2, "3"]]}]},
    "same": [[1, 2]] * 2,
}  # fmt: skip


def test_what_is_written_is_read() -> None:
    text = dumped(VALUES)
    assert loaded(text.encode(), "x") == VALUES
    assert yaml.safe_load(text) == VALUES, "other programs, by YAML 1.1, read the same"
    assert loaded(json.dumps(VALUES).encode(), "x") == VALUES, "JSON, as runs of before have it"
    assert "&" not in text and "*" not in text


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 1e-3), (".5", 0.5), ("on", "on"), ("2026-01-31", "2026-01-31"), ("1:30", "1:30"), ("007", 7)],
)
def test_what_a_person_writes(text: str, value: object) -> None:
    found = loaded(f"x: {text}\n".encode(), "x")["x"]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b"", "it is empty"),
        (b"\xff\xfe", "no UTF-8 text"),
        (b"a: [1", "line 1, column"),
        (b"- a\n", "must hold values by name, got a YAML list"),
        (b"1: a\n", "names that are no text"),
        (b"a: &x [1]\nb: *x\n", "line 2, column 4: it has aliases"),
        (b"a: !!python/object/apply:os.system [ls]\n", "could not determine a constructor"),
        (b"[" * 1500, "nested too deeply"),
        (b"a: " + b"9" * 5000, "9|integer"),
    ],
)
def test_what_is_none_is_named(text: bytes, why: str) -> None:
    with pytest.raises(UserError, match=why) as caught:
        loaded(text, "runs/a/config.yaml")
    assert str(caught.value).startswith("runs/a/config.yaml") and "\n" not in str(caught.value)


def test_the_file_says_what_ran_and_what_was_given(images: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    fields = {**TINY, "data": images, "epochs": 40, "method": "byol", "max_steps": 2, "out": str(run)}
    fastjem.pretrain(**fields, options={"hidden": 16}, momentum=0.95)
    kept = yaml.safe_load((run / "config.yaml").read_text())
    ran = kept["ran"]
    assert kept["given"] == {**fields, "options": {"hidden": 16}, "momentum": 0.95}
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert ran["peak_learning_rate"] == rows[0]["learning_rate"], "there is no warm-up in two steps"
    assert ran["learning_rate"] == pytest.approx(ran["peak_learning_rate"] * 4) and kept["learning_rate"] is None
    assert {name: ran[name] for name in ("optimizer", "weight_decay", "clip", "warmup_steps", "momentum", "steps")} == {
        "optimizer": "adamw", "weight_decay": 1.5e-6, "clip": None, "warmup_steps": 0, "momentum": 0.95, "steps": 2,
    }  # fmt: skip
    assert ran["options"]["hidden"] == 16 and ran["options"]["norm"] == "batch"
    assert (ran["recipe"], ran["large_views"], ran["small_views"], ran["views"][0]["blur"]) == ("byol", 2, 0, 0.0)
    assert (ran["precision"], ran["device"], ran["loader"]) == ("fp32", "cpu", "memory")
    shown = read(run)
    assert option(shown, "learning_rate") == f"{ran['learning_rate']} (not given)"
    assert option(shown, "momentum") == "0.95" and option(shown, "precision") == "fp32 (auto)"
    assert option(shown, "clip") == "none" and option(shown, "peak_learning_rate") == str(ran["peak_learning_rate"])
    assert "ran" not in shown.config and "given" not in shown.config


def test_a_longer_run_keeps_what_was_given(images: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    fastjem.pretrain(**TINY, data=images, max_steps=2, out=str(run))
    before = (run / "config.yaml").read_text()
    fastjem.pretrain(out=str(run), resume="auto")
    assert (run / "config.yaml").read_text() == before, "nothing is told anew, nothing is written"
    fastjem.pretrain(out=str(run), resume=True, epochs=2)
    kept = loaded((run / "config.yaml").read_bytes(), "x")
    assert kept["given"].keys() == {*TINY, "data", "max_steps", "out", "epochs"}
    assert (kept["ran"]["steps"], kept["epochs"], kept["max_steps"], kept["resume"]) == (4, 2, 0, False)


def test_a_run_of_before_goes_on_bit_for_bit(images: str, tmp_path: Path) -> None:
    """Its config.yaml is JSON without `ran` and `given`, and its checkpoint says nothing of the precision."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    fields = {**TINY, "data": images, "method": "byol", "checkpoint_steps": 2}
    fastjem.pretrain(**fields, max_steps=4, out=str(whole))
    shutil.copytree(whole, run)
    (run / "encoder.safetensors").unlink()
    (run / "checkpoints/last.pt").unlink()  # of step 4; that of step 2 is there
    state = torch.load(run / "checkpoints/last-1.pt", weights_only=False)
    config = json.loads(state["config"])
    new = ("precision", "log")
    state["config"] = json.dumps({name: value for name, value in config.items() if name not in new})
    for name in ("precision", "device"):
        del state[name]
    torch.save(state, run / "checkpoints/last-1.pt")
    kept = loaded((run / "config.yaml").read_bytes(), "x")
    older = {name: value for name, value in kept.items() if name not in ("ran", "given", *new)}
    (run / "config.yaml").write_text(json.dumps({**older, "out": str(run)}, indent=2))
    assert configuration.read(run)[0].given >= {"method", "batch_size", "max_steps"}
    assert fastjem.pretrain(out=str(run), resume=True).finished
    ours, theirs = (checkpoints.load(path) for path in (run, whole))
    assert ours is not None and theirs is not None and ours["step"] == 4
    assert all(torch.equal(value, theirs["model"][name]) for name, value in ours["model"].items())
    assert "ran" in loaded((run / "config.yaml").read_bytes(), "x")


def test_what_given_is_no_mapping_is_named(images: str, tmp_path: Path) -> None:
    fastjem.pretrain(**TINY, data=images, max_steps=1, out=str(tmp_path))
    kept = loaded((tmp_path / "config.yaml").read_bytes(), "x")
    (tmp_path / "config.yaml").write_text(dumped({**kept, "given": ["a"], "ran": 3}))
    with pytest.raises(UserError, match=r"config.yaml: given must be values by name, got list"):
        configuration.read(tmp_path)
    (tmp_path / "config.yaml").write_text(dumped({**kept, "ran": 3}))
    assert read(tmp_path).ran == {}


def test_what_auto_is(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    for capability, expected in (((7, 5), "fp16"), ((8, 0), "bf16"), ((9, 0), "bf16")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert precision.chosen("auto", cuda) == expected
        assert precision.chosen("fp32", cuda) == "fp32" and precision.chosen("auto", cpu) == "fp32"
    before = precision.kept({}, cuda)
    assert precision.chosen("auto", cuda, before) == "bf16", "as every run on a GPU was before there was a choice"
    assert precision.kept({"precision": "fp16", "device": "cuda"}, cuda) == "fp16"
    assert precision.kept({"precision": "fp32", "device": "cpu"}, cuda) is None
    assert precision.kept(None, cuda) is None and precision.kept({}, cpu) is None


def linear() -> torch.nn.Module:
    """Convolutions in float16 take seconds on a CPU."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(8), torch.nn.Flatten(), torch.nn.Linear(192, 16))


def test_float16_scales_its_loss_and_resumes_bit_for_bit(
    images: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fields = {name: value for name, value in TINY.items() if name != "backbone"} | {"data": images}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    fastjem.pretrain(**fields, encoder=linear(), precision="fp16", max_steps=4, out=str(whole), checkpoint_steps=2)
    shutil.copytree(whole, parts)
    (parts / "encoder.safetensors").unlink()
    (parts / "checkpoints/last.pt").unlink()
    assert fastjem.pretrain(encoder=linear(), out=str(parts), resume=True).steps == 4
    ours, theirs = (checkpoints.load(path) for path in (parts, whole))
    assert ours is not None and theirs is not None
    assert ours["scaler"] == theirs["scaler"] and ours["scaler"]["scale"] < 65536, "it goes on where it was"
    assert all(torch.equal(value, theirs["model"][name]) for name, value in ours["model"].items())
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["loss_scale"] == ours["scaler"]["scale"]
    exact = fastjem.pretrain(**fields, encoder=linear(), max_steps=1, out=str(tmp_path / "fp32")).metrics
    assert exact["loss"] == pytest.approx(rows[0]["loss"], rel=1e-2) and exact["loss"] != rows[0]["loss"]
    assert "loss_scale" not in exact
    capsys.readouterr()
    fastjem.pretrain(encoder=linear(), out=str(parts), resume=True, precision="fp32", max_steps=5)
    assert "--precision is fp32 from step 5 on; it was fp16" in capsys.readouterr().err
    assert "scaler" not in (checkpoints.load(parts) or {})


def test_a_step_that_overflows_changes_nothing_and_the_scale_is_halved(images: str, tmp_path: Path) -> None:
    class Overflows(SimCLR):
        def loss(self, student, teacher, batch, step):
            loss = super().loss(student, teacher, batch, step)
            return loss * torch.where(step == 6, 1e38, 1.0)  # times the scale that is infinity

    scales = []

    class Keeps:
        def log(self, step: int, figures: dict) -> None:
            scales.append(figures.get("loss_scale"))

    fields = {name: value for name, value in TINY.items() if name != "backbone"} | {"data": images}
    options = {"method": Overflows, "precision": "fp16", "checkpoint_steps": 1, "keep_checkpoints": 4}
    fastjem.pretrain(
        **fields, **options, encoder=linear(), max_steps=8, out=str(tmp_path), loggers=[Keeps()], warmup_epochs=0
    )
    found = [scale for scale in scales if scale]
    assert found[5] == found[4] and found[6] == found[5] / 2 == found[7]
    weights = [
        torch.load(tmp_path / f"checkpoints/{name}.pt", weights_only=False)["model"]["encoder.backbone.2.weight"]
        for name in ("last-3", "last-2", "last-1", "last")
    ]
    changed = [not torch.equal(before, after) for before, after in itertools.pairwise(weights)]
    assert changed == [True, False, False]  # the seventh step overflows, and the last has a rate of 0
