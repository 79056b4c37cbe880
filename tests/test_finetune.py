"""Classifiers on a run's encoder: what they learn, figures by hand, resuming bit for bit, who opens them again."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from images import TINY, make_folder

for package in ("timm", "torchvision", "safetensors", "tyro"):
    pytest.importorskip(package)

import timm  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

import fastjem  # noqa: E402
from fastjem import exports, finetuning  # noqa: E402
from fastjem.cli import main  # noqa: E402
from fastjem.commands import finetune as command  # noqa: E402
from fastjem.data.pixels import Pixels  # noqa: E402
from fastjem.data.source import open_source  # noqa: E402
from fastjem.errors import UserError  # noqa: E402
from fastjem.finetuning import Augmentation, Images, augmentation, few, steps_per_epoch  # noqa: E402
from fastjem.runs import open_run  # noqa: E402

QUICK: dict[str, Any] = {"workers": 0, "device": "cpu", "batch_size": 16}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Path:
    """A run that has hardly learned, and images of three classes to train and to test on."""
    folder = tmp_path_factory.mktemp("finetuned")
    make_folder(folder / "train", 48)
    make_folder(folder / "test", 24, seed=1)
    fastjem.pretrain(**TINY, stem="standard", data=folder / "train", out=folder / "run", max_steps=1)
    return folder


@pytest.mark.parametrize("tune", ["whole", "linear"])
def test_it_learns_and_opens_again(tune: str, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "classifier"
    rate = {"whole": "0.03", "linear": "0.5"}[tune]
    words = ["--tune", tune, "--epochs", "8", "--learning-rate", rate, "--batch-size", "16", "--workers", "0"]
    assert main(["finetune", str(root / "run"), "--out", str(out), "--augmentation", "none", *words]) == 0
    table = capsys.readouterr().out
    found = json.loads((out / "finetune.json").read_text())
    assert found["top1"] > {"whole": 0.6, "linear": 0.35}[tune]  # the untrained encoder tells little
    assert "top5" not in found and found["test_images"] == 24 and found["train_images"] == 48
    assert f"{found['top1']:.1%}" in table and "class0" in table and not (out / "checkpoint.pt").exists()
    losses = [row["loss"] for row in found["history"]]
    assert len(losses) == 8 and losses[-1] < 0.7 * losses[0]
    # The figures again, by the classifier that anybody opens.
    model = fastjem.load_classifier(out)
    paths = sorted((root / "test").rglob("*.png"))
    images = model.prepare(paths)
    theirs = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    with torch.no_grad():
        logits = model(images)
        torch.testing.assert_close(theirs(images), logits)
    named = [model.classes[i] for i in logits.argmax(1)]
    truth = [path.parent.name for path in paths]
    assert found["top1"] == pytest.approx(np.mean([a == b for a, b in zip(named, truth, strict=True)]))
    assert theirs.pretrained_cfg["label_names"] == model.classes == ["class0", "class1", "class2"]
    assert found["timm"] == "opens it" and not model.training
    # What learned: the head alone, or all of it.
    before = open_run(root / "run").encoder.state_dict()
    same = [torch.equal(value, before[name]) for name, value in model.state_dict().items() if name in before]
    assert all(same) if tune == "linear" else sum(same) <= len(same) // 2


def test_norm_and_head_become_one_layer() -> None:
    head = torch.nn.Linear(4, 3)
    norm = finetuning.normalised(head)
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)) * 7 + 3
    for part in x.split(10):
        head(part)
    norm.eval()
    expected = head(x)
    finetuning.fold(norm, head)
    torch.testing.assert_close(head(x), expected)
    assert not torch.allclose(torch.nn.functional.linear(x, head.weight), expected)


def test_figures_by_hand() -> None:
    classes = [f"c{i}" for i in range(7)]
    truth = torch.tensor([0, 0, 0, 1, 1, 2, 3])
    # Each row's classes from the likeliest on: the last row's true one is the last.
    order = [[0, 1, 2, 3, 4, 5, 6], [1, 0, 2, 3, 4, 5, 6], [1, 2, 3, 4, 0, 5, 6], [1, 0, 2, 3, 4, 5, 6]]
    order += [[0, 1, 2, 3, 4, 5, 6], [2, 0, 1, 3, 4, 5, 6], [6, 0, 1, 2, 4, 5, 3]]
    logits = torch.zeros(7, 7).scatter_(1, torch.tensor(order), torch.arange(7.0).flip(0).expand(7, 7))
    found = command.measured(logits, truth, classes)
    assert found["top1"] == pytest.approx(3 / 7) and found["top5"] == pytest.approx(6 / 7)
    assert found["by_class"]["c0"] == {"images": 3, "top1": pytest.approx(1 / 3)}
    assert found["by_class"]["c5"] == {"images": 0, "top1": None}
    assert found["confused"] == [
        {"class": "c0", "taken_for": "c1", "images": 2},
        {"class": "c1", "taken_for": "c0", "images": 1},
        {"class": "c3", "taken_for": "c6", "images": 1},
    ]
    assert found["test_loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, truth)))


def test_few_labels_are_balanced() -> None:
    labels = np.repeat([0, 1, 2], [100, 50, 3])
    chosen = np.arange(0, 153)
    kept = few(labels, chosen, 10, seed=0)
    assert np.bincount(labels[kept]).tolist() == [10, 5, 1] and (np.diff(kept) > 0).all()
    assert kept.tolist() == few(labels, chosen, 10, seed=0).tolist() != few(labels, chosen, 10, seed=1).tolist()
    assert steps_per_epoch(48, 16) == 3 and steps_per_epoch(47, 16) == 2 and steps_per_epoch(5, 16) == 1


class Killed(BaseException):
    """As a kill, nothing is caught."""


def test_gone_on_with_it_is_as_one_go(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With all that is drawn: order, crops, policies, mixup; killed behind a checkpoint in the middle of an epoch."""
    options = {**QUICK, "epochs": 3, "augmentation": "strong", "checkpoint_every": 0.0, "clip": 1.0}
    fastjem.finetune(root / "run", out=tmp_path / "whole", **options)
    saved: Callable[..., None] = finetuning.Training.save

    def save(self: finetuning.Training) -> None:
        saved(self)
        if self.step == 5:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(finetuning.Training, "save", save)
        with pytest.raises(Killed):
            fastjem.finetune(root / "run", out=tmp_path / "cut", **options)
    capsys.readouterr()
    with pytest.raises(UserError, match=r"finetune: .* isn't finished \(.*rate was .*\): the same command goes on"):
        fastjem.finetune(root / "run", out=tmp_path / "cut", **{**options, "learning_rate": 0.1})
    found = fastjem.finetune(root / "run", out=tmp_path / "cut", **options)
    assert "it goes on behind step 5 of 9" in capsys.readouterr().err
    cut, whole = (load_file(tmp_path / name / "model.safetensors") for name in ("cut", "whole"))
    assert cut.keys() == whole.keys() and all(torch.equal(cut[name], whole[name]) for name in cut)
    assert len(found["history"]) == 3
    with pytest.raises(UserError, match="holds a classifier already; overwrite trains it anew"):
        fastjem.finetune(root / "run", out=tmp_path / "cut", **options)


def test_layers_learn_at_rates_of_their_own(tmp_path: Path, root: Path) -> None:
    module = timm.create_model("test_vit", num_classes=3)
    plan = command._plan(command.FinetuneOptions("x", layer_decay=0.5), open_run(root / "run"), 48)
    optimizer, scheduler = finetuning._optimizer(module, plan)
    scheduler.step_update(plan.warmup)
    rates = {id(parameter): group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    rate = {name: rates[id(parameter)] for name, parameter in module.named_parameters()}
    assert rate["head.weight"] == pytest.approx(plan.rate)
    depth = len(module.blocks)
    for i in range(depth):
        assert rate[f"blocks.{i}.mlp.fc1.weight"] == pytest.approx(plan.rate * 0.5 ** (depth - i))
    assert rate["patch_embed.proj.weight"] == pytest.approx(plan.rate * 0.5 ** (depth + 1))
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decays[id(module.head.bias)] == 0 and decays[id(module.head.weight)] == plan.weight_decay


def test_what_is_drawn_depends_on_epoch_and_image_alone(root: Path) -> None:
    source = open_source(root / "train")
    images = Images(source, Pixels(32), augmentation("strong", {}, 32), seed=3)
    first = images[(1, 5)][0]
    images[(1, 6)]
    assert torch.equal(images[(1, 5)][0], first) and not torch.equal(images[(2, 5)][0], first)
    whole = Images(source, Pixels(32), augmentation("none", {}, 32), seed=3)
    torch.testing.assert_close(whole[(1, 5)][0], Pixels(32).prepare(str(root / "train" / source.name(5)))[0])
    assert augmentation("light", {"mixup": 0.2, "erase": None}, 224) == Augmentation(mixup=0.2, smoothing=0.1)


def test_images_of_many_bits_and_channels(tmp_path: Path) -> None:
    """Five channels of 12 bits: cut and flipped, no policy of Pillow's; and a module of the user's own."""
    random = np.random.default_rng(0)
    labels = np.arange(32) % 2
    values = random.integers(0, 2000, (32, 20, 20, 5)) + labels[:, None, None, None] * 2000
    np.savez(tmp_path / "images.npz", images=values.astype(np.uint16), labels=labels)

    layers = (torch.nn.Conv2d(5, 8, 3, 2), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(392, 8))
    own = torch.nn.Sequential(*layers)
    given = {**TINY, "channels": 5, "value_range": "0,4095", "image_size": 16}
    del given["backbone"]
    fastjem.pretrain(**given, data=tmp_path / "images.npz", out=tmp_path / "run", encoder=own, max_steps=1)
    found = fastjem.finetune(tmp_path / "run", encoder=own, epochs=8, learning_rate=0.05, **QUICK)
    assert found["top1"] == 1 and "module of its owner's" in found["timm"]
    model = fastjem.load_classifier(found["out"], encoder=own)
    with torch.no_grad():
        assert model(model.prepare(list(values[:4].astype(np.uint16)))).argmax(1).tolist() == [0, 1, 0, 1]
    with pytest.raises(UserError, match="scratch is for an encoder that has a backbone's name"):
        fastjem.finetune(tmp_path / "run", encoder=own, scratch=True, epochs=1, **QUICK)


@pytest.mark.parametrize("backbone", ["resnet18", "test_vit"])
def test_small_stems_transformers_and_scratch(
    backbone: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What timm can't make is said, and opened by us; a transformer of another patch size by both."""
    images = make_folder(tmp_path / "train", 16)
    (images / "class0/0003.png").write_bytes(b"no image")
    given = {**TINY, "backbone": backbone} | ({"patch_size": 8} if backbone == "test_vit" else {})
    fastjem.pretrain(**given, data=images, out=tmp_path / "run", max_steps=1)
    capsys.readouterr()
    found = fastjem.finetune(tmp_path / "run", train=images, epochs=1, scratch=backbone == "resnet18", **QUICK)
    assert found["unreadable_images"] == 1 and found["layer_decay"] == (0.75 if backbone == "test_vit" else 1)
    said = capsys.readouterr().err
    assert "left out: " in said and "0003.png" in said
    model = fastjem.load_classifier(found["out"])
    if backbone == "resnet18":
        assert found["timm"].startswith("no argument of timm's gives a ResNet the stem for small images")
        assert f"timm won't open {found['out']}" in said and Path(found["out"]).name == "finetune-whole-scratch"
        return
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        theirs = timm.create_model(f"local-dir:{found['out']}", pretrained=True).eval()
        torch.testing.assert_close(theirs(x), model(x))


def test_mistakes(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(root / "run")
    for words, says in [
        (["--epochs", "0"], "--epochs must be at least 1, got 0"),
        (["--tune", "linear", "--scratch"], "--tune linear the encoder would stay as random as it is"),
        (["--optimizer", "nadamm"], "--optimizer nadamm: timm says:"),
        (["--augmentation", "none", "--erase", "0.1"], "--erase is for --augmentation light or strong"),
        (["--layer-decay", "1.5"], "--layer-decay must be at most 1"),
        (["--test", run], "--test needs --train"),
    ]:
        assert main(["finetune", run, *words, "--out", str(tmp_path / "x"), "--workers", "0"]) == 2
        assert says in capsys.readouterr().err
    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert main(["finetune", run]) == 2
    assert "one process" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"it names no classes: an encoder, which fastjem\.load_encoder opens"):
        fastjem.export(run, out=tmp_path / "export")
        fastjem.load_classifier(tmp_path / "export")
    assert exports.CLASSES == "classes"


def test_a_folder_of_something_else_is_left_alone(root: Path, tmp_path: Path) -> None:
    fastjem.export(root / "run", out=tmp_path / "export")
    make_folder(tmp_path / "photos", 4)
    for folder, says in [
        (root / "run", "is a run's own folder"),
        (tmp_path / "export", "has files that are no classifier's, README.md"),
        (tmp_path / "photos", "has files that are no classifier's, class0"),
    ]:
        before = sorted(folder.iterdir())
        for overwrite in (False, True):
            with pytest.raises(UserError, match=says):
                fastjem.finetune(root / "run", out=folder, overwrite=overwrite, epochs=1, **QUICK)
        assert sorted(folder.iterdir()) == before
    begun = tmp_path / "begun"  # what a call leaves that is killed while it writes its first checkpoint
    begun.mkdir()
    (begun / ".lock").touch()
    (begun / "checkpoint.pt.0123.part").touch()
    for overwrite in (False, True):
        fastjem.finetune(root / "run", out=begun, tune="linear", overwrite=overwrite, epochs=1, **QUICK)
    for opens in (fastjem.load_encoder, fastjem.export):
        with pytest.raises(UserError, match=r"a classifier of fastjem finetune, which fastjem\.load_classifier opens"):
            opens(begun)
