"""Evaluation against independent answers; export and what is loaded from it; mistakes in one line."""

import errno
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from images import make_folder

for package in ("timm", "torchvision", "safetensors", "tyro", "sklearn"):
    pytest.importorskip(package)
from PIL import Image  # noqa: E402

import fastjem  # noqa: E402
from fastjem.cli import main  # noqa: E402
from fastjem.commands.evaluate import EvaluateOptions, NotWritten, evaluate  # noqa: E402
from fastjem.commands.export import ExportOptions, export  # noqa: E402
from fastjem.data import shapes  # noqa: E402
from fastjem.data.pixels import Pixels  # noqa: E402
from fastjem.data.source import open_source  # noqa: E402
from fastjem.errors import UserError  # noqa: E402
from fastjem.probes import LinearProbe, embed, knn, moments, rankme  # noqa: E402
from fastjem.runs import Opened, open_run  # noqa: E402

CPU = ["--device", "cpu", "--workers", "0"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("evaluated")
    for part, seed in (("train", 0), ("test", 1)):
        make_folder(root / part, 48, seed=seed)
    fastjem.pretrain(data=str(root / "train"), out=str(root / "run"), backbone="test_resnet", image_size=32,
                     batch_size=16, workers=0, device="cpu", max_steps=1, stem="standard")  # fmt: skip
    return root / "run"


@pytest.mark.parametrize("temperature", [0.07, 0.001])
def test_knn_is_the_vote_of_all_similarities(temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastjem.probes.QUERIES", 17)
    random = torch.Generator().manual_seed(0)
    bank, queries = torch.randn(70, 5, generator=random), torch.randn(30, 5, generator=random)
    labels = torch.randint(4, (70,), generator=random)
    b, q = (torch.nn.functional.normalize(x.double(), dim=1) for x in (bank, queries))
    expected = []
    for row in q @ b.T:
        near = row.topk(9).indices
        votes = [((row[near] - row.max()) / temperature).exp()[labels[near] == c].sum() for c in range(4)]
        expected.append(int(torch.stack(votes).argmax()))
    assert knn(bank, labels, queries, k=9, temperature=temperature).tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_probe_is_scikit_learns(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    from sklearn.linear_model import LogisticRegression

    monkeypatch.setattr("fastjem.probes.ELEMENTS", 384)
    random = np.random.default_rng(0)
    labels = random.integers(0, 3, 300)
    x = torch.tensor(random.normal(size=(300, 6)) + labels[:, None] * random.normal(size=6) + 5, dtype=dtype)
    ours, l2 = LinearProbe(x, torch.tensor(labels), 3, l2=0.01), 0.01
    rows = (x.double().numpy() - x.double().numpy().mean(0)) / x.double().numpy().std(0)
    theirs = LogisticRegression(C=1 / (300 * l2), tol=1e-8, max_iter=2000).fit(rows, labels)
    np.testing.assert_allclose(ours.weight.detach().numpy(), theirs.coef_, atol=2e-3)
    assert (ours.predict(x).numpy() == theirs.predict(rows)).mean() > 0.99


def test_rank_and_deviation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastjem.probes.ELEMENTS", 384)
    x = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(x.double())
    share = values / values.sum()
    assert rankme(x) == pytest.approx(math.exp(-(share * share.log()).sum()), rel=1e-4)
    assert rankme(torch.ones(50, 8)) == pytest.approx(1, abs=1e-3)
    assert math.isnan(rankme(torch.full((5, 8), torch.nan)))
    torch.testing.assert_close(moments(x + 1000)[1], (x + 1000).double().std(0, correction=0))


def test_embeddings_are_the_files_in_order(tmp_path: Path) -> None:
    folder = open_source(make_folder(tmp_path, 10, size=8))
    rows, labels = embed(torch.nn.Flatten(), folder, Pixels(8), batch=3)
    whole, _ = embed(torch.nn.Flatten(), folder, Pixels(8), batch=10)
    assert torch.equal(rows, whole) and rows.std(0).min() > 0 and labels.tolist() == folder.labels.tolist()


def test_evaluate(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(run), "--features", "both", *CPU]) == 0
    table = capsys.readouterr().out
    found = json.loads((run / "evaluation.json").read_text())
    assert found["test"].endswith("test") and found["test_images"] == 48 and found["step"] == 1
    assert set(found["features"]) == {"encoder", "projector"}
    encoder = found["features"]["encoder"]
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    exported = fastjem.load_encoder(str(run / "encoder.safetensors"))
    sources = [open_source(run.parent / part) for part in ("train", "test")]
    (x, labels), (q, truth) = (embed(exported, source, Pixels(32)) for source in sources)
    assert encoder["knn"] == pytest.approx((knn(x, labels, q) == truth).double().mean().item())
    scaler = StandardScaler().fit(x.double())
    probe = LogisticRegression(C=1 / (len(x) * 1e-3), max_iter=5000).fit(scaler.transform(x.double()), labels)
    assert encoder["linear_probe"] == pytest.approx(probe.score(scaler.transform(q.double()), truth), abs=0.05)
    assert 1 <= encoder["rankme"] <= encoder["dimensions"] == x.shape[1]
    assert "projector" in table and f"{encoder['knn']:.1%}" in table


def test_export_is_the_encoder(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import timm
    from safetensors.torch import load_file

    out = tmp_path / "a" / "encoder.safetensors"
    assert main(["export", str(run), "--out", str(out)]) == 0
    timm.create_model("test_resnet", num_classes=0).load_state_dict(load_file(out), strict=True)
    state = torch.load(run / "checkpoints/last.pt", weights_only=True)["model"]
    for name, value in fastjem.load_encoder(str(out)).state_dict().items():
        assert torch.equal(value, state[f"encoder.backbone.{name}"])
    capsys.readouterr()
    assert main(["evaluate", str(out), "--train", str(run.parent / "train"), *CPU]) == 0
    assert main(["evaluate", str(out), "--train", str(run.parent / "train"), "--features", "both", *CPU]) == 2
    assert "no projector" in capsys.readouterr().err


# How a run's pixels become numbers, where it isn't by ImageNet's mean and deviation.
VIEW = {"mean": "0.5,0.5,0.5", "std": "0.02,0.02,0.02"}
PIXELS = Pixels(32, mean=(0.5,) * 3, std=(0.02,) * 3)


def whole(folder: Path) -> torch.Tensor:
    """[N, 3, 32, 32]: the folder's images as that run sees them, in its order, by torchvision."""
    from torchvision.transforms.v2 import functional as V

    images = [Image.open(file).convert("RGB") for file in sorted(folder.glob("*/*.png"))]
    images = [V.pil_to_tensor(V.center_crop(V.resize(image, [32]), [32, 32])) for image in images]
    return (torch.stack(images) / 255 - 0.5) / 0.02


def is_among(images: torch.Tensor, those: torch.Tensor) -> bool:
    """Whether each image is one of those, but for rounding: a level of 255 is 0.2 here."""
    distances = torch.cdist(images.flatten(1), those.flatten(1), p=torch.inf)
    return bool((distances.min(1).values < 1e-3).all())


class Recorder(torch.nn.Module):
    """Any encoder that keeps what it is given in eval mode, as nobody else's views are whole images."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.Tensor] = []
        self.linear = torch.nn.Linear(3 * 32 * 32, 8)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if not self.training:
            self.seen.append(images.detach().clone())
        return self.linear(images.flatten(1))


def test_knn_of_a_run_sees_its_pixels(run: Path, tmp_path: Path) -> None:
    encoder = Recorder()
    train = run.parent / "train"
    fastjem.pretrain(data=str(train), out=str(tmp_path / "run"), encoder=encoder, image_size=32, batch_size=16,
                     workers=0, device="cpu", max_steps=1, view=VIEW, report=False)  # fmt: skip
    seen = torch.cat([images for images in encoder.seen if len(images) == 48])
    assert len(seen) >= 48 and is_among(seen, whole(train))


def test_evaluation_and_export_use_the_runs_pixels(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors import safe_open

    train, test = run.parent / "train", run.parent / "test"
    out = tmp_path / "run"
    fastjem.pretrain(data=str(train), out=str(out), backbone="test_resnet", image_size=32, batch_size=16, workers=0,
                     device="cpu", max_steps=1, stem="standard", view=VIEW, report=False)  # fmt: skip
    assert open_run(out).pixels == PIXELS
    exported = tmp_path / "encoder.safetensors"
    assert main(["export", str(out), "--out", str(exported)]) == 0
    for path in (out / "encoder.safetensors", exported):
        with safe_open(path, "pt") as file:
            assert Pixels.from_metadata(file.metadata()) == PIXELS

    seen: list[torch.Tensor] = []

    def recording(path: str, **options: object) -> Opened:
        opened = open_run(path, **options)
        opened.encoder.register_forward_pre_hook(lambda module, images: seen.append(images[0].clone()))
        return opened

    monkeypatch.setattr("fastjem.commands.evaluate.open_run", recording)
    for path in (out, exported):
        seen.clear()
        assert main(["evaluate", str(path), "--train", str(train), "--test", str(test), *CPU]) == 0
        bank, queries = seen
        torch.testing.assert_close(bank, whole(train), atol=1e-3, rtol=0)
        torch.testing.assert_close(queries, whole(test), atol=1e-3, rtol=0)


def test_onnx(run: Path, tmp_path: Path) -> None:
    for package in ("onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    assert main(["export", str(run), "--out", str(tmp_path / "e.safetensors"), "--onnx"]) == 0
    assert (tmp_path / "e.onnx").stat().st_size > 100_000
    import onnxruntime

    session = onnxruntime.InferenceSession(str(tmp_path / "e.onnx"), providers=["CPUExecutionProvider"])
    metadata = session.get_modelmeta().custom_metadata_map
    assert metadata["backbone"] == "test_resnet" and Pixels.from_metadata(metadata) == Pixels(32)


def test_mistakes(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = str(run.parent / "train")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare/config.yaml").write_text((run / "config.yaml").read_text())
    (tmp_path / "text.safetensors").write_text("no")
    flat, one = make_folder(tmp_path / "flat", 4, classes=0), make_folder(tmp_path / "one", 4, classes=1)
    other = make_folder(tmp_path / "other", 8, classes=4)
    for line, says in (
        (["evaluate", str(tmp_path / "none")], "no run in"),
        (["evaluate", str(tmp_path / "bare")], "no checkpoint"),
        (["evaluate", str(tmp_path / "text.safetensors")], "no safetensors file"),
        (["evaluate", str(run), "--train", str(flat), *CPU], "has no labels"),
        (["evaluate", str(run), "--train", str(one), *CPU], "one class only"),
        (["evaluate", str(run), "--train", train, "--test", str(other), *CPU], "class3"),
        (["evaluate", str(run), "--train", str(tmp_path / "gone"), *CPU], "not a folder"),
        (["evaluate", str(run), "--test", train], "--test needs --train"),
        (["evaluate", str(run), "--k", "0"], "at least 1"),
        (["export", str(tmp_path / "none")], "no run in"),
        (["export", str(run), "--out", str(tmp_path / "encoder.pt")], ".safetensors"),
    ):
        assert main(line) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and says in error, error


def test_embeddings_keep_their_labels_where_an_image_cannot_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = open_source(make_folder(tmp_path, 10, size=8))
    whole, every_label = embed(torch.nn.Flatten(), folder, Pixels(8))
    (tmp_path / folder.name(2)).write_bytes(b"no image")
    rows, labels = embed(torch.nn.Flatten(), folder, Pixels(8), batch=3)
    left = torch.arange(10) != 2
    torch.testing.assert_close(rows, whole[left], rtol=0, atol=0)
    assert labels.tolist() == every_label[left].tolist() and folder.name(2) in capsys.readouterr().err


def evaluated(*words: object) -> int:
    return main(["evaluate", *map(str, words), *CPU])


def test_an_image_that_cannot_be_read_is_left_out_and_counted(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for part in ("train", "test"):
        shutil.copytree(run.parent / part, tmp_path / "broken" / part)
        shutil.copytree(run.parent / part, tmp_path / "gone" / part)
    for part, name in (("train", "class0/0003.png"), ("train", "class1/0022.png"), ("test", "class2/0047.png")):
        (tmp_path / "broken" / part / name).write_bytes(b"no image")
        (tmp_path / "gone" / part / name).unlink()
    figures = []
    for folder in ("broken", "gone"):
        out = tmp_path / f"{folder}.json"
        assert (
            evaluated(run, "--train", tmp_path / folder / "train", "--test", tmp_path / folder / "test", "--out", out)
            == 0
        )
        figures.append(json.loads(out.read_text()))
    said = capsys.readouterr()
    assert said.err.count("skipped") == 3 and "0022.png" in said.err and "3 can't be read" in said.out
    assert figures[0]["unreadable_images"] == 3 and figures[1]["unreadable_images"] == 0
    assert figures[0]["features"] == figures[1]["features"]  # labels stay with their images
    assert [found["train_images"] for found in figures] == [46, 46] and figures[0]["test_images"] == 47
    for path in (tmp_path / "broken").rglob("*.png"):
        path.write_bytes(b"no image")
    assert evaluated(run, "--train", tmp_path / "broken/train") == 2
    assert "none of the images" in capsys.readouterr().err


def test_parts_of_a_data_set_are_no_classes(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = run.parent
    both = tmp_path / "both"
    both.mkdir()
    for part in ("train", "test"):
        (both / part).symlink_to(root / part)
    assert evaluated(run, "--train", both) == 2
    assert f"--train {both}/train --test {both}/test" in capsys.readouterr().err
    (both / "test").rename(both / "Val")
    (both / "train").unlink()
    assert evaluated(run, "--train", both) == 2 and "Val" in capsys.readouterr().err
    (both / "train").symlink_to(root / "train")
    shutil.copytree(root / "test", both / "others")
    assert evaluated(run, "--train", both, "--out", tmp_path / "x.json") == 0
    assert "Val, train" in capsys.readouterr().err  # beside others: said, and taken as they are
    cifar = tmp_path / "cifar100"
    for name, part in (("train", "class0"), ("tulip", "class1")):
        shutil.copytree(root / "train" / part, cifar / name)
    assert evaluated(run, "--train", cifar, "--out", tmp_path / "x.json") == 0
    assert "train" not in capsys.readouterr().err


def test_a_run_on_the_parts_of_a_data_set_measures_no_knn(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for part in ("train", "test"):
        shutil.copytree(run.parent / part, tmp_path / "all" / part)
    fastjem.pretrain(data=tmp_path / "all", out=tmp_path / "run", backbone="test_resnet", image_size=32, batch_size=16,
                     workers=0, device=torch.device("cpu"), max_steps=1, stem="standard", report=False)  # fmt: skip
    said = capsys.readouterr().err
    assert "no kNN: the folders test, train are parts" in said and not (tmp_path / "run/knn.jsonl").read_text()


def test_figures_that_cannot_be_written_are_shown(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(path: Path, content: bytes) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("fastjem.checkpoints.write_atomically", read_only)
    assert evaluated(run) == 2
    said = capsys.readouterr()
    assert "linear probe" in said.out and "%" in said.out
    assert "Read-only file system" in said.err and "--out" in said.err and said.err.count("\n") == 1
    with pytest.raises(NotWritten) as error:
        evaluate(EvaluateOptions(run=run, workers=np.int64(0), device=torch.device("cpu")))  # type: ignore[arg-type]
    assert 0 <= error.value.figures["features"]["encoder"]["knn"] <= 1


@pytest.mark.parametrize("full", ["encoder", "onnx", "report", "picture"])
def test_a_full_disk_is_seen_in_the_exit_code(
    full: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    bare = tmp_path / "bare"  # nothing to draw
    bare.mkdir()
    shutil.copy(run / "config.yaml", bare)
    export_words = ["export", str(run), "--out", str(tmp_path / "x.safetensors")]
    views_words = ["views", "--data", str(run.parent / "train"), "--images", "1", "--image-size", "32"]
    places = {
        "encoder": ("fastjem.encoders", export_words),
        "onnx": ("fastjem.commands.export", [*export_words, "--onnx"]),
        "report": ("fastjem.report.page", ["report", str(bare)]),
        "picture": ("fastjem.commands.views", [*views_words, "--out", str(tmp_path / "x.png")]),
    }
    module, words = places[full]
    if full == "onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    monkeypatch.setattr(f"{module}.write_atomically", no_space)
    assert main(words) == 2
    error = capsys.readouterr().err
    assert "No space left on device" in error and error.count("\n") == 1
    assert not (tmp_path / "x.onnx").exists()


def test_more_neighbours_than_images(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluated(run, "--k", 1000, "--out", tmp_path / "x.json") == 0
    assert "--k 1000 is more than the 48" in capsys.readouterr().err
    assert json.loads((tmp_path / "x.json").read_text())["k"] == 48


def test_options_from_python_are_checked(run: Path) -> None:
    for options, says in (
        ({"k": "20"}, "evaluate: k must be an integer, got str '20'"),
        ({"features": "head"}, "evaluate: features must be one of encoder, projector, both"),
        ({"temperature": math.nan}, "evaluate: temperature must be a number, got NaN"),
        ({"train": ""}, "evaluate: train must not be empty"),
        ({"workers": -2}, "--workers must be at least 0"),
        ({"temperature": math.inf}, "positive and finite"),
    ):
        with pytest.raises(UserError, match=re.escape(says)):
            evaluate(EvaluateOptions(run=str(run), **options))
    with pytest.raises(UserError, match="export: out must not be empty"):
        export(ExportOptions(run=str(run), out=""))


def test_the_embedded_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(shapes.write, "__defaults__", ({"train": 20, "test": 10},))
    made = shapes.folder()
    assert [path.name for path in (tmp_path / "fastjem").iterdir()] == [made.name]
    train, test = open_source(made / "train"), open_source(made / "test")
    assert train.classes == test.classes == sorted(shapes.SHAPES) and (len(train), len(test)) == (20, 10)
    before = (made / "train/star/0000.jpg").stat().st_mtime_ns
    assert shapes.folder() == made and (made / "train/star/0000.jpg").stat().st_mtime_ns == before
    assert (made / "train/star/0000.jpg").read_bytes() != (made / "test/star/0000.jpg").read_bytes()
