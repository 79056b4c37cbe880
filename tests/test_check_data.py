"""`fastjem check-data`: what is broken is named, what is there is counted."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from images import make_folder

pytest.importorskip("PIL")
pytest.importorskip("tyro")
from PIL import Image

from fastjem.cli import main


def folder(root: Path, images: int) -> Path:
    make_folder(root, images, classes=3, size=40)
    whole = (root / "class0" / "0000.png").read_bytes()
    (root / "class0" / "copy.png").write_bytes(whole)
    (root / "class1" / "half.png").write_bytes(whole[: len(whole) // 2])
    (root / "class1" / "empty.jpg").write_bytes(b"")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("L", (64, 48)).save(root / "class2" / "turned.jpg", exif=exif, progressive=True)
    return root


@pytest.mark.parametrize(("images", "workers"), [(6, 1), (90, 2)])
def test_counts_and_reasons(tmp_path: Path, images: int, workers: int, capsys: pytest.CaptureFixture[str]) -> None:
    root = folder(tmp_path, images)
    arguments = ["check-data", str(root), "--image-size", "50", "--views", "3", "--workers", str(workers)]
    assert main([*arguments, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["files"] == images + 4 and found["classes"] == 3
    assert found["formats"] == {"PNG": images + 1, "JPEG": 1} and found["modes"] == {"RGB": images + 1, "L": 1}
    assert (found["copies"], found["turned"], found["progressive"]) == (1, 1, 1)
    assert found["largest"] == [48, 64] and found["smallest"] == [40, 40] and found["small"] == images + 2
    assert [Path(path).name for path, _ in found["skipped"]] == ["empty.jpg", "half.png"]
    assert dict(found["skipped"])[str(root / "class1" / "empty.jpg")] == "cannot identify image file"
    assert all(why and str(root) not in why for _, why in found["skipped"])
    assert found["bytes"] == sum(file.stat().st_size for file in root.rglob("*.*"))
    assert 0 < found["epoch_seconds"] < 60
    assert main([*arguments, "--show", "1"]) == 1
    said = capsys.readouterr().out
    assert "2 (" in said and "class1/empty.jpg: " in said and "half.png" not in said and "1 more; --show 0" in said


def test_nothing_to_complain_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_folder(tmp_path, 3, classes=0)
    assert main(["check-data", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "3 in one class" in said and said.splitlines()[-1].split() == ["skipped", "none"]
    assert main(["check-data", str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert main(["check-data", str(tmp_path), "--views", "0"]) == 2
    assert "--views must be at least 1, got 0" in capsys.readouterr().err


def test_names_that_are_no_text_and_names_that_forge(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A name in Latin-1, and one that would colour the terminal and forge a line."""
    names = (b"caf\xe9.jpg", b"\x1b[31mred\nfastjem: all is well.png", "\u202egpj.exe.png".encode())
    for name in names:
        (tmp_path / os.fsdecode(name)).write_bytes(b"")
    make_folder(tmp_path, 2, classes=0)
    assert main(["check-data", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    for shown in (r"  caf\xe9.jpg: ", r"  \x1b[31mred\nfastjem: all is well.png: ", r"  \u202egpj.exe.png: "):
        assert f"\n{shown}cannot identify image file" in said
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e]", said) and "\nfastjem:" not in said
    assert main(["check-data", str(tmp_path), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["skipped"][0][0].endswith(os.fsdecode(names[1]))


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_names_that_the_terminal_lacks(tmp_path: Path, encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "猫é.jpg").write_bytes(b"")
    raw = io.BytesIO()
    terminal = io.TextIOWrapper(raw, encoding=encoding)
    monkeypatch.setattr(sys, "stdout", terminal)
    assert main(["check-data", str(tmp_path)]) == 1
    assert "猫é.jpg".encode(encoding, "backslashreplace") in raw.getvalue()


def test_a_reader_that_has_gone(tmp_path: Path) -> None:
    make_folder(tmp_path, 2, classes=0)
    command = [sys.executable, "-m", "fastjem", "check-data", str(tmp_path)]
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert done.stderr == "" and done.returncode == 0


def test_what_is_not_taken_and_what_values_mean(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_folder(tmp_path, 4, classes=2)
    for name in ("a.heic", "b.HEIC", "notes.txt", "README", ".hidden"):
        (tmp_path / "class0" / name).write_bytes(b"x")
    (tmp_path / "class2").symlink_to("nowhere")
    for i, largest in enumerate((900, 4000)):
        Image.fromarray(np.linspace(0, largest, 64).reshape(8, 8).astype(np.uint16)).save(tmp_path / f"{i}.png")
    assert main(["check-data", str(tmp_path)]) == 1
    said = capsys.readouterr()
    lines = {line[:10].strip(): line[10:] for line in said.out.splitlines()}
    assert lines["not taken"] == ".heic 2, .txt 1, no ending 1"
    assert lines["unlisted"] == f"{tmp_path}/class2: a link to nothing; what is in it is left out"
    assert lines["values"] == (
        "integers of more than 8 bits: black is 0, white 4095 (--value-range LOW,HIGH); 0 to 4000 in the 2 looked at; "
        "8-bit images beside them have their own, 0 to 255"
    )
    (tmp_path / "class2").unlink()
    assert main(["check-data", str(tmp_path), "--value-range", "0,1000"]) == 0
    assert "white 1000 " in (text := capsys.readouterr().out) and "values outside of that in 1 images" in text
    assert main(["check-data", str(tmp_path), "--channels", "4"]) == 1
    assert "3 channels, not the 4 of --channels" in capsys.readouterr().out
    assert main(["check-data", str(tmp_path), "--value-range", "5"]) == 2
    np.savez(tmp_path / "a.npz", images=np.zeros((3, 8, 8), np.float32))
    assert main(["check-data", str(tmp_path / "a.npz")]) == 0
    assert "floats: black is 0, white 1 " in capsys.readouterr().out
