"""Pairs of sources, and what people name by mistake: a message that says what is wrong, and nothing is left behind."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from images import TINY, make_folder

for package in ("timm", "torchvision", "safetensors"):
    pytest.importorskip(package)

import fastjem  # noqa: E402
from fastjem.data.source import open_sources  # noqa: E402
from fastjem.errors import UserError  # noqa: E402

Make = Callable[[Path, Path], object]


def files(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file())


@pytest.fixture
def sides(tmp_path: Path) -> tuple[Path, Path]:
    """Two folders of 24 images of the same names."""
    make_folder(tmp_path / "a", 24)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    return tmp_path / "a", tmp_path / "b"


def other_names(a: Path, b: Path) -> object:
    for path in files(b):
        path.rename(path.with_stem("other-" + path.stem))
    return [a, b]


def nothing(a: Path, b: Path) -> object:
    for path in files(b):
        path.unlink()
    return f"{a},{b}"


def two_endings(a: Path, b: Path) -> object:
    first = files(b)[0]
    shutil.copy(first, first.with_suffix(".jfif"))
    return [a, b]


def one_is_missing(a: Path, b: Path) -> object:
    return f"{a},{b.with_name('c')}"


MISTAKES: dict[str, tuple[Make, str]] = {
    "other names": (other_names, "no image has the same name in"),
    "an empty folder": (nothing, "no images"),
    "a name with two endings": (two_endings, "have one name, the ending aside"),
    "a folder that isn't there": (one_is_missing, "c"),
    "one folder": (lambda a, b: str(a), "2 sources, got 1"),
    "three folders": (lambda a, b: [a, b, str(a)], "2 sources, got 3"),
    "nothing between commas": (lambda a, b: f"{a},,", "2 sources, got 1"),
    "a comma in a name": (lambda a, b: [f"{a},1", b], "a comma in its name"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_said_and_leave_no_run(mistake: str, sides: tuple[Path, Path], tmp_path: Path) -> None:
    make, message = MISTAKES[mistake]
    data = make(*sides)
    with pytest.raises(UserError, match=message):
        fastjem.pretrain(**TINY, method="clip", data=data, max_steps=1, out=str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_method_of_single_images_takes_both_folders_images(sides: tuple[Path, Path], tmp_path: Path) -> None:
    a, b = sides
    data = [a.rename(a.with_name("a,1")), b]  # a path that is there is one, whatever is in its name
    result = fastjem.pretrain(**TINY, method="simclr", data=data, epochs=1, out=str(tmp_path / "run"))
    assert result.steps == 3  # of 16 of their 48 images


@pytest.mark.parametrize("method", ["clip", "siglip"])
def test_images_without_a_partner_or_damaged_are_left_out(
    method: str, sides: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    a, b = sides
    files(b)[3].unlink()
    damaged = files(b)[7]
    damaged.write_bytes(b"no image")
    whole = {**TINY, "batch_size": 23}  # so that each image is in the batch
    result = fastjem.pretrain(**whole, method=method, data=[a, b], max_steps=1, out=str(tmp_path / "run"))
    told = capfd.readouterr().err
    assert result.finished
    assert "23 images are in all of" in told and f"1 in {a}" in told
    assert damaged.name in told


def test_images_belong_together_by_their_names(sides: tuple[Path, Path]) -> None:
    a, b = sides
    files(a)[0].unlink()
    pairs = open_sources([a, b], 2)
    assert len(pairs) == 23
    for i in range(len(pairs)):
        first, second = pairs.read_all(i)
        assert first == second
