"""A resumed run knows its own options and its own images, and says what can't change."""

from pathlib import Path

import pytest
import torch
from images import TINY, Own, make_folder

for package in ("timm", "torchvision", "safetensors"):
    pytest.importorskip(package)

import fastjem  # noqa: E402
from fastjem import checkpoints  # noqa: E402
from fastjem import config as configuration  # noqa: E402
from fastjem.arguments import parse  # noqa: E402
from fastjem.cli import main  # noqa: E402
from fastjem.config import Config  # noqa: E402
from fastjem.data.fingerprint import difference, fingerprint  # noqa: E402
from fastjem.data.loaders import Order  # noqa: E402
from fastjem.data.source import open_source  # noqa: E402
from fastjem.errors import UserError  # noqa: E402
from fastjem.methods import SimCLR  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_folder(tmp_path_factory.mktemp("images"), 32, kind="png"))


def test_what_was_given_is_known() -> None:
    line = ["--out", "a", "--resume", "--batch-size", "256", "--no-compile", "--no-blur"]
    config = parse(Config, "pretrain", line)
    assert config.given == {"out", "resume", "batch_size", "compile", "blur"} and config.resume is True
    assert config == Config(out="a", resume=True, blur=False)
    assert Config("a", seed=0).given == {"out", "seed"}
    assert configuration.from_fields({"out": "a", "resume": "auto"}).given == {"out", "resume"}
    for words in (["--resume", "auto"], ["--resume=auto"]):
        assert parse(Config, "pretrain", ["--out", "a", *words]).resume == "auto"
    with pytest.raises(UserError):
        parse(Config, "pretrain", ["--out", "a", "--resume", "perhaps"])


def test_resume_alone_goes_on_and_only_what_is_given_anew_is_compared(
    images: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(tmp_path / "run")
    fastjem.pretrain(**TINY, data=images, epochs=2, options={"temperature": 0.2}, out=run)
    capsys.readouterr()
    for words, said in (
        ("--batch-size 256", "--batch-size was 16 in this run and is 256 now"),  # the default, but given
        ("--options temperature=0.3", "--options was {'temperature': 0.2}"),
        ("--epochs 1", "has taken 4 steps already and can't end at step 2; a larger --epochs"),
        ("", "already at its end, step 4; a larger --epochs"),
    ):
        assert main(["pretrain", "--resume", "--out", run, *words.split()]) == 2, words
        assert said in capsys.readouterr().err
    assert main(["pretrain", "--resume", "auto", "--out", run]) == 0  # for a job that is started again and again
    assert "already at its end" in capsys.readouterr().err
    assert main(["pretrain", "--resume", "--out", run, "--epochs", "3", "--batch-size", "16"]) == 0
    assert "the run ends at step 6 in place of 4" in capsys.readouterr().err
    assert checkpoints.load(Path(run))["step"] == 6  # type: ignore[index]
    assert configuration.read(Path(run))[0].epochs == 3  # and the next one knows it
    result = fastjem.pretrain(out=run, resume=True, max_steps=7)
    assert result.finished and result.steps == 7 and result.metrics["learning_rate"] == 0
    longer = fastjem.pretrain(out=run, resume="auto", epochs=4)  # the epochs say how long, not the steps of before
    assert longer.steps == 8
    new = fastjem.pretrain(**TINY, data=images, epochs=1, out=str(tmp_path / "new"), resume="auto")
    assert new.finished and new.steps == 2
    assert main(["pretrain", "--resume", "--out", str(tmp_path / "nowhere")]) == 2
    assert "--resume auto would begin one" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["simclr", "moco"])
def test_other_images_are_refused_unless_they_are_wanted(method: str, tmp_path: Path) -> None:
    folder, run = make_folder(tmp_path / "images", 32), str(tmp_path / "run")
    fastjem.pretrain(**TINY, data=str(folder), method=method, epochs=1, out=run)
    make_folder(folder, 202)
    with pytest.raises(UserError, match=r"holds 202 images, and held 32 when this run began \(170 more\)"):
        fastjem.pretrain(out=run, resume=True, epochs=2)
    assert checkpoints.load(Path(run))["step"] == 2  # type: ignore[index]
    result = fastjem.pretrain(out=run, resume=True, new_data=True, max_steps=4)  # moco's queue has its size of 32
    assert result.finished and result.steps == 4
    assert fastjem.pretrain(out=run, resume=True, max_steps=5).finished  # these are the run's images now


def test_a_fingerprint_tells_number_names_and_sizes(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "a", 6)
    before = fingerprint(open_source(folder))
    moved = folder.rename(tmp_path / "b")
    assert difference(before, fingerprint(open_source(moved))) == ""
    one = next(moved.rglob("*.png"))
    good = one.read_bytes()
    one.write_bytes(good + b"more")
    assert "larger or smaller" in difference(before, fingerprint(open_source(moved)))
    one.write_bytes(good)
    one.rename(one.with_name("other.png"))
    assert "other names" in difference(before, fingerprint(open_source(moved)))
    one.with_name("other.png").unlink()
    assert "5 images, and held 6 when this run began (1 fewer)" in difference(before, fingerprint(open_source(moved)))


def test_objects_of_the_owners_are_asked_for_again(images: str, tmp_path: Path) -> None:
    class Mine(SimCLR):
        pass

    encoder = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten(), torch.nn.Linear(48, 8))
    tiny = {name: value for name, value in TINY.items() if name != "backbone"}
    own = {"encoder": encoder, "method": Mine, "source": Own(open_source(images))}
    run = str(tmp_path / "run")
    fastjem.pretrain(**tiny, **own, epochs=1, out=run)
    for name in own:
        others = {other: value for other, value in own.items() if other != name}
        with pytest.raises(UserError, match=f"begun with an? {name} of its owner's.*{name}=") as caught:
            fastjem.pretrain(out=run, resume=True, epochs=2, **others)
        assert "did you mean" not in str(caught.value)
    with pytest.raises(UserError, match=r"method was .*Mine in this run and is .*SimCLR now"):
        fastjem.pretrain(out=run, resume=True, epochs=2, **{**own, "method": SimCLR})
    assert fastjem.pretrain(out=run, resume=True, epochs=2, **own).steps == 4


def test_a_run_that_was_killed_before_its_first_step_is_in_nobodys_way(images: str, tmp_path: Path) -> None:
    fastjem.pretrain(**TINY, data=images, max_steps=1, out=str(tmp_path))
    state = checkpoints.load(tmp_path)
    assert state is not None
    with pytest.raises(UserError, match="holds a run already"):
        fastjem.pretrain(**TINY, data=images, max_steps=1, out=str(tmp_path))
    for name in ("metrics.jsonl", "encoder.safetensors", "checkpoints/last-1.pt"):
        (tmp_path / name).unlink()
    checkpoints.save(tmp_path, {**state, "step": 0})
    assert fastjem.pretrain(**{**TINY, "batch_size": 8}, data=images, max_steps=1, out=str(tmp_path)).finished


def test_an_epoch_is_whole_steps_of_accumulated_batches() -> None:
    order = Order(samples=7, batch=1, accumulate=3, stop=12)
    epochs = [keys[0][0] for keys in order]
    assert epochs == [0] * 6 + [1] * 6  # 7 batches make two steps of three, and the seventh belongs to no epoch
    few = Order(samples=2, batch=1, accumulate=3, stop=6)
    assert [keys[0][0] for keys in few] == [0, 0, 1, 1, 2, 2]


def test_a_run_begun_with_a_relative_folder_goes_on_from_anywhere(
    images: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(images).parent)
    run = tmp_path / "run"
    fastjem.pretrain(out=run, data=Path(images).name, max_steps=1, **TINY)
    monkeypatch.chdir(tmp_path)
    assert configuration.read(run)[0].data == images
    assert fastjem.pretrain(out=run, resume=True, max_steps=2).finished
    (tmp_path / Path(images).name).mkdir()  # what is called so from here goes first: a project may have moved
    assert configuration.read(run)[0].data == images  # the resumed run has written where its images are
