"""What a run says: its banner, its progress in any width, its last lines; and what it makes of little data."""

import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from images import TINY, make_folder

for package in ("timm", "torchvision", "safetensors", "rich"):
    pytest.importorskip(package)

import fastjem  # noqa: E402
from fastjem import terminal  # noqa: E402
from fastjem.arguments import parse  # noqa: E402
from fastjem.banner import classes_of  # noqa: E402
from fastjem.commands.evaluate import EvaluateOptions, evaluate  # noqa: E402
from fastjem.config import Config  # noqa: E402
from fastjem.errors import UserError  # noqa: E402
from fastjem.loggers import LoggedRun  # noqa: E402
from fastjem.probes import majority  # noqa: E402
from fastjem.run import with_folder  # noqa: E402
from fastjem.terminal import Progress, TerminalLogger, duration  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
ROW = {
    "step": 340,
    "loss": 4.2153,
    "images_per_second": 1234.5,
    "data_wait": 0.31,
    "std": 0.9895,
    "effective_rank": 8.1,
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_folder(tmp_path_factory.mktemp("images"), 32))


def progress(steps: int = 1200) -> Progress:
    found = Progress(LoggedRun(Path("runs/a"), "simclr", 0, steps, 256, 10, steps_per_epoch=100))
    found.log(ROW)
    return found


def drawn(found: Progress, width: int) -> str:
    """The line as a terminal of so many columns shows it."""
    from rich.console import Console

    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    console.print(found)
    return console.file.getvalue().rstrip("\n")  # type: ignore[attr-defined]


@pytest.mark.parametrize("width", [*range(10, 100, 3), 79, 80, 119, 120, 160, 219])
def test_a_line_of_progress_fits_and_cuts_nothing(width: int) -> None:
    line = drawn(progress(), width)
    assert "\n" not in line and len(line) < width
    assert re.match(r"(simclr )?340/1200( |$)", line)
    left = re.sub(r"[━╸╺ ]{8,}", " ", line)
    known = (
        r"simclr|340/1200|epoch 4/12|\d:\d\d left|loss 4\.215|1,2\d\d img/s|waiting 31%|std 0\.9895|effective_rank 8\.1"
    )
    assert not re.sub(known, "", left).strip(), f"cut: {left}"


@pytest.mark.parametrize(
    ("width", "there"),
    [
        (20, ("340/1200",)),
        (40, ("340/1200", "left", "loss 4.215")),
        (60, ("340/1200", "left", "loss 4.215", "━━", "epoch 4/12")),
        (80, ("340/1200", "left", "loss 4.215", "━━", "epoch 4/12", "img/s", "simclr")),
        (200, ("340/1200", "left", "loss 4.215", "━━", "epoch 4/12", "img/s", "simclr", "effective_rank 8.1")),
    ],
)
def test_what_matters_most_is_there_longest(width: int, there: tuple[str, ...]) -> None:
    line = drawn(progress(), width)
    assert all(text in line for text in there), line


def test_the_time_that_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now)
    found = Progress(LoggedRun(Path("runs/a"), "simclr", 0, 100, 50, 10))
    assert found.left() == ""
    found.log({**ROW, "step": 10, "images_per_second": 10.0})  # 5 seconds a step
    assert found.left() == "7:30 left"
    now = 130.0  # 20 steps in 30 seconds: checkpoints are in it
    found.log({**ROW, "step": 30, "images_per_second": 1e9})
    assert found.left() == "1:45 left"
    now = 135.0
    assert found.left() == "1:40 left"
    found.log({**ROW, "step": 100})
    assert found.left() == ""
    assert [duration(x) for x in (0, 59.6, 3599, 3600, 3600 * 47, 86400 * 3 + 3600 * 5)] == [
        "0:00", "1:00", "59:59", "1:00:00", "47:00:00", "3 d 05 h",
    ]  # fmt: skip


def test_without_a_terminal_there_are_lines_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now)
    logger = TerminalLogger()
    logger.begin(LoggedRun(Path("runs/a"), "simclr", 0, 1000, 50, 10))
    for step in range(10, 1001, 10):  # 10 seconds each
        now += 10
        logger.log({**ROW, "step": step})
    steps = [int(line.split()[1].partition("/")[0]) for line in capsys.readouterr().err.splitlines()]
    assert steps[:3] == [10, 30, 50] and steps[-1] == 1000
    assert 20 < len(steps) < 50


def test_a_banner_says_what_is_and_what_is_otherwise(images: str, tmp_path: Path, capsys) -> None:
    fastjem.pretrain(**TINY, data=images, method="byol", max_steps=2, weight_decay=0.5, out=str(tmp_path / "a b"))
    err = capsys.readouterr().err
    for text in (
        f"data       {images}: 32 images of 3 classes\n",
        "method     byol (Grill et al. 2020, arXiv 2006.07733); 2 views of 32 pixels, recipe byol",
        "encoder    test_resnet, 0.373 M parameters, 96 numbers an image; heads",
        "training   2 steps, 1 epoch of 2, of 16 images\n",
        "weight decay 0.5, momentum encoder 0.9 to 1\n",
        "runs on    CPU, 1 thread, fp32; images by memory; operators: ",
        "recipe     the paper: section 3.3: LARS, 3.2 at batch 4096",
        "weight decay 0.5 for 1.5e-06",
        " no blur, ",
        ", batches of 16, 1 epoch\n",
        f"2 steps are taken; encoder {tmp_path}/a b/encoder.safetensors\n",
        f"next: fastjem evaluate '{tmp_path}/a b'\n",
        f"fastjem export '{tmp_path}/a b'\n",
    ):
        assert text in err, text
    assert len(err[: err.index("fastjem: ", 1)].splitlines()) <= 10, "the banner is short"
    assert err.index("data  ") < err.index("kNN"), "before the first wait"


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ({}, "9 images, no classes"),
        ({"a": 5, "b": 5}, "10 images of 2 classes"),
        ({"a": 5, "b": 11}, "16 images of 2 classes, of 5 to 11 images; 69% are b"),
        ({"a": 4}, "4 images of one class"),
        ({"": 97, "odd": 3}, "100 images, 97 of them in no folder of their own: no classes"),
    ],
)
def test_how_large_classes_are_is_said(sizes: dict[str, int], says: str) -> None:
    class Source:
        def __init__(self) -> None:
            self.labels = np.repeat(range(len(sizes)), list(sizes.values())) if sizes else None
            self.classes = list(sizes)

        def __len__(self) -> int:
            return sum(sizes.values()) or 9

    assert classes_of(Source()) == says  # type: ignore[arg-type]


def test_an_odd_subfolder_is_no_class(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_folder(tmp_path / "photos", 30, classes=0)
    make_folder(tmp_path / "photos/odd", 2, classes=0)
    fastjem.pretrain(**TINY, data=str(tmp_path / "photos"), max_steps=1, out=str(tmp_path / "run"))
    err = capsys.readouterr().err
    assert "no kNN: images lie beside the folders (odd)" in err and "kNN " not in err.replace("no kNN", "")
    assert "fastjem evaluate" not in err and "fastjem export" in err


def test_an_accuracy_stands_beside_a_guess(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_folder(tmp_path / "photos/many", 36, classes=0)
    make_folder(tmp_path / "photos/few", 4, classes=0)
    run = tmp_path / "run"
    fastjem.pretrain(**TINY, data=str(tmp_path / "photos"), max_steps=1, out=str(run))
    err = capsys.readouterr().err
    assert "40 images of 2 classes, of 4 to 36 images; 90% are many" in err
    assert err.count("(always the largest class: 90.0%)") == 2
    found = evaluate(EvaluateOptions(str(run), workers=0, device="cpu"))
    assert found["majority"] == 0.75  # of the four images held out: one of few, three of many
    known = torch.tensor([0, 0, 1])
    assert majority(known, torch.tensor([1, 1, 1, 0])) == 0.25, "the guess is of what is known, not of what is asked"


@pytest.mark.parametrize(
    ("count", "batch", "steps"), [(100, 32, 6), (7, 2, 6), pytest.param(768, 256, 6, marks=pytest.mark.exhaustive)]
)
def test_a_batch_fits_the_data(
    count: int, batch: int, steps: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "x.npy", np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8))
    fields = {name: value for name, value in TINY.items() if name not in ("batch_size", "log_every")}
    fields |= {"data": str(tmp_path / "x.npy"), "out": str(tmp_path / "run"), "image_size": 8}
    result = fastjem.pretrain(**fields, epochs=2, learning_rate=1e-4)
    assert result.steps == steps
    rows = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert len(rows) == steps, "each step of so short a run is logged"
    said = f"batches of {batch} images, as there are {count}"
    assert (said in capsys.readouterr().err) == (batch < 256)
    resumed = fastjem.pretrain(out=fields["out"], resume=True, epochs=3)
    assert resumed.steps == steps * 3 // 2
    with pytest.raises(UserError, match=f"batch_size {count + 1} is more than the {count} images"):
        fastjem.pretrain(**{**fields, "out": str(tmp_path / "other")}, batch_size=count + 1)


def test_one_image_is_none(tmp_path: Path) -> None:
    make_folder(tmp_path / "photos", 1, classes=0)
    fields = {name: value for name, value in TINY.items() if name != "batch_size"}
    with pytest.raises(UserError, match="has 1 image, and every method compares images"):
        fastjem.pretrain(**fields, data=str(tmp_path / "photos"), out=str(tmp_path / "run"))


def test_a_folder_for_a_run_that_has_none(images: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse(Config, "pretrain", ["--data", images]).out == "runs/METHOD"
    found = [fastjem.pretrain(**TINY, data=images, max_steps=1, method="byol").out for _ in range(2)]
    assert found == [Path("runs/byol"), Path("runs/byol-2")] and all(path.is_dir() for path in found)
    for resume in (True, "auto"):
        with pytest.raises(UserError, match="resume needs out"):
            fastjem.pretrain(resume=resume)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "1")
    with pytest.raises(UserError, match="with several ranks the folder of the run has to be named"):
        with_folder(Config(data=images), None)


def on_a_terminal(command: list[str], columns: int, stop_at: str | None = None) -> tuple[str, int, list[Any]]:
    """(what a command prints on a terminal, its exit code, the terminal's settings behind it)."""
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdin=its, stdout=its, stderr=its, env=environment, start_new_session=True)
    seen = b""
    begin = time.monotonic()
    while process.poll() is None and time.monotonic() - begin < 120:
        fcntl.ioctl(ours, termios.FIONREAD, waiting := bytearray(4))
        seen += os.read(ours, 65536) if any(waiting) else b""
        if stop_at and stop_at.encode() in seen:
            process.send_signal(2)
            stop_at = None
        time.sleep(0.02)
    fcntl.ioctl(ours, termios.FIONREAD, waiting := bytearray(4))
    seen += os.read(ours, 65536) if any(waiting) else b""
    settings = termios.tcgetattr(its)
    for end in (ours, its):
        os.close(end)
    return seen.decode(), process.returncode, settings


@pytest.mark.skipif(sys.platform != "linux", reason="pty")
def test_ctrl_c_leaves_the_terminal_as_it_was(images: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fastjem", "pretrain", "--data", images, "--out", str(tmp_path / "run")]
    command += ["--backbone", "test_resnet", "--image-size", "32", "--batch-size", "16", "--max-steps", "100000"]
    command += ["--device", "cpu", "--knn-every", "0", "--no-report", "--workers", "0"]
    text, code, settings = on_a_terminal(command, 80, stop_at="loss")
    assert code == 130, text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l"), "the cursor is shown again"
    assert settings[3] & termios.ECHO and settings[3] & termios.ICANON
    assert re.search(r"stopped at step \d+; go on with --resume --out", text)
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)
    assert re.search(r"/100000 epoch \d+/50000 [━╸╺]+ [\d:]+ left loss \d", plain), plain[-500:]
