"""Stochastic depth, and learning rates that depend on the layer."""

from pathlib import Path
from typing import Any

import pytest
import torch
from broken import broken_off, rows
from images import TINY, make_folder
from torch import Tensor, nn

for package in ("timm", "torchvision", "safetensors"):
    pytest.importorskip(package)
import timm  # noqa: E402
import timm.optim  # noqa: E402

import fastjem  # noqa: E402
from fastjem import backbones, checkpoints, encoders, optim, prepare  # noqa: E402
from fastjem import config as configuration  # noqa: E402
from fastjem.cli import main  # noqa: E402
from fastjem.config import Config  # noqa: E402
from fastjem.data.batch import Batch  # noqa: E402
from fastjem.errors import UserError  # noqa: E402
from fastjem.methods import BYOL, DINO, METHODS, Defaults, DINOv2, Method, RunFacts  # noqa: E402
from fastjem.prepare import Objects  # noqa: E402
from fastjem.step import Step  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
DINOS = {"hidden": 16, "bottleneck": 8, "prototypes": 12}
VIT = {**TINY, "backbone": "test_vit", "patch_size": 8}
LONG = 10_000  # steps from which on methods have what papers give


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_folder(tmp_path_factory.mktemp("images"), 48))


def rates(module: nn.Module) -> list[float]:
    return [rate for _, rate in encoders.drop_paths(module)]


# Stochastic depth


def test_its_rate_grows_from_block_to_block() -> None:
    module = backbones.create("test_vit", 32, patch=8, drop_path=0.3)
    assert rates(module) == pytest.approx([x for i in range(1, 6) for x in [0.3 * i / 5] * 2])
    assert rates(backbones.create("test_vit", 32, patch=8)) == []


def test_the_momentum_encoder_has_none() -> None:
    module = backbones.create("test_vit", 32, patch=8, drop_path=0.5)
    step = Step(module, BYOL(module.num_features, RunFacts(), hidden=16)).train()
    assert len(rates(step.encoder)) == 10 and rates(step.teacher) == []
    assert step.teacher["encoder"].state_dict().keys() == step.encoder.state_dict().keys()
    images = torch.randn(4, 3, 32, 32)
    teacher = step.teacher["encoder"]
    assert torch.equal(teacher(images).pooled, teacher(images).pooled)
    assert not torch.equal(step.encoder(images).pooled, step.encoder(images).pooled)
    whole = step.eval().encoder(images).pooled
    torch.testing.assert_close(step.train().teacher["encoder"](images).pooled, whole)


@pytest.mark.parametrize("masked", ["hidden", "visible"])
def test_it_works_with_masks(masked: str) -> None:
    """Where each branch but the first block's is left out, the tokens are those behind the first block."""
    encoder = encoders.wrap(backbones.create("test_vit", 32, patch=8, drop_path=0.3), mask_token=True).train()
    vit = encoder.backbone
    for part in vit.modules():
        if type(part).__name__ == "DropPath":
            part.drop_prob = 1.0
    images = torch.randn(3, 3, 32, 32)
    visible = torch.stack([torch.randperm(16)[:5].sort().values for _ in range(3)])
    hidden = torch.ones(3, 16, dtype=torch.bool).scatter(1, visible, False).view(3, 4, 4)
    found = encoder(images, **{masked: visible if masked == "visible" else hidden})
    patches = vit.patch_embed(images).flatten(1, -2)
    if masked == "hidden":
        patches = torch.where(hidden.flatten(1)[..., None], encoder.mask_token, patches)
    tokens = torch.cat([vit.cls_token.expand(3, -1, -1), patches], 1) + vit.pos_embed
    if masked == "visible":
        kept = tokens[:, 1:].gather(1, visible[..., None].expand(-1, -1, encoder.width))
        tokens = torch.cat([tokens[:, :1], kept], 1)
    torch.testing.assert_close(found.tokens, vit.norm(vit.blocks[0](tokens))[:, 1:])


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_it_follows_the_seed(compiled: bool) -> None:
    torch.manual_seed(0)
    module = backbones.create("test_vit", 32, patch=8, drop_path=0.5)
    step = Step(module, DINO(module.num_features, RunFacts(), **DINOS)).train()
    batch = Batch([torch.randn(4, 3, 32, 32) for _ in range(3)], torch.arange(4))

    def losses(step: nn.Module) -> list[Tensor]:
        found = []
        for seed in (0, 1, 0):
            torch.manual_seed(seed)
            found.append(step(batch, torch.tensor(0))[0])
        return found

    one, other, again = losses(step)
    assert torch.equal(one, again) and not torch.equal(one, other)
    if compiled:
        torch._dynamo.reset()
        found = losses(torch.compile(step, fullgraph=True, backend="aot_eager"))
        torch.testing.assert_close(found, [one, other, again])


@pytest.mark.parametrize("method", ["dino", "dinov2", pytest.param("capi", marks=pytest.mark.exhaustive)])
def test_a_long_run_has_the_papers_and_resumes(method: str, images: str, tmp_path: Path) -> None:
    """Also where a step has several micro-batches: the random numbers of a step follow from its number alone."""
    options = {"clusters": 8, "predictor_width": 16, "predictor_depth": 1} if method == "capi" else DINOS
    common = {**VIT, "method": method, "options": options, "data": images, "batch_size": 8, "accumulate": 2}
    common |= {"max_steps": LONG, "warmup_epochs": 0}
    whole = broken_off(5, **common, out=str(tmp_path / "whole"))
    cut = broken_off(3, **common, out=str(tmp_path / "cut"), checkpoint_steps=2)
    broken_off(5, out=str(cut), resume=True)
    assert len(rows(whole)) >= 4 and rows(cut) == rows(whole)
    config = configuration.read(whole)[0]
    defaults = METHODS[method].defaults
    found = (config.drop_path, config.layer_decay, config.patch_embed_rate)
    assert found == (defaults.drop_path, defaults.layer_decay, defaults.patch_embed_rate)
    assert configuration.read(cut)[0].drop_path == defaults.drop_path
    one = broken_off(2, **common, drop_path=0.0, layer_decay=1.0, patch_embed_rate=1.0, out=str(tmp_path / "none"))
    assert rows(one)[0]["loss"] != rows(whole)[0]["loss"]


def drop_path_of(backbone: str, kind: type[Method], steps: int, **fields: Any) -> float | None:
    config = Config(out="x", backbone=backbone, **fields)
    return prepare.with_drop_path(config, Objects(), kind, kind.defaults.of_run(steps)).drop_path


def test_whose_default_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    for kind, backbone, steps, expected in (
        (DINO, "vit_tiny", LONG, 0.1),
        (DINO, "vit_tiny", LONG - 1, 0.0),
        (DINO, "vit_large", LONG, 0.1),
        (DINOv2, "vit_base", LONG, 0.1),
        (DINOv2, "vit_large", LONG, 0.3),
        (DINO, "convnext_atto", LONG, 0.1),
        (DINO, "resnet18", LONG, 0.0),  # has batch norm
        (DINO, "vgg11", LONG, 0.0),  # timm has none for it
        (BYOL, "vit_tiny", LONG, 0.0),
        (METHODS["msn"], "vit_small", LONG, 0.0),
        (METHODS["data2vec"], "vit_base", LONG, 0.25),
        (METHODS["data2vec"], "vit_large", LONG, 0.2),
    ):
        assert drop_path_of(backbone, kind, steps) == expected, (kind, backbone, steps)
        assert drop_path_of(backbone, kind, steps, drop_path=0.4) == 0.4
    assert rates(backbones.create("resnet18", 32, drop_path=0.2))[-1] == pytest.approx(0.2)  # where it is asked for
    for name in ("dinov2", "dino"):
        assert main(["methods", name]) == 0
        said = capsys.readouterr().out
        defaults = METHODS[name].defaults
        assert f"drop path {defaults.drop_path:g}" in said and ("layer decay 0.9" in said) == (name == "dinov2")


def test_a_short_run_says_what_it_goes_without(images: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fields = {**VIT, "method": "dinov2", "options": DINOS, "data": images, "max_steps": 1}
    fastjem.pretrain(**fields, out=str(tmp_path / "a"))
    said = "so short a run goes without --drop-path 0.1 --layer-decay 0.9 --patch-embed-rate 0.2, which the method has"
    assert said in capsys.readouterr().err
    assert configuration.read(tmp_path / "a")[0].drop_path == 0.0
    fastjem.pretrain(**fields, out=str(tmp_path / "b"), drop_path=0.1, layer_decay=0.9, patch_embed_rate=0.2)
    assert "goes without" not in capsys.readouterr().err
    groups = checkpoints.load(tmp_path / "b")["optimizer"]["param_groups"]
    assert min(group["rate_factor"] for group in groups) == pytest.approx(0.2 * 0.9**7)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"backbone": "vgg11", "drop_path": 0.1}, "drop_path 0.1: timm's vgg11 has no stochastic depth"),
        ({"drop_path": 1.0}, "drop_path must be below 1"),
        ({"drop_path": -0.1}, "drop_path must be a finite number, at least 0"),
        ({"drop_path": 0.1, "encoder": nn.Linear(2, 2)}, "drop_path 0.1: the encoder is made already"),
        ({"layer_decay": 0.0}, "layer_decay must be above 0"),
        ({"layer_decay": 1.1}, "layer_decay must be between 0 and 1"),
        ({"backbone": "pit_ti_224", "image_size": 224, "layer_decay": 0.9}, "PoolingVisionTransformer doesn't tell"),
        ({"patch_embed_rate": 0.2}, "patch_embed_rate 0.2: ResNet has no patch embedding"),
    ],
)
def test_what_an_encoder_cant_have(given: dict[str, Any], says: str, images: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=says):
        fastjem.pretrain(**{**TINY, "data": images, "max_steps": 1, "out": str(tmp_path / "x"), **given})
    assert not (tmp_path / "x").exists()


# Rates by layer


@pytest.mark.parametrize(
    "name",
    ["test_vit", "vit_small_patch16_dinov3", "eva02_tiny_patch14_224", "resnet18", "convnext_atto", "cait_xxs24_224"],
)
def test_layers_are_timms(name: str) -> None:
    """The heads are where timm's models have their classifier."""
    with torch.device("meta"):
        whole = timm.create_model(name, num_classes=10)
        module = timm.create_model(name, num_classes=0)
    expected = {}
    names = {id(parameter): name for name, parameter in whole.named_parameters()}
    for group in timm.optim.param_groups_layer_decay(whole, layer_decay=0.7):
        expected |= {names[id(parameter)]: group["lr_scale"] for parameter in group["params"]}
    found = optim.rate_factors(module, 0.7)
    assert found == pytest.approx({name: expected[name] for name, _ in module.named_parameters()})
    assert len(set(found.values())) > 4 and max(found.values()) <= 1


def test_layers_of_a_vit_are_dinov2s() -> None:
    """dinov2/utils/param_groups.py, but that timm counts the last norm to the last block."""
    with torch.device("meta"):
        module = timm.create_model("vit_small_patch16_224", num_classes=0)
    found = optim.rate_factors(module, 0.9, 0.2)
    for i in range(12):
        assert found[f"blocks.{i}.mlp.fc1.weight"] == pytest.approx(0.9 ** (12 - i))
    assert found["pos_embed"] == found["cls_token"] == pytest.approx(0.9**13)
    assert found["patch_embed.proj.weight"] == pytest.approx(0.2 * 0.9**13)
    assert optim.rate_factors(module) == dict.fromkeys(found, 1.0)


def test_groups_keep_what_doesnt_decay() -> None:
    module = backbones.create("test_vit", 32, patch=8)
    step = Step(module, METHODS["data2vec"](module.num_features, RunFacts()))
    from fastjem.build import rate_factors

    factors = rate_factors(Config(out="x", layer_decay=0.5, patch_embed_rate=0.1), step.encoder)
    assert factors["encoder.mask_token"] == factors["encoder.backbone.cls_token"] == pytest.approx(0.5**7)
    names = {id(p): name for name, p in step.named_parameters()}
    plain, ours = optim.parameter_groups(step), optim.parameter_groups(step, factors=factors)
    decays = {names[id(p)]: group["decays"] for group in plain for p in group["params"]}
    assert {names[id(p)]: group["decays"] for group in ours for p in group["params"]} == decays
    assert {names[id(p)]: group["rate_factor"] for group in ours for p in group["params"]} == {
        name: factors.get(name, 1.0) for name in decays
    }


THEIRS = {
    "adamw": lambda groups: torch.optim.AdamW(groups, betas=(0.9, 0.999)),
    "sgd": lambda groups: torch.optim.SGD(groups, momentum=0.9),
    "lars": lambda groups: timm.optim.Lars(groups, momentum=0.9),
    "larc": lambda groups: timm.optim.Lars(groups, momentum=0.9, trust_coeff=0.02, trust_clip=True),
}


@pytest.mark.parametrize("name", THEIRS)
def test_every_optimiser_follows_the_factors(name: str) -> None:
    """As torch's and timm's own do, each parameter in a group of its own."""
    schedule = optim.Schedule(steps=4, learning_rate=0.1, warmup=2, weight_decay=0.05)
    modules = []
    for theirs in (False, True):
        torch.manual_seed(0)
        module = timm.create_model("test_vit", num_classes=0, img_size=32, patch_size=8)
        factors = optim.rate_factors(module, 0.5, 0.1)
        groups = optim.parameter_groups(module, factors=factors)
        if theirs:
            groups = [{"params": [p], "name": name, "decays": p.dim() > 1} for name, p in module.named_parameters()]
            for group in groups:
                group["decays"] &= group["name"] not in ("cls_token", "pos_embed")
        optimizer = THEIRS[name](groups) if theirs else optim.build(name, groups)
        for step in range(4):
            now = schedule.at(step) if theirs else schedule.apply(optimizer, step)
            for group in optimizer.param_groups if theirs else ():
                group["lr"] = now["learning_rate"].item() * factors[group["name"]]
                group["weight_decay"] = now["weight_decay"].item() * group["decays"]
            for parameter in module.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step))
            optimizer.step()
        modules.append(module)
    torch.manual_seed(0)
    start = timm.create_model("test_vit", num_classes=0, img_size=32, patch_size=8)
    for ours, theirs, begin in zip(*(module.parameters() for module in (*modules, start)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        assert not torch.equal(ours, begin)


def test_a_state_of_before_there_were_factors_goes_on() -> None:
    module = nn.Linear(2, 2)
    optimizer = optim.build("adamw", optim.parameter_groups(module))
    for group in optimizer.param_groups:
        del group["rate_factor"]
    optim.Schedule(steps=4, learning_rate=0.5).apply(optimizer, 0)
    assert {float(group["lr"]) for group in optimizer.param_groups} == {0.5}
    before = {name: value for name, value in vars(Defaults("adamw", 1e-3, 0.1)).items() if name != "drop_path"}
    assert Defaults(**before).drop_path == 0.0
