"""Runs that begin with given weights, parts that stay as they are, and heads that learn first."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from broken import broken_off, rows
from images import BYOLS, TINY, make_folder
from torch import Tensor, nn

for package in ("timm", "torchvision", "safetensors", "tyro"):
    pytest.importorskip(package)
import timm  # noqa: E402
from timm.layers import resample_abs_pos_embed, resample_patch_embed  # noqa: E402

import fastjem  # noqa: E402
from fastjem import checkpoints, exports, run  # noqa: E402
from fastjem import config as configuration  # noqa: E402
from fastjem.build import Training, build  # noqa: E402
from fastjem.cli import main  # noqa: E402
from fastjem.errors import UserError  # noqa: E402
from fastjem.methods import SimCLR  # noqa: E402
from fastjem.prepare import Objects  # noqa: E402
from fastjem.ranks import join  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
REST = {name: value for name, value in TINY.items() if name not in ("backbone", "image_size")}
VIT = {**TINY, "backbone": "test_vit", "patch_size": 8}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_folder(tmp_path_factory.mktemp("images"), 48))


@pytest.fixture(scope="module")
def source(images: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """BYOL's run of a vision transformer, whose momentum encoder lags behind."""
    out = tmp_path_factory.mktemp("source") / "run"
    fastjem.pretrain(**VIT, **BYOLS, data=images, out=str(out), max_steps=2)
    return out


def saved(folder: Path, name: str, **options: Any) -> nn.Module:
    """A model of timm's with its weights in a folder, as timm saves it, with a normalisation of its own."""
    torch.manual_seed(7)
    module: Any = timm.create_model(name, num_classes=10, **options)
    for buffer in module.buffers():  # running statistics as of a trained one
        if buffer.is_floating_point():
            buffer.copy_(torch.rand_like(buffer) + 0.5)
    module.pretrained_cfg |= {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4), "num_classes": 10}
    timm.models.save_for_hf(module, str(folder), safe_serialization=True, model_args=options)
    return timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()


def begun(**fields: Any) -> Training:
    """A run as it is before its first step."""
    config, _ = run.settled(configuration.from_fields({"out": "nowhere", **fields}), Objects())
    return build(config, join("cpu"), Objects(), Path("nowhere"), None)


def weights_of(folder: Path, prefix: str = "") -> dict[str, Tensor]:
    state = checkpoints.load(folder)
    assert state is not None
    return exports.below(prefix, state["model"])


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("name", "size", "options"),
    [
        ("test_vit", 160, {}),
        ("test_vit", 96, {}),  # positions are resampled as the images come, as timm does it
        ("test_vit", 32, {"img_size": 32, "patch_size": 8}),
        ("test_resnet", 32, {}),
        ("resnet18", 32, {}),  # 7x7 at 32 pixels: the stem for small images would have no weights
    ],
)
def test_the_first_embeddings_are_the_given_models(
    name: str, size: int, options: dict[str, Any], images: str, tmp_path: Path
) -> None:
    dynamic = {"dynamic_img_size": True} if name == "test_vit" else {}
    saved(tmp_path, name, **options)
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=0, **dynamic).eval()
    fields = {**REST, "data": images, "method": "byol", "image_size": size, "options": {"hidden": 16}}
    batch = torch.randn(2, 3, size, size)
    for given in ({"weights": f"local-dir:{tmp_path}"}, {"backbone": f"local-dir:{tmp_path}"}):
        training = begun(**fields, **given)
        assert torch.equal(training.step.encoder.eval()(batch).pooled, model(batch))
        assert training.config.backbone == name and training.config.weights == f"local-dir:{tmp_path}"
        assert (training.pixels.mean, training.pixels.std) == ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
        assert training.step.method.mean == (0.5, 0.4, 0.3)
        assert torch.equal(training.step.teacher["encoder"].eval()(batch).pooled, model(batch))


def test_a_user_has_the_last_word_on_normalisation(images: str, tmp_path: Path) -> None:
    saved(tmp_path, "test_resnet")
    training = begun(**REST, image_size=32, data=images, weights=f"local-dir:{tmp_path}", view={"std": "0.1,0.1,0.1"})
    assert (training.pixels.mean, training.pixels.std) == ((0.5, 0.4, 0.3), (0.1, 0.1, 0.1))


def test_positions_and_patches_of_another_size_are_resampled_by_timm(images: str, source: Path) -> None:
    """As timm does it for its own weights: bicubic, with antialiasing."""
    given = weights_of(source, "encoder.backbone.")
    fields = {**REST, "data": images, "weights": str(source), "image_size": 64}
    found = begun(**fields).step.encoder.backbone.state_dict()
    expected = resample_abs_pos_embed(given["pos_embed"], new_size=[8, 8], num_prefix_tokens=1)
    torch.testing.assert_close(found["pos_embed"], expected)
    rest = {name: tensor for name, tensor in given.items() if name != "pos_embed"}
    assert all(torch.equal(found[name], tensor) for name, tensor in rest.items())
    found = begun(**fields, patch_size=16).step.encoder.backbone.state_dict()
    assert torch.equal(found["pos_embed"], given["pos_embed"])  # a grid of 4 x 4 as before
    expected = resample_patch_embed(given["patch_embed.proj.weight"], [16, 16])
    torch.testing.assert_close(found["patch_embed.proj.weight"], expected)


def test_another_run_is_gone_on_with(
    images: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its encoder alone, with how it was built; the same command goes on where it ended, without the weights."""
    moved = tmp_path / "source"
    shutil.copytree(source, moved)
    line = ["pretrain", "--data", images, "--weights", str(moved), "--method", "dino", "--workers", "0"]
    line += ["--batch-size", "16", "--options", "hidden=16", "bottleneck=8", "prototypes=12", "--no-report"]
    line += ["--view", "flip=0", "--checkpoint-steps", "1", "--device", "cpu", "--out", str(tmp_path / "run")]
    line += ["--resume", "auto"]
    assert main([*line, "--max-steps", "2"]) == 0
    said = capsys.readouterr().err
    assert f"the encoder begins as the encoder of {moved} (byol, step 2), whose heads stay behind" in said
    assert "--weights-of all" not in said
    config = configuration.read(tmp_path / "run")[0]
    assert (config.backbone, config.patch_size, config.image_size) == ("test_vit", 8, 32)
    shutil.rmtree(moved)
    assert main([*line, "--max-steps", "3"]) == 0
    assert "the encoder begins" not in capsys.readouterr().err
    assert checkpoints.load(tmp_path / "run")["step"] == 3
    assert main(["pretrain", "--resume", "--out", str(tmp_path / "run"), "--max-steps", "4"]) == 0
    assert main(["pretrain", "--resume", "--out", str(tmp_path / "run"), "--weights", "other"]) == 2
    assert f"--weights was {moved} in this run and is other now" in capsys.readouterr().err


def test_a_resumed_run_keeps_the_weights_normalisation(images: str, tmp_path: Path) -> None:
    given = tmp_path / "given"
    saved(given, "test_resnet")
    fields = {**REST, "image_size": 32, "data": images, "weights": f"local-dir:{given}", "checkpoint_steps": 1}
    fastjem.pretrain(**fields, max_steps=4, out=str(tmp_path / "whole"))
    cut = broken_off(2, **fields, max_steps=4, out=str(tmp_path / "cut"))
    shutil.rmtree(given)
    fastjem.pretrain(out=str(cut), resume=True)
    assert rows(cut) == rows(tmp_path / "whole") and same(weights_of(cut), weights_of(tmp_path / "whole"))
    assert configuration.read(cut)[1].std == (0.2, 0.3, 0.4)


@pytest.mark.parametrize("which", ["encoder", "teacher", "all"])
def test_what_of_a_run_is_taken(which: str, images: str, source: Path) -> None:
    fields = {**REST, "data": images, "weights": str(source), "weights_of": which, "method": "byol"}
    fields |= {} if which == "all" else {"options": {"hidden": 16}}
    step = begun(**fields).step
    given = weights_of(source)
    expected = {name: tensor for name, tensor in given.items() if name.startswith("encoder.")}
    if which == "teacher":
        expected = {f"encoder.{name}": tensor for name, tensor in exports.below("teacher.encoder.", given).items()}
    found = dict(step.state_dict())
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert same(found, given) == (which == "all")
    copy, live = (exports.below(prefix, found) for prefix in ("teacher.encoder.", "encoder."))
    assert same(copy, live) == (which != "all")


def test_all_of_a_run_at_another_size_with_other_data(source: Path, tmp_path: Path) -> None:
    """Heads keep their sizes, and the momentum encoder's positions are resampled, too."""
    data = str(make_folder(tmp_path / "more", 260))
    fields = {**REST, "data": data, "image_size": 64, "weights": str(source), "weights_of": "all", "method": "byol"}
    found = begun(**fields).step.state_dict()
    given = weights_of(source)
    for prefix in ("encoder.backbone.", "teacher.encoder.backbone."):
        expected = resample_abs_pos_embed(given[f"{prefix}pos_embed"], new_size=[8, 8], num_prefix_tokens=1)
        torch.testing.assert_close(found[f"{prefix}pos_embed"], expected)
    assert all(torch.equal(found[name], tensor) for name, tensor in given.items() if "pos_embed" not in name)

    few = tmp_path / "dino"
    dino = {**TINY, "method": "dino", "options": {"hidden": 16, "bottleneck": 8}, "max_steps": 1, "out": str(few)}
    fastjem.pretrain(**dino, data=str(make_folder(tmp_path / "few", 48)))
    prototypes = weights_of(few, "method.prototypes.")["weight"]
    step = begun(**REST, data=data, weights=str(few), weights_of="all", method="dino").step
    assert torch.equal(step.method.prototypes.weight, prototypes) and len(prototypes) == 8


def test_a_small_stem_goes_along(images: str, tmp_path: Path) -> None:
    few = {**REST, "data": images, "batch_size": 2}
    fastjem.pretrain(**few, backbone="resnet18", image_size=16, max_steps=1, out=str(tmp_path / "run"))
    for name in ("run", "run/encoder.safetensors"):
        training = begun(**few, weights=str(tmp_path / name), image_size=72)
        assert training.config.stem == "small" and training.step.encoder.backbone.conv1.kernel_size == (3, 3)
        assert same(
            dict(training.step.encoder.backbone.state_dict()), weights_of(tmp_path / "run", "encoder.backbone.")
        )


def test_what_cant_be_begun_with(images: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    dino = tmp_path / "dino"
    fastjem.pretrain(**TINY, data=images, max_steps=1, out=str(dino), method="pirl", options={"dim": 8})
    more = str(make_folder(tmp_path / "more", 64))
    for given, says in (
        (
            {"weights": str(source), "backbone": "resnet18"},
            "they are a test_vit's, and the encoder is a resnet18: conv1",
        ),
        (
            {"weights": str(source), "backbone": "vit_tiny", "patch_size": 8},
            "are a test_vit's, and the encoder is a vit_t",
        ),
        ({"weights": "nowhere"}, "'nowhere' names no encoder with weights|nowhere names no encoder with weights"),
        ({"weights": str(dino), "weights_of": "teacher"}, "has no momentum encoder, as pirl was trained"),
        ({"weights": str(source), "weights_of": "all"}, "was byol's, whose heads simclr can't go on with"),
        ({"weights": str(source / "encoder.safetensors"), "weights_of": "all"}, "is no run's folder, which alone has"),
        ({"weights": str(source), "weights_of": "all", "method": "byol", "options": {"hidden": 8}}, "doesn't fit this"),
        (
            {"weights": str(dino), "weights_of": "all", "method": "pirl", "data": more},
            "a row of each image .* 48 .* 64",
        ),
        ({"weights": str(source), "channels": 1}, "for images of 3 channels, and channels is 1"),
        ({"weights_of": "all"}, "weights_of all is for weights"),
        ({"backbone": "resnet18.a1_in1k", "weights": str(source)}, "names weights already, and weights .* others"),
        ({"backbone": "resnet18.no_such_tag"}, "no pretrained resnet18 'no_such_tag'"),
        ({"backbone": "resnet18.a1_in1k"}, "the weights of resnet18.a1_in1k can't be had: the hub can't be reached"),
        ({"backbone": "hf-hub:somebody/model"}, "hf-hub:somebody/model can't be had: the hub can't be reached"),
        ({"weights": "local-dir:/nowhere"}, "local-dir:/nowhere can't be had: Config file not found"),
        ({"weights": str(source), "encoder": nn.Linear(2, 2)}, "the encoder is made already, with weights of its own"),
    ):
        fields = {**REST, "image_size": 32, "data": images, "max_steps": 1, "out": str(tmp_path / "x"), **given}
        with pytest.raises(UserError, match=says) as caught:
            fastjem.pretrain(**fields)
        assert "\n" not in str(caught.value) and not (tmp_path / "x").exists(), given


# Parts that stay as they are


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lars", "larc", torch.optim.AdamW])
def test_frozen_parts_stay(optimizer: Any, images: str, tmp_path: Path) -> None:
    fields = {**VIT, **BYOLS, "data": images, "optimizer": optimizer, "checkpoint_steps": 1, "weight_decay": 0.1}
    fields |= {"out": str(tmp_path), "learning_rate": 0.1}
    fastjem.pretrain(**fields, freeze=["patch_embed", "blocks.0", "blocks.1.mlp.fc1.weight"], max_steps=3)
    first = begun(**{name: value for name, value in fields.items() if name != "optimizer"}, max_steps=3)
    before = first.step.encoder.backbone.state_dict()
    fastjem.pretrain(
        out=str(tmp_path), resume=True, max_steps=5, **({} if isinstance(optimizer, str) else {"optimizer": optimizer})
    )
    frozen = ("patch_embed.", "blocks.0.", "blocks.1.mlp.fc1.weight")
    after = weights_of(tmp_path, "encoder.backbone.")
    assert {name for name in after if torch.equal(after[name], before[name])} == {
        name for name in after if name.startswith(frozen)
    }
    assert configuration.read(tmp_path)[0].freeze == "patch_embed,blocks.0,blocks.1.mlp.fc1.weight"
    copies = weights_of(tmp_path, "teacher.encoder.backbone.")
    assert all(torch.equal(copies[name], before[name]) for name in copies if name.startswith("patch_embed."))


def test_what_cant_be_frozen(images: str, tmp_path: Path) -> None:
    everything = "patch_embed,cls_token,pos_embed,blocks,norm"
    for given, says in (
        ({"freeze": "block.0"}, "no part of the VisionTransformer for freeze, 'block.0'; did you mean blocks.0"),
        ({"freeze": "blocks.1,blocks.11"}, "freeze, 'blocks.11'"),
        ({"head_warmup_epochs": 2.0, "epochs": 2}, "head_warmup_epochs 2 is the whole run of 6 steps"),
        ({"head_warmup_epochs": -1.0}, "head_warmup_epochs must be a finite number, at least 0"),
        ({"method": Headless, "freeze": everything}, "leaves nothing to train: .*Headless has no heads"),
        ({"method": Headless, "head_warmup_epochs": 1.0}, "head_warmup_epochs 1 leaves nothing to train"),
    ):
        with pytest.raises(UserError, match=says):
            fastjem.pretrain(**{**VIT, "data": images, "epochs": 2, "out": str(tmp_path / "x"), **given})
        assert not (tmp_path / "x").exists()


class Headless(SimCLR):
    """Nothing behind the encoder."""

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.projector = nn.Identity()


# Heads first


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lars", "larc"])
def test_heads_learn_first(optimizer: str, images: str, tmp_path: Path) -> None:
    fields = {**VIT, "data": images, "optimizer": optimizer, "checkpoint_steps": 1, "weight_decay": 0.1}
    fields |= {"out": str(tmp_path / "run"), "learning_rate": 0.1, "warmup_epochs": 0.0}
    before = begun(**fields, epochs=2).step.state_dict()
    moved = []
    config = {**fields, "epochs": 2, "head_warmup_epochs": 2 / 3}  # 2 of 6 steps

    class Look:
        def begin(self, run: Any) -> None: ...
        def close(self) -> None: ...

        def log(self, row: dict[str, Any]) -> None:
            now = checkpoints.load(tmp_path / "run")["model"]
            moved.append({name.partition(".")[0] for name in before if not torch.equal(now[name], before[name])})

    fastjem.pretrain(**config, loggers=[Look()])
    # A step is logged one late: the checkpoint that is there is of the step itself, or of the one before.
    assert moved[0] <= {"method"} and {"method"} in moved and moved[-1] == {"method", "encoder"}
    groups = checkpoints.load(tmp_path / "run")["optimizer"]["param_groups"]
    assert {group["waits"] for group in groups} == {True, False}


def test_the_rate_of_what_waits() -> None:
    """Nothing for its steps, then a warm-up as long as the heads' own, on the cosine of the whole run."""
    from fastjem import optim

    module = nn.ModuleDict({"encoder": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
    optimizer = optim.build("sgd", optim.parameter_groups(module, waiting=("encoder.",)))
    schedule = optim.Schedule(steps=20, learning_rate=1.0, warmup=2, head_warmup=5)
    for step in range(20):
        now = schedule.apply(optimizer, step)["learning_rate"].item()
        rates = {group["waits"]: float(group["lr"]) for group in optimizer.param_groups}
        share = 0.0 if step < 5 else 0.5 if step == 5 else 1.0
        assert rates == {False: pytest.approx(now), True: pytest.approx(share * now)}
    assert not any(group["waits"] for group in optim.parameter_groups(module))
