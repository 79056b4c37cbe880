"""DALI's crops are the torch loader's, and no file ends a run."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from images import make_folder

pytest.importorskip("nvidia.dali")
pytest.importorskip("torchvision")
from PIL import Image

from fastjem.data import executors
from fastjem.data.dali import DaliLoader, encoded
from fastjem.data.folder import ImageFolder
from fastjem.data.loader import ViewLoader
from fastjem.data.views import Views
from fastjem.errors import UserError


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JPEG: smooth colours, larger than they are shown, of any shape."""
    folder, random = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for i in range(24):
        coarse = Image.fromarray(random.integers(0, 256, (6, 6, 3), np.uint8))
        coarse.resize((90 + 5 * i, 140 - 3 * i), Image.Resampling.BICUBIC).save(folder / f"{i:02}.jpg", quality=90)
    return folder


def loaded(kind: type, folder: Path, views: Views, size: int = 32, **options) -> list:
    return list(kind(ImageFolder(folder), views.specs(size), **{"batch": 8, "stop": 4, "seed": 3, **options}))


def test_crops_are_the_torch_loaders(photos: Path) -> None:
    for views, interior, most in ((Views(2, 1, "simclr"), 1, 24), (Views(2, 1, "dino"), 2, 24)):
        pairs = list(zip(loaded(ViewLoader, photos, views), loaded(DaliLoader, photos, views), strict=True))
        for v in range(3):
            assert all(torch.equal(a.tables[v], b.tables[v]) for a, b in pairs)
            difference = torch.cat([(a.crops[v].float() - b.crops[v].float()).abs() for a, b in pairs])
            inner = difference[:, 4:-4, 4:-4].flatten()
            assert inner.quantile(0.999) <= interior and difference.max() <= most and difference.mean() < 0.5


def test_crops_depend_on_nothing_but_their_key(photos: Path) -> None:
    views = Views(2, 1, "simclr")
    whole = loaded(DaliLoader, photos, views, stop=6)
    late = loaded(DaliLoader, photos, views, stop=6, start=4, threads=1)
    ranks = [loaded(DaliLoader, photos, views, stop=6, rank=rank, ranks=2) for rank in range(2)]
    for v in range(3):
        assert all(torch.equal(a.crops[v], b.crops[v]) for a, b in zip(whole[4:], late, strict=True))
        for one, first, second in zip(whole, *ranks, strict=True):
            assert torch.equal(one.crops[v], torch.cat([first.crops[v], second.crops[v]]))
    assert not torch.equal(whole[0].crops[0], whole[3].crops[0])  # three batches are an epoch


def test_batches_stay_as_they_are(photos: Path) -> None:
    """What DALI hands out is not written over by later batches."""
    loader, kept = DaliLoader(ImageFolder(photos), Views().specs(32), batch=4, stop=30), []
    for batch in loader:
        kept.append((batch.crops[0], batch.crops[0].clone()))
    assert len(kept) == 30 and all(torch.equal(view, copy) for view, copy in kept)


def test_no_file_ends_a_run(tmp_path: Path) -> None:
    make_folder(tmp_path, 12, classes=0)
    good = Image.fromarray(np.random.default_rng(1).integers(0, 256, (60, 80, 3), np.uint8))
    good.save(tmp_path / "a.jpg")
    data = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "truncated.jpg").write_bytes(data[: len(data) // 2])
    (tmp_path / "no_image.jpg").write_bytes(b"\xff\xd8\xff\xe0 no image at all \xff\xd9")
    (tmp_path / "empty.jpg").write_bytes(b"")
    good.save(tmp_path / "progressive.jpg", progressive=True)
    good.convert("CMYK").save(tmp_path / "cmyk.jpg")
    good.convert("L").save(tmp_path / "gray.jpg")
    exif = good.getexif()
    exif[0x0112] = 6
    good.save(tmp_path / "turned.jpg", exif=exif)
    Image.fromarray(np.full((50, 40), 60_000, np.uint16)).save(tmp_path / "deep.png")
    good.save(tmp_path / "x.webp")
    folder = ImageFolder(tmp_path)
    ours, theirs = (
        list(kind(folder, Views().specs(24), batch=11, stop=4, seed=1)) for kind in (DaliLoader, ViewLoader)
    )
    for a, b in zip(ours, theirs, strict=True):
        assert {Path(path).name for path, _ in a.unreadable} == {Path(path).name for path, _ in b.unreadable}
        assert all(torch.equal(x, y) for x, y in zip(a.tables, b.tables, strict=True))
        assert (a.crops[0][:, 4:-4, 4:-4].float() - b.crops[0][:, 4:-4, 4:-4].float()).abs().quantile(0.99) <= 1
    named = {Path(path).name for batch in ours for path, _ in batch.unreadable}
    assert {"truncated.jpg", "no_image.jpg", "empty.jpg"} <= named


def test_damage_inside_a_file_is_decoded_as_far_as_it_goes(photos: Path, tmp_path: Path) -> None:
    """Headers and end are right, the rest isn't: Pillow refuses such a file, DALI shows what it makes of it."""
    data = (photos / "00.jpg").read_bytes()
    start = data.index(b"\xff\xda") + 14
    for i in range(2):
        (tmp_path / f"{i}.jpg").write_bytes(data)
    (tmp_path / "2.jpg").write_bytes(data[:start] + b"\xff\xc4\x00\x01" + data[start + 4 :])
    assert len(loaded(DaliLoader, tmp_path, Views(), batch=3, stop=5)) == 5


def test_a_pipeline_that_dies_is_built_again(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a file that looks whole: the batches under way go through Pillow, none is lost or doubled."""
    from fastjem.data import dali

    expected, calls = loaded(DaliLoader, photos, Views()), []

    def broken(path: str, careful: bool = False):
        data, size = encoded(path, careful)
        if path.endswith("07.jpg") and not careful:
            calls.append(path)
            data = np.concatenate([data[:20], np.zeros(200, np.uint8)])
        return data, size

    monkeypatch.setattr(dali, "encoded", broken)
    found = loaded(DaliLoader, photos, Views())
    assert calls and len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a.crops, b.crops, strict=True))


def test_what_is_asked_for_and_cannot_run_says_so(photos: Path, tmp_path: Path) -> None:
    folder, specs, cpu = ImageFolder(photos), Views().specs(16), torch.device("cpu")
    options = {"workers": 1, "batch": 4, "stop": 1}
    assert isinstance(executors.create("auto", folder, specs, cpu, **options)[0], ViewLoader)
    assert isinstance(executors.create("dali-cpu", folder, specs, cpu, **options)[0], DaliLoader)
    with pytest.raises(UserError, match="--loader dali decodes on the GPU"):
        executors.create("dali", folder, specs, cpu, **options)
    with pytest.raises(UserError, match="no loader 'dally'"):
        executors.create("dally", folder, specs, cpu, **options)
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="DALI doesn't run on cuda:0: "):
            executors.create("dali", folder, specs, torch.device("cuda:0"), **options)
        loader, which = executors.create("auto", folder, specs, torch.device("cuda:0"), **options)
        assert isinstance(loader, ViewLoader) and "DALI doesn't run on cuda:0" in which
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_text("x")
    with pytest.raises(UserError, match="none of the files can be read"):
        list(DaliLoader(ImageFolder(tmp_path), specs, batch=2, stop=1))


@pytest.mark.slow
def test_pretraining_reads_by_dali(photos: Path, tmp_path: Path) -> None:
    pytest.importorskip("timm")
    import fastjem

    fields = {"data": str(photos), "backbone": "test_resnet", "image_size": 32, "batch_size": 8, "epochs": 2,
              "report": False, "loader": "dali-cpu", "workers": 1}  # fmt: skip
    first = fastjem.pretrain(out=str(tmp_path / "a"), **fields)
    fastjem.pretrain(out=str(tmp_path / "b"), checkpoint_steps=2, **{**fields, "epochs": 2, "max_steps": 4})
    again = fastjem.pretrain(out=str(tmp_path / "b"), resume=True, checkpoint_steps=2, **fields)
    assert first.steps == again.steps == 6 and os.path.exists(tmp_path / "a" / "encoder.safetensors")
