"""DALI's views against torchvision's of the same windows, and files that would end its pipeline."""

import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("nvidia.dali")
pytest.importorskip("torchvision")
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as V

from fastjem.data import loaders
from fastjem.data.batch import Crops, finish
from fastjem.data.loaders import Budget, Order, dali
from fastjem.data.loaders.dali import DaliLoader
from fastjem.data.loaders.jpeg import jpeg_size
from fastjem.data.source import open_source, path_of, to_image
from fastjem.data.views import RECIPES, ViewSpec
from fastjem.errors import UserError
from fastjem.kernels.augment.columns import COLUMNS

SPECS = [ViewSpec(size=48), ViewSpec(size=32, bicubic=True)]


def picture(seed: int, height: int = 90, width: int = 120) -> Image.Image:
    """Smooth enough for JPEG, with fine detail and strong colours."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (9, 12, 3), dtype=np.uint8)).resize((width, height), 3)
    noise = random.normal(0, 12, (height, width, 3))
    return Image.fromarray((np.asarray(coarse) + noise).clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def tables(keys: Sequence[tuple[int, int]], sizes: np.ndarray) -> list[np.ndarray]:
    """A window of each view that depends on its key and its image's size alone."""
    out = [np.zeros((len(keys), COLUMNS), np.float32) for _ in SPECS]
    for i, ((epoch, sample), (height, width)) in enumerate(zip(keys, sizes, strict=True)):
        for view, table in enumerate(out):
            random = np.random.default_rng([epoch, sample, view])
            h, w = random.integers(height // 3, height + 1), random.integers(width // 3, width + 1)
            table[i, :4] = random.integers(height - h + 1), random.integers(width - w + 1), h, w
    return out


def run(root: Path, batches: list[list[int]], **options) -> list[Crops]:
    order = [[(0, sample) for sample in batch] for batch in batches]
    return list(DaliLoader(open_source(root), SPECS, order, tables, batch=max(map(len, batches)), **options))


def write(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).write_bytes(data)
    return root


def check(crops: Crops, rows: dict[int, str]) -> None:
    """Rows of a batch are the views of these files: torchvision's, within DALI's rounding."""
    for row, path in rows.items():
        image = to_image(Path(path).read_bytes())
        for spec, view, table in zip(SPECS, crops.views, crops.tables, strict=True):
            assert view.shape[1:] == (spec.size, spec.size, 3) and view.dtype == torch.uint8
            mode = InterpolationMode.BICUBIC if spec.bicubic else InterpolationMode.BILINEAR
            box = [int(x) for x in table[row, :4]]
            true = V.resized_crop(image, *box, [spec.size] * 2, interpolation=mode, antialias=True)
            off = np.abs(np.asarray(true).astype(int) - view[row].numpy().astype(int))
            inside = off[4:-4, 4:-4]
            # cubic filters have negative lobes: Pillow clips between the two passes and DALI doesn't
            assert inside.mean() < 0.3 and (np.quantile(inside, 0.995) <= 2 if spec.bicubic else inside.max() <= 1)
            assert off.max() <= 25  # the edge


def test_views_are_torchvisions_and_stay_valid(tmp_path: Path) -> None:
    write(tmp_path, {f"{i:02}.jpg": encoded(picture(i, 90 + i, 130 - 3 * i), quality=90) for i in range(16)})
    order = [list(range(i, i + 4)) for i in (0, 4, 8, 12)] * 3
    held = run(tmp_path, order, prefetch=3)  # all twelve batches are held at once
    assert len(held) == 12
    for batch, crops in zip(order, held, strict=True):
        check(crops, {row: str(tmp_path / f"{sample:02}.jpg") for row, sample in enumerate(batch)})
    again = run(tmp_path, [list(range(8)), [8, 9, 10]], prefetch=1, threads=1)  # another batch, the same views
    assert [len(crops.views[0]) for crops in again] == [8, 3]
    for view in range(2):
        one = torch.cat([crops.views[view] for crops in held[:2]])
        assert torch.equal(one, again[0].views[view])


def test_exotic_files_are_read_and_broken_ones_named(tmp_path: Path) -> None:
    image = picture(0)
    whole, exif = encoded(image, quality=90), image.getexif()
    exif[0x0112] = 6
    two_frames = whole[:-2] + whole[whole.find(b"\xff\xc0") :][:19] + whole[-2:]
    files = {
        "00.jpg": whole,
        "01.jpg": encoded(image, progressive=True),
        "02.jpg": encoded(image.convert("L")),
        "03.jpg": encoded(image.convert("CMYK")),
        "04.jpg": encoded(image, exif=exif),
        "05.png": encoded(image, "PNG"),
        "06.png": encoded(Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257), "PNG"),
        "07.webp": encoded(image, "WEBP"),
        "08.jpg": whole + b"\0" * 99,  # some cameras' files
        "09.jpg": encoded(image, "PNG"),  # a wrong ending
        "10.jpg": whole[: len(whole) // 2],
        "11.jpg": b"",
        "12.jpg": b"no image at all",
        "13.jpg": whole[: len(whole) // 2] + whole[:200],
        "14.jpg": two_frames,
    }
    root = write(tmp_path, files)
    names = sorted(files)
    loader = DaliLoader(open_source(root), SPECS, [[(0, i) for i in range(15)]], tables, batch=15)
    (crops,) = loader
    assert loader.failures == 0
    assert sorted({Path(path).name for path, _ in crops.unreadable}) == names[10:]
    assert all(why and str(tmp_path) not in why for _, why in crops.unreadable)
    stand_in = [*range(10), 0, 0, 0, 0, 0]
    check(crops, {row: str(root / names[i]) for row, i in enumerate(stand_in)})


def test_a_file_that_breaks_the_pipeline_costs_nothing_but_time(tmp_path: Path, monkeypatch) -> None:
    whole = encoded(picture(0), quality=90)
    files = {f"{i}.jpg": encoded(picture(i), quality=90) for i in range(12)} | {"7.jpg": whole[: len(whole) // 2]}
    root = write(tmp_path, files)
    monkeypatch.setattr(dali, "jpeg_size", lambda data: (90, 120))  # sees nothing
    order = [[(epoch, i), (epoch, i + 1)] for epoch in range(3) for i in range(0, 12, 2)]
    loader = DaliLoader(open_source(root), SPECS, order, tables, batch=2)
    out = list(loader)
    assert loader.failures == 1 and len(out) == 18  # and in later epochs Pillow reads it
    for epoch in range(3):
        unreadable = {Path(path).name for crops in out[6 * epoch : 6 * epoch + 6] for path, _ in crops.unreadable}
        assert unreadable == {"7.jpg"}
    folder = open_source(root)
    for i, crops in enumerate(out[:6]):
        rows = [2 * i, 2 * i + 1]
        check(crops, {row: path_of(folder, j + (folder.name(j) == "7.jpg")) for row, j in enumerate(rows)})


def test_no_readable_file_at_all(tmp_path: Path) -> None:
    write(tmp_path, {f"{i}.jpg": b"x" for i in range(3)})
    with pytest.raises(UserError, match=r"none of the files can be read; the first: .*0\.jpg"):
        run(tmp_path, [[0, 1]])


def test_jpeg_size() -> None:
    image = picture(1, 33, 57)
    whole, exif = encoded(image, comment=b"\xff\xd9 is no end here"), image.getexif()
    assert jpeg_size(whole) == (33, 57)
    assert jpeg_size(encoded(image, progressive=True)) == jpeg_size(encoded(image.convert("L"))) == (33, 57)
    for orientation in range(1, 9):
        exif[0x0112] = orientation
        data = encoded(image, exif=exif)
        with Image.open(io.BytesIO(data)) as opened:
            width, height = opened.size
        assert jpeg_size(data) == ((width, height) if orientation >= 5 else (height, width))
    assert jpeg_size(encoded(image, restart_marker_blocks=2)) == (33, 57)
    table = whole.find(b"\xff\xc4")
    assert jpeg_size(whole[:table] + b"\xff\xff" + whole[table:]) == (33, 57)  # fill bytes
    assert jpeg_size(whole[:table] + b"\0" + whole[table:]) is None  # Pillow reads on; DALI's threads would crash
    for broken in (b"", b"\xff\xd8", whole[:-2], whole[:300], whole[1:], encoded(image.convert("CMYK")), b"\xff\xd9"):
        assert jpeg_size(broken) is None
    frame = whole.find(b"\xff\xc0")
    assert jpeg_size(whole[: frame + 5] + b"\xff\xff\xff\xff" + whole[frame + 9 :]) is None  # a bomb: 4 gigapixels


def test_the_loader_that_was_named_or_the_best(tmp_path: Path, monkeypatch) -> None:
    write(tmp_path, {"0.jpg": encoded(picture(0))})
    source = open_source(tmp_path)

    def choose(name: str, device: str) -> str:
        return loaders.choose(name, source, SPECS, Budget(device=torch.device(device)))

    assert choose("torch", "cuda") == "torch"
    assert choose("auto", "cpu") == "torch" and choose("dali-cpu", "cpu") == "dali-cpu"
    with pytest.raises(UserError, match="--loader must be one of auto, dali, dali-cpu, memory, torch, got dalli"):
        choose("dalli", "cpu")
    if not torch.cuda.is_available():
        assert choose("auto", "cuda") == "dali-cpu"
        with pytest.raises(UserError, match="--loader dali can't run here: torch sees no CUDA device"):
            choose("dali", "cuda")
    monkeypatch.setattr(dali, "why_not", lambda device: "no")
    assert choose("auto", "cuda") == "torch"


def test_the_graph_for_a_gpu_is_on_the_gpu(monkeypatch) -> None:
    """As far as that goes without one: it is described and looked at, not run."""
    from nvidia.dali import Pipeline

    monkeypatch.setattr(Pipeline, "build", lambda self: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    made = dali.build_pipeline(lambda: (), SPECS, batch=2, device="cuda", decoder_share=0.25)
    made._build_graph()
    kinds = [(op.name.strip("_").partition("_")[0], op.outputs[0].device) for op in made._ops]
    assert sorted(kind for kind in kinds if "xternal" not in kind[0]) == [
        ("Image", "gpu"), ("Resize", "gpu"), ("Resize", "gpu"), ("Slice", "gpu"), ("Slice", "gpu")
    ]  # fmt: skip


def test_loaders_agree_from_any_step_and_rank(tmp_path: Path) -> None:
    write(tmp_path, {f"{i:02}.jpg": encoded(picture(i), quality=90) for i in range(12)})
    specs = [replace(RECIPES["dino"].large[1], size=32), replace(RECIPES["simclr"].large[0], size=48, blur=0)]

    def made(name: str, **options) -> list[list[torch.Tensor]]:
        order = Order(samples=12, **{"batch": 4, "seed": 5, "stop": 5} | options)
        loader = loaders.create(name, open_source(tmp_path), specs, order, Budget())
        return [finish(crops, specs, "cpu").views for crops in loader]

    whole = made("dali-cpu")
    assert len(whole) == 5 and [view.shape for view in whole[0]] == [(4, 3, 32, 32), (4, 3, 48, 48)]
    for one, other in zip(whole[3:], made("dali-cpu", start=3), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    for one, first, second in zip(whole, *(made("dali-cpu", rank=rank, ranks=2) for rank in range(2)), strict=True):
        assert all(torch.equal(a, torch.cat([b, c])) for a, b, c in zip(one, first, second, strict=True))
    for one, other in zip(whole, made("torch"), strict=True):
        # normalised units; DALI's edges differ by up to 25 levels
        assert all(0 < (a - b).abs().mean() < 0.04 for a, b in zip(one, other, strict=True))
        assert not any(torch.equal(a, b.flip(3)) for a, b in zip(one, other, strict=True))


def test_memory_is_a_loader_too(tmp_path: Path) -> None:
    """Images that already have the array's size: the views of the torch loader, by another resize."""
    write(tmp_path, {f"{i}.png": encoded(picture(i, 40, 40), "PNG") for i in range(6)} | {"9.png": b"no image"})
    folder, specs = open_source(tmp_path), [ViewSpec(size=36)]
    order = Order(samples=7, batch=6, seed=1, stop=3)
    loader = loaders.create("memory", folder, specs, order, Budget())
    first, *others = loader
    assert "6 images of 40 x 40" in loader.reads and len(others) == 2
    assert [Path(path).name for path, _ in first.unreadable] == ["9.png"] and not others[0].unreadable
    with pytest.raises(UserError, match="more than the budget"):
        loaders.create("memory", folder, specs, order, Budget(memory=1e-6))


def test_the_share_for_a_gpus_own_decoder_is_measured(tmp_path: Path, monkeypatch) -> None:
    """On a CPU all are as fast: what is measured, taken and said, not which is best."""
    write(tmp_path, {f"{i}.jpg": encoded(picture(i), quality=90) for i in range(4)})
    on_cpu = dali.build_pipeline
    monkeypatch.setattr(dali, "why_not", lambda device: "")
    monkeypatch.setattr(dali, "build_pipeline", lambda *args, **options: on_cpu(*args, **options | {"device": "cpu"}))
    monkeypatch.setattr(dali, "stream_of", lambda device: None)
    monkeypatch.setattr(dali, "uploaded", lambda batches, device: batches)

    def made(stop: int, **budget) -> loaders.Loader:
        order = Order(samples=4, batch=2, seed=1, stop=stop)
        return loaders.create("dali", open_source(tmp_path), SPECS, order, Budget(workers=1, **budget))

    loader = made(1000, agree=lambda share: share if share in dali.DECODER_SHARES else -1)
    assert loader.decoder_share in dali.DECODER_SHARES
    assert all(f"{share:g}: " in loader.reads for share in dali.DECODER_SHARES)
    assert made(1000, agree=lambda share: 0.5).decoder_share == 0.5
    for stop, share in ((999, None), (1000, 0.25)):  # too short to be worth it; told
        loader = made(stop, decoder_share=share)
        assert loader.decoder_share == (share or 0.65) and "second" not in loader.reads
