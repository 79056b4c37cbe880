"""torch.compile with dynamic shapes: one graph for all batch sizes and all values of a number, and eager's results.

What is counted are the graphs that reach the backend: a fake kernel that asks for `len`, a message that is formatted
before there is a mistake, a number that becomes a constant all make one for each size or value.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch._dynamo
from calls import CALLS, MODULES, D, K, leaf
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager

import fastjem.functional as F
from fastjem import nn
from fastjem.functional import held
from fastjem.kernels import tiling

SIZES = (13, 17, 9, 32)
MANY_SIZES = (12, 13, 17, 16, 20, 9, 31, 32, 33, 64, 40, 11, 15, 21, 27, 10)  # torch.compile gives up at the ninth
AT_MOST = 2


class Counter:
    """A backend that counts its graphs."""

    def __init__(self, differentiates: bool):
        self.compiled: set[tuple] = set()
        self.differentiates = differentiates

    @property
    def graphs(self) -> int:
        return len(self.compiled)

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        # An analysis that is begun again, as a number taken for a tensor turns out to decide, is no graph more.
        now = torch._guards.CompileContext.current_compile_id()
        self.compiled.add((now.frame_id, now.frame_compile_id))
        return aot_eager(graph, inputs) if self.differentiates else graph.forward


def _compiled(function: Callable[..., Tensor], differentiates: bool, dynamic: bool | None = True):
    torch._dynamo.reset()
    counter = Counter(differentiates)
    return torch.compile(function, dynamic=dynamic, fullgraph=True, backend=counter), counter


def _run(function: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """The value and the gradients."""
    torch.manual_seed(0)  # some losses draw directions
    value = function(*inputs)
    leaves = [x for x in inputs if x.requires_grad]
    if not (isinstance(value, Tensor) and value.requires_grad):
        return [value]
    gradients = torch.autograd.grad(value * 2, leaves, allow_unused=True)
    return [value.detach(), *[torch.zeros_like(x) if g is None else g for x, g in zip(leaves, gradients, strict=True)]]


def _same_at(sizes: tuple[int, ...], name: str, differentiates: bool) -> int:
    case = CALLS[name]
    compiled, counter = _compiled(case.fresh(), differentiates)
    eager = case.fresh()
    for size in sizes:
        torch.manual_seed(size)
        inputs = case.make(size)
        for ours, expected in zip(_run(compiled, inputs), _run(eager, inputs), strict=True):
            # A compiled temperature is a tensor and goes into the rows, so sums round otherwise: 20 units in the last
            # place of the largest element, as gradients are sums of terms that cancel.
            largest = float(expected.detach().abs().max()) if expected.numel() else 0.0
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=max(20 * 1.2e-7 * largest, 1e-6))
    return counter.graphs


# One of each way in which a graph may be tied to a size: the rest takes minutes.
QUICK = ("nt_xent", "info_nce", "clip_loss", "negative_cosine", "koleo", "sinkhorn", "crop_resize", "SupConLoss")
QUICK += ("clip_loss-options",)
QUICK += ("DINOLoss-epoch", "DINOLoss-tensor", "IBOTPatchLoss", "SigLipLoss", "MSNLoss")


def _quick(names, quick) -> list:
    return [name if name in quick else pytest.param(name, marks=pytest.mark.exhaustive) for name in names]


@pytest.mark.parametrize("name", _quick(CALLS, QUICK))
def test_one_graph_for_all_batch_sizes(name):
    assert _same_at(SIZES, name, differentiates=False) <= AT_MOST


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", CALLS)
def test_one_graph_with_its_backward_for_many_batch_sizes(name):
    # SimDINO's rate is of the smaller Gram matrix, of images or of features: each has a graph.
    forms = 2 if name == "SimDINOLoss" else 1
    assert _same_at(MANY_SIZES, name, differentiates=True) < AT_MOST + forms


LOSSES = [name for name in MODULES if CALLS[name].differentiable or "Memory" in name]


def test_every_loss_is_in_the_table():
    losses = {name for name in nn.__all__ if name.endswith("Loss")} | {"NegativeCosineSimilarity", "SIGReg"}
    assert losses <= {name.split("-")[0] for name in MODULES}


def _graphs_of_steps(name: str, attribute: str | None = None) -> list[int]:
    """How many graphs there are after each of four steps of as many images; `attribute` falls a little at each."""
    case = MODULES[name]
    module = case.module()
    value = 0.0 if attribute is None else getattr(module, attribute)
    # Without dynamic=True a number is a constant at first, and another graph is made when it changes.
    compiled, counter = _compiled(partial(case.call, module), differentiates=True, dynamic=None)
    graphs = []
    for step in range(4):
        if attribute is not None:
            setattr(module, attribute, value * (1 - 0.1 * step))
        torch.manual_seed(step)
        _run(compiled, case.make(12))
        graphs.append(counter.graphs)
    return graphs


def _quick_modules() -> list:
    """But one, whose graph takes half a minute."""
    return [pytest.param(n, marks=pytest.mark.exhaustive) if n == "VICRegLLoss" else n for n in LOSSES]


@pytest.mark.parametrize("name", _quick_modules())
def test_no_step_compiles_anything_again(name):
    """TiCo's second step alone finds a covariance."""
    assert _graphs_of_steps(name) == ([1, 2, 2, 2] if name == "TiCoLoss" else [1, 1, 1, 1])


# eps, degrees and the like are known on the host: nobody schedules them, and each value has a graph.
HOST = ("eps", "p", "t_max")
SCHEDULED = [
    (name, attribute)
    for name in LOSSES
    for attribute, value in vars(MODULES[name].module()).items()
    if isinstance(value, float) and value and attribute not in HOST
]
QUICK_SCHEDULES = [("PMSNLoss", "power_law_exponent"), ("SimDINOLoss", "coefficient"), ("TiCoLoss", "beta")]


@pytest.mark.parametrize(
    "name, attribute",
    [x if x in QUICK_SCHEDULES else pytest.param(*x, marks=pytest.mark.exhaustive) for x in SCHEDULED],
)
def test_a_number_that_changes_at_each_step_compiles_once_more_at_most(name, attribute):
    graphs = _graphs_of_steps(name, attribute)
    assert graphs[0] == 1 and graphs[-1] == graphs[1] <= AT_MOST, graphs


@pytest.mark.parametrize("name", ["MSNLoss", "PMSNLoss"])
def test_one_graph_of_scores_that_are_not_held(name, monkeypatch):
    monkeypatch.setattr(held, "LARGEST_SCORES", 0)
    monkeypatch.setattr(tiling, "HEAD_USAGE_BYTES", 5 * 3 * K * 4)  # five images at a time: no graph may know of it
    assert _same_at(SIZES, name, differentiates=True) <= AT_MOST


def _two() -> list[Tensor]:
    return [leaf(10, D), leaf(10, D)]


def _scores(count: int) -> Callable[[], list[Tensor]]:
    return lambda: [leaf(10, K) for _ in range(count)]


def _with(module: torch.nn.Module, attribute: str, call=lambda module, *x: module(*x)) -> Callable[..., Tensor]:
    """A module whose attribute follows the schedule."""

    def step(*x: Tensor) -> Tensor:
        *inputs, number = x
        setattr(module, attribute, number)
        return call(module, *inputs)

    return step


_dino = nn.DINOLoss(K)
SCHEDULES: dict[str, tuple[Callable[[], list[Tensor]], Callable[..., Tensor]]] = {
    "nt_xent": (_two, lambda a, b, t: F.nt_xent(a, b, temperature=t)),
    "dclw": (_two, lambda a, b, t: F.dclw(a, b, temperature=t, sigma=t)),
    "supcon": (lambda: [leaf(2, 10, D), torch.arange(10) % 3], lambda z, y, t: F.supcon(z, y, temperature=t)),
    "info_nce": (lambda: [*_two(), leaf(20, D)], lambda a, b, q, t: F.info_nce(a, b, q, temperature=t)),
    "clip_loss": (_two, F.clip_loss),
    "siglip_loss": (_two, lambda a, b, t: F.siglip_loss(a, b, t, t)),
    "prototype_cross_entropy": (
        _scores(4),
        lambda s, r, t, u, tau: F.prototype_cross_entropy(
            [s, r], [t, u], student_temperature=tau, teacher_temperature=tau
        ),
    ),
    "mean_entropy": (_scores(1), lambda x, t: F.mean_entropy(x, temperature=t)),
    "sinkhorn": (_scores(1), lambda x, t: F.sinkhorn(x, epsilon=t)),
    "barlow_twins": (_two, lambda a, b, t: F.barlow_twins(a, b, lambda_param=t)),
    "vicreg": (_two, lambda a, b, t: F.vicreg(a, b, mu_param=t)),
    "tico": (_two, lambda a, b, t: F.tico(a, b, beta=t, rho=t)[0]),
    "lejepa": (
        lambda: [leaf(2, 10, D), leaf(2, 10, D), torch.randn(D, 6)],
        lambda a, b, d, t: F.lejepa(a, b, d, lambda_param=t),
    ),
    "visreg": (
        lambda: [leaf(2, 10, D), leaf(2, 10, D), torch.randn(D, 6)],
        lambda a, b, d, t: F.visreg(a, b, d, lambda_param=t, scale=t, shape=t, center=t),
    ),
    "emp_ssl": (lambda: [leaf(2, 10, D)], lambda z, t: F.emp_ssl(z, eps=t, invariance=t)),
    "DINOLoss": (_scores(4), lambda a, b, c, d, t: nn.DINOLoss.forward(_dino, [a, b], [c, d], teacher_temp=t)),
    "NTXentLoss": (_two, _with(nn.NTXentLoss(), "temperature")),
    "VICRegLoss": (_two, _with(nn.VICRegLoss(), "nu_param")),
    "SwaVLoss": (_scores(2), _with(nn.SwaVLoss(), "sinkhorn_epsilon", lambda loss, a, b: loss([a, b], []))),
}


@pytest.mark.parametrize("kind", [float, torch.tensor], ids=["number", "tensor"])
@pytest.mark.parametrize("name", _quick(SCHEDULES, ("nt_xent", "clip_loss", "sinkhorn", "barlow_twins", "DINOLoss")))
def test_one_graph_for_all_values_of_a_schedule(name, kind):
    make, call = SCHEDULES[name]
    # Without dynamic=True a number is a constant at first, and another graph is made when it changes.
    compiled, counter = _compiled(call, differentiates=True, dynamic=None)
    for number in (0.11, 0.13, 0.17, 0.19):
        torch.manual_seed(0)
        inputs = make()
        _dino.center.zero_()
        got = _run(lambda *x, number=number: compiled(*x, kind(number)), inputs)
        _dino.center.zero_()
        expected = _run(lambda *x, number=number: call(*x, number), inputs)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    assert counter.graphs <= AT_MOST


def test_a_centre_that_is_moved_by_itself():
    center = nn.Center((1, 1, K))

    def update(x):
        center.update(x)
        return center.value.sum()

    compiled, counter = _compiled(update, differentiates=False)
    for rows in MANY_SIZES:
        x = torch.randn(2, rows, K)
        center.center.zero_()
        compiled(x)
        torch.testing.assert_close(center.value, 0.1 * x.mean((0, 1), keepdim=True))
    assert counter.graphs <= AT_MOST


def test_one_graph_for_all_epochs():
    loss = nn.DINOLoss(K, warmup_teacher_temp=0.02, warmup_teacher_temp_epochs=5)
    compiled, counter = _compiled(lambda a, b, c, d, e: loss([a, b], [c, d], epoch=e), differentiates=False)
    for epoch in range(5):
        inputs = [x.detach() for x in _scores(4)()]
        got, again = [], []
        for function, values in ((lambda *x, e=epoch: compiled(*x, e), got), (compiled, again)):
            loss.center.zero_()
            values.append(function(*inputs) if values is got else loss(inputs[:2], inputs[2:], epoch=epoch))
        torch.testing.assert_close(got, again)
    assert counter.graphs <= AT_MOST


TWICE = {
    "vicreg": F.vicreg,
    "barlow_twins": F.barlow_twins,
    "clip_loss": lambda a, b: F.clip_loss(a, b, 2.0),
    "siglip_loss": lambda a, b: F.siglip_loss(a, b, 2.0, 1.0),
    "info_nce": lambda a, b: F.info_nce(a, b.flip(0), a),
    "negative_cosine": lambda a, b: F.negative_cosine(a, b),
}


@pytest.mark.parametrize("name", _quick(TWICE, ("barlow_twins", "clip_loss")))
def test_a_tensor_that_is_given_twice_has_its_whole_gradient(name):
    """torch 2.11 keeps one of the two gradients of an autograd Function that is given a tensor twice."""
    z = leaf(10, D)
    compiled, _ = _compiled(lambda x: TWICE[name](x, x), differentiates=True)
    torch.testing.assert_close(_run(compiled, [z]), _run(lambda x: TWICE[name](x, x), [z]), rtol=1e-5, atol=1e-7)


def test_a_loss_whose_methods_are_its_own_is_fused_when_compiled():
    """No bound method is what it was under torch.compile: the way for subclasses would make N x N logits."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        graphs.append(str(graph.graph))
        return graph.forward

    torch._dynamo.reset()
    torch.compile(nn.ClipLoss(), backend=backend, fullgraph=True)(*_two(), torch.tensor(10.0))
    assert len(graphs) == 1 and "cross_entropy" not in graphs[0]
