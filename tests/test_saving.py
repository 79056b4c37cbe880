"""What of a run reaches the disk when something goes wrong: damaged files, NaN, errors, full disks, two writers."""

import errno
import io
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from images import TINY, make_folder

for package in ("timm", "torchvision", "safetensors"):
    pytest.importorskip(package)

import fastjem  # noqa: E402
from fastjem import checkpoints  # noqa: E402
from fastjem.cli import main  # noqa: E402
from fastjem.errors import DivergedError, ResourceError, UserError  # noqa: E402
from fastjem.lock import Lock  # noqa: E402
from fastjem.methods import SimCLR  # noqa: E402
from fastjem.runs import open_run  # noqa: E402
from fastjem.step import StepEnd  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

TINY_LINE = [
    *("--backbone", "test_resnet", "--image-size", "32", "--batch-size", "16", "--workers", "0", "--device", "cpu"),
    *("--knn-every", "0", "--no-report"),
]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_folder(tmp_path_factory.mktemp("images"), 32, kind="png"))


def state_of(step: int) -> dict[str, Any]:
    return {"step": step, "model": {"weight": torch.full((1000,), float(step))}, "optimizer": {}, "defaults": {}}


def write_three(run: Path) -> Path:
    """Checkpoints of steps 1, 2, 3, of which the last two are kept; the path of the newest."""
    for step in (1, 2, 3):
        checkpoints.keep_earlier(run, 2)
        assert checkpoints.save(run, state_of(step)) is None
    return run / checkpoints.LAST


def flipped(good: bytes) -> bytes:
    middle = len(good) // 2
    return good[:middle] + bytes(255 - x for x in good[middle : middle + 8]) + good[middle + 8 :]


def other_pickle(_: bytes) -> bytes:
    return pickle.dumps({"run": subprocess.Popen})


def other_checkpoint(_: bytes) -> bytes:
    file = io.BytesIO()
    torch.save({"state_dict": {"weight": torch.ones(2)}, "epoch": 3}, file)
    return file.getvalue()


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda good: b"",
    "cut": lambda good: good[: len(good) // 2],
    "last byte": lambda good: good[:-1],
    "text": lambda good: b"no checkpoint",
    "flipped": flipped,
    "pickle": other_pickle,
    "other": other_checkpoint,
}


@pytest.mark.parametrize("damage", [*DAMAGES, "folder", "pipe"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(damage: str, tmp_path: Path) -> None:
    last = write_three(tmp_path)
    assert sorted(path.name for path in last.parent.iterdir()) == ["last-1.pt", "last.pt"]
    good = last.read_bytes()
    last.unlink()
    if damage == "folder":
        last.mkdir()
    elif damage == "pipe":
        os.mkfifo(last)
    else:
        last.write_bytes(DAMAGES[damage](good))
    said: list[str] = []
    state = checkpoints.load(tmp_path, said.append)
    assert state is not None and state["step"] == 2 and state["model"]["weight"][0] == 2
    assert len(said) == 1 and f"{last} is no checkpoint" in said[0] and "last-1.pt is taken, of step 2" in said[0]
    assert last.exists() and checkpoints.load(tmp_path, None, set_aside=True) and not last.exists()
    checkpoints.keep_earlier(tmp_path, 2)
    checkpoints.save(tmp_path, state_of(4))  # the damaged one isn't what is kept for the next time
    assert [checkpoints.read(checkpoints.earlier(tmp_path, i))["step"] for i in (0, 1)] == [4, 2]
    for path in last.parent.iterdir():
        if path.is_file():
            path.write_bytes(b"")
    with pytest.raises(UserError, match="no earlier one can be read"):
        checkpoints.load(tmp_path, None)


def test_earlier_checkpoints_move_on_and_a_failed_one_moves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in range(1, 6):
        checkpoints.keep_earlier(tmp_path, 3)
        checkpoints.save(tmp_path, state_of(step))
    assert [checkpoints.read(checkpoints.earlier(tmp_path, i))["step"] for i in range(3)] == [5, 4, 3]

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.os, "fsync", full)
        for step in (6, 7):
            checkpoints.keep_earlier(tmp_path, 3)
            assert "step" in (checkpoints.save(tmp_path, state_of(step)) or "")
    found = [checkpoints.read(checkpoints.earlier(tmp_path, i))["step"] for i in range(3)]
    assert found == [5, 5, 4] and not list(tmp_path.rglob("*.part"))
    checkpoints.save(tmp_path, state_of(8))
    checkpoints.keep_earlier(tmp_path, 2**62)  # of any number of them only those that are there are looked at
    assert len(checkpoints.present(tmp_path)) == 4
    checkpoints.keep_earlier(tmp_path, 1)
    checkpoints.save(tmp_path, state_of(9))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["last.pt"]
    assert checkpoints.load(tmp_path / "nowhere") is None


def test_a_temporary_file_is_a_writers_own_and_no_link_is_followed(tmp_path: Path) -> None:
    victim, path = tmp_path / "victim", tmp_path / "figures.json"
    victim.write_text("mine")
    for planted in (path, tmp_path / "figures.json.part"):  # the second is what all writers shared once
        planted.symlink_to(victim)
    checkpoints.write_atomically(path, b"ours")
    assert victim.read_text() == "mine" and path.read_text() == "ours" and not path.is_symlink()
    (tmp_path / "new").symlink_to(victim)
    with pytest.raises(FileExistsError):
        checkpoints.new_file(tmp_path / "new")
    rows = tmp_path / "metrics.jsonl"
    rows.symlink_to(victim)
    metrics = checkpoints.Metrics(tmp_path, 3)
    metrics.write({"step": 1})
    metrics.close()
    assert victim.read_text() == "mine" and '"step": 1' in rows.read_text()

    stale = [tmp_path / "metrics.jsonl.0123456789abcdef.part", tmp_path / "checkpoints" / "last.pt.part"]
    foreign = tmp_path / "report.html.0123456789abcdef.part"  # another command may be writing it
    (tmp_path / "checkpoints").mkdir()
    for part in (*stale, foreign):
        part.write_bytes(b"")
    checkpoints.clean(tmp_path)
    assert not any(part.exists() for part in stale) and foreign.exists()


def test_a_device_or_a_pipe_keeps_its_place(tmp_path: Path) -> None:
    read, write = os.pipe()
    pipe, null, out = (tmp_path / name for name in ("pipe", "null", "stdout"))
    os.mkfifo(pipe)
    null.symlink_to(os.devnull)
    out.symlink_to(f"/proc/self/fd/{write}")
    for path in (pipe, null, out, Path(os.devnull)):
        before = os.lstat(path)
        with pytest.raises(OSError, match="no place for a file"):
            checkpoints.write_atomically(path, b"figures")
        assert os.path.samestat(os.lstat(path), before)
    os.close(read)
    os.close(write)


def test_rows_of_a_damaged_file_are_left_out(tmp_path: Path) -> None:
    lines = ['{"step": 1}', "3", '{"step": "x"}', "[" * 100_000, '{"step": 9}', '{"st', "\x00\xff"]
    (tmp_path / "metrics.jsonl").write_bytes("\n".join(lines).encode("latin-1"))
    checkpoints.Metrics(tmp_path, 3).close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_a_second_writer_is_refused_by_name(tmp_path: Path) -> None:
    lock = Lock(tmp_path)
    lock.acquire()
    with pytest.raises(UserError, match=f"another run of this process .pid {os.getpid()}"):
        Lock(tmp_path).acquire()
    program = f"from pathlib import Path; from fastjem.lock import Lock; Lock(Path({str(tmp_path)!r})).acquire()"
    other = [sys.executable, "-c", program]
    done = subprocess.run(other, capture_output=True, text=True)
    assert done.returncode and f"being written by another run (pid {os.getpid()} on " in done.stderr
    lock.release()
    assert not (tmp_path / ".lock").exists()
    assert subprocess.run(other, capture_output=True).returncode == 0
    assert (tmp_path / ".lock").exists()  # its holder ended without a word
    lock.acquire()
    lock.release()
    lock.release()
    (tmp_path / ".lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="--out"):
        Lock(tmp_path).acquire()
    assert not (tmp_path / "elsewhere").exists()


class TurnsBad(SimCLR):
    """Something of it turns into NaN in its 12th step."""

    def step_ends(self, step: torch.Tensor) -> None:
        if int(step) == 11:
            self.projector.get_parameter(next(iter(dict(self.projector.named_parameters())))).data[0] = torch.nan


def test_weights_that_are_not_finite_are_never_saved(images: str, tmp_path: Path) -> None:
    with pytest.raises(
        DivergedError, match=r"step 12: .*weights are not finite.*step 11 is the last good one.*--resume"
    ):
        fastjem.pretrain(**TINY, data=images, method=TurnsBad, epochs=10, checkpoint_steps=1, out=str(tmp_path))
    state = checkpoints.load(tmp_path)
    assert state is not None and state["step"] == 11
    assert all(value.isfinite().all() for value in state["model"].values())
    # a smaller rate leads on from there, and what was said is what the command line takes
    TurnsBad.step_ends = SimCLR.step_ends
    result = fastjem.pretrain(out=str(tmp_path), resume=True, method=TurnsBad, learning_rate=0.01, epochs=7)
    assert result.finished and result.steps == 14


def test_a_giant_rate_ends_in_words(images: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["--data", images, "--out", str(tmp_path / "run"), "--learning-rate", "1e30", "--epochs", "20"]
    assert main(["pretrain", *line, *TINY_LINE]) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said and "the loss is not a number since step 2" in said
    assert "step 2: the run is collapsing" in said  # the first step that is logged: every second of 40
    assert checkpoints.load(tmp_path / "run")["step"] == 0  # type: ignore[index]
    assert (
        main(["pretrain", "--resume", "--out", str(tmp_path / "run"), *["--learning-rate", "0.1", "--max-steps", "1"]])
        == 0
    )


@pytest.mark.parametrize("name", ["learning_rate", "weight_decay"])
def test_a_figure_beyond_float32_is_refused(name: str, images: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="more than float32 holds"):
        fastjem.pretrain(out=tmp_path / "run", data=images, **TINY, **{name: 1e300})
    assert not (tmp_path / "run").exists()


def test_finite_weights_that_cannot_be_trained_leave_the_way_to_those_before(images: str, tmp_path: Path) -> None:
    fields = {**TINY, "out": tmp_path, "max_steps": 6}
    with pytest.raises(DivergedError):
        fastjem.pretrain(data=images, learning_rate=1e30, checkpoint_steps=1, **fields)
    assert checkpoints.load(tmp_path)["step"] == 1  # type: ignore[index]
    with pytest.raises(DivergedError, match=r"without .*last.pt the run goes on from last-1.pt, of step 0"):
        fastjem.pretrain(resume=True, learning_rate=0.1, **fields)
    (tmp_path / checkpoints.LAST).unlink()
    assert fastjem.pretrain(resume=True, learning_rate=0.1, **fields).finished


class Breaks(SimCLR):
    """Its loss raises in one of the forward passes, behind the encoder, whose batch norms have moved by then."""

    at = 0
    error: BaseException = MemoryError()
    calls = 0

    def loss(self, student, teacher, batch, step):
        loss = super().loss(student, teacher, batch, step)
        type(self).calls += 1
        if self.calls == self.at:
            raise self.error
        return loss


@pytest.mark.parametrize("error", [MemoryError(), ArithmeticError("mine")])
def test_any_error_saves_the_last_step_and_resume_alone_goes_on(
    error: BaseException, images: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    Breaks.at, Breaks.calls, Breaks.error = 0, 0, error
    fastjem.pretrain(**TINY, data=images, method=Breaks, epochs=3, out=str(whole))
    Breaks.at, Breaks.calls = 1, 0
    kind = ResourceError if isinstance(error, MemoryError) else type(error)
    with pytest.raises(kind):
        fastjem.pretrain(**TINY, data=images, method=Breaks, epochs=3, out=str(cut))
    assert not cut.exists()  # no step was taken: the corrected command finds nothing in its way
    Breaks.at, Breaks.calls = 5, 0
    with pytest.raises(kind) as caught:
        fastjem.pretrain(**TINY, data=images, method=Breaks, epochs=3, out=str(cut))
    assert kind is not ResourceError or "halve batch_size" in str(caught.value)
    assert "step 4 is saved; --resume --out" in capsys.readouterr().err
    Breaks.at = 0
    result = fastjem.pretrain(out=str(cut), resume=True, method=Breaks)
    assert result.finished and result.steps == 6
    one, other = (checkpoints.load(path)["model"] for path in (cut, whole))  # type: ignore[index]
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_a_step_that_was_torn_isnt_saved() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
    end, batch = StepEnd(module), torch.randn(8, 4)
    for _ in range(2):
        end.begins()
        module(batch)
        end.moves()
        end.ends()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    end.begins()
    module(batch)
    assert end.restore()
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    end.begins()
    module(batch)
    end.moves()
    assert not end.restore()


def test_a_folder_that_vanishes_costs_no_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_folder(tmp_path / "images", 32)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")

    class Vanishes:
        def begin(self, run) -> None: ...

        def log(self, row) -> None:
            if row["step"] == 7:
                folder.rename(tmp_path / "away")

        def close(self) -> None: ...

    run = tmp_path / "run"
    with pytest.raises(UserError, match="none of the files can be read"):
        fastjem.pretrain(**TINY, data=str(folder), epochs=10, loader="torch", loggers=[Vanishes()], out=str(run))
    assert "step 7 is saved" in capsys.readouterr().err
    assert open_run(run).step == 7 and (run / "notes.txt").exists()
    (tmp_path / "away").rename(folder)
    assert fastjem.pretrain(out=str(run), resume=True, max_steps=8).finished


@pytest.mark.parametrize("room", [0, 1])
def test_a_full_disk_is_no_success(
    room: int, images: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Room for so many checkpoints, and none for the encoder."""
    write = checkpoints.write_atomically
    written: list[Path] = []

    def full(path: Path, content: bytes) -> None:
        if path.suffix in (".pt", ".safetensors"):
            written.append(path)
            if len(written) > room:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, content)

    monkeypatch.setattr(checkpoints, "write_atomically", full)
    monkeypatch.setattr("fastjem.encoders.write_atomically", full, raising=False)
    monkeypatch.setattr("fastjem.exports.write_atomically", full, raising=False)
    line = [
        "--data",
        images,
        "--out",
        str(tmp_path / "run"),
        *["--epochs", "1", "--batch-size", "16", "--workers", "0"],
    ]
    code = main(["pretrain", *line, *TINY_LINE])
    said = capsys.readouterr().err
    assert code == (1 if room else 2) and "Traceback" not in said
    if room:
        assert "the last good one, of step 0, stays" in said and "step 2 is not saved, only step 0" in said
        assert "encoder.safetensors could not be written" in said
        monkeypatch.undo()
        assert main(["pretrain", "--resume", "--out", str(tmp_path / "run")]) == 0
    else:
        assert "ends before its first step" in said and "stays" not in said and not (tmp_path / "run").exists()
