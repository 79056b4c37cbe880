"""A run that is killed between two checkpoints and goes on is the same run, for each kind of state of methods."""

from pathlib import Path

import pytest
import torch
from broken import broken_off, rows
from images import TINY, make_folder

for package in ("timm", "torchvision", "safetensors"):
    pytest.importorskip(package)

from test_methods import given_weights, small_options  # noqa: E402

import fastjem  # noqa: E402
from fastjem import checkpoints  # noqa: E402
from fastjem.cli import main  # noqa: E402
from fastjem.methods import METHODS, needs_patches  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

VIT = {"backbone": "test_vit", "patch_size": 8}
RUNS: dict[str, dict] = {
    "deepcluster": {"options": {"prototypes": 8, "hidden": 16}},
    "pirl": {"image_size": 36},
    "smog": {"options": {"hidden": 16, "groups": 8}},
    "ibot": {**VIT, "options": {"hidden": 16, "bottleneck": 8}},
    "capi": {**VIT, "options": {"predictor_depth": 1}},
    "distill": {},
}
QUICK = ("deepcluster", "ibot")


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.exhaustive) for n in RUNS])
def test_killed_and_resumed_is_the_same_run(name: str, tmp_path: Path) -> None:
    images = str(make_folder(tmp_path / "images", 48))
    common = {**TINY, "data": images, "method": name, "epochs": 3, **RUNS[name]}
    if name == "distill":
        common["options"] = {"given": given_weights()}
    fastjem.pretrain(**common, out=str(tmp_path / "whole"))
    broken_off(5, **common, out=str(tmp_path / "cut"), checkpoint_steps=2)
    fastjem.pretrain(out=str(tmp_path / "cut"), resume=True)
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")
    one, other = (checkpoints.load(tmp_path / run)["model"] for run in ("cut", "whole"))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.exhaustive) for n in METHODS])
def test_resumed_by_the_command_line_and_opened_by_timm(name: str, tmp_path: Path) -> None:
    """Every method: stopped and resumed is the run that wasn't, to the bit, and its encoder is one of timm's."""
    import timm
    from safetensors.torch import load_file

    images = str(make_folder(tmp_path / "images", 48))
    kind = METHODS[name]
    is_vit = needs_patches(kind)
    common = {**TINY, "method": name, "data": images, "stem": "standard", **(VIT if is_vit else {})}
    common |= {
        "max_steps": 6,
        "options": {key: value for key, value in small_options(name).items() if value is not None},
    }
    if kind.views.sources > 1:
        common["data"] = [images, Path(images)]
    if name == "pirl":
        common["image_size"] = 36
    fastjem.pretrain(**common, out=str(tmp_path / "whole"))
    broken_off(3, **common, out=str(tmp_path / "cut"), checkpoint_steps=2)
    assert main(["pretrain", "--resume", "--out", str(tmp_path / "cut")]) in (0, None)
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")
    one, other = (load_file(tmp_path / run / "encoder.safetensors") for run in ("cut", "whole"))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)

    options = {"patch_size": 8, "img_size": 32, "global_pool": kind.pool, "fc_norm": False} if is_vit else {}
    given = {key: value for key, value in options.items() if value is not None}
    module = timm.create_model(common["backbone"], num_classes=0, **given)
    module.load_state_dict(one, strict=True)
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(module.eval()(x), fastjem.load_encoder(tmp_path / "cut")(x))
