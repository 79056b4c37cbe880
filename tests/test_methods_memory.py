"""What a step doesn't hold and doesn't compute: scores of many prototypes, and patches that a mask drops."""

import math

import pytest
import torch
from test_methods import make
from test_methods_distributed import part_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from fastjem import nn
from fastjem.functional import held
from fastjem.health import SCORES, figures
from fastjem.kernels import tiling
from fastjem.methods import Codes, deepcluster
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


SINKHORN = {"centring": "sinkhorn"}
UNTIED = {"shared": False, "patch_prototypes": MANY}
# Options, the width of the prototypes, and how many rows the teacher's scores may have: views by themselves or
# together, and "patches"; nothing of [rows, K] where a running mean centres.
HEADS = {
    "dino": ("dino", {"prototypes": MANY}, 8, ()),
    "dino, sinkhorn": ("dino", {"prototypes": MANY, **SINKHORN}, 8, (6,)),
    "ibot": ("ibot", {"prototypes": MANY}, 8, ()),
    "ibot, untied": ("ibot", {"prototypes": MANY, **UNTIED}, 8, ()),
    "ibot, sinkhorn": ("ibot", {"prototypes": MANY, **SINKHORN}, 8, (6, "patches")),
    "dinov2": ("dinov2", {"prototypes": MANY}, 8, ()),
    "dinov2, untied": ("dinov2", {"prototypes": MANY, **UNTIED}, 8, ()),
    "dinov2, sinkhorn": ("dinov2", {"prototypes": MANY, **SINKHORN}, 8, (6, "patches")),
    "dinov3": ("dinov3", {"prototypes": MANY, "patch_prototypes": MANY}, 8, (6, "patches")),
    "swav": ("swav", {"prototypes": MANY}, 8, (3,)),
    "swav, queue": ("swav", {"prototypes": MANY, "queue": 5}, 8, (3, 5)),
    "msn": ("msn", {"prototypes": MANY}, 8, (3,)),
    "pmsn": ("pmsn", {"prototypes": MANY}, 8, ()),
    "smog": ("smog", {"groups": MANY}, 8, ()),
    "deepcluster": ("deepcluster", {"prototypes": MANY}, 8, ()),
}


def few_images(name: str, **options: object):
    """A step of three images and three views, or as many as the method has."""
    step, batch = make(name, **options)
    return step, part_of(batch, slice(0, 3))._replace(views=[view[:3] for view in batch.views[:3]])


@pytest.mark.parametrize("of", HEADS)
def test_no_scores_of_many_prototypes_are_held(of: str) -> None:
    """Of few images too: nothing of [rows, K] but what Sinkhorn is given, the teacher's scores once."""
    name, options, width, teacher = HEADS[of]
    step, batch = few_images(name, **options)
    if name == "deepcluster":
        step.method.assignments.fill_(7)
    patches = int(sum(mask.hidden.sum() for mask in batch.masks.values()))
    rows = [patches if n == "patches" else n for n in teacher]
    # Prototypes and their gradients, a number for each, SMoG's groups with their counts, DeepCluster's three heads
    own = {(MANY, width), (width, MANY), (MANY,), (1, MANY), (MANY, 1), (2, MANY), (MANY, width + 1)}
    own |= {(3, MANY, width), (3, MANY, 1), (1, MANY, width)}
    seen = shapes_of(step, batch)
    assert seen - own <= {(n, MANY) for n in rows}
    assert {(n, MANY) for n in rows} <= seen


def test_capi_holds_its_teachers_scores_alone() -> None:
    """[B, places, K] once, which Sinkhorn is given and may look at the other way around; nothing of predictions."""
    step, batch = few_images("capi", clusters=MANY, predicted=0.2)
    patches, inner, places = step.encoder.width, 16, 16
    own = {(MANY, n) for n in (1, inner, patches, patches + 1, patches + 1 + places)} | {(MANY,), (1, MANY)}
    own |= {tuple(reversed(shape)) for shape in own}
    own |= {(places, MANY), (MANY, places)}  # Sinkhorn's potentials, of each place
    scores = {(3, places, MANY), (places, 3, MANY), (3 * places, MANY)}  # one memory
    seen = shapes_of(step, batch)
    assert scores <= seen and seen - own <= scores


@pytest.mark.parametrize("name", ["smog", "deepcluster"])
def test_labels_cost_the_same_whether_scores_are_held(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and every gradient, of images without a cluster too."""
    found = []
    for many in (held.MANY_PROTOTYPES, 1):
        monkeypatch.setattr(held, "MANY_PROTOTYPES", many)
        step, batch = make(name)
        step.double()
        for unit in ("groups", "centroids"):  # of length one to float64's digits, which the fused one makes sure of
            if hasattr(step.method, unit):
                rows = getattr(step.method, unit)
                rows.copy_(torch.nn.functional.normalize(rows, dim=-1))
        batch = batch._replace(views=[view.double() for view in batch.views])
        if name == "deepcluster":
            step.method.assignments.copy_(torch.arange(24).view(3, 8) % 5 - 1)
            step.method.assignments[step.method.assignments < 0] = deepcluster.NO_CLUSTER
        loss, _ = step(batch, 0)
        loss.backward()
        found.append([loss.detach(), *[p.grad for p in step.parameters() if p.grad is not None]])
    for held_, fused in zip(*found, strict=True):
        torch.testing.assert_close(held_, fused, rtol=1e-9, atol=1e-12)


def test_fewer_prototypes_of_few_images_are_held() -> None:
    """As tiles take more time there: the rule has both sides."""
    assert held.scores_fit(80, 16, MANY - 1, 4) and not held.scores_fit(80, 16, MANY, 4)
    assert held.scores_fit(1, 0, 1 << 15, 4)
    assert not held.scores_fit(320, 64, 1 << 16, 4) and not held.scores_fit(2560, 512, 8192, 4)


@pytest.mark.parametrize("cls", [nn.MSNLoss, nn.PMSNLoss])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_teachers_scores_are_in_the_inputs_dtype(cls: type[nn.MSNLoss], dtype: torch.dtype) -> None:
    """And nothing of the student's, by MSN's loss itself."""
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


def test_figures_of_many_prototypes_are_of_some_rows_at_a_time() -> None:
    """The same figures as of all scores at once, which aren't in memory."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(40, 8, generator=generator)
    weight = torch.randn(MANY, 8, generator=generator)
    bias = torch.randn(MANY, generator=generator)
    with Largest() as seen:
        found = figures({"codes": Codes(features, weight, bias, 0.1)})
    scores = features @ weight.T / 0.1 + bias
    p = scores.double().softmax(1)
    entropy = -(p * p.log()).nan_to_num().sum(1).mean() / math.log(MANY)
    torch.testing.assert_close(found["teacher_entropy"].double(), entropy, rtol=1e-5, atol=0)
    assert found["prototype_usage"] == len(set(scores.argmax(1).tolist())) / 40
    assert max(shape[0] for shape in seen.shapes if len(shape) == 2 and shape[1] == MANY) == SCORES // MANY


class Multiplied(TorchDispatchMode):
    """The dtypes in which rows of a queue reach what multiplies them, and of what they are multiplied with."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length
        self.dtypes: set[torch.dtype] = set()
        self.others: set[torch.dtype] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if name.startswith("fastjem::") or name.rpartition("::")[2] in ("mm", "addmm", "bmm"):
            tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.dim() > 1]
            rows = [x.dtype for x in tensors if self.length in x.shape]
            self.dtypes |= set(rows)
            self.others |= {x.dtype for x in tensors if rows}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["moco", "nnclr", "all4one", "ressl", "simclr", "swav"])
@pytest.mark.parametrize("half", [False, True])
def test_rows_of_a_queue_enter_a_loss_in_the_dtype_of_its_queries(name: str, half: bool) -> None:
    """Else bfloat16 queries are multiplied as float32; the queue itself stays what a checkpoint holds."""
    length = 26
    step, batch = make(name, queue=length)
    before = {key: x.dtype for key, x in step.state_dict().items()}
    with Multiplied(length) as seen, torch.autocast("cpu", torch.bfloat16, enabled=half):
        loss, _ = step(batch, torch.tensor(0))
    loss.backward()
    step.step_ends(0, 0.9)
    assert seen.dtypes == seen.others == {torch.bfloat16 if half else torch.float32}
    assert {key: x.dtype for key, x in step.state_dict().items()} == before
