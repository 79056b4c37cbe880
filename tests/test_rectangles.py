"""`--image-size 32x64`: views, runs and encoders of images that are no squares."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from broken import broken_off, rows
from images import TINY
from PIL import Image
from torch import nn

for package in ("timm", "torchvision", "safetensors"):
    pytest.importorskip(package)

from safetensors.torch import load_file  # noqa: E402
from test_methods import given_weights, small_options  # noqa: E402

import fastjem  # noqa: E402
from fastjem import backbones, checkpoints, encoders, starting  # noqa: E402
from fastjem import config as configuration  # noqa: E402
from fastjem.cli import main  # noqa: E402
from fastjem.commands import check_data  # noqa: E402
from fastjem.config import Config  # noqa: E402
from fastjem.data import masks  # noqa: E402
from fastjem.data.loaders import Budget, Order, choose, create, dali  # noqa: E402
from fastjem.data.masking import MASKINGS, drawn_masks, mask_specs, masks_of_run  # noqa: E402
from fastjem.data.parameters import Parameters, column  # noqa: E402
from fastjem.data.pixels import Pixels  # noqa: E402
from fastjem.data.size import as_size, from_text, written  # noqa: E402
from fastjem.data.source import open_source  # noqa: E402
from fastjem.data.views import MaskSpec, Views, ViewSpec  # noqa: E402
from fastjem.errors import UserError  # noqa: E402
from fastjem.exports import Built, open_encoder  # noqa: E402
from fastjem.given import Given  # noqa: E402
from fastjem.methods import METHODS, needs_patches, views_of  # noqa: E402
from fastjem.methods.dinov3 import _on_grid  # noqa: E402
from fastjem.methods.pirl import pieces_in_order  # noqa: E402
from fastjem.methods.transformer import rows_and_columns  # noqa: E402
from fastjem.nn.tokens import patchify, unpatchify  # noqa: E402
from fastjem.yaml_text import loaded  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE = (32, 64)
WIDE = {**TINY, "image_size": "32x64", "batch_size": 8}
VIT = {"backbone": "test_vit", "patch_size": 8}


def write_images(root: Path, count: int, height: int, width: int, kind: str = "png") -> str:
    """Files in three folders: smooth, with an edge and noise, no two alike."""
    random = np.random.default_rng([height, width])
    for i in range(count):
        coarse = Image.fromarray(random.integers(0, 256, (4, 5, 3), np.uint8)).resize((width, height), 3)
        pixels = np.asarray(coarse) + random.normal(0, 8, (height, width, 3))
        pixels[:, width // 3 : width // 2, i % 3] += 60
        folder = root / f"class{i % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{i:03}.{kind}")
    return str(root)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_images(tmp_path_factory.mktemp("images"), 48, 40, 72)


def test_a_square_is_one_number_and_sizes_are_read_as_they_are_written() -> None:
    assert as_size(32, 32) == 32 and as_size(32, 64) == SIZE
    for size, text in ((224, "224"), (SIZE, "32x64")):
        assert written(size) == text and from_text(text) == size
    assert from_text("32x32") == 32 and from_text("32x") is None and from_text("32X64") is None
    pixels = Pixels((32, 64))
    assert Pixels.from_metadata(pixels.to_metadata()) == pixels and pixels.to_dict()["size"] == [32, 64]
    assert Pixels.from_dict({"size": [32, 32]}) == Pixels(32) and Pixels(32).to_dict()["size"] == 32
    for wrong in ((32, 0), (32, 2**15)):
        with pytest.raises(ValueError, match="size must be between 1 and"):
            Pixels(wrong)
    with pytest.raises(UserError, match="size must be 2 values, got 3"):
        Pixels.from_dict({"size": [32, 64, 3]})


def test_windows_are_stretched_no_more_than_squares_are() -> None:
    """The ratio of a recipe is to the view's own aspect: torchvision's windows, which are those of squares, are drawn
    by a ratio that is given."""
    samples = np.arange(400)
    specs = [ViewSpec(size=32), ViewSpec(size=SIZE), ViewSpec(size=(64, 32)), ViewSpec(size=SIZE, ratio=(0.375, 2 / 3))]
    tables = Parameters(specs)(0, 0, samples, 2000, 2000)
    aspects = tables[:, :, column.WIDTH] / tables[:, :, column.HEIGHT]
    for table, lowest, highest in zip(aspects, (3 / 4, 3 / 2, 3 / 8, 3 / 4), (4 / 3, 8 / 3, 2 / 3, 4 / 3), strict=True):
        assert lowest * 0.99 < table.min() < lowest * 1.05 and highest / 1.05 < table.max() < highest * 1.01
    # an image of the view's aspect is cut as a square image is for squares
    (of_square,) = Parameters([ViewSpec(size=32)])(0, 0, samples, 500, 500)
    (of_wide,) = Parameters([ViewSpec(size=SIZE)])(0, 0, samples, 500, 1000)
    assert np.abs(of_wide[:, column.HEIGHT] - of_square[:, column.HEIGHT]).max() <= 1
    assert np.abs(of_wide[:, column.WIDTH] - 2 * of_square[:, column.WIDTH]).max() <= 2
    assert np.array_equal(of_wide[:, column.FLIP :], of_square[:, column.FLIP :])
    # where no try fits, the largest window of an aspect that is allowed
    (centre,) = Parameters([ViewSpec(size=SIZE, scale=(1, 1), ratio=(1, 1))])(0, 0, [1], 300, 200)
    assert centre[0, : column.WIDTH + 1].tolist() == [100, 0, 100, 200]


def test_small_views_keep_the_aspect_and_the_shorter_side_decides() -> None:
    specs = Views(large=2, small=2, recipe="dino").specs((112, 448), patch=16)
    assert [spec.size for spec in specs] == [(112, 448)] * 2 + [(48, 192)] * 2
    assert specs[1].blur and views_of("dino", (112, 448)).small
    assert not Views(recipe="simclr").specs((64, 448))[0].blur and not views_of("dino", (64, 448)).small
    assert Views(large=1, small=1, recipe="dino").specs(224)[1].size == 96


@pytest.mark.parametrize("bicubic", [False, True], ids=["bilinear", "bicubic"])
def test_views_are_the_same_by_every_loader(bicubic: bool, tmp_path: Path) -> None:
    source = open_source(write_images(tmp_path, 12, 36, 72))
    specs = [ViewSpec(size=SIZE, bicubic=bicubic), ViewSpec(size=(16, 24), bicubic=bicubic)]
    order = Order(samples=12, batch=6, stop=2, seed=3)
    expected = list(create("torch", source, specs, order, Budget()))
    held = 3 if bicubic else 1  # levels: a cubic's rounding in two passes, in 2 of 100,000 values of squares as well
    loaders = {"memory": held, "auto": held, **({} if dali.why_not("cpu") else {"dali-cpu": 25})}
    for name, most in loaders.items():
        for crops, theirs in zip(create(name, source, specs, order, Budget(workers=1)), expected, strict=True):
            assert torch.equal(crops.index, theirs.index)
            for view, other, table, same in zip(crops.views, theirs.views, crops.tables, theirs.tables, strict=True):
                assert view.shape == other.shape and torch.equal(table, same)
                off = (view.int() - other.int()).abs()
                assert off.max() <= most and off[:, 4:-4, 4:-4].float().mean() < 0.3
                assert name.startswith("dali") or (off > 1).float().mean() < 1e-4
    assert [tuple(view.shape) for view in expected[0].views] == [(6, 32, 64, 3), (6, 16, 24, 3)]
    assert choose("auto", source, specs, Budget()) == "memory", "they are small, of one size and of the views' aspect"
    assert choose("auto", source, [ViewSpec(size=64)], Budget()) == "torch"


def test_what_is_held_in_memory_has_the_views_aspect(tmp_path: Path) -> None:
    """The middle of larger images, 8/7 of the views; of smaller ones as much as the largest has."""
    specs = [ViewSpec(size=SIZE)]
    order = Order(samples=3, batch=3, stop=1)
    for height, width, held in ((80, 90, (37, 73)), (30, 40, (20, 40)), (20, 90, (20, 40))):
        source = open_source(write_images(tmp_path / f"{height}", 3, height, width))
        array = create("memory", source, specs, order, Budget()).array  # type: ignore[attr-defined]
        assert array.images.shape == (3, *held, 3)
        image = Image.open(os.path.join(source.root, source.name(0)))
        across, down = min(width, height * held[1] / held[0]), min(height, width * held[0] / held[1])
        box = ((width - across) / 2, (height - down) / 2, (width + across) / 2, (height + down) / 2)
        expected = np.asarray(image.resize((held[1], held[0]), Image.Resampling.BICUBIC, box))
        assert np.array_equal(array.images[0].numpy(), expected)
    with pytest.raises(UserError, match=r"3 images of 20 x 40 take .* GiB; 10 x 20 would fit"):
        create("memory", source, specs, order, Budget(memory=3 * 3 * 10 * 20 / 2**30))


RUNS: dict[str, dict[str, Any]] = {
    "simclr": {},
    "dino": {**VIT, "small_views": 2, "options": {"hidden": 16, "bottleneck": 8}},
    "ibot": {**VIT, "small_views": 0, "options": {"hidden": 16, "bottleneck": 8}},
    "mae": {**VIT, "options": {"decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2}},
    "ijepa": {**VIT, "options": {"predictor_width": 24, "predictor_depth": 1, "predictor_heads": 2}},
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_its_export_and_a_resumed_one(name: str, images: str, tmp_path: Path) -> None:
    import timm

    common = {**WIDE, **RUNS[name], "data": images, "method": name, "max_steps": 4}
    run = tmp_path / "whole"
    fastjem.pretrain(**common, out=str(run))
    kept = loaded((run / "config.yaml").read_bytes(), "config.yaml")
    assert kept["image_size"] == "32x64" and kept["pixels"]["size"] == [32, 64]
    assert checkpoints.load(run)["pixels"]["size"] == [32, 64]  # type: ignore[index]
    broken_off(3, **common, out=str(tmp_path / "cut"), checkpoint_steps=2)
    assert main(["pretrain", "--resume", "--out", str(tmp_path / "cut")]) == 0
    assert rows(tmp_path / "cut") == rows(run)
    one, other = (load_file(path / "encoder.safetensors") for path in (run, tmp_path / "cut"))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)

    export = str(tmp_path / "e.safetensors")
    assert main(["export", str(run), "--out", export]) == 0
    picture = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)
    for path in (str(run), export):
        opened = open_encoder(path)
        assert opened.metadata["image_size"] == "32x64" and opened.pixels.size == SIZE
        encoder = fastjem.load_encoder(path)
        prepared = encoder.prepare(picture)  # type: ignore[operator]
        assert prepared.shape == (1, 3, 32, 64)
        assert torch.equal(encoder(prepared), opened.encoder(prepared))
    if "backbone" in RUNS[name]:
        options = {"patch_size": 8, "img_size": SIZE, "global_pool": METHODS[name].pool, "fc_norm": False}
        taken = options if METHODS[name].pool else {key: options[key] for key in ("patch_size", "img_size")}
        module = timm.create_model("test_vit", num_classes=0, **taken)
        module.load_state_dict(load_file(export), strict=True)
        torch.testing.assert_close(module.eval()(prepared), encoder(prepared))


def test_what_comes_after_a_run(images: str, tmp_path: Path) -> None:
    """kNN, its report, evaluate, views and check-data."""
    run = tmp_path / "run"
    fastjem.pretrain(**{**WIDE, "report": True, "knn_every": 1, "mask": 0.5, **VIT}, data=images, max_steps=2, out=run)
    assert "32x64 pixels" in (run / "report.html").read_text()
    assert (run / "knn.jsonl").read_text().strip()
    assert main(["evaluate", str(run), "--device", "cpu", "--workers", "0", "--k", "3"]) == 0
    picture = tmp_path / "views.png"
    line = ["views", "--data", images, "--image-size", "48x96", "--images", "2", "--mask", "0.5", "--patch-size", "8"]
    assert main([*line, "--method", "simclr", "--out", str(picture)]) == 0
    assert Image.open(picture).size == (8 + 4 * (96 + 8), 28 + 2 * (96 + 28))
    found = check_data.check_data(check_data.CheckDataOptions(images, image_size=(32, 80), workers=1))  # type: ignore[arg-type]
    assert found["image_size"] == [32, 80] and found["small"] == 48
    assert "a side below 32x80: 48" in check_data.render(found)


def test_an_exported_graph_takes_the_runs_size(images: str, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    fastjem.pretrain(**WIDE, data=images, max_steps=1, out=tmp_path / "run")
    assert main(["export", str(tmp_path / "run"), "--onnx", "--out", str(tmp_path / "e.safetensors")]) == 0
    session = onnxruntime.InferenceSession(str(tmp_path / "e.onnx"), providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape[1:] == [3, 32, 64]
    assert session.get_modelmeta().custom_metadata_map["image_size"] == "32x64"


QUICK = ("vicregl", "pirl", "msn", "capi", "data2vec", "dinov2", "dinov3", "clip", "deepcluster")
SIDES = {"pirl": "24x72"}


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.exhaustive) for n in METHODS])
def test_every_method_takes_them(name: str, images: str, tmp_path: Path) -> None:
    kind = METHODS[name]
    options = {key: value for key, value in small_options(name).items() if value is not None}
    fields = {**WIDE, **(VIT if needs_patches(kind) else {}), "method": name, "options": options, "max_steps": 2}
    fields["image_size"] = SIDES.get(name, "32x64")
    fields["data"] = [images, images] if kind.views.sources > 1 else images
    done = fastjem.pretrain(**fields, out=str(tmp_path / "run"))
    assert done.steps == 2 and all(np.isfinite(row["loss"]) for row in rows(tmp_path / "run"))
    if name in ("vicregl", "dinov2"):  # with small views, and patches where it can do without
        fields |= {**VIT, "small_views": 1, "max_steps": 1}
        fastjem.pretrain(**fields, out=str(tmp_path / "patches"))


def test_sizes_may_rise_in_stages(images: str, tmp_path: Path) -> None:
    common = {**WIDE, **VIT, "image_size": "16x32:50%,32x64", "data": images, "method": "mae", "max_steps": 4}
    common["options"] = {"decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2}
    fastjem.pretrain(**common, out=str(tmp_path / "whole"))
    config, pixels, _ = configuration.read(tmp_path / "whole")
    assert config.size == pixels.size == SIZE and config.image_size == "16x32:50%,32x64"
    broken_off(1, **common, out=str(tmp_path / "cut"), checkpoint_steps=1)
    fastjem.pretrain(out=str(tmp_path / "cut"), resume=True)
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"image_size": "32x60", **VIT}, "image_size 32x60 is no multiple of test_vit's patch of 8; 32x64 is"),
        ({"image_size": (8, 64), **VIT, "method": "mae"}, ""),
        ({"image_size": (8, 64), **VIT, "method": "ibot"}, "1 x 8 patches of 8 pixels, and block masks need 2 x 16"),
        (
            {"image_size": "8x32", **VIT, "method": "ijepa"},
            "is 1 x 4 patches of 8 pixels, and multi_block masks need 2",
        ),
        ({"image_size": "32x64", "method": "pirl", **VIT}, "a third of the image's 32x64 pixels must be whole patches"),
        ({"image_size": "32x64", **VIT, "mask": 0.99}, "leaves none of the 32 patches of a view of 32x64 pixels"),
        ({"image_size": "32x64", "backbone": "swin_tiny_patch4_window7_224"}, "can't take 32 x 64 images"),
    ],
)
def test_what_is_refused_and_why(fields: dict[str, Any], says: str, images: str, tmp_path: Path) -> None:
    options = {"decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2} if fields.get("method") == "mae" else {}
    run = {**WIDE, "data": images, "out": str(tmp_path / "run"), "max_steps": 1, "options": options, **fields}
    if not says:  # nothing is wrong with a single row of patches that masks can part
        fastjem.pretrain(**run)
        return
    with pytest.raises(UserError) as error:
        fastjem.pretrain(**run)
    assert says in str(error.value), error.value


@pytest.mark.parametrize("masking", MASKINGS)
@pytest.mark.parametrize("grid", [(4, 8), (8, 4), (3, 14), (2, 5)], ids=str)
def test_masks_of_any_grid_hide_as_many_and_stay_in_it(masking: str, grid: tuple[int, int]) -> None:
    samples = torch.arange(64)
    spec = MaskSpec(0, grid, 0.5, masking, masking != "block", least=0.1)
    drawn = drawn_masks(spec, seed=1, epoch=0, samples=samples, step=3)
    assert drawn.hidden.shape == (64, *grid)
    counts = drawn.hidden.sum((1, 2))
    if masking == "block":
        assert counts.max() <= grid[0] * grid[1] // 2 and (counts > 0).any()
    else:
        assert len(set(counts.tolist())) == 1 and 0 < counts[0] < grid[0] * grid[1]
    if masking == "multi_block":
        assert drawn.targets is not None and drawn.visible is not None
        for image in range(64):
            inside = drawn.targets[image]
            assert inside.min() >= 0 and inside.max() < grid[0] * grid[1]
            assert not set(drawn.visible[image].tolist()) & set(inside.flatten().tolist())
            row, place = inside // grid[1], inside % grid[1]
            area = (row.amax(1) - row.amin(1) + 1) * (place.amax(1) - place.amin(1) + 1)
            assert (area == inside.shape[1]).all(), "each is one rectangle"
    hidden = drawn.hidden.float().mean(0)
    if masking in ("random", "inverse_rectangle", "even_block"):  # no part of the image is spared
        assert (hidden - hidden.mean()).abs().max() < 0.3


def test_masks_lie_on_rows_and_columns() -> None:
    (spec,) = mask_specs(Views(large=1, mask=0.5, masking="random"), SIZE, 8)
    assert spec.grid == (4, 8)
    grids = [spec.grid for spec in masks_of_run([ViewSpec(size=SIZE), ViewSpec(size=(16, 24))], 8, 0.5, "random")]
    assert grids == [(4, 8), (2, 3)]
    assert masks.hidden_patches((4, 8), 0.5) == 16


def test_positions_of_a_rectangle_are_its_own_and_those_of_weights_are_resampled() -> None:
    from timm.layers import resample_abs_pos_embed

    wide = backbones.create("test_vit", SIZE, patch=8)
    square = backbones.create("test_vit", 64, patch=8)
    assert wide.pos_embed.shape[1] == 1 + 4 * 8 and wide.patch_embed.grid_size == (4, 8)
    assert backbones.create("test_vit", (160, 320)).patch_embed.grid_size == (10, 20)
    assert backbones.create("vit_tiny", (64, 128)).patch_embed.grid_size == (8, 16)
    assert backbones.create("vit_tiny", (224, 448)).patch_embed.grid_size == (14, 28)
    tall = backbones.create("test_vit", (64, 32), patch=8)
    long = backbones.create("test_vit", (32, 128), patch=8)  # as many patches as 64 x 64 has
    for module, weights in ((wide, square), (square, wide), (tall, wide), (long, square), (square, long)):
        positions = nn.init.normal_(weights.pos_embed.detach().clone())
        state = {**weights.state_dict(), "pos_embed": positions}
        found = starting.fitted(module, state, starting.grid_of_positions(weights))["pos_embed"]
        grids = module.patch_embed.grid_size, weights.patch_embed.grid_size
        assert torch.equal(found, resample_abs_pos_embed(positions, *map(list, grids), num_prefix_tokens=1))
        assert found.shape == module.pos_embed.shape and not torch.equal(found, positions)
    # patches of another size, too
    other = backbones.create("test_vit", SIZE, patch=16)
    found = starting.fitted(other, wide.state_dict(), (4, 8))
    other.load_state_dict(found, strict=True)
    assert other.pos_embed.shape[1] == 1 + 2 * 4


@pytest.mark.parametrize("size", ["32x64", "64x32", 64, "64x128"])
def test_a_run_begins_with_weights_of_another_shape(size: Any, images: str, tmp_path: Path) -> None:
    first = {
        **WIDE,
        **VIT,
        "data": images,
        "method": "dino",
        "options": {"hidden": 16, "bottleneck": 8},
        "max_steps": 1,
    }
    fastjem.pretrain(**first, out=str(tmp_path / "a"))
    second = {key: first[key] for key in ("data", "method", "batch_size", "workers", "device", "max_steps", "report")}
    fastjem.pretrain(**second, weights=str(tmp_path / "a"), image_size=size, out=str(tmp_path / "b"))
    config, pixels, _ = configuration.read(tmp_path / "b")
    assert config.image_size == size and config.patch_size == 8
    fastjem.pretrain(**second, weights=str(tmp_path / "a"), weights_of="all", out=str(tmp_path / "c"))
    config, pixels, _ = configuration.read(tmp_path / "c")
    assert pixels.size == SIZE and config.image_size == "32x64", "as the weights' images were"


def test_features_say_their_rows_and_columns() -> None:
    x = torch.randn(2, 3, 32, 64)
    resnet = encoders.wrap(backbones.create("test_resnet", SIZE, stem="standard")).eval()
    found = resnet(x, tokens=True)
    assert found.tokens is not None and rows_and_columns(found) == found.grid
    maps = resnet.backbone.forward_features(x)
    assert found.grid == tuple(maps.shape[2:]) and found.grid[0] * 2 == found.grid[1]
    vit = encoders.wrap(backbones.create("test_vit", SIZE, patch=8), mask_token=True).eval()
    assert vit(x).grid == vit(x, hidden=torch.zeros(2, 4, 8, dtype=torch.bool)).grid == (4, 8)
    assert vit(x, visible=torch.arange(6).expand(2, -1)).grid is None
    assert rows_and_columns(encoders.Features(x, torch.zeros(2, 9, 4))) == (3, 3)
    with pytest.raises(ValueError, match="8 tokens are no square's: the encoder must say their `grid`"):
        rows_and_columns(encoders.Features(x, torch.zeros(2, 8, 4)))


def test_a_given_encoder_sees_the_aspect_of_the_images() -> None:
    given = Given(given_weights(), 48)
    seen: list[tuple[int, ...]] = []
    given.encoder.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape[2:])))
    for height, width in ((32, 32), (32, 64), (64, 32), (48, 96)):
        given(torch.randn(2, 3, height, width), given.mean, given.std)
    assert seen == [(48, 48), (48, 96), (96, 48), (48, 96)]
    tokens = torch.arange(32.0).view(1, 32, 1)
    assert torch.equal(_on_grid(tokens, (4, 8), (4, 8)), tokens)
    smaller = _on_grid(tokens, (4, 8), (2, 4))[0, :, 0].view(2, 4)
    assert (smaller.diff(dim=1) > 1.5).all() and (smaller.diff(dim=0) > 12).all()


def test_pieces_of_a_jigsaw_are_thirds_of_each_side() -> None:
    images = torch.arange(2 * 3 * 24 * 50.0).view(2, 3, 24, 50)
    pieces = pieces_in_order(images, torch.arange(9).expand(2, -1)).view(2, 9, 3, 8, 16)
    for i in range(3):
        for j in range(3):
            expected = images[:, :, 8 * i : 8 * i + 8, 16 * j : 16 * j + 16]
            assert torch.equal(pieces[:, 3 * i + j], expected)


def test_patches_of_a_rectangle_are_put_together_again() -> None:
    images = torch.randn(2, 3, 16, 24)
    patches = patchify(images, 8)
    assert torch.equal(unpatchify(patches, 8, grid=(2, 3)), images)
    with pytest.raises(ValueError, match="patches must be 3 x 3 of them, got 6"):
        unpatchify(patches, 8, grid=(3, 3))
    with pytest.raises(ValueError, match="patches must be a square of them, got 6"):
        unpatchify(patches, 8)


def test_metadata_that_are_no_size_are_refused() -> None:
    about = encoders.metadata("test_resnet", "auto", 0, None, Pixels(SIZE))
    assert about["image_size"] == "32x64" and Built.of(about).image_size == SIZE
    for wrong in ("32x", "x64", "0x64", "32x64x3", "999999x4", "[32, 64]"):
        with pytest.raises(UserError, match="image_size in its metadata must be a number of pixels, or height x width"):
            Built.of({**about, "image_size": wrong})


def test_the_command_line_takes_both_sides(images: str, tmp_path: Path) -> None:
    line = ["pretrain", "--data", images, "--backbone", "test_resnet", "--image-size", "32x64", "--batch-size", "8"]
    assert main([*line, "--max-steps", "1", "--workers", "0", "--device", "cpu", "--out", str(tmp_path / "a")]) == 0
    assert configuration.read(tmp_path / "a")[0].size == SIZE
    assert Config(out="a", image_size=SIZE) == replace(Config(out="a"), image_size="32x64")  # type: ignore[arg-type]
