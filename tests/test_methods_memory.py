"""What a step doesn't hold and doesn't compute: scores of many prototypes, and patches that a mask drops."""

import pytest
from test_methods import make
from test_methods_distributed import part_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from fastjem.methods import prototypes
from fastjem.step import Step

pytestmark = pytest.mark.usefixtures("one_thread")
MANY = 65536


class Largest(TorchDispatchMode):
    """The shapes that have a dimension of all prototypes, whatever operator made them."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.shapes |= {tuple(x.shape) for x in tree_leaves(result) if isinstance(x, Tensor) and MANY in x.shape}
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
}


@pytest.mark.parametrize("name", HEADS)
def test_no_scores_of_many_prototypes_are_held(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of [rows, K], of students or of a teacher that a running mean centres."""
    monkeypatch.setattr(prototypes, "LARGEST_SCORES", 1 << 20)  # as of more images, which this test hasn't got
    options, width = HEADS[name]
    step, batch = make(name, **options)
    batch = part_of(batch, slice(0, 3))._replace(views=[view[:3] for view in batch.views[:3]])
    allowed = {(MANY, width), (width, MANY), (MANY,), (1, MANY), (MANY, 1)}
    assert shapes_of(step, batch) <= allowed


@pytest.mark.parametrize("name", ["ibot", "dinov2", "swav"])
def test_sinkhorn_holds_the_teachers_scores_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prototypes, "LARGEST_SCORES", 1 << 20)
    step, batch = make(name, prototypes=MANY, **({} if name == "swav" else {"centring": "sinkhorn"}))
    batch = part_of(batch, slice(0, 3))._replace(views=[view[:3] for view in batch.views[:3]])
    patches = int(sum(mask.hidden.sum() for mask in batch.masks.values()))
    rows = {shape[0] for shape in shapes_of(step, batch) if len(shape) == 2 and shape[1] == MANY}
    # The bias [T, K], prototypes' own [D, K]; the teacher's views by themselves or together, and its patches
    assert rows - {1, 2, 8} <= {3, 6, patches}


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
