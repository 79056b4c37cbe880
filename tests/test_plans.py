"""The formulas of benchmarks/plans.py against timm's models: parameters, what autograd keeps, products; the page."""

import importlib
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

timm = pytest.importorskip("timm")

from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402

ROOT = Path(__file__).parents[1]
MODELS = {
    "VIT_S": "vit_small_patch16_224",
    "VIT_B": "vit_base_patch16_224",
    "VIT_L": "vit_large_patch16_224",
    "VIT_G": "vit_giant_patch14_dinov2",
}


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("plans")


def model_of(name: str) -> torch.nn.Module:
    with torch.device("meta"):
        return timm.create_model(MODELS[name], num_classes=0, img_size=224)


def without_numbers(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters as the mode of fake tensors makes them, whose sizes alone are real."""
    return {name: torch.nn.Parameter(torch.empty(p.shape)) for name, p in model.named_parameters()}


def kept(model: torch.nn.Module, parameters: dict[str, torch.Tensor], batch: int, half: bool) -> int:
    """Bytes of the memory that autograd keeps for backward, each once, without parameters and their copies."""
    images = torch.empty(batch, 3, 224, 224)
    of_parameters = {p.untyped_storage()._cdata for p in parameters.values()}
    shapes = {shape for p in parameters.values() for shape in (tuple(p.shape), tuple(p.shape[::-1]))}
    memory: dict[int, torch.UntypedStorage] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        is_copy = x.dtype == torch.bfloat16 and tuple(x.shape) in shapes
        if storage._cdata not in of_parameters and not is_copy:
            memory[storage._cdata] = storage  # kept alive, or its number would be another's
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), torch.autocast("cpu", torch.bfloat16, half):
        features = torch.func.functional_call(model, parameters, images)
    assert features.requires_grad
    return sum(storage.nbytes() for storage in memory.values())


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_what_autograd_keeps(name: str, half: bool, plans) -> None:
    """Of tensors without numbers, which have the sizes of others; of the smallest with numbers as well."""
    vit = getattr(plans, name)
    batch = 3
    model = model_of(name)
    assert sum(p.numel() for p in model.parameters()) == vit.parameters()
    with FakeTensorMode():
        found = kept(model, without_numbers(model), batch, half)
    assert found == pytest.approx(batch * vit.kept(224, half), rel=0.05)
    if name == "VIT_S":
        model = timm.create_model(MODELS[name], num_classes=0)
        assert kept(model, {**dict(model.named_parameters())}, batch, half) == found


@pytest.mark.parametrize("name", ["VIT_S", "VIT_G"])
def test_products(name: str, plans) -> None:
    """Of attention by two products, as the counter doesn't know the CPU's fused one."""
    model = model_of(name)
    with FakeTensorMode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        features = torch.func.functional_call(model, without_numbers(model), torch.empty(2, 3, 224, 224))
        forward = counter.get_total_flops()
        features.sum().backward()
    assert forward == pytest.approx(2 * getattr(plans, name).flops(224), rel=0.01)
    assert counter.get_total_flops() == pytest.approx(3 * forward, rel=0.05)


def test_the_page_has_the_tables(plans) -> None:
    page = (ROOT / "docs/scaling.md").read_text()
    for table in (plans.per_image(), plans.per_rank(), plans.plans()):
        assert table in page


def test_the_most_images_fit_and_one_more_does_not(plans) -> None:
    for vit, recipe in plans.RUNS:
        for plan in plans.PLANS:
            most = plan.largest(vit, recipe)
            assert most == 0 or plan.memory(vit, recipe, most) <= plans.MEMORY
            more = max(most + 1, plan.micro_batch or 1)
            assert plan.memory(vit, recipe, more) > plans.MEMORY
