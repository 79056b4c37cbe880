"""What a step doesn't hold and doesn't compute: scores of many prototypes, and patches that a mask drops."""

import pytest
import torch
from test_methods import make
from test_methods_distributed import part_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from fastjem import nn
from fastjem.kernels import tiling
from fastjem.methods import prototypes
from fastjem.nn import msn
from fastjem.step import Step

pytestmark = pytest.mark.usefixtures("one_thread")
MANY = 65536


class Largest(TorchDispatchMode):
    """The shapes that have a dimension of all prototypes, whatever operator made them."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()
        self.dtypes: dict[tuple[int, ...], set[torch.dtype]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and MANY in x.shape:
                self.shapes.add(tuple(x.shape))
                self.dtypes.setdefault(tuple(x.shape), set()).add(x.dtype)
        return result


def shapes_of(step: Step, batch) -> set[tuple[int, ...]]:
    """Of a step's forward and backward pass, its end, and its optimiser's gradients."""
    with Largest() as seen:
        loss, _ = step(batch, 0)
        loss.backward()
        step.step_ends(0, 0.9)
    return seen.shapes


HEADS = {
    "dino": ({"prototypes": MANY}, 8),
    "ibot": ({"prototypes": MANY}, 8),
    "dinov2": ({"prototypes": MANY, "patch_prototypes": MANY, "shared": False}, 8),
    "pmsn": ({"prototypes": MANY}, 8),
}


def few_scores_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of more images, which these tests haven't got."""
    for module in (prototypes, msn):
        monkeypatch.setattr(module, "LARGEST_SCORES", 1 << 20)


@pytest.mark.parametrize("name", HEADS)
def test_no_scores_of_many_prototypes_are_held(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of [rows, K], of students or of a teacher that a running mean centres."""
    few_scores_fit(monkeypatch)
    options, width = HEADS[name]
    step, batch = make(name, **options)
    batch = part_of(batch, slice(0, 3))._replace(views=[view[:3] for view in batch.views[:3]])
    allowed = {(MANY, width), (width, MANY), (MANY,), (1, MANY), (MANY, 1)}
    assert shapes_of(step, batch) <= allowed


@pytest.mark.parametrize("name", ["ibot", "dinov2", "swav", "msn"])
def test_sinkhorn_holds_the_teachers_scores_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    few_scores_fit(monkeypatch)
    step, batch = make(name, prototypes=MANY, **({} if name in ("swav", "msn") else {"centring": "sinkhorn"}))
    batch = part_of(batch, slice(0, 3))._replace(views=[view[:3] for view in batch.views[:3]])
    patches = int(sum(mask.hidden.sum() for mask in batch.masks.values()))
    rows = {shape[0] for shape in shapes_of(step, batch) if len(shape) == 2 and shape[1] == MANY}
    # The bias [T, K], prototypes' own [D, K]; the teacher's views by themselves or together, and its patches
    assert rows - {1, 2, 8} <= {3, 6, patches}


@pytest.mark.parametrize("cls", [nn.MSNLoss, nn.PMSNLoss])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_teachers_scores_are_in_the_inputs_dtype(
    cls: type[nn.MSNLoss], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing of the student's, by MSN's loss itself."""
    few_scores_fit(monkeypatch)
    anchors = torch.randn(6, 8, dtype=dtype, requires_grad=True)
    prototypes_ = torch.randn(MANY, 8, requires_grad=True)
    with Largest() as seen:
        cls()(anchors, torch.randn(3, 8, dtype=dtype), prototypes_).backward()
    assert seen.shapes <= {(MANY, 8), (8, MANY), (MANY,), (MANY, 1), (3, MANY)}
    assert seen.dtypes[3, MANY] == {dtype}


def test_scores_of_some_images_at_a_time_are_so_many_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside the operators: the scores and gradients of an image's views and of its target, and not of a second's."""
    cpu = pytest.importorskip("fastjem.kernels.prototypes.cpu", reason="the C++ extension isn't built")
    monkeypatch.setattr(tiling, "HEAD_USAGE_BYTES", 2 * 4 * (2 + 1) * MANY - 1)
    inputs = [torch.randn(4, 8), torch.randn(4, 8), torch.randn(MANY, 8)]
    sides = inputs, [torch.randn(4, 8)], inputs[-1], 0.1, 0.1, None, "all"
    with Largest() as seen:
        cpu.prototype_head_usage(*sides)
        cpu.prototype_head_usage_backward(*sides, torch.ones(()), torch.randn(MANY).double(), [True] * 3)
    assert seen.shapes <= {(MANY, 8), (8, MANY), (MANY,), (1, MANY), (2, MANY), (MANY, 2)}


def flops(step: Step, batch) -> int:
    with FlopCounterMode(display=False) as counter:
        loss, _ = step(batch, 0)
        loss.backward()
    return counter.get_total_flops()


def tokens_given(step: Step, batch) -> int:
    """To the student's blocks, in all: heads and teachers see as many whatever is hidden."""
    counted = []
    for block in step.encoder.backbone.blocks:
        block.register_forward_pre_hook(lambda _, x: counted.append(x[0].shape[0] * x[0].shape[1]))
    step(batch, 0)
    return sum(counted)


@pytest.mark.parametrize("name", ["mae", "msn", "capi"])
def test_what_is_masked_is_not_computed(name: str) -> None:
    """The patches that go through the blocks are those that are left, and the step's operations fall with them."""
    shares = (0.25, 0.5, 0.75)
    found = []
    tokens = []
    for share in shares:
        step, batch = make(name, mask=share)
        batch = batch._replace(views=batch.views[:2])
        tokens.append(tokens_given(step, batch))
        found.append(flops(step, batch))
    prefix = step.encoder.prefix_tokens
    depth = len(step.encoder.backbone.blocks)
    assert tokens == [8 * depth * (16 - int(16 * share) + prefix) for share in shares]
    if name != "mae":  # whose decoder has all patches, visible or not
        assert found[0] > found[1] > found[2], found
    else:
        assert found[0] > found[2], found


def test_ijepas_context_is_what_its_encoder_is_given() -> None:
    step, batch = make("ijepa")
    visible = batch.masks[0].visible.shape[1]
    assert visible < 16
    depth = len(step.encoder.backbone.blocks)
    assert tokens_given(step, batch) == 8 * depth * (visible + step.encoder.prefix_tokens)
