"""What features that don't know of each other do together: given encoders and views, weights and projectors, loaders
and resumed runs."""

from pathlib import Path

import pytest
import torch
from images import TINY, make_folder

pytest.importorskip("timm")

import fastjem
from fastjem import checkpoints, encoders
from fastjem.commands.check_data import CheckDataOptions, check_data
from fastjem.commands.views import ViewsOptions, draw_views
from fastjem.data.loaders import Budget, choose
from fastjem.data.source import open_source
from fastjem.data.views import ViewSpec
from fastjem.errors import UserError
from fastjem.methods import BYOL

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_folder(tmp_path_factory.mktemp("images"), 24))


def test_small_views_of_a_wrapped_transformer_are_whole_patches(images: str, tmp_path: Path) -> None:
    """9.6 patches of 14 pixels: 70 pixels would be rounded to 69 or 68 for the check, and to 70 for the run."""
    import timm

    vit = timm.create_model("test_vit", num_classes=0, img_size=168, patch_size=14, dynamic_img_size=True)
    assert encoders.patch_size(encoders.wrap(vit)) == 14
    fields = {key: value for key, value in TINY.items() if key not in ("backbone", "stem")}
    fields |= {"image_size": 168, "batch_size": 8, "small_views": 1, "max_steps": 1}
    done = fastjem.pretrain(
        **fields,
        encoder=encoders.wrap(vit),
        method="dino",
        options={"prototypes": 8},
        data=images,
        out=tmp_path / "run",
    )
    assert done.finished


def test_a_models_own_complaint_names_the_size(images: str, tmp_path: Path) -> None:
    class Particular(torch.nn.Module):
        num_features = 12

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise ValueError("Input image size doesn't match model")

    fields = {key: value for key, value in TINY.items() if key not in ("backbone", "stem")}
    with pytest.raises(
        UserError, match=r"image_size 32: the encoder, a Particular, can't take 32 x 32 .*: Input image"
    ):
        fastjem.pretrain(**fields, encoder=Particular(), data=images, max_steps=1, out=tmp_path / "run")


def test_a_run_keeps_to_the_loader_that_it_began_with(images: str, tmp_path: Path, capsys) -> None:
    """Its views would be others by a level."""
    out = tmp_path / "run"
    fastjem.pretrain(**TINY, data=images, max_steps=2, out=out)
    assert "held in memory on cpu; --loader torch reads them anew each time" in capsys.readouterr().err
    state = checkpoints.load(out, torch.device("cpu"))
    assert state is not None and state["holds_images"] is True
    source = open_source(images)
    for holds, name in ((None, "memory"), (True, "memory"), (False, "torch")):
        assert choose("auto", source, [ViewSpec(size=32)], Budget(holds=holds)) == name


def test_weights_of_all_for_a_run_without_the_momentum_encoder(images: str, tmp_path: Path) -> None:
    options = {"hidden": 16, "dim": 8}
    fastjem.pretrain(**TINY, data=images, method="byol", options=options, max_steps=1, out=tmp_path / "a")
    given = {"weights": str(tmp_path / "a"), "weights_of": "all", "momentum_encoder": False}
    assert fastjem.pretrain(**TINY, data=images, method="byol", **given, max_steps=1, out=tmp_path / "b").finished


def test_a_method_that_is_made_already_is_told_of_its_momentum_encoder(images: str, tmp_path: Path) -> None:
    encoder = fastjem.backbones.create("test_resnet", 32, stem="standard")
    made = BYOL(encoders.wrap(encoder).width, hidden=16, dim=8)
    with pytest.raises(UserError, match=r"momentum_encoder: .*RunFacts\(momentum_encoder=\.\.\.\) tells it"):
        fastjem.pretrain(**TINY, data=images, method=made, momentum_encoder=False, max_steps=1, out=tmp_path / "run")


def test_commands_take_the_sizes_of_a_run(images: str, tmp_path: Path) -> None:
    assert check_data(CheckDataOptions(images, image_size="16:50%,32", workers=1))["image_size"] == 32
    with pytest.raises(UserError, match=r"--mask: mae masks its images by itself$"):
        draw_views(ViewsOptions(data=images, method="mae", mask="0.5", out=str(tmp_path / "a.png")))
    with pytest.raises(UserError, match="--small-views must be at most 1000, got 100000"):
        draw_views(ViewsOptions(data=images, method="dino", small_views=100000, out=str(tmp_path / "a.png")))
