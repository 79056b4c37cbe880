"""Runs with `--mask`: from the command line to timm, resumed, accumulated and over ranks; what is refused."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from broken import broken_off, rows
from images import TINY, make_folder

for package in ("timm", "torchvision", "safetensors"):
    pytest.importorskip(package)

from test_pretrain import ENVIRONMENT, fails  # noqa: E402

import fastjem  # noqa: E402
from fastjem import checkpoints, encoders  # noqa: E402
from fastjem import config as configuration  # noqa: E402
from fastjem.cli import main  # noqa: E402
from fastjem.errors import UserError  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

MASKED = {**TINY, "backbone": "test_vit", "patch_size": 8, "mask": 0.75}
WITHOUT_BATCH_NORM = {"hidden": 16, "dim": 8, "norm": "none"}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_folder(tmp_path_factory.mktemp("images"), 48))


@pytest.mark.parametrize(
    ("backbone", "theirs"),
    [
        ("test_vit", "test_vit"),
        pytest.param("vit_tiny", "vit_tiny_patch16_224", marks=pytest.mark.exhaustive),
    ],
)
def test_from_the_command_line_to_timm(backbone: str, theirs: str, images: str, tmp_path: Path) -> None:
    """The run knows its mask, shows it, and its encoder is one of timm's as it stands."""
    import timm
    from safetensors.torch import load_file

    out = tmp_path / "run"
    line = ["pretrain", "--data", images, "--method", "simclr", "--backbone", backbone, "--mask", "0.75"]
    line += ["--image-size", "32", "--patch-size", "8", "--batch-size", "8", "--max-steps", "2", "--workers", "0"]
    assert main([*line, "--device", "cpu", "--out", str(out)]) == 0
    config, _, _ = configuration.read(out)
    assert config.mask == 0.75 and config.masking is None
    module = timm.create_model(theirs, num_classes=0, patch_size=8, img_size=32)
    module.load_state_dict(load_file(out / "encoder.safetensors"), strict=True)
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(module.eval()(x), fastjem.load_encoder(out)(x))
    page = (out / "report.html").read_text()
    assert "masked" in page and re.search(r"<th[^>]*>mask</th><td>0.75</td>", page)


def test_a_run_gives_its_trained_encoder_the_visible_patches(
    images: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of large and of small views; its momentum encoder sees whole ones."""
    calls: list[tuple[bool, int, int | None]] = []
    forward = encoders.TransformerEncoder.forward

    def noted(self: encoders.TransformerEncoder, images: torch.Tensor, **options: Any) -> encoders.Features:
        visible = options.get("visible")
        trained = next(self.parameters()).requires_grad
        calls.append((trained, images.shape[-1], None if visible is None else visible.shape[1]))
        return forward(self, images, **options)

    monkeypatch.setattr(encoders.TransformerEncoder, "forward", noted)
    common = {**MASKED, "data": images, "method": "byol", "options": {"hidden": 16}, "small_views": 1, "max_steps": 1}
    fastjem.pretrain(**common, out=str(tmp_path / "run"))
    assert set(calls) == {(True, 32, 4), (True, 16, 1), (False, 32, None)}


@pytest.mark.parametrize("masking", ["random", pytest.param("block", marks=pytest.mark.exhaustive)])
def test_killed_and_resumed_is_the_same_run(masking: str, images: str, tmp_path: Path) -> None:
    common = {**MASKED, "data": images, "masking": masking, "epochs": 2, "small_views": 1, "method": "dino"}
    common["options"] = {"hidden": 16, "bottleneck": 8}
    fastjem.pretrain(**common, out=str(tmp_path / "whole"))
    broken_off(3, **common, out=str(tmp_path / "cut"), checkpoint_steps=2)
    fastjem.pretrain(out=str(tmp_path / "cut"), resume=True)
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")
    one, other = (checkpoints.load(tmp_path / run)["model"] for run in ("cut", "whole"))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    with pytest.raises(UserError, match=r"mask was 0\.75 in this run and is 0\.5 now"):
        fastjem.pretrain(out=str(tmp_path / "cut"), resume=True, mask=0.5, epochs=3)


def test_micro_batches_have_the_masks_of_one_batch(images: str, tmp_path: Path) -> None:
    """Of a loss that is a mean over images, without a norm over the batch: every image has its own mask."""
    common = {**MASKED, "data": images, "max_steps": 3, "method": "byol", "options": WITHOUT_BATCH_NORM}
    common["optimizer"] = "sgd"  # whose steps grow with the gradient: nothing hides in a sign
    models = []
    for batch, parts in ((16, 1), (8, 2)):
        out = tmp_path / str(batch)
        fastjem.pretrain(**{**common, "batch_size": batch}, accumulate=parts, out=str(out))
        models.append(checkpoints.load(out)["model"])
    for key, value in models[0].items():
        torch.testing.assert_close(models[1][key], value, rtol=1e-4, atol=1e-6)


# By SGD: AdamW would make steps of rounding errors, where a gradient is zero (an attention's bias of the keys).
SCRIPT = """
import sys, torch, fastjem
torch.set_num_threads(1)
fastjem.pretrain(data=sys.argv[1], out=sys.argv[2], method="simclr", backbone="test_vit", patch_size=8, image_size=32,
                 mask=0.75, batch_size=16, epochs=1, workers=0, device="cpu", log_every=1, report=False, knn_every=0,
                 optimizer="sgd", options={"norm": "none"})
"""


@pytest.mark.exhaustive
def test_two_ranks_follow_one(images: str, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for name, prefix in (("one", []), ("two", torchrun)):
        line = [sys.executable, *prefix, str(tmp_path / "script.py"), images, str(tmp_path / name)]
        done = subprocess.run(line, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    one, two = rows(tmp_path / "one"), rows(tmp_path / "two")
    assert len(one) == len(two) == 3
    for a, b in zip(one, two, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=2e-4)
    one, two = (checkpoints.load(tmp_path / name)["model"] for name in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=2e-3, atol=2e-5)


def test_masks_that_cant_be_are_one_line(images: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["--data", images, "--out", str(tmp_path / "run"), "--device", "cpu", "--workers", "0", "--batch-size", "16"]
    base += ["--image-size", "32"]
    vit = [*base, "--backbone", "test_vit", "--patch-size", "8"]
    for line, words in (
        ([*base, "--backbone", "test_resnet", "--mask", "0.75"], ["need a vision transformer", "sliding windows"]),
        ([*vit, "--method", "mae", "--mask", "0.5"], ["mae masks its images by itself: --options mask=0.75"]),
        ([*vit, "--method", "ijepa", "--mask", "0.5"], ["--mask: ijepa masks its images by itself ("]),
        ([*vit, "--method", "vicregl", "--mask", "0.5"], ["--mask: vicregl looks for each place"]),
        ([*vit, "--mask", "1"], ["--mask must be a share of the patches below 1, got 1"]),
        ([*vit, "--mask", "-0.1"], ["--mask must be a finite number, at least 0"]),
        ([*vit, "--mask", "0.99"], ["--mask 0.99 leaves none of the 16 patches of a view of 32 pixels"]),
        ([*vit, "--masking", "block"], ["--masking block is for --mask"]),
        ([*vit, "--mask", "0.5", "--masking", "blocks"], ["there is no masking", "did you mean block"]),
    ):
        error = fails(capsys, *line)
        assert all(word in error for word in words), error
    assert not (tmp_path / "run").exists()


def test_the_fast_preset_hides_patches_of_a_transformer(images: str, tmp_path: Path) -> None:
    common = {**TINY, "data": images, "preset": "fast", "max_steps": 1, "batch_size": 8}
    vit = {**common, "backbone": "test_vit", "patch_size": 8}
    wanted: dict[str, tuple[dict[str, Any], float | None]] = {
        "a": (vit, 0.75),
        "whole": ({**vit, "mask": 0.0}, 0.0),
        "own": ({**vit, "mask": 0.5}, 0.5),
        "few patches": ({**vit, "patch_size": 16}, None),
        "resnet": (common, None),
        "few in the first stage": ({**vit, "image_size": "16:50%,32", "max_steps": 2}, None),
        "few in small views": ({**vit, "small_views": 1}, None),
        "masking": ({**vit, "masking": "block"}, 0.75),
        "dcl": ({**vit, "method": "dcl"}, 0.75),
    }
    for name, (fields, mask) in wanted.items():
        out = tmp_path / name
        fastjem.pretrain(**fields, out=str(out))
        assert configuration.read(out)[0].mask == mask, name
    state = checkpoints.load(tmp_path / "a")
    assert state["defaults"]["optimizer"] == "adamw" and state["defaults"]["learning_rate"] == 1e-3
    assert checkpoints.load(tmp_path / "resnet")["defaults"]["learning_rate"] == 4e-3
    result = fastjem.pretrain(out=str(tmp_path / "a"), resume=True, max_steps=2)
    assert result.finished and configuration.read(tmp_path / "a")[0].mask == 0.75
    with pytest.raises(UserError, match="preset of BYOL"):
        fastjem.pretrain(**{**common, "method": "byol"}, out=str(tmp_path / "byol"))
