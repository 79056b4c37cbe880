"""What the blocks of an encoder are, and computing them again in the backward pass."""

import copy
from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from fastjem import encoders
from fastjem.blocks import blocks, recompute, smallest
from fastjem.errors import UserError

timm = pytest.importorskip("timm")
pytestmark = pytest.mark.usefixtures("one_thread")

# (blocks by class, the smallest of them)
KNOWN = {
    "vit_tiny_patch16_224": ({"Block": 12}, "Block"),
    "eva02_tiny_patch14_224": ({"EvaBlock": 12}, "EvaBlock"),
    "resnet18": ({"BasicBlock": 8}, "BasicBlock"),
    "regnety_002": ({"Bottleneck": 13}, "Bottleneck"),  # stages are classes that hold their blocks themselves
    "convnext_atto": ({"ConvNeXtBlock": 12, "ConvNeXtStage": 4}, "ConvNeXtBlock"),
    "densenet121": ({"DenseLayer": 58}, "DenseLayer"),  # in dicts of modules
    "mixer_s32_224": ({"MixerBlock": 8}, "MixerBlock"),  # whose two MLPs are no blocks
    "test_resnet": ({"BasicBlock": 3}, "BasicBlock"),  # a block a stage
    "vgg11": ({}, ""),
}


def kinds(found: list[nn.Module]) -> dict[str, int]:
    return dict(Counter(type(block).__name__ for block in found))


@pytest.mark.parametrize("name", KNOWN)
def test_blocks_of_timms_models(name: str) -> None:
    with torch.device("meta"):
        module = timm.create_model(name, num_classes=0)
    expected, least = KNOWN[name]
    assert kinds(blocks(module)) == expected
    assert kinds(smallest(module)) == ({least: expected[least]} if least else {})
    found = blocks(module)
    places = {id(block): place for place, block in enumerate(found)}
    for place, block in enumerate(found):
        assert all(places.get(id(inner), -1) <= place for inner in block.modules()), "inner ones first"


class Layer(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 4), nn.ReLU(), nn.LayerNorm(4))


def test_blocks_of_any_module() -> None:
    assert kinds(blocks(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))) == {}  # single layers
    mixed = nn.Sequential(nn.Linear(4, 4), Layer(), Layer(), nn.ReLU(), nn.Sequential(Layer()))
    assert kinds(blocks(mixed)) == {}  # of two classes
    assert kinds(blocks(nn.Sequential(nn.Linear(4, 4), Layer(), Layer()))) == {"Layer": 2}
    stages = nn.ModuleDict({"a": nn.Sequential(Layer(), Layer()), "b": nn.Sequential(Layer())})
    assert kinds(blocks(stages)) == {"Layer": 3, "Sequential": 2}
    lists = nn.ModuleList([nn.ModuleList([Layer(), Layer()]), nn.ModuleList([Layer(), Layer()])])
    assert kinds(blocks(lists)) == {"Layer": 4}  # a list has no forward pass
    layers = nn.ModuleList(Layer() for _ in range(3))
    layers[2][0].weight = layers[0][0].weight  # which goes with neither alone
    assert blocks(layers) == [layers[1]]


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "test_resnet":
        return timm.create_model(name, num_classes=0)
    options = {"proj_drop_rate": 0.2, "drop_path_rate": 0.3} if name == "test_vit" else {}
    return timm.create_model(name, num_classes=0, img_size=32, **{"patch_size": 8, **options})


def gradients(encoder: nn.Module, images: Tensor, half: bool = False) -> dict[str, Tensor]:
    """Behind two forward passes and one backward pass, with the buffers and the embeddings."""
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        x = torch.cat([encoder(images).pooled, encoder(images.flip(3)).pooled])
    x.float().square().sum().backward()
    found = {name: p.grad for name, p in encoder.named_parameters() if p.grad is not None}
    return {**found, **dict(encoder.named_buffers()), "pooled": x.detach()}


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_recomputed_blocks_give_the_same_bits_and_keep_less(name: str, half: bool) -> None:
    """Dropout, drop path and running statistics among them, under autocast too."""
    images = torch.randn(4, 3, 32, 32)
    module = network(name)
    plain = encoders.wrap(module)
    other = encoders.wrap(copy.deepcopy(module))
    names = list(other.state_dict()), [name for name, _ in other.named_parameters()]
    assert recompute(other) == len(smallest(module)) > 1
    assert (list(other.state_dict()), [name for name, _ in other.named_parameters()]) == names
    sizes = []
    results = []
    for encoder in (plain, other):
        kept: dict[int, int] = {}

        def keep(x: Tensor, kept: dict[int, int] = kept) -> Tensor:
            kept[x.data_ptr()] = x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            torch.manual_seed(1)
            encoder(images)
        sizes.append(sum(kept.values()))
        results.append(gradients(encoder, images, half))
    assert results[0].keys() == results[1].keys()
    for key, expected in results[0].items():
        assert torch.equal(results[1][key], expected), key
    assert sizes[1] < sizes[0] / 2


def test_nothing_is_recomputed_without_gradients_or_blocks() -> None:
    encoder = encoders.wrap(network("test_vit").eval())
    images = torch.randn(2, 3, 32, 32)
    expected = encoder(images).pooled
    recompute(encoder)
    with torch.no_grad():
        assert torch.equal(encoder(images).pooled, expected)
    with pytest.raises(UserError, match="--activation-checkpointing: Linear has no repeated blocks"):
        recompute(encoders.wrap(nn.Linear(3, 4), 4))
