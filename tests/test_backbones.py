"""timm's vision transformers as encoders: what their names stand for is built, masked, trained whole and exported."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from broken import broken_off
from images import make_folder
from test_methods import NEEDS_IMAGES, masks_of, small_options

timm = pytest.importorskip("timm")
for package in ("safetensors", "torchvision"):
    pytest.importorskip(package)
from safetensors.torch import load_file  # noqa: E402

import fastjem  # noqa: E402
from fastjem import backbones, build, encoders, starting  # noqa: E402
from fastjem.cli import main  # noqa: E402
from fastjem.config import Config  # noqa: E402
from fastjem.data.batch import Batch  # noqa: E402
from fastjem.data.masking import drawn_masks, mask_specs  # noqa: E402
from fastjem.data.parameters import Parameters  # noqa: E402
from fastjem.errors import UserError  # noqa: E402
from fastjem.methods import METHODS, RunFacts, needs_patches  # noqa: E402
from fastjem.ranks import Ranks  # noqa: E402
from fastjem.step import Step  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

# One of each of timm's families of VisionTransformer and Eva: pooling, norms, prefixes, positions.
FAMILIES = [
    "vit_tiny_patch16_224",
    "deit_tiny_patch16_224",
    "deit3_small_patch16_224",
    "beit3_base_patch16_224",
    "flexivit_small",
    "eva_large_patch14_196",
    "vit_wee_patch16_reg1_gap_256",
    "vit_so150m_patch16_reg4_map_256",
    "vit_base_patch16_siglip_224",
    "vit_base_patch16_siglip_gap_224",
    "vit_xsmall_patch16_clip_224",
    "vit_small_patch14_reg4_dinov2",
    "vit_base_patch16_rpn_224",
    "vit_base_patch16_xp_224",
    "vit_base_patch16_radio_v3",
    "test_vit3",
    "test_vit4",
    "eva02_tiny_patch14_224",
    "eva02_base_patch16_clip_224",
    "vit_small_patch16_dinov3",
    "vit_tiny_patch16_dinov3_qkvb",
    "vit_small_patch16_lingbot",
    "vit_small_patch16_rope_224",
    "vit_small_patch16_rope_ape_224",
    "vit_small_patch16_rope_mixed_224",
    "vit_small_patch16_rope_mixed_ape_224",
    "vit_medium_patch16_rope_reg1_gap_256",
    "vit_pe_core_tiny_patch16_384",
    "vit_pe_spatial_tiny_patch16_512",
    "vit_base_patch16_sapiens2",
]
QUICK = ("eva02_tiny_patch14_224", "vit_tiny_patch16_dinov3_qkvb", "vit_wee_patch16_reg1_gap_256", "test_vit3")
EVERY_FAMILY = [f if f in QUICK else pytest.param(f, marks=pytest.mark.exhaustive) for f in FAMILIES]
POOLED = [name for name, kind in METHODS.items() if kind.pool is not None]


@pytest.fixture
def two_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """timm's models with two of their blocks, all with a key and a value for each head."""
    create = timm.create_model

    def shallow(name: str, **options: object) -> torch.nn.Module:
        if name not in FAMILIES:
            return create(name, **options)
        heads = {"num_kv_heads": (None, None)} if "sapiens" in name else {}
        return create(name, depth=2, **heads, **options)

    monkeypatch.setattr(timm, "create_model", shallow)


def prepared(backbone: str, name: str) -> tuple[Step, Batch]:
    """A step of a method with one of timm's models, and a batch of 4 x 4 patches, 3 x 3 for PIRL's puzzle."""
    torch.manual_seed(0)
    kind = METHODS[name]
    patch = encoders.patch_size(backbones.outline_of(backbone))
    size = (3 if name == "pirl" else 4) * (patch if patch > 1 else 32)
    encoder = encoders.wrap(backbones.create(backbone, size, pool=kind.pool), mask_token=kind.mask_token)
    images = NEEDS_IMAGES.get(name, 0)
    run = RunFacts(image_size=size, patch=encoder.patch, batch=8, prefix_tokens=encoder.prefix_tokens, images=images)
    method = kind(encoder.width, run, **small_options(name))
    views = [torch.randn(8, 3, size, size) for _ in range(kind.views.large)]
    views += [torch.randn(8, 3, size // 2, size // 2) for _ in range(kind.views.small)]
    index = torch.arange(8)
    masks = {spec.view: drawn_masks(spec, 5, 0, index) for spec in mask_specs(method.views, size, encoder.patch)}
    tables = torch.from_numpy(Parameters(kind.views.specs(size))(0, 0, index.numpy(), size, size))
    return Step(encoder, method), Batch(views, index, index % 3, masks, list(tables))


def without_gradient(step: Step, batch: Batch) -> list[str]:
    """Names of what is to be trained and has no gradient behind a step: DDP raises at its second step for one."""
    if hasattr(step.method, "centroids"):  # an epoch that has been seen, for clusters
        step(batch, 0)
        step.method.step_ends(torch.tensor(0))
        step.method.epoch_begins(1)
    loss, _ = step(batch, 0)
    loss.backward()
    assert torch.isfinite(loss)
    return [key for key, p in step.named_parameters() if p.requires_grad and p.grad is None]


@pytest.mark.usefixtures("two_blocks")
@pytest.mark.parametrize("name", POOLED)
@pytest.mark.parametrize("backbone", EVERY_FAMILY)
def test_every_family_is_trained_whole_by_the_methods_that_pool_patches(backbone: str, name: str) -> None:
    step, batch = prepared(backbone, name)
    assert without_gradient(step, batch) == []
    module = step.encoder.backbone
    step.eval()  # Sapiens moves its positions at random
    tokens = module.forward_features(batch.views[0])
    first = 0 if getattr(module, "pool_include_prefix", False) else module.num_prefix_tokens
    torch.testing.assert_close(step.encoder(batch.views[0]).pooled, tokens[:, first:].mean(1))


ONE_OF_EACH_KIND = ("ibot", "msn", "simclr", "dinov3")  # mask tokens, dropped patches, pairs, layers


@pytest.mark.usefixtures("two_blocks")
@pytest.mark.parametrize("name", ONE_OF_EACH_KIND)
@pytest.mark.parametrize("backbone", EVERY_FAMILY)
def test_every_family_is_trained_whole_by_the_methods_that_take_its_own_embedding(backbone: str, name: str) -> None:
    step, batch = prepared(backbone, name)
    assert without_gradient(step, batch) == []


LATER = ("vit_tiny_patch16_224", "test_convnext")  # tests/test_methods.py has relatives of both
WITH_EACH = [
    pytest.param(backbone, name, marks=pytest.mark.exhaustive if backbone in LATER else ())
    for backbone in ("eva02_tiny_patch14_224", "vit_tiny_patch16_224", "test_convnext")
    for name, kind in METHODS.items()
    if not (needs_patches(kind) and backbone == "test_convnext")
]


@pytest.mark.usefixtures("two_blocks")
@pytest.mark.parametrize("backbone, name", WITH_EACH)
def test_every_method_trains_all_of_an_eva_a_vit_and_a_convnext(backbone: str, name: str) -> None:
    step, batch = prepared(backbone, name)
    assert without_gradient(step, batch) == []


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[Ranks]:
    """The only process of a group, which DDP treats as one of many."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield Ranks(0, 2, torch.device("cpu"))
    dist.destroy_process_group()


@pytest.mark.parametrize("idle", ["fc_norm", "attn_pool", "spare"])
def test_ranks_wait_for_no_parameter_of_an_own_encoder_that_no_loss_reaches(idle: str, alone: Ranks) -> None:
    """As DDP is by itself its second step raises: "Expected to have finished reduction in the prior iteration"."""
    name = "simclr" if idle == "spare" else "mae"
    pool = {"fc_norm": "avg", "attn_pool": "map", "spare": "token"}[idle]
    module = timm.create_model("test_vit", num_classes=0, patch_size=8, img_size=32, global_pool=pool)
    if idle == "spare":
        module.spare = torch.nn.Linear(2, 2)
    kind = METHODS[name]
    step = Step(encoders.wrap(module), kind(64, RunFacts(image_size=32, patch=8), **small_options(name)))
    masks = masks_of(step.method)
    config = Config(out="run", image_size=32)
    model = build.wrapped(config, alone, step)
    assert all(parameter.grad is None for parameter in step.parameters()) and model.training
    for i in range(3):
        loss, _ = model(Batch([torch.randn(8, 3, 32, 32)] * 2, torch.arange(8), None, masks), i)
        loss.backward()
    without = {key for key, p in step.named_parameters() if p.grad is None}
    assert without and all(key.startswith(f"encoder.backbone.{idle}.") for key in without)
    whole = encoders.wrap(timm.create_model("test_vit", num_classes=0, patch_size=8, img_size=32))
    assert not build.wrapped(config, alone, Step(whole, METHODS["simclr"](64))).find_unused_parameters


RUNS = [
    "vit_tiny_patch16_dinov3_qkvb",
    "eva02_tiny_patch14_224",
    pytest.param("vit_small_patch16_rope_mixed_ape_224", marks=pytest.mark.exhaustive),
    pytest.param("vit_medium_patch16_rope_reg1_gap_256", marks=pytest.mark.exhaustive),
    pytest.param("vit_pe_core_tiny_patch16_384", marks=pytest.mark.exhaustive),
]


@pytest.mark.usefixtures("two_blocks")
@pytest.mark.parametrize("backbone", RUNS)
def test_a_run_with_rotary_positions_is_resumed_evaluated_and_opened_by_timm(backbone: str, tmp_path: Path) -> None:
    patch = encoders.patch_size(backbones.outline_of(backbone))
    images = str(make_folder(tmp_path / "images", 24))
    common = {"data": images, "backbone": backbone, "method": "mae", "image_size": 4 * patch, "batch_size": 8}
    common |= {
        "options": small_options("mae"),
        "workers": 0,
        "device": "cpu",
        "max_steps": 4,
        "report": False,
        "log_every": 1,
    }
    fastjem.pretrain(**common, out=str(tmp_path / "whole"))
    broken_off(3, **common, out=str(tmp_path / "cut"), checkpoint_steps=1)
    fastjem.pretrain(out=str(tmp_path / "cut"), resume=True)
    exported = tmp_path / "one.safetensors"
    assert main(["export", str(tmp_path / "cut"), "--out", str(exported)]) in (0, None)
    one, other = load_file(exported), load_file(tmp_path / "whole" / "encoder.safetensors")
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)

    as_documented = {"global_pool": "avg", "use_fc_norm": False}  # docs/training.md
    module = timm.create_model(backbone, num_classes=0, dynamic_img_size=True, **as_documented)
    module.load_state_dict(one, strict=True)
    x = torch.randn(2, 3, 4 * patch, 4 * patch)
    torch.testing.assert_close(module.eval()(x), fastjem.load_encoder(exported)(x))
    classes = ["--train", images, "--test", images]
    assert main(["evaluate", str(tmp_path / "cut"), *classes, "--device", "cpu", "--workers", "0"]) in (0, None)


POOLED_AND_NOT = [
    ("vit_so150m_patch16_reg4_map_256", "norm"),
    ("eva02_tiny_patch14_224", "fc_norm"),
    ("test_vit4", "fc_norm"),
]


@pytest.mark.usefixtures("two_blocks")
@pytest.mark.parametrize("backbone, norm", POOLED_AND_NOT)
def test_weights_are_taken_over_by_an_encoder_that_pools_otherwise(backbone: str, norm: str) -> None:
    """timm's own way -> the patches' mean: the last norm becomes that of the tokens, attention that pools is left."""
    own = backbones.create(backbone, 224)
    with torch.no_grad():
        own.get_submodule(norm).weight.copy_(torch.rand(own.num_features))
    averaged = backbones.create(backbone, 224, pool="avg")
    state = starting.fitted(averaged, own.state_dict())
    averaged.load_state_dict(state, strict=True)
    assert torch.equal(averaged.norm.weight, own.get_submodule(norm).weight)
    assert torch.equal(averaged.blocks[1].mlp.fc2.weight, own.blocks[1].mlp.fc2.weight)
    if norm == "fc_norm":
        back = backbones.create(backbone, 224)
        back.load_state_dict(starting.fitted(back, averaged.state_dict()), strict=True)
        assert torch.equal(back.fc_norm.weight, own.fc_norm.weight)


REFUSED = [
    ("simclr", "test_vit_relpos", 64, "--image-size 64: the encoder, a VisionTransformerRelPos, can't take 64 x 64"),
    ("mae", "deit_tiny_distilled_patch16_224", 32, "(the method's embedding is the mean of the patches): The dist"),
    ("msn", "vit_tiny_r_s16_p8_224", 64, "msn: masked patches need a vision transformer (--backbone vit_tiny): the"),
    ("mae", "vitamin_small_224", 64, "are those of a convolutional stem, whose windows see one another's"),
    ("capi", "test_vit_relpos", 160, "VisionTransformerRelPos adds a bias for each two places of the whole grid"),
    ("mae", "xcit_nano_12_p8_224", 64, "Xcit can't be given some of an image's patches alone"),
    ("mae", "test_resnet", 64, "a convolution's sliding windows see the edges of the holes, so that ResNet"),
    ("ijepa", "vit_tiny_patch16_224", 32, "is 2 x 2 patches of 16 pixels, and multi_block masks need 3 x 3: --image"),
    ("mae", "vit_tiny_patch16_224", 16, "--image-size 16 is 1 x 1 patches of 16 pixels, and random masks need 2 x 2"),
    ("ibot", "vit_tiny_patch16_224", 16, "is 1 x 1 patches of 16 pixels, and block masks need 2 x 2: --image-size 32"),
]
REFUSED_LATER = [
    ("simclr", "swin_tiny_patch4_window7_224", 64, "a SwinTransformer, can't take 64 x 64 images of 3 channels: Input"),
    (
        "dino",
        "swin_tiny_patch4_window7_224",
        224,
        "--small-views (0: none): the encoder, a SwinTransformer, can't",
    ),
    ("ibot", "vit_small_r26_s32_224", 64, "are those of a convolutional stem"),
    ("capi", "beit_base_patch16_224", 224, "Beit adds a bias for each two places"),
    ("mae", "swin_tiny_patch4_window7_224", 224, "SwinTransformer merges neighbouring patches"),
    ("mae", "hiera_tiny_224", 224, "Hiera merges neighbouring patches"),
    ("mae", "naflexvit_base_patch16_gap", 64, "NaFlexVit cuts images into patches and places them in a way of its own"),
]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_folder(tmp_path_factory.mktemp("images"), 8))


@pytest.mark.parametrize(
    "name, backbone, size, message",
    [*REFUSED, *(pytest.param(*case, marks=pytest.mark.exhaustive) for case in REFUSED_LATER)],
)
def test_what_a_backbone_cant_is_one_line(
    name: str, backbone: str, size: int, message: str, images: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["pretrain", "--data", images, "--method", name, "--backbone", backbone, "--image-size", str(size)]
    line += [
        "--out",
        str(tmp_path / "run"),
        "--batch-size",
        "4",
        "--max-steps",
        "1",
        "--device",
        "cpu",
        "--workers",
        "0",
    ]
    assert main(line) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and message in said[0]


def test_a_hybrids_patch_is_that_of_the_image() -> None:
    """Its name tells the patch of 8 places on the stem's map, each of 4 pixels."""
    module = backbones.create("vit_tiny_r_s16_p8_224", 64)
    encoder = encoders.wrap(module)
    x = torch.randn(2, 3, 64, 64)
    tokens = encoder(x).tokens
    assert encoder.patch == 32 and tokens is not None and tokens.shape[1] == 4
    with pytest.raises(ValueError, match="convolutional stem"):
        encoder(x, visible=torch.zeros(2, 1, dtype=torch.int64))
    with pytest.raises(UserError, match=r"--patch-size is for .* cuts them from a convolutional stem's maps"):
        backbones.create("vit_tiny_r_s16_p8_224", 64, patch=8)
