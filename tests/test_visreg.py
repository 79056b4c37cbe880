"""VISReg, CAPI's and PMSN's losses: against lightly's, against a formula in float64, at the edges; mistakes."""

import importlib
import math

import pytest
import torch
from test_nn import assert_same, normal, signature
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode

import fastjem.functional as F
import fastjem.nn as ours

theirs = pytest.importorskip("lightly.loss", reason="lightly is not installed")
pytestmark = pytest.mark.usefixtures("one_thread")


def formula(local: Tensor, views: Tensor, slices: Tensor, weight: float, scale: float, shape: float, center: float):
    """Algorithm 1 of the paper, a view, a direction and a dimension at a time."""
    everything = torch.cat([views, local])
    terms = []
    for z in everything:
        rows = len(z)
        mean = z.mean(0)
        std = (z - mean).square().mean(0).sqrt()
        x = (z - mean) / (std.detach() + 1e-4)
        places = torch.arange(1, rows + 1, dtype=z.dtype) / (rows + 1)
        quantiles = math.sqrt(2) * torch.erfinv(2 * places - 1)
        distances = [(torch.sort(x @ direction)[0] - quantiles).square().mean() for direction in slices.T]
        of_view = scale * (1 - std).square().mean() + center * mean.square().mean()
        terms.append(of_view + shape * torch.stack(distances).mean())
    invariance = (everything - views.mean(0)).square().mean()
    return weight * torch.stack(terms).mean() + (1 - weight) * invariance


@pytest.mark.parametrize(
    "weights",
    [(0.9, 1.0, 1.0, 1.0), (0.3, 2.0, 0.5, 3.0), (1.0, 0.0, 1.0, 0.0), (1.0, 1.0, 0.0, 1.0), (0.0, 1.0, 1.0, 1.0)],
)
@pytest.mark.parametrize("rows, width, slices", [(2, 1, 1), (9, 5, 7), (16, 33, 40)])
@pytest.mark.parametrize("at_once", [1, 1 << 20], ids=["one slice at a time", ""])
def test_value_and_gradient(rows, width, slices, weights, at_once, monkeypatch):
    monkeypatch.setattr(importlib.import_module("fastjem.functional.visreg"), "ELEMENTS_AT_ONCE", at_once)
    directions = normalize(normal(width, slices, seed=9), dim=0)
    given = normal(3, rows, width, seed=1), 2 * normal(2, rows, width, seed=2) + 1
    names = ("lambda_param", "scale", "shape", "center")
    options = dict(zip(names, weights, strict=True))
    mine = lambda a, b: F.visreg(a, b, directions, **options)  # noqa: E731
    assert_same(mine, lambda a, b: formula(a, b, directions, *weights), *given)
    learned = torch.tensor(weights[0], dtype=torch.float64, requires_grad=True)
    (of_weight,) = torch.autograd.grad(F.visreg(*given, directions, **{**options, "lambda_param": learned}), learned)
    ends = [formula(*given, directions, end, *weights[1:]) for end in (0.0, 1.0)]
    torch.testing.assert_close(of_weight, ends[1] - ends[0])


@pytest.mark.parametrize(
    "weights, sorts",
    [
        ({}, True),
        ({"shape": torch.tensor(0.0)}, True),  # which nobody reads
        ({"shape": 0.0}, False),
        ({"shape": 0}, False),
        ({"lambda_param": 0.0}, False),
    ],
)
def test_nothing_is_sorted_for_a_weight_of_0(weights, sorts):
    """Nor are quantiles computed, or rows projected; in lejepa no slice is."""
    given = normal(3, 8, 4).requires_grad_(), normal(2, 8, 4, seed=1)
    with Operators() as seen:
        F.visreg(*given, torch.eye(4, dtype=torch.float64), **weights).backward()
    for name in ("sort", "special_ndtri", "mm", "bmm", "matmul"):
        assert not any(name in op for op in seen.names) or sorts, (name, seen.names)
    assert any("special_ndtri" in op for op in seen.names) == sorts
    if "lambda_param" in weights:
        with Operators() as seen:
            F.lejepa(*given, torch.eye(4, dtype=torch.float64), **weights).backward()
        assert not any("characteristic" in op for op in seen.names), seen.names


class Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_in_other_dtypes_it_is_that_of_the_rounded_inputs(dtype):
    directions = normalize(normal(6, 9, seed=3), dim=0)
    given = [normal(2, 12, 6, seed=seed).to(dtype) for seed in (0, 1)]
    leaves = [x.clone().requires_grad_() for x in given]
    loss = F.visreg(*leaves, directions)
    exact = [x.double().requires_grad_() for x in given]
    expected = F.visreg(*exact, directions)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    for ours_, truth in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, exact), strict=True):
        assert ours_.dtype == dtype
        torch.testing.assert_close(ours_.double(), truth, rtol=4 * torch.finfo(dtype).eps, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(F.visreg(*given, directions), loss.detach(), rtol=1e-6, atol=0)


def test_a_dimension_that_does_not_vary_has_a_finite_gradient():
    """As lightly's: its deviation has none, and what other slices say of it is divided by eps."""
    given = normal(3, 8, 4), normal(2, 8, 4, seed=1)
    for z in given:
        z[:, :, 1] = 3.0

    def run(package):
        loss = package.VISRegLoss(num_slices=5, eps=1e-2)
        return lambda a, b: loss(local_proj=a, global_proj=b)

    assert_same(run(ours), run(theirs), *given, rtol=2e-6)
    same = torch.full((2, 8, 4), 1.0, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(F.visreg(same[1:], same[:1], torch.eye(4, dtype=torch.float64)), same)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("options", [{}, {"lambda_param": 0.6, "lambda_shape": 2.0, "lambda_scale": 0.5, "eps": 1e-2}])
@pytest.mark.parametrize("rows, width", [(2, 3), (11, 4), (16, 9)])
def test_visreg_is_lightlys(rows, width, options):
    given = normal(3, rows, width), normal(2, rows, width, seed=1) + 0.5
    options = {"num_slices": 13, **options}
    mine, other = ours.VISRegLoss(**options), theirs.VISRegLoss(**options)

    def run(loss):
        return lambda a, b: loss(local_proj=a, global_proj=b)

    assert_same(run(mine), run(other), *given, rtol=2e-6)  # lightly's quantiles are float32
    for name in ours.VISRegLossComponents._fields:

        def term(loss, name=name):
            return lambda a, b: (
                getattr(loss.forward_components(local_proj=a, global_proj=b), name) + 0 * (a.sum() + b.sum())
            )

        assert_same(term(mine), term(other), *given, rtol=2e-6)
    assert ours.VISRegLossComponents._fields == theirs.VISRegLossComponents._fields
    torch.manual_seed(0)
    total = mine.forward_components(local_proj=given[0], global_proj=given[1]).total
    torch.manual_seed(0)
    torch.testing.assert_close(total, mine(local_proj=given[0], global_proj=given[1]))


@pytest.mark.parametrize("name", ["VISRegLoss", "CAPILoss", "PMSNLoss", "PMSNCustomLoss"])
def test_lightlys_arguments(name):
    mine, other = getattr(ours, name), getattr(theirs, name)
    assert signature(mine.__init__) == signature(other.__init__)
    assert [p[0] for p in signature(mine.forward)] == [p[0] for p in signature(other.forward)]


@pytest.mark.parametrize("subset", [False, True])
@pytest.mark.parametrize("iterations", [1, 3])
def test_capi_is_lightlys(iterations, subset):
    scores, predictions = normal(6, 5, 7), normal(6, 5, 7, seed=1)
    index = None
    if subset:
        index = torch.stack([torch.randperm(5, generator=torch.Generator().manual_seed(i))[:3] for i in range(6)])
        predictions = predictions[:, :3]
    options = {"teacher_temperature": 0.3, "student_temperature": 0.2, "sinkhorn_iterations": iterations}
    mine, other = ours.CAPILoss(**options), theirs.CAPILoss(**options)
    assert_same(lambda x: mine(scores, x, index), lambda x: other(scores, x, index), predictions, rtol=1e-9)
    teacher = scores.clone().requires_grad_()
    loss = mine(teacher, predictions.requires_grad_(), index)
    assert torch.autograd.grad(loss, [teacher, predictions], allow_unused=True)[0] is None


@pytest.mark.parametrize("scale", [0.2, 1.0, 5.0])
def test_capi_of_scores_far_apart_is_lightlys(scale):
    """With few clusters some patches are near none of them: the 1e-8 by which it divides then takes of their codes."""
    scores, predictions = scale * normal(12, 3, 5), normal(12, 3, 5, seed=1)
    loss = ours.CAPILoss()
    kept = loss.codes(scores).kept
    assert (kept < 0.99).any() == (scale > 2) and (kept >= 0).all() and (kept <= 1).all()
    assert_same(lambda x: loss(scores, x), lambda x: theirs.CAPILoss()(scores, x), predictions, rtol=1e-6)


@pytest.mark.parametrize("iterations", [0, 3])
@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_pmsn_is_lightlys(iterations, weight):
    inputs = normal(12, 5), normal(4, 5, seed=1), normal(7, 5, seed=2)
    options = {"sinkhorn_iterations": iterations, "regularization_weight": weight, "temperature": 0.2}

    def run(loss):
        return lambda anchors, prototypes: loss(anchors, inputs[1], prototypes, 0.5)

    given = inputs[0], inputs[2]
    for exponent in (0.25, 1.0):
        mine, other = (package.PMSNLoss(**options, power_law_exponent=exponent) for package in (ours, theirs))
        assert_same(run(mine), run(other), *given, rtol=1e-6)  # lightly's power law is float32

    def target(p: Tensor) -> Tensor:
        return torch.arange(1.0, len(p) + 1, dtype=torch.float64).softmax(0)

    mine, other = (package.PMSNCustomLoss(target, **options) for package in (ours, theirs))
    assert_same(run(mine), run(other), *given)
    uniform = ours.PMSNCustomLoss(lambda p: torch.full_like(p, 1 / len(p)), **options)
    exponent = ours.PMSNLoss(**options, power_law_exponent=0.0)
    torch.testing.assert_close(run(uniform)(*given), run(exponent)(*given))


Z = torch.zeros(2, 3, 4)
MISTAKES = [
    (lambda: F.visreg(Z, Z, torch.eye(3)), "visreg: directions must be [4, S], got (3, 3)"),
    (lambda: F.visreg(Z[0], Z, torch.eye(4)), "visreg: local_proj and global_proj must be [V_local, N, D]"),
    (lambda: F.visreg(Z[:, :2], Z, torch.eye(4)), "visreg: local_proj and global_proj must be [V_local, N, D]"),
    (lambda: F.visreg(Z[:, :1], Z[:, :1], torch.eye(4)), "visreg: a batch must have at least two rows"),
    (lambda: F.visreg(Z.long(), Z.long(), torch.eye(4)), "visreg: "),
    (lambda: F.visreg(Z, Z, torch.eye(4), eps=0), "visreg: eps must be"),
    (lambda: F.visreg(Z, Z, torch.eye(4), scale="1"), "visreg: scale must be"),
    (lambda: F.visreg(Z, Z[:0], torch.eye(4)), "visreg: "),
    (lambda: F.visreg(Z, Z, torch.eye(4)[:, :0]), "visreg: directions must be [4, S], got (4, 0)"),
    (lambda: ours.VISRegLoss(lambda_param=1.5), "VISRegLoss: lambda_param must be in [0, 1], got 1.5"),
    (lambda: ours.VISRegLoss(num_slices=0), "VISRegLoss: num_slices must be at least 1, got 0"),
    (lambda: ours.VISRegLoss(lambda_shape=-1.0), "VISRegLoss: lambda_shape must be at least 0"),
    (lambda: ours.VISRegLoss(eps=0.0), "VISRegLoss: eps must be"),
    (lambda: ours.CAPILoss(sinkhorn_iterations=0), "CAPILoss: sinkhorn_iterations must be at least 1, got 0"),
    (lambda: ours.CAPILoss(teacher_temperature=0), "CAPILoss: teacher_temperature must be a positive finite number"),
    (lambda: ours.CAPILoss()(Z, Z[:, :2]), "CAPILoss: teacher_logits must be [B, P, K], student_logits [B, Q, K]"),
    (lambda: ours.CAPILoss()(Z, Z[..., :2]), "CAPILoss: teacher_logits must be [B, P, K], student_logits [B, Q, K]"),
    (lambda: ours.CAPILoss()(Z[0], Z[0]), "CAPILoss: teacher_logits must be [B, P, K], student_logits [B, Q, K]"),
    (
        lambda: ours.CAPILoss()(Z, Z[:, :2], torch.zeros(2, 3, dtype=torch.long)),
        "CAPILoss: teacher_logits must be [B, P, K], student_logits [B, Q, K]",
    ),
]


@pytest.mark.parametrize("mistake, message", MISTAKES)
def test_a_mistake_is_told(mistake, message):
    with pytest.raises(ValueError) as told:
        mistake()
    assert str(told.value).startswith(message)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_gives_nan_and_no_exception(bad):
    z = normal(2, 5, 3)
    z[0, 1, 2] = bad
    z.requires_grad_()
    loss = F.visreg(z[1:], z[:1], torch.eye(3, dtype=torch.float64))
    loss.backward()
    assert loss.isnan() and z.grad.isnan().any()
