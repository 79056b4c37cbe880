"""Exported folders: opened by timm, fastjem, torchvision and onnxruntime as their model card says, and one embedding by
every route."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from encoder_files import encoder_file, randomise
from images import BYOLS, TINY, make_folder
from torch import Tensor, nn

for package in ("timm", "torchvision", "safetensors", "tyro"):
    pytest.importorskip(package)
import timm  # noqa: E402
from PIL import Image, ImageOps  # noqa: E402

import fastjem  # noqa: E402
from fastjem.cli import main  # noqa: E402
from fastjem.commands.export import ExportOptions, export  # noqa: E402
from fastjem.data.pixels import Pixels, whole_images  # noqa: E402
from fastjem.data.size import height_and_width  # noqa: E402
from fastjem.data.source import open_source  # noqa: E402
from fastjem.errors import UserError  # noqa: E402
from fastjem.runs import open_run  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.21, 0.33)
WITH = re.compile(r"^## With (\S+)\n(?:(?!## ).)*?```python\n(.*?)```", re.DOTALL | re.MULTILINE)


def photographs(folder: Path) -> list[Path]:
    """As cameras, scanners and the web leave them: turned by EXIF, gray, for printing, of a palette, long."""
    random = np.random.default_rng(0)
    small = random.integers(60, 190, (7, 9, 3), np.uint8)
    picture = Image.fromarray(small).resize((151, 98), Image.Resampling.BICUBIC)
    turned = Image.Exif()
    turned[0x0112] = 6
    folder.mkdir(parents=True)
    picture.save(folder / "a.jpg")
    picture.save(folder / "b.jpg", exif=turned)
    picture.convert("L").save(folder / "c.jpg")
    picture.convert("CMYK").save(folder / "d.jpg")
    picture.convert("P").save(folder / "e.png")
    picture.resize((151, 33)).save(folder / "f.jpg")
    return sorted(folder.iterdir())


def measured(module: nn.Module, pixels: Pixels, folder: Path) -> Tensor:
    """Embeddings of a folder's images by the route of `evaluate` [N, D]."""
    source = open_source(folder)
    images = whole_images(source, range(len(source)), pixels)
    whole = torch.stack([images[i] for i in range(len(source))])
    with torch.no_grad():
        return module(pixels.decoded.normalise(whole, "cpu"))


def by_card(folder: Path, image: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """The embedding [1, D] of an image by the code of each route that the model card shows, run as it stands."""
    monkeypatch.chdir(folder.parent)
    found = {}
    for route, code in WITH.findall((folder / "README.md").read_text()):
        names: dict[str, Any] = {}
        exec(compile(re.sub('"(photo.jpg|image.png)"', repr(str(image)), code), "README.md", "exec"), names)
        if route == "torchvision":
            with torch.no_grad():
                picture = ImageOps.exif_transpose(Image.open(image)).convert("RGB")
                names["embedding"] = names["model"](names["transform"](picture)[None])
        result = next(names[name] for name in ("embedding", "embeddings", "features") if name in names)
        found[route] = torch.as_tensor(result).detach()
    return found


EVERY = {"timm", "fastjem", "ONNX"}
ENCODERS = {
    "resnet18": (Pixels(72, MEAN, STD), {}, EVERY | {"torchvision"}),
    "test_resnet": (Pixels(40, MEAN, STD), {}, EVERY),
    "resnet18 of the small stem": (Pixels(33, MEAN, STD), {}, {"fastjem", "torchvision", "ONNX"}),
    "resnet50": (Pixels(65, MEAN, STD), {}, EVERY | {"torchvision"}),
    "test_convnext": (Pixels((64, 96), MEAN, STD), {}, EVERY),
    "test_vit": (Pixels(64, MEAN, STD), {}, EVERY),  # positions are resampled as images come
    "test_vit2": (Pixels((32, 48), MEAN, STD), {"patch": 8, "pool": "avg"}, EVERY),
    "vit_wee_patch16_reg1_gap_256": (Pixels((64, 32), MEAN, STD), {}, EVERY),  # with a register token
    "resnet10t": (Pixels(72, MEAN, STD, value_range=(10, 250)), {}, EVERY),
}
SLOW = ("resnet18", "resnet50", "vit_wee_patch16_reg1_gap_256", "test_convnext")
NAMES = [pytest.param(name, marks=[pytest.mark.exhaustive] if name in SLOW else []) for name in ENCODERS]


@pytest.mark.parametrize("name", NAMES)
def test_one_embedding_by_every_route(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels, how, routes = ENCODERS[name]
    onnx = name in ("test_resnet", *SLOW)
    if onnx:
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    photos = photographs(tmp_path / "photos")
    module = encoder_file(tmp_path / "a.safetensors", name.partition(" ")[0], pixels, **how)
    export(ExportOptions(str(tmp_path / "a.safetensors"), out=str(tmp_path / "model"), onnx=onnx))
    expected = measured(module, pixels, tmp_path / "photos")
    assert not torch.allclose(expected[0], expected[1], rtol=0.01)  # turned, it is another
    # With another black and white than 0 and 255, ours are rounded to 8 bits before the resize, and timm's aren't.
    rounded = pixels.value_range != (0, 255)
    for i, photo in enumerate(photos):
        found = by_card(tmp_path / "model", photo, monkeypatch)
        assert set(found) == routes - (set() if onnx else {"ONNX"})
        for route, embedding in found.items():
            scale = float(expected[i].abs().max())
            atol = 0.02 if rounded and route == "timm" else 1e-5
            torch.testing.assert_close(
                embedding[0] / scale, expected[i] / scale, rtol=0, atol=atol, msg=lambda m, r=route: f"{r}: {m}"
            )


@pytest.mark.parametrize(
    ("channels", "values", "black_and_white"),
    [(1, "8-bit", (0.0, 255.0)), (4, "integer", (100.0, 4095.0)), (1, "float", (-2.0, 3.0))],
)
def test_images_that_arent_pictures(
    channels: int, values: str, black_and_white: tuple[float, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gray ones, four channels of 16 bits, floats: as tensors from 0 to 1, as the card says."""
    tifffile = pytest.importorskip("tifffile")
    pixels = Pixels(48, (0.4,) * channels, (0.25,) * channels, channels, black_and_white, values)
    black, white = black_and_white
    dtype = {"8-bit": np.uint8, "integer": np.uint16, "float": np.float32}[values]
    y, x = np.mgrid[:60, :80]
    waves = np.stack([np.sin(x / (9 + 2 * c)) * np.cos(y / 11) for c in range(channels)], 2) * 0.5 + 0.5
    stored = (black + waves * (white - black)).astype(dtype)
    (tmp_path / "images").mkdir()
    path = tmp_path / "images/a.png"
    if values == "8-bit":
        Image.fromarray(stored[:, :, 0]).save(path)
    else:
        path = path.with_suffix(".tif")
        given = {} if channels == 1 else {"extrasamples": ["unspecified"] * (channels - 1)}
        tifffile.imwrite(path, stored[:, :, 0] if channels == 1 else stored, photometric="minisblack", **given)
    module = encoder_file(tmp_path / "a.safetensors", "test_resnet", pixels)
    export(ExportOptions(str(tmp_path / "a.safetensors"), out=str(tmp_path / "model")))
    expected = measured(module, pixels, tmp_path / "images")
    if channels == 4:  # Pillow doesn't read it
        monkeypatch.setattr(Image, "open", lambda file: tifffile.imread(file))
        monkeypatch.setattr("fastjem.data.pixels.read_file", lambda file: tifffile.imread(file))
    found = by_card(tmp_path / "model", path, monkeypatch)
    assert set(found) == {"timm", "fastjem"}
    for route, embedding in found.items():
        scale = expected.abs().max()
        torch.testing.assert_close(embedding / scale, expected / scale, rtol=0, atol=2e-5, msg=route)
    config = timm.data.resolve_model_data_config(timm.create_model(f"local-dir:{tmp_path / 'model'}"))
    assert list(config["input_size"]) == [channels, 48, 48] and config["mean"] == pytest.approx([0.4] * channels)


@pytest.mark.parametrize(
    ("name", "size", "how", "arguments"),
    [
        ("test_vit", 160, {}, {"dynamic_img_size": True, "img_size": [160, 160]}),
        ("test_vit", (32, 64), {"pool": "token"}, {"global_pool": "token", "fc_norm": False, "img_size": [32, 64]}),
        ("vit_tiny", 32, {}, {"dynamic_img_size": True, "img_size": 32, "patch_size": 4}),
        ("test_resnet", 40, {}, {"in_chans": 2}),
        ("test_vit_relpos", 160, {}, {"img_size": [160, 160]}),
        ("test_efficientnet", 40, {}, {}),
    ],
)
def test_timm_makes_it_again(name: str, size: Any, how: dict, arguments: dict, tmp_path: Path) -> None:
    """By arguments in its file; also with a classifier, for fine-tuning."""
    channels = arguments.get("in_chans", 3)
    pixels = Pixels(size, (0.5,) * channels, (0.2,) * channels, channels)
    module = encoder_file(tmp_path / "a.safetensors", name, pixels, **how)
    export(ExportOptions(str(tmp_path / "a.safetensors")))
    config = json.loads((tmp_path / "a/config.json").read_text())
    assert config["architecture"] == timm.models.parse_model_name(config["architecture"])[1]
    assert arguments.items() <= config["model_args"].items()
    assert (config["num_classes"], config["num_features"]) == (0, module.num_features)
    images = torch.randn(2, channels, *height_and_width(size))
    model: Any = timm.create_model(f"local-dir:{tmp_path / 'a'}", pretrained=True).eval()
    torch.testing.assert_close(model(images), module(images))
    found = timm.data.resolve_model_data_config(model)
    assert {**found, "input_size": list(found["input_size"])} == {
        "input_size": [channels, *height_and_width(size)], "interpolation": "bilinear", "mean": list(pixels.mean),
        "std": list(pixels.std), "crop_pct": 1.0, "crop_mode": "center",
    }  # fmt: skip
    tuned: Any = timm.create_model(f"local-dir:{tmp_path / 'a'}", pretrained=True, num_classes=7).eval()
    assert tuned(images).shape == (2, 7)
    torch.testing.assert_close(tuned.forward_head(tuned.forward_features(images), pre_logits=True), module(images))


def test_what_timm_lacks_is_said_and_opened_by_fastjem(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = encoder_file(tmp_path / "a.safetensors", "resnet18", Pixels(32))
    out = tmp_path / "a"
    assert main(["export", str(tmp_path / "a.safetensors")]) == 0
    said = capsys.readouterr()
    assert said.out.split() == [str(out / name) for name in ("model.safetensors", "config.json", "README.md")]
    first, last = said.err.splitlines()
    why = "no argument of timm's gives a ResNet the stem for small images"
    assert first == f"fastjem: timm won't open {out}, as {why}; fastjem.load_encoder({str(out)!r}) does"
    assert last == f'fastjem: fastjem.load_encoder("{out}") opens it'
    with pytest.raises(RuntimeError, match=r"Unknown model .*fastjem\.load_encoder opens it"):
        timm.create_model(f"local-dir:{out}", pretrained=True)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(fastjem.load_encoder(out)(images), module(images))
    card = (out / "README.md").read_text()
    assert f"timm doesn't open these weights: {why}" in card and "library_name: fastjem" in card


def test_what_differs_from_timms_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By opening the folder before it is there: nothing is promised by a name alone."""
    encoder_file(tmp_path / "a.safetensors", "test_resnet", Pixels(32))
    create = timm.create_model

    def other(name: str, **options: Any) -> Any:
        module = create(name, **options)
        if name.startswith("local-dir:"):
            module.layer4.register_forward_hook(lambda part, given, out: out * 0.999)
        return module

    with monkeypatch.context() as patched:
        patched.setattr(timm, "create_model", other)
        export(ExportOptions(str(tmp_path / "a.safetensors")))
    assert "its embeddings would be others" in (tmp_path / "a/README.md").read_text()
    with monkeypatch.context() as patched:
        patched.setattr("fastjem.portable.pretrained_cfg", lambda *_: {"input_size": [3, 40, 40], "num_classes": 0})
        export(ExportOptions(str(tmp_path / "a.safetensors")))
    assert "it would prepare images of another size" in (tmp_path / "a/README.md").read_text()


# From a run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """BYOL's run, whose momentum encoder lags behind."""
    root = tmp_path_factory.mktemp("exported")
    for part, seed in (("train", 0), ("test", 1)):
        make_folder(root / "secret" / part, 48, seed=seed)
    fastjem.pretrain(**{**TINY, **BYOLS}, data=str(root / "secret/train"), out=str(root / "run"), max_steps=2)
    return root / "run"


def test_a_run_is_exported_with_its_figures(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(run), "--workers", "0", "--device", "cpu"]) == 0
    capsys.readouterr()
    assert main(["export", str(run), "--license", "apache-2.0"]) == 0
    out = run / "export"
    assert f'timm.create_model("local-dir:{out}", pretrained=True) opens it' in capsys.readouterr().err
    card = (out / "README.md").read_text()
    figures = json.loads((run / "evaluation.json").read_text())["features"]["encoder"]
    assert f"| {figures['knn']:.1%} | {figures['linear_probe']:.1%} | {figures['rankme']:.1f} of " in card
    for row in ("method | `byol`", "trained on | `train`, 48 images", "steps | 2", "epochs | 0.6667", "batch | 16"):
        assert f"\n| {row} |\n" in card
    for line in ("library_name: timm", "license: apache-2.0", "- byol", "- timm"):
        assert f"\n{line}\n" in card.partition("\n# ")[0]
    assert f"fastjem {fastjem.__version__}, torch {torch.__version__.partition('+')[0]}" in card
    assert "secret" not in card + (out / "config.json").read_text()  # no path leaves the machine

    again = tmp_path / "again"  # an export of an export knows what it knew
    export(ExportOptions(str(out), out=str(again)))
    assert (again / "README.md").read_text() == re.sub(
        r'(["":])export\b', r"\1again", card.replace("license: apache-2.0\n", "")
    )
    assert export(ExportOptions(str(again)))[0] == again / "model.safetensors"  # in its own place

    results = json.loads((run / "evaluation.json").read_text())
    for changed in ({"step": 1}, {"teacher": True}, {"features": {}}):  # of other weights, or damaged
        (run / "evaluation.json").write_text(json.dumps({**results, **changed}))
        export(ExportOptions(str(run), out=str(again)))
        assert "## Figures" not in (again / "README.md").read_text()
    (run / "evaluation.json").write_text("{")
    capsys.readouterr()
    export(ExportOptions(str(run), out=str(again)))
    assert "left out of the model card: " in capsys.readouterr().err
    (run / "evaluation.json").unlink()


def test_the_momentum_encoder_travels_too(run: Path) -> None:
    images = torch.randn(2, 3, 32, 32)
    files = export(ExportOptions(str(run), teacher=True))
    assert files[0].parent == run / "export-teacher"
    copy = fastjem.load_encoder(run, teacher=True)
    model = timm.create_model(f"local-dir:{run / 'export-teacher'}", pretrained=True).eval()
    torch.testing.assert_close(model(images), copy(images))
    assert not torch.allclose(model(images), fastjem.load_encoder(run)(images), rtol=0.01)
    assert torch.equal(fastjem.load_encoder(run / "export-teacher", teacher=True)(images), copy(images))
    assert "the momentum encoder (teacher)" in (run / "export-teacher/README.md").read_text()


def test_an_exported_folder_is_taken_where_a_run_is(run: Path, tmp_path: Path) -> None:
    """By evaluate, whose figures stand in it, and as the weights that a run begins with."""
    out = tmp_path / "model"
    export(ExportOptions(str(run), out=str(out)))
    assert open_run(out).pixels == open_run(run).pixels
    words = ["--train", str(run.parent / "secret/train"), "--workers", "0", "--device", "cpu"]
    assert main(["evaluate", str(out), *words]) == 0 and (out / "evaluation.json").exists()
    fields = {**TINY, "data": str(run.parent / "secret/train"), "max_steps": 1, "learning_rate": 0.0}
    fields = {name: value for name, value in fields.items() if name not in ("backbone", "image_size")}
    fastjem.pretrain(**fields, weights=str(out), out=str(tmp_path / "next"))
    weights, given = (fastjem.load_encoder(path).state_dict() for path in (tmp_path / "next", out))
    assert all(torch.equal(weights[name], given[name]) for name in given if "running" not in name and "num" not in name)


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2))

    def forward(self, images: Tensor) -> Tensor:
        return self.body(images).flatten(1)


@pytest.mark.parametrize("kind", ["own", "timm's"])
def test_a_module_of_its_owners(kind: str, run: Path, tmp_path: Path) -> None:
    """timm opens one of its own; any other is given again."""
    torch.manual_seed(0)
    make = Own if kind == "own" else lambda: timm.create_model("test_resnet", num_classes=0, drop_path_rate=0.1)
    trained = make()
    randomise(trained, torch.randn(4, 3, 32, 32))
    data = str(run.parent / "secret/train")
    fields = {name: value for name, value in TINY.items() if name != "backbone"}
    fastjem.pretrain(**fields, data=data, out=str(tmp_path / "run"), max_steps=1, encoder=trained)
    out = tmp_path / "model"
    export(ExportOptions(str(tmp_path / "run"), out=str(out)), encoder=make())
    images = torch.randn(2, 3, 32, 32)
    expected = fastjem.load_encoder(tmp_path / "run", encoder=make())(images)
    assert torch.equal(fastjem.load_encoder(out, encoder=make())(images), expected)
    with pytest.raises(UserError, match=r"names no backbone: .* fastjem.load_encoder\(path, encoder=...\)"):
        fastjem.load_encoder(out)
    card = (out / "README.md").read_text()
    assert "encoder=module" in card
    if kind == "own":
        assert "timm doesn't open these weights: it is a module of its owner's, Own." in card
    else:
        model = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
        torch.testing.assert_close(model(images), expected)


def test_where_a_folder_may_be_written(run: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for out, says in (
        (run, "is a run's own folder; .*export, say, is none"),
        (tmp_path / "taken", "has files that are no export's"),
        (tmp_path / "file", "is a file; a folder is written, or a file whose name ends in .safetensors"),
        (tmp_path / "file/model", "File exists"),
    ):
        with pytest.raises(UserError, match=f"--out {re.escape(str(out))}.* ?{says}"):
            export(ExportOptions(str(run), out=str(out)))
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "notes.txt", "taken"]


def test_an_earlier_export_is_replaced_whole(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "model"
    monkeypatch.setattr("fastjem.commands.export.to_onnx", lambda *given: given[2].write_bytes(b"onnx"))
    assert [path.name for path in export(ExportOptions(str(run), out=str(out), onnx=True))][-1] == "model.onnx"
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("fastjem.encoders.write_atomically", full)
        with pytest.raises(UserError, match=r"--out .*model: No space left on device"):
            export(ExportOptions(str(run), out=str(out), teacher=True))
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    export(ExportOptions(str(run), out=str(out), teacher=True))  # whose ONNX file would be other weights'
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
