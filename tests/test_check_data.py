"""`fastjem check-data`: what is broken is named, what is there is counted."""

import json
from pathlib import Path

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
