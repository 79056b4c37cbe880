"""`fastjem pretrain`: nothing is lost, ranks agree, and a mistake is one line."""

import errno
import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from broken import broken_off, rows
from images import Own, make_folder

for package in ("timm", "torchvision", "safetensors"):
    pytest.importorskip(package)
from safetensors.torch import load_file  # noqa: E402

import fastjem  # noqa: E402
from fastjem import backbones, checkpoints, encoders  # noqa: E402
from fastjem.arguments import parse  # noqa: E402
from fastjem.cli import main  # noqa: E402
from fastjem.config import Config  # noqa: E402
from fastjem.data.batch import finish  # noqa: E402
from fastjem.data.loaders import LOADERS, Budget, Order  # noqa: E402
from fastjem.data.source import open_source  # noqa: E402
from fastjem.data.views import Views  # noqa: E402
from fastjem.errors import UserError  # noqa: E402
from fastjem.methods import SimCLR  # noqa: E402
from fastjem.runs import open_run  # noqa: E402
from fastjem.yaml_text import loaded  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = {
    "backbone": "test_resnet",
    "image_size": 32,
    "batch_size": 16,
    "workers": 0,
    "device": "cpu",
    "log_every": 1,
    "report": False,
}
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_folder(tmp_path_factory.mktemp("images"), 48, kind="jpg"))


def command(**fields: object) -> list[str]:
    line = [sys.executable, "-m", "fastjem", "pretrain"]
    for name, value in fields.items():
        flag = f"--{'no-' if value is False else ''}{name.replace('_', '-')}"
        line += [flag] if isinstance(value, bool) else [flag, str(value)]
    return line


def wait_for(run: Path, step: int, process: subprocess.Popen) -> None:
    for _ in range(1200):
        if (run / "metrics.jsonl").exists() and len((run / "metrics.jsonl").read_text().splitlines()) >= step:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    raise AssertionError("the run made no progress in a minute")


@pytest.mark.parametrize(("method", "loader"), [("moco", "dali-cpu"), ("swav", "memory"), ("dino", "torch")])
def test_stopped_and_resumed_is_the_same_run(method: str, loader: str, images: str, tmp_path: Path) -> None:
    if loader == "dali-cpu":
        pytest.importorskip("nvidia.dali")
    small = {"swav": {"queue": 24}, "moco": {"queue": 32}, "dino": {"hidden": 16}}[method]
    common = {**TINY, "data": images, "method": method, "loader": loader, "epochs": 3, "options": small}
    if method != "moco":
        common["small_views"] = 1
    whole = fastjem.pretrain(**common, out=str(tmp_path / "whole"))
    assert whole.finished and whole.steps == 9

    # Not ended: broken off between two checkpoints, as by a kill
    broken_off(5, **common, out=str(tmp_path / "cut"), checkpoint_steps=2)
    assert len(rows(tmp_path / "cut")) == 5
    fastjem.pretrain(**common, out=str(tmp_path / "cut"), resume=True, checkpoint_steps=2)
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")
    one, other = (checkpoints.load(tmp_path / name)["model"] for name in ("cut", "whole"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def killed(at: tuple[str, int], **fields: object) -> None:
    """`pretrain` in a fork that dies of SIGKILL at a moment: (what, step)."""
    what, step = at
    process = os.fork()
    if process:
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL, f"{what}: it ended by itself"
        return
    save, write, replace = checkpoints.save, checkpoints.Metrics.write, os.replace
    now = -1

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def saving(run: Path, state: dict) -> str | None:
        nonlocal now
        now = state["step"]
        if (what, step) == ("before a checkpoint", now):
            die()
        said = save(run, state)
        if (what, step) == ("after a checkpoint", now):
            die()
        return said

    def replacing(part: Path, path: Path) -> None:
        if (what, step) == ("in a checkpoint", now) and path.name == "last.pt":
            die()
        replace(part, path)

    def writing(self: checkpoints.Metrics, row: dict) -> str | None:
        if (what, step) == ("in a row", row["step"]):
            self.file.write('{"step": ')
            self.file.flush()
            die()
        return write(self, row)

    checkpoints.save, checkpoints.Metrics.write, checkpoints.os.replace = saving, writing, replacing
    try:
        fastjem.pretrain(**fields)
    finally:
        os._exit(0)


# 3 steps an epoch, 9 in all
MOMENTS = (("before a checkpoint", 0), ("in a checkpoint", 2), ("in a row", 5), ("after a checkpoint", 6),
           ("before a checkpoint", 8), ("after a checkpoint", 9))  # fmt: skip


@pytest.mark.parametrize("method", ["byol", pytest.param("data2vec", marks=pytest.mark.exhaustive)])
def test_kill_dash_nine(method: str, tmp_path: Path) -> None:
    if "FORKS" not in os.environ:  # where a test before has compiled something, autograd refuses to run in a fork
        test = f"{__file__}::test_kill_dash_nine[{method}]"
        line = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", test]
        done = subprocess.run(line, env={**os.environ, "FORKS": "1"}, capture_output=True, text=True)
        assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout
        return

    def encoder() -> torch.nn.Module | None:
        torch.manual_seed(0)
        return None if method == "byol" else backbones.create("test_vit", 32, patch=8, pool="avg", drop_path=0.3)

    images = make_folder(tmp_path / "images", 48)
    (images / "broken.png").write_bytes(b"no image")
    common = {
        **TINY,
        "data": str(images),
        "method": method,
        "epochs": 3,
        "options": {"hidden": 64} if method == "byol" else {},
    }
    fastjem.pretrain(**common, encoder=encoder(), out=str(tmp_path / "whole"))
    (tmp_path / "cut").mkdir()
    for i, at in enumerate(MOMENTS):
        killed(at, **common, encoder=encoder(), out=str(tmp_path / "cut"), checkpoint_steps=2, resume=i > 0)
    fastjem.pretrain(**common, encoder=encoder(), out=str(tmp_path / "cut"), resume=True)
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")
    one, other = (checkpoints.load(tmp_path / name)["model"] for name in ("cut", "whole"))
    assert all(torch.equal(one[name], other[name]) for name in other)
    one, other = (load_file(tmp_path / name / "encoder.safetensors") for name in ("cut", "whole"))
    assert all(torch.equal(one[name], other[name]) for name in other)
    assert not list((tmp_path / "cut").rglob("*.part"))


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.exhaustive)])
def test_asked_to_stop(number: int, images: str, tmp_path: Path) -> None:
    line = command(**{**TINY, "workers": 1}, data=images, method="simsiam", epochs=2000, out=tmp_path / "run")
    process = subprocess.Popen(line, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    wait_for(tmp_path / "run", 2, process)
    os.killpg(process.pid, number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in error
    assert "go on with --resume" in error
    assert checkpoints.load(tmp_path / "run")["step"] == rows(tmp_path / "run")[-1]["step"]


def test_a_full_disk_leaves_the_last_good_checkpoint(
    images: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, calls = os.fsync, []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) > 14:  # two a file: the run's, the report's, two checkpoints
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(checkpoints.os, "fsync", full)
    result = fastjem.pretrain(**TINY, data=images, epochs=2, out=str(tmp_path), checkpoint_steps=1)
    assert not result.finished and not result.stopped and result.steps == 6
    assert "No space left on device); the last good one, of step 1, stays" in capsys.readouterr().err
    state = checkpoints.load(tmp_path)
    assert state["step"] == result.saved == 1 and not list((tmp_path / "checkpoints").glob("*.part"))


def test_export_goes_into_timm(images: str, tmp_path: Path) -> None:
    import timm

    fastjem.pretrain(**TINY, data=images, max_steps=1, out=str(tmp_path / "a"), stem="standard")
    weights = load_file(tmp_path / "a" / "encoder.safetensors")
    timm.create_model("test_resnet", num_classes=0).load_state_dict(weights, strict=True)
    encoder = fastjem.load_encoder(str(tmp_path / "a" / "encoder.safetensors"))
    state = checkpoints.load(tmp_path / "a")["model"]
    values = encoder.state_dict()
    assert all(torch.equal(value, state[f"encoder.backbone.{name}"]) for name, value in values.items())


def test_a_module_of_ones_own_and_accumulation(images: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    encoder = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten(), torch.nn.Linear(48, 8))
    result = fastjem.pretrain(
        **{**TINY, "batch_size": 8}, data=images, encoder=encoder, method="vicreg", accumulate=2, epochs=1, clip=1.0,
        out=str(tmp_path / "a"), options={"hidden": 8},
    )  # fmt: skip
    assert result.steps == 3 and result.metrics["gradient_norm"] > 0
    assert "--backbone test_resnet: not used, as the encoder is made already" in capsys.readouterr().err


def test_objects_in_place_of_names(images: str, tmp_path: Path) -> None:
    """A method, a source, an optimizer and a logger of one's own, and a loss that moves things once a step."""

    class Mine(SimCLR):
        ends: ClassVar[list[int]] = []
        epochs: ClassVar[list[int]] = []

        def step_ends(self, step: torch.Tensor) -> None:
            self.ends.append(int(step))

        def epoch_begins(self, epoch: int) -> None:
            self.epochs.append(epoch)

    class Kept:
        def begin(self, run) -> None:
            self.rows, self.run, self.closed = [], run, False

        def log(self, row) -> None:
            self.rows.append(dict(row))

        def close(self) -> None:
            self.closed = True

    logger, source = Kept(), Own(open_source(images))
    own = {"method": Mine, "source": source, "optimizer": functools.partial(torch.optim.RMSprop, alpha=0.9)}
    tiny = {**TINY, "batch_size": 8, "accumulate": 2, "epochs": 2}
    result = fastjem.pretrain(**tiny, **own, loggers=[logger], out=str(tmp_path / "a"))
    assert result.steps == 4 and [row["step"] for row in logger.rows] == [1, 2, 3, 4] and logger.closed
    assert logger.run.steps == 4 and logger.run.images_per_step == 16
    assert Mine.ends == [0, 1, 2, 3] and Mine.epochs == [0, 1]
    assert checkpoints.load(tmp_path / "a")["optimizer"]["param_groups"][0]["alpha"] == 0.9
    opened = open_run(tmp_path / "a")  # the encoder is timm's, and only the method its owner's
    assert opened.projector is None and opened.config.method.endswith("Mine")
    assert opened.encoder(torch.zeros(1, 3, 32, 32)).shape[0] == 1


class Masked(SimCLR):
    """A mask that an instance has and its class doesn't."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.views = replace(self.views, mask=0.5)


@pytest.mark.parametrize(
    ("own", "words"),
    [
        ({"optimizer": torch.optim.SGD(torch.nn.Linear(2, 2).parameters(), 0.1)}, "optimizer must be a name, or make"),
        ({"optimizer": lambda groups: None}, "must make a torch.optim.Optimizer of the groups"),
        ({"method": torch.nn.Linear}, "method must be a name, or a subclass"),
        ({"method": SimCLR(7)}, "SimCLR was made for embeddings of 7"),
        ({"method": SimCLR(7), "options": {"dim": 8}}, "this one is made already"),
        ({"source": dict}, "not its class"),
        ({"source": {}, "data": "photos"}, "data or source, got both"),
        ({"method": Masked}, "masked patches need a vision transformer"),
        ({"loggers": [print]}, r"loggers must have log\(step, figures\), or begin, log and close"),
        ({"loggers": None}, "loggers must be a list of them, got NoneType None"),
    ],
)
def test_objects_that_are_none(own: dict, words: str, images: str, tmp_path: Path) -> None:
    data = {} if "source" in own else {"data": images}
    with pytest.raises(UserError, match=words):
        fastjem.pretrain(**{**TINY, **data, **own}, out=str(tmp_path))
    assert not (tmp_path / "config.yaml").exists()


@pytest.mark.parametrize(
    "optimizer", ["sgd", "adamw", "lars", functools.partial(torch.optim.AdamW, lr=torch.tensor(0.1))]
)
def test_each_group_follows_its_own_schedule(optimizer: object, images: str, tmp_path: Path) -> None:
    """SimSiam's predictor keeps its rate, and everything else ends at 0, in a resumed run too."""
    fields = {**TINY, "data": images, "out": str(tmp_path / "r"), "optimizer": optimizer}
    fastjem.pretrain(method="simsiam", learning_rate=0.8, warmup_epochs=0, max_steps=3, **fields)
    fastjem.pretrain(method="simsiam", learning_rate=0.8, warmup_epochs=0, max_steps=6, **fields, resume=True)
    state = checkpoints.load(tmp_path / "r")
    assert state is not None
    groups = state["optimizer"]["param_groups"]
    rates = {group["constant_rate"]: float(group["lr"]) for group in groups}
    base = 0.8 / (4 if optimizer in ("adamw", "lars") else 16)  # for 16 images of 256
    assert rates == {True: pytest.approx(base), False: 0.0}
    assert len({float(group["lr"]) for group in groups if not group["constant_rate"]}) == 1


def test_a_mistake_in_ones_own_code_is_raised_as_it_is(images: str, tmp_path: Path) -> None:
    """And where no step was taken, the corrected call can use the folder."""

    class Wrong(SimCLR):
        def loss(self, student, teacher, batch, step):
            raise ValueError("a mistake of mine")

    class Worse(SimCLR):
        def loss(self, student, teacher, batch, step):
            raise ArithmeticError("a mistake of mine")

    for method in (Wrong, Worse):
        with pytest.raises((ValueError, ArithmeticError), match="a mistake of mine") as caught:
            fastjem.pretrain(**TINY, data=images, method=method, max_steps=2, out=str(tmp_path))
        assert not isinstance(caught.value, UserError)

    class Broken:
        def begin(self, run) -> None: ...

        def log(self, row) -> None:
            row.clear()
            raise RuntimeError("no network")

        def close(self) -> None:
            raise RuntimeError("no network")

    result = fastjem.pretrain(**TINY, data=images, max_steps=2, loggers=[Broken()], out=str(tmp_path))
    assert result.finished and result.metrics["loss"] and (tmp_path / "encoder.safetensors").exists()


def test_a_run_knows_how_its_pixels_became_numbers(images: str, tmp_path: Path) -> None:
    own = {"mean": "0.5,0.5,0.5", "std": "0.02,0.02,0.02"}
    fastjem.pretrain(**TINY, data=images, max_steps=1, out=str(tmp_path), view=own)
    for path in (tmp_path, tmp_path / "encoder.safetensors"):
        pixels = open_run(path).pixels
        assert (pixels.mean, pixels.std, pixels.size) == ((0.5,) * 3, (0.02,) * 3, 32)


def test_a_run_of_an_earlier_version_is_named_as_such(images: str, tmp_path: Path) -> None:
    fastjem.pretrain(**TINY, data=images, max_steps=1, out=str(tmp_path))
    values = loaded((tmp_path / "config.yaml").read_bytes(), "config.yaml")
    del values["pixels"]
    (tmp_path / "config.yaml").write_text(json.dumps(values))
    for call in (lambda: open_run(tmp_path), lambda: fastjem.pretrain(**TINY, out=str(tmp_path), resume=True)):
        with pytest.raises(UserError, match="earlier version of fastjem"):
            call()


def test_stems() -> None:
    assert backbones.create("resnet18", 32).conv1.kernel_size == (3, 3)
    assert backbones.create("resnet18", 32, stem="standard").conv1.kernel_size == (7, 7)
    assert backbones.create("resnet18", 96).conv1.kernel_size == (7, 7)


@pytest.mark.parametrize("backbone", ["test_efficientnet", "test_resnet", "test_byobnet"])
def test_synchronized_batch_norms_compute_the_same(backbone: str) -> None:
    """timm's fused activations among them; in eval mode, as a CPU synchronises nothing in training."""
    module = backbones.create(backbone, 32).eval()
    images = torch.randn(2, 3, 32, 32)
    weights = {id(weight) for weight in module.parameters()}
    with torch.no_grad():
        before = module(images)
        synchronized = encoders.synchronize_batch_norm(module)
        norms = [part for part in synchronized.modules() if isinstance(part, torch.nn.modules.batchnorm._BatchNorm)]
        assert norms and all(isinstance(norm, torch.nn.SyncBatchNorm) for norm in norms)
        assert torch.equal(synchronized(images), before)
    assert {id(weight) for weight in synchronized.parameters()} == weights  # which an optimizer has already


def test_a_batch_norm_of_ones_own_is_not_replaced() -> None:
    class Doubled(torch.nn.BatchNorm2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    with pytest.raises(UserError, match="1 is a Doubled"):
        encoders.synchronize_batch_norm(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), Doubled(4)))


def test_images_come_in_the_layout_of_the_encoder(images: str) -> None:
    convolutional, transformer = backbones.create("test_resnet", 32), backbones.create("test_vit", 32, patch=8)
    assert encoders.memory_format(convolutional) == torch.channels_last
    assert (
        encoders.memory_format(transformer)
        == encoders.memory_format(torch.nn.Conv2d(3, 4, 3))
        == torch.contiguous_format
    )
    specs = Views(large=2).specs(32)
    source = open_source(images)
    crops = next(iter(LOADERS["torch"](source, specs, Order(samples=len(source), batch=4, stop=1), Budget())))
    for layout in (torch.channels_last, torch.contiguous_format):
        views = finish(crops, specs, torch.device("cpu"), channels_last=layout == torch.channels_last).views
        assert all(view.is_contiguous(memory_format=layout) and view.shape == (4, 3, 32, 32) for view in views)


# VICReg at the rate that it is compared at: AdamW makes whole steps of a gradient that is rounding alone, and at its
# default of 2e-3 one bias of 16 differs by 0.6 %. By SGD there is no such difference.
LAYER_NORM = """
import sys, torch, fastjem
from torch import nn
torch.set_num_threads(1)
torch.manual_seed(0)
encoder = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 16), nn.LayerNorm(16), nn.GELU())
method, data, out, options = sys.argv[1], sys.argv[2], sys.argv[3], eval(sys.argv[4])
fastjem.pretrain(data=data, out=out, encoder=encoder, method=method, image_size=16, batch_size=16, epochs=2, workers=0,
                 device="cpu", log_every=1, options={"norm": "none", **options},
                 small_views=1 if method in ("swav", "dino") else None,
                 **({"optimizer": "adamw", "learning_rate": 5e-4} if method == "vicreg" else {}))
"""


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("simclr", {}),
        pytest.param("swav", {"queue": 24}, marks=pytest.mark.exhaustive),
        pytest.param("dino", {"hidden": 16}, marks=pytest.mark.exhaustive),
        pytest.param("vicreg", {"hidden": 16}, marks=pytest.mark.exhaustive),
        pytest.param("moco", {}, marks=pytest.mark.exhaustive),
    ],
)
def test_two_ranks_follow_one(method: str, options: dict, images: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(LAYER_NORM)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for name, prefix in (("one", []), ("two", torchrun)):
        line = [sys.executable, *prefix, str(script), method, images, str(tmp_path / name), repr(options)]
        done = subprocess.run(line, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    one, two = rows(tmp_path / "one"), rows(tmp_path / "two")
    assert len(one) == len(two) == 6
    for a, b in zip(one, two, strict=True):
        # a loss of global negatives is the same number on each rank; others are this rank's half of a mean
        if method in ("simclr", "vicreg"):
            assert b["loss"] == pytest.approx(a["loss"], rel=2e-4)
    one, two = (checkpoints.load(tmp_path / name)["model"] for name in ("one", "two"))
    for name, value in one.items():
        if value.is_floating_point():
            torch.testing.assert_close(
                two[name], value, rtol=2e-3, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}"
            )


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["pretrain", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "Traceback" not in error, error
    return error


def test_mistakes_are_one_line(
    images: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # what has weights would be downloaded
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "empty").mkdir()
    base = ["--data", images, "--out", str(tmp_path / "run"), "--device", "cpu", "--workers", "0", "--batch-size", "16"]
    tiny = [*base, "--backbone", "test_resnet", "--image-size", "32", "--batch-size", "16"]
    for arguments, words in (
        (["--data", "x"], ["x is not a folder"]),
        (["--resume"], ["--resume needs --out"]),
        ([*tiny, "--method", "supcon", "--small-views", "2"], ["--small-views: supcon takes every view as a target"]),
        ([*tiny, "--method", "all4one", "--large-views", "3"], ["--large-views: all4one has three losses of exactly"]),
        ([*tiny, "--large-views", "1"], ["--large-views must be at least 2, as views are compared, got 1"]),
        ([*tiny, "--large-views", "1001"], ["--large-views must be at most 1000"]),
        ([*tiny, "--method", "moco", "--no-momentum-encoder"], ["MoCo compares with keys of earlier batches"]),
        ([*tiny, "--method", "dino", "--no-momentum-encoder"], ["DINO collapses", "--options centring=sinkhorn"]),
        ([*tiny, "--projector", "8,x"], ["--projector must be widths of layers", "8,x"]),
        ([*tiny, "--projector", "8", "--options", "dim=4"], ["give it or --options dim"]),
        (["--data", str(tmp_path / "nowhere"), "--out", str(tmp_path / "r1")], ["not a folder"]),
        (["--data", str(tmp_path / "empty"), "--out", str(tmp_path / "r2")], ["no images", ".jpg", ".webp"]),
        ([*base, "--method", "simclrr"], ["did you mean simclr"]),
        ([*base, "--backbone", "resnet118"], ["did you mean", "resnet18"]),
        ([*base, "--bach-size", "4"], ["did you mean --batch-size"]),
        ([*base, "--batch-size", "four"], ["--batch-size", "four"]),
        ([*tiny, "--options", "temprature=0.2"], ["did you mean temperature"]),
        ([*tiny, "--options", "temperature=warm"], ["temperature is 0.1 by default", "'warm'"]),
        ([*tiny, "--options", "hidden=0"], ["hidden must be at least 1, got 0"]),
        ([*tiny, "--method", "dino", "--options", "prototypes=0"], ["prototypes must be at least 1"]),
        ([*tiny, "--learning-rate", "-1"], ["--learning-rate must be", "-1"]),
        ([*tiny, "--momentum", "2"], ["--momentum must be between 0 and 1"]),
        ([*tiny, "--momentum", "0.9"], ["simclr has no momentum encoder"]),
        ([*tiny, "--method", "SimCLR"], ["did you mean simclr?"]),
        ([*tiny, "--options", "temperature=nan"], ["--options temperature must be a number, got NaN"]),
        ([*tiny, "--options", "temperature="], ["--options temperature must not be empty"]),
        ([*tiny, "--view", "tries=2.7"], ["tries must be like 10, got 2.7"]),
        ([*tiny, "--view", "flip=true"], ["flip must be like 0.5, got True"]),
        ([*tiny, "--view", "mean=nan,0,0"], ["mean must be like"]),
        ([*tiny, "--view", "small.scale=0.05,0.2"], ["--view small.scale: there are no small views"]),
        ([*tiny, "--memory", "-1"], ["--memory must be", "-1"]),
        ([*tiny, "--device", "cuda:1"], ["CUDA_VISIBLE_DEVICES"]),
        ([*tiny, "--image-size", "99999"], ["--image-size must be at most"]),
        (["--data", "", "--out", str(tmp_path / "r3")], ["--data must not be empty"]),
        (["--data", images, "--out", ""], ["--out must not be empty"]),
        ([*tiny, "--backbone", "resnet10t.c3_in1k"], ["resnet10t.c3_in1k can't be had", "the hub can't be reached"]),
        ([*tiny, "--backbone", "resnet10t.no_such_tag"], ["no pretrained resnet10t 'no_such_tag'", "c3_in1k"]),
        ([*tiny, "--backbone", "resnet10t."], ["no pretrained resnet10t ''"]),
        ([*tiny, "--backbone", "hf_hub:timm/resnet18.a1_in1k"], ["resnet18.a1_in1k can't be had"]),
        (
            [*tiny, "--backbone", "hf-hub:somebody/model"],
            ["somebody/model can't be had", "local-dir:FOLDER"],
        ),
        ([*tiny, "--backbone", "timm/resnet18"], ["the weights of resnet18 can't be had"]),
        ([*tiny, "--backbone", "ResNet18 "], ["did you mean resnet18?"]),
        ([*tiny, "--batch-size", "1"], ["at least 2"]),
        ([*tiny, "--batch-size", "64"], ["more than the 48 images"]),
        ([*tiny, "--method", "data2vec"], ["vision transformer", "sliding windows"]),
        (
            [*base, "--batch-size", "16", "--backbone", "vit_tiny_patch16_224", "--image-size", "40"],
            ["patch of 16", "32 is"],
        ),
        ([*tiny, "--resume"], ["no run in"]),
        ([*tiny, "--optimizer", "adam"], ["adamw"]),
        ([*tiny, "--sync-batch-norm"], ["--sync-batch-norm needs CUDA"]),
    ):
        error = fails(capsys, *arguments)
        assert all(word in error for word in words), error
        assert not (tmp_path / "run" / "config.yaml").exists(), "the corrected command would find a run there"


def test_values_of_other_types_from_python(images: str, tmp_path: Path) -> None:
    plain: dict = {"workers": 0, "max_steps": 1, "stem": "standard", "report": False}
    done = fastjem.pretrain(
        data=Path(images), out=tmp_path / "run", encoder="test_resnet", image_size=(32, 32), batch_size=np.int64(16),
        device=torch.device("cpu"), learning_rate=np.float32(0.5), options={"temperature": np.float32(0.25)},
        view={"scale": (0.5, 1)}, seed=2**40, **plain,
    )  # fmt: skip
    assert done.steps == 1
    kept = loaded((tmp_path / "run/config.yaml").read_bytes(), "config.yaml")
    assert kept["backbone"] == "test_resnet" and kept["image_size"] == 32 and kept["batch_size"] == 16
    assert kept["device"] == "cpu" and kept["learning_rate"] == 0.5 and kept["options"] == {"temperature": 0.25}
    assert kept["data"] == images and kept["view"] == {"scale": [0.5, 1.0]}
    usual = {"data": images, "out": str(tmp_path / "wrong"), "device": "cpu", "workers": 0, "batch_size": 16}
    for wrong, says in (
        ({"batch_size": "16"}, "pretrain: batch_size must be an integer, got str '16'"),
        ({"batch_size": True}, "pretrain: batch_size must be an integer, got bool True"),
        ({"image_size": (32, 48, 3)}, "pretrain: image_size must be a number of pixels, or height and width"),
        ({"learning_rate": float("nan")}, "pretrain: learning_rate must be a number, got NaN"),
        ({"data": ""}, "pretrain: data must not be empty"),
        ({"epochs": 1e2}, "pretrain: epochs must be an integer, got float 100.0"),
        ({"options": [("temperature", 0.1)]}, "pretrain: options must be a dict"),
        ({"encoder": "test_resnet", "backbone": "resnet18"}, "encoder or backbone, got both"),
    ):
        with pytest.raises(UserError, match=re.escape(says)):
            fastjem.pretrain(**{**usual, **wrong})
    config = Config(out=str(tmp_path / "wrong"), data=images)
    config.batch_size = "16"  # type: ignore[assignment]
    with pytest.raises(UserError, match="batch_size must be an integer"):
        fastjem.pretrain(config)
    assert not (tmp_path / "wrong/config.yaml").exists()


def test_data_that_nobody_named_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("fastjem.data.shapes.write.__defaults__", ({"train": 20, "test": 10},))
    done = fastjem.pretrain(out=tmp_path / "run", backbone="test_resnet", image_size=32, batch_size=16, workers=0,
                            device="cpu", max_steps=1, stem="standard", report=False)  # fmt: skip
    assert done.finished
    assert "fastjem: no data is named: the embedded data set" in capsys.readouterr().err


def test_an_operators_contract_broken_by_an_option(
    images: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen in the first step, with a checkpoint of step 0 written: the corrected command still starts afresh."""
    monkeypatch.setattr("fastjem.methods.ranges.positive", lambda *_, **__: None)  # which would see it before
    with pytest.raises(UserError, match="nt_xent: temperature must be"):
        fastjem.pretrain(**TINY, data=images, options={"temperature": -1}, max_steps=1, out=str(tmp_path))
    assert fastjem.pretrain(**TINY, data=images, max_steps=1, out=str(tmp_path)).finished


def test_mistakes_on_resume(images: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = ["--data", images, "--out", str(tmp_path / "run"), "--backbone", "test_resnet", "--image-size", "32",
            "--batch-size", "16", "--workers", "0", "--device", "cpu", "--epochs", "1"]  # fmt: skip
    assert main(["pretrain", *tiny]) == 0
    capsys.readouterr()
    assert "holds a run already" in fails(capsys, *tiny)
    error = fails(capsys, *tiny, "--resume", "--method", "byol")
    assert "--method was simclr in this run and is byol now" in error
    assert "already at its end" in fails(capsys, *tiny, "--resume")


def test_unreadable_files_are_named_and_the_run_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_folder(tmp_path / "images", 16, classes=0)
    (folder / "0003.png").write_bytes(b"")
    result = fastjem.pretrain(**TINY, data=str(folder), epochs=2, out=str(tmp_path / "run"))
    assert result.finished and result.metrics["unreadable_files"] == 1
    assert capsys.readouterr().err.count("0003.png") == 1


def test_the_command_line_is_the_dataclass() -> None:
    line = "--data a --out b --options temperature=0.2 queue=8 --no-blur --seed 3"
    config = parse(Config, "pretrain", line.split())
    assert config.options == {"temperature": 0.2, "queue": 8} and config.blur is False and config.seed == 3
    with pytest.raises(UserError, match="did you mean image_size"):
        fastjem.pretrain(data="a", out="b", imagesize=3)
