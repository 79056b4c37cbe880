"""lightly's paths under `fastjem.compat.lightly`: every name of 1.6.0 is there, or says what to use instead."""

import copy
import importlib
import inspect
import pkgutil
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastjem.compat.lightly import lookup
from fastjem.nn import blocks, shuffling

pytest.importorskip("lightly.loss", reason="lightly is not installed")
pytest.importorskip("timm", reason="timm is not installed")
from lightly.models import utils as their_utils
from lightly.utils import debug, optim
from lightly.utils import dist as their_dist
from lightly.utils.lars import LARS as TheirLARS

OURS = "fastjem.compat.lightly"
PACKAGES = ("loss", "models", "transforms", "utils", "data")
APART = {  # tools beside training, which have other paths here or none
    "data._", "data.dataset", "data.lightly_subset", "data.multi_view_collate", "utils.benchmarking",
    "utils.bounding_box", "utils.cropping", "utils.dependency", "utils.deprecation", "utils.embeddings_2d",
    "utils.hipify", "utils.io", "utils.reordering", "utils.version_compare", "models.batchnorm", "models.resnet",
    "models.zoo",
}  # fmt: skip


def files() -> list[str]:
    """lightly's modules, without its name before them."""
    found = []
    for package in PACKAGES:
        module = importlib.import_module(f"lightly.{package}")
        found += [
            package,
            *(x.name.removeprefix("lightly.") for x in pkgutil.walk_packages(module.__path__, f"{module.__name__}.")),
        ]
    return [name for name in found if not any(name.startswith(apart) for apart in APART)]


def public(file: str) -> list[str]:
    module = importlib.import_module(f"lightly.{file}")
    own = inspect.isclass, inspect.isfunction
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and any(is_one(value) for is_one in own)
        and value.__module__.startswith("lightly.")
        and not value.__module__.startswith(("lightly.utils.dep", "lightly.utils.ver"))
    ]


# What lightly's files have for themselves.
PARTS = {"latent_prediction_loss", "latent_distance", "LatentDistance", "Location", "center_mean", "center_momentum",
         "MaskedCausalAttention", "MaskedCausalBlock", "AIMPredictionHeadBlock", "IJEPAEncoder", "sinkhorn_knopp",
         "RandomResizedCropWithLocation", "RandomHorizontalFlipWithLocation", "RandomVerticalFlipWithLocation",
         "GatherLayer", "MultiViewTransform", "Center", "gather", "DeprecatedShim", "EmptyVideoError", "VideoError",
         "NonIncreasingTimestampError", "UnseekableTimestampError"}  # fmt: skip


@pytest.mark.parametrize("file", files())
def test_every_name_is_here_or_says_what_is_instead(file):
    ours = importlib.import_module(f"{OURS}.{file}")
    silent = []
    for name in public(file):
        try:
            found = getattr(ours, name)
        except ImportError as error:
            assert str(error).startswith("lightly.") and "isn't in fastjem: " in str(error)
        except AttributeError:
            silent.append(name)
        else:
            assert found.__module__.startswith("fastjem.")
    assert set(silent) <= PARTS, f"{file}: {silent}"


def test_a_name_that_is_not_here_is_told_by_from_too():
    with pytest.raises(ImportError, match=r"lightly\.transforms\.FDATransform isn't in fastjem: it changes an image's"):
        exec(f"from {OURS}.transforms import FDATransform")
    with pytest.raises(ImportError, match=r"isn't in fastjem: use fastjem\.functional\.total_coding_rate"):
        exec(f"from {OURS}.loss.emp_ssl_loss import tcr_loss")
    with pytest.raises(AttributeError, match="has no attribute 'NTXnetLoss'"):
        importlib.import_module(f"{OURS}.loss").NTXnetLoss  # noqa: B018
    unknown = set(lookup.INSTEAD) & set(importlib.import_module(f"{OURS}.loss").__all__)
    assert not unknown


SCRIPT = """
import copy
import torch
import lightly.utils.debug
import lightly
from lightly.loss import NTXentLoss
from lightly.loss.ntx_ent_loss import NTXentLoss as Same
from lightly.models import utils
from lightly.models.modules import SimCLRProjectionHead
from lightly.models.modules.heads import SimCLRProjectionHead as Head
from lightly.models.utils import deactivate_requires_grad, update_momentum
from lightly.transforms.simclr_transform import SimCLRTransform
from lightly.utils.scheduler import cosine_schedule
from PIL import Image

assert Same is NTXentLoss is lightly.loss.NTXentLoss is lightly.loss.ntx_ent_loss.NTXentLoss
assert Head is SimCLRProjectionHead
transform = SimCLRTransform(input_size=32)
batch = [transform(Image.new("RGB", (40, 48), (i * 9, 90, 200 - i))) for i in range(6)]
model = torch.nn.Sequential(torch.nn.Flatten(), SimCLRProjectionHead(3 * 32 * 32, 16, 8))
teacher = copy.deepcopy(model)
deactivate_requires_grad(teacher)
update_momentum(model, teacher, m=cosine_schedule(1, 10, 0.99, 1))
x0, x1 = (torch.stack(views) for views in zip(*batch))
loss = NTXentLoss()(model(x0), teacher(x1))
loss.backward()
figure = float(lightly.utils.debug.std_of_l2_normalized(model(x0)))
utils.batch_shuffle(x0)
"""


def test_a_script_with_its_imports_changed_runs():
    script = re.sub(r"^from lightly", f"from {OURS}", SCRIPT, flags=re.MULTILINE)
    script = re.sub(r"^import lightly$", f"import {OURS} as lightly", script, flags=re.MULTILINE)
    script = re.sub(r"^import lightly\.utils\.debug$", f"import {OURS}.utils.debug", script, flags=re.MULTILINE)
    names: dict[str, Any] = {}
    exec(script, names)
    assert names["loss"].isfinite() and names["x0"].shape == (6, 3, 32, 32) and 0 < names["figure"] < 1
    assert names["NTXentLoss"].__module__ == "fastjem.nn.contrastive"


@pytest.mark.parametrize("nesterov", [False, True])
def test_lars(nesterov):
    ours = importlib.import_module(f"{OURS}.utils.lars").LARS
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((3, 4), (5,), (2, 2), (4,))]
    start[2].zero_()
    gradients = [[torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in start] for _ in range(4)]
    ends = []
    for kind in (ours, TheirLARS):
        parameters = [torch.nn.Parameter(x.clone()) for x in start]
        groups = [
            {"params": parameters[:3], "name": "decayed"},
            {"params": parameters[3:], "weight_decay": 0.0, "trust_coefficient": 0.5},
        ]
        options = {"momentum": 0.9, "weight_decay": 1e-2, "nesterov": nesterov, "trust_coefficient": 0.02}
        optimizer = kind(groups, 0.3, **options)
        for step in gradients:
            for parameter, gradient in zip(parameters, step, strict=True):
                parameter.grad = gradient.clone()
            optimizer.step()
        ends.append([x.detach() for x in parameters])
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert list(inspect.signature(ours).parameters) == list(inspect.signature(TheirLARS).parameters)
    with pytest.raises(ValueError, match=r"LARS: dampening must be 0, got 0\.1"):
        ours(parameters, 0.1, dampening=0.1)


def test_groups_of_an_optimiser_by_their_names():
    ours = importlib.import_module(f"{OURS}.utils.optim").update_param_groups
    made = []
    for update in (ours, optim.update_param_groups):
        groups = [{"name": name, "params": [torch.nn.Parameter(torch.zeros(2))]} for name in ("model", "head")]
        optimizer = torch.optim.SGD(groups, lr=0.1, weight_decay=0.2)
        update(optimizer, {"weight_decay": 0.3, "else": 1}, [{"name": "head", "weight_decay": 0.6}])
        made.append([(g["name"], g["weight_decay"], "else" in g) for g in optimizer.param_groups])
        with pytest.raises(ValueError, match="body"):
            update(optimizer, updates=[{"name": "body", "lr": 1}])
        with pytest.raises(ValueError, match="rate"):
            update(optimizer, updates=[{"name": "head", "rate": 1}])
    assert made[0] == made[1] == [("model", 0.3, False), ("head", 0.6, False)]


def test_figures_and_ranks():
    z = torch.randn(9, 5, generator=torch.Generator().manual_seed(0))
    ours = importlib.import_module(f"{OURS}.utils.debug")
    torch.testing.assert_close(ours.std_of_l2_normalized(z), debug.std_of_l2_normalized(z))
    with pytest.raises(ValueError, match=r"std_of_l2_normalized: z must be \[N, D\], got \(9,\)"):
        ours.std_of_l2_normalized(z[:, 0])
    dist = importlib.import_module(f"{OURS}.utils.dist")
    assert (dist.rank(), dist.world_size()) == (0, 1) and dist.gather(z)[0] is z
    assert torch.equal(dist.eye_rank(3), their_dist.eye_rank(3))
    assert dist.rank_zero_only(lambda x: x + 1)(1) == 2


@pytest.mark.parametrize("prefix", [0, 1, 3])
def test_positions(prefix):
    for width in (8, 12):
        for get in ("get_2d_sine_cosine_positional_embedding", "get_2d_sincos_pos_embed"):
            mine, other = (getattr(x, get)(width, 4, num_prefix_tokens=prefix) for x in (blocks, their_utils))
            torch.testing.assert_close(*(torch.from_numpy(x).double() for x in (mine, other)))
        made = []
        for utils in (blocks, their_utils):
            torch.manual_seed(0)
            for strategy in ("learn", "sincos", "skip"):
                parameter = torch.nn.Parameter(torch.ones(1, 16 + prefix, width))
                utils.initialize_positional_embedding(parameter, strategy, prefix)
                made.append((parameter.detach(), parameter.requires_grad))
        for (a, of_a), (b, of_b) in zip(made[:3], made[3:], strict=True):
            torch.testing.assert_close(a, b)
            assert of_a == of_b
    with pytest.raises(ValueError, match="there must be a square of patches, got 15"):
        blocks.initialize_2d_sine_cosine_positional_embedding(torch.nn.Parameter(torch.ones(1, 16, 8)))
    with pytest.raises(ValueError, match="strategy must be one of learn, sincos, skip, got 'cosine'"):
        blocks.initialize_positional_embedding(parameter, "cosine", 0)


def test_pooling_and_norms():
    x = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    mask = torch.randint(3, (2, 4, 5), generator=torch.Generator().manual_seed(1))
    mine, other = (utils.pool_masked(x, mask, 4) for utils in (blocks, their_utils))
    torch.testing.assert_close(mine, other)
    torch.testing.assert_close(
        torch.autograd.grad(mine.square().sum(), x), torch.autograd.grad(other.square().sum(), x)
    )
    torch.testing.assert_close(blocks.pool_masked(x[0], mask[0], 4), mine[0])
    torch.testing.assert_close(blocks.pool_masked(x, mask, 3, reduce="sum").sum(2), x.sum((2, 3)))
    with pytest.raises(ValueError, match=r"pool_masked: source and mask must be .*, got \(2, 3, 4, 5\) and \(4, 5\)"):
        blocks.pool_masked(x, mask[0], 4)
    torch.testing.assert_close(blocks.normalize_mean_var(x, 1), their_utils.normalize_mean_var(x, 1))
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Linear(2, 2)))
    assert blocks.get_named_leaf_modules(model) == their_utils.get_named_leaf_modules(model)


def test_stochastic_depth():
    import timm
    from torchvision.models.vision_transformer import VisionTransformer

    vits = [VisionTransformer(8, 4, 2, 2, 8, 16) for _ in range(2)]
    for vit, utils in zip(vits, (blocks, their_utils), strict=True):
        utils.add_stochastic_depth_to_blocks(vit, 0.3)
    assert str(vits[0]) == str(vits[1]) and "StochasticDepth(p=0.3, mode=row)" in str(vits[0])
    for mode in ("linear", "uniform"):
        small = {"img_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 3, "num_heads": 2}
        models = [timm.create_model("vit_tiny_patch16_224", **small) for _ in range(2)]
        for model, utils in zip(models, (blocks, their_utils), strict=True):
            utils.update_drop_path_rate(model, 0.2, mode)
        assert str(models[0]) == str(models[1])
    with pytest.raises(ValueError, match="mode must be one of linear, uniform, got 'square'"):
        blocks.update_drop_path_rate(models[0], 0.2, "square")


def test_a_shuffled_batch_comes_back():
    x = torch.arange(12.0).view(6, 2).requires_grad_()
    torch.manual_seed(0)
    mine = shuffling.batch_shuffle(x)
    torch.manual_seed(0)
    for a, b in zip(mine, their_utils.batch_shuffle(x), strict=True):
        assert torch.equal(a, b) and not a.requires_grad
    assert torch.equal(shuffling.batch_unshuffle(*mine), x)
    shuffled = shuffling.batch_shuffle(x, distributed=True)  # one rank is a batch of its own
    assert torch.equal(shuffling.batch_unshuffle(*shuffled, distributed=True), x)
    with pytest.raises(ValueError, match=r"batch_unshuffle: shuffle must be \[6\], got \(5,\)"):
        shuffling.batch_unshuffle(x, mine[1][:5])


def of_both(name: str, *args: Any, **options: Any) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Ours and lightly's, in evaluation mode, with the same weights, from the same seed."""
    made = []
    for package in (OURS, "lightly"):
        module = importlib.import_module(f"{package}.models.modules")
        if not hasattr(module, name):
            module = importlib.import_module(f"{package}.models.modules.ijepa")
        torch.manual_seed(0)
        made.append(getattr(module, name)(*copy.deepcopy(args), **copy.deepcopy(options)).eval())
    made[1].load_state_dict(made[0].state_dict(), strict=True)
    return made[0], made[1]


def assert_same(mine: Any, other: Any, *inputs: Tensor, **options: Any) -> None:
    found, expected = mine(*inputs, **options), other(*inputs, **options)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, equal_nan=True)


SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
KEEP = torch.tensor([[0, 3, 5], [0, 1, 2], [0, 9, 16]])
HIDDEN = torch.tensor([[1, 2], [5, 6], [7, 12]])


@pytest.mark.parametrize(
    "kind",
    ["timm", "torchvision", *(pytest.param(x, marks=pytest.mark.exhaustive) for x in ("timm_sizes", "timm_pooled"))],
)
def test_vision_transformers_with_masks(kind):
    import timm
    from torchvision.models.vision_transformer import VisionTransformer

    torch.manual_seed(1)
    if kind == "torchvision":
        mine, other = of_both("MaskedVisionTransformerTorchvision", VisionTransformer(16, 4, 2, 2, 16, 32))
    else:
        options = {"timm_sizes": {"dynamic_img_size": True}, "timm_pooled": {"global_pool": "avg", "reg_tokens": 2}}
        vit = timm.create_model("vit_tiny_patch16_224", **SMALL, **options.get(kind, {}))
        mine, other = of_both("MaskedVisionTransformerTIMM", vit)
    assert mine.sequence_length == other.sequence_length
    for given in ({}, {"idx_mask": HIDDEN}, {"idx_keep": KEEP}, {"mask": torch.arange(mine.sequence_length) % 3 == 0}):
        given = {k: v.expand(3, -1) if k == "mask" else v for k, v in given.items()}
        assert_same(mine, other, IMAGES, **given)
        assert_same(mine.encode, other.encode, IMAGES, **given)
    if kind.startswith("timm"):
        assert_same(mine.forward_intermediates, other.forward_intermediates, IMAGES, norm=True)
        for model in (mine, other):
            model.set_grad_checkpointing()
        assert_same(mine.encode, other.encode, IMAGES)
    if kind in ("timm_sizes", "torchvision"):
        larger = torch.nn.functional.interpolate(IMAGES, 24)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert_same(mine.encode, other.encode, larger)
    with pytest.raises(ValueError, match="idx_mask or mask must be given, not both"):
        mine.encode(IMAGES, idx_mask=HIDDEN, mask=torch.ones(3, mine.sequence_length, dtype=torch.bool))


def test_decoders_predictors_and_heads():
    x = torch.randn(3, 17, 16, generator=torch.Generator().manual_seed(0))
    mine, other = of_both("MaskedVisionTransformerDecoderTIMM", 16, 16, 2, 2)
    assert_same(mine, other, x, idx_mask=HIDDEN, idx_keep=KEEP)
    of_patches = torch.tensor([[0, 1], [3, 4], [9, 15]])
    mine, other = of_both("IJEPAPredictorTIMM", 16, 2, 12, 16, 2)
    assert_same(mine, other, x[:, :2, :12], of_patches, [of_patches, of_patches + 0])
    context = torch.randn(3, 2, 16, generator=torch.Generator().manual_seed(1))
    mine, other = of_both("CAPIPredictorTIMM", 16, 4, depth=2, num_heads=2)
    assert_same(mine, other, context, of_patches, KEEP[:, 1:] - 1)
    mine, other = of_both("AIMPredictionHead", 16, 12, 20, 2)
    assert_same(mine, other, x)
    mine, other = of_both("MaskedCausalVisionTransformer", **SMALL, num_classes=0)
    for given in ({}, {"mask": torch.arange(17).expand(3, -1) > 4}):
        assert_same(mine.forward_features, other.forward_features, IMAGES, **given)


def test_ijepa_of_torchvision():
    from torchvision.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    vit = VisionTransformer(16, 4, 1, 2, 768, 768)
    module, theirs = (importlib.import_module(f"{x}.models.modules.ijepa") for x in (OURS, "lightly"))
    mine, other = (x.IJEPABackbone.from_vit(copy.deepcopy(vit)).eval() for x in (module, theirs))
    assert_same(mine, other, IMAGES)
    assert_same(mine, other, IMAGES, [KEEP, KEEP + 0])
    mine, other = (x.IJEPAPredictor.from_vit_encoder(copy.deepcopy(vit.encoder), 16).eval() for x in (module, theirs))
    other.load_state_dict(mine.state_dict(), strict=True)
    tokens = torch.randn(3, 2, 768, generator=torch.Generator().manual_seed(0))
    of_patches = torch.tensor([[0, 1], [3, 4], [9, 15]])
    for model in (mine, other):
        model.requires_grad_(False)  # lightly's adds in place
    assert_same(mine, other, tokens, of_patches, [of_patches, of_patches + 0])


def test_masks_of_ijepa():
    collate = importlib.import_module(f"{OURS}.data").IJEPAMaskCollator((64, 96), 8, npred=3)
    samples = [(torch.full((2,), float(i)), i) for i in range(5)]
    (images, labels), contexts, targets = collate(samples)
    assert images.shape == (5, 2) and labels.tolist() == list(range(5)) and len(contexts) == 1 and len(targets) == 3
    for image in range(5):
        hidden = {int(x) for target in targets for x in target[image]}
        assert not hidden & set(contexts[0][image].tolist()) and max(hidden) < 96
    assert contexts[0].shape[1] > 0 and len({target.shape for target in targets}) == 1
    again = importlib.import_module(f"{OURS}.data").IJEPAMaskCollator((64, 96), 8, npred=3)
    assert again(samples)[2][0].shape == targets[0].shape  # sizes follow the batch's number
    with pytest.raises(ValueError, match="IJEPAMaskCollator: nenc must be 1, got 2"):
        type(collate)(nenc=2)


def test_what_the_page_shows_about_float64(capsys):
    """A few steps of the script: in float64 ours and lightly's curves are one, in float32 all but one."""
    page = (Path(__file__).parent.parent / "docs/lightly.md").read_text()
    script = next(code for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "def curve" in code)
    exec(script.replace("steps = 100", "steps = 10"), {})
    curves = [[float(x) for x in re.findall(r"\d+e[+-]\d+", line)] for line in capsys.readouterr().out.splitlines()]
    assert [len(curve) for curve in curves] == [3, 3, 3]
    assert max(curves[0]) < 1e-12
    assert max(*curves[1], *curves[2]) < 1e-2
