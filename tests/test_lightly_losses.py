"""Losses and heads beside those of `test_nn.py`, against lightly 1.6.0: arguments, values and gradients, compiled too.

Both are given float64, where lightly's arithmetic is float64 as well; where it isn't (DetCon's weights and all of
PaKA's are float32 in lightly) the tolerance is float32's, and the formula is held to in float64 beside it.
"""

import inspect
import sys
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import fastjem.functional as F
import fastjem.nn as ours
from fastjem.functional.dense_structure import clusters

pytest.importorskip("lightly.loss", reason="lightly is not installed")
import lightly.loss as theirs
from lightly.loss.hypersphere_loss import HypersphereLoss
from lightly.loss.regularizer import CO2Regularizer, DSERegularizer
from lightly.models.modules import heads as their_heads


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def numbers(below: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(seed))


MASK = numbers(3, 4, 6, seed=5) == 0  # of 4 images of 6 patches; in one nothing is hidden
MASK[1] = False
MASK[2] = True


class Case(NamedTuple):
    name: str
    mine: Callable[[], Callable]
    other: Callable[[], Callable]
    inputs: list[Tensor]  # that get gradients
    call: Callable[..., Any] = lambda module, *x: module(*x)
    rtol: float = 1e-9


def pairs(module: Any, *x: Tensor) -> Tensor:
    return module((x[0], x[1]), (x[2], x[3]))


def symmetric_negative_cosine() -> Callable:
    """lightly 1.5's, which 1.6 has no more."""

    def loss(out0: tuple[Tensor, Tensor], out1: tuple[Tensor, Tensor]) -> Tensor:
        (z0, p0), (z1, p1) = out0, out1
        of = torch.nn.functional.cosine_similarity
        return -(of(p0, z1.detach(), dim=1).mean() + of(p1, z0.detach(), dim=1).mean()) / 2

    return loss


def lewm(module: Any, predicted: Tensor, target: Tensor, embeddings: Tensor) -> Tensor:
    torch.manual_seed(3)
    return module(predicted=predicted, target=target, embeddings=embeddings)


def differentiable_co2(*args: Any, **options: Any) -> Callable:
    """lightly's, but for its last line: `torch.tensor(loss)`, which has no gradient."""
    module = CO2Regularizer(*args, **options)

    def loss(out0: Tensor, out1: Tensor) -> Tensor:
        x, y = (torch.nn.functional.normalize(z, dim=1) for z in (out0, out1))
        y, bank = module.memory_bank(y, update=True)
        p, q = module._get_pseudo_labels(x, y, bank), module._get_pseudo_labels(y, x, bank)
        return module.alpha * 0.5 * (module.kl_div(p, q) + module.kl_div(q, p))

    return loss


def with_bank(make: Callable) -> Callable:
    """A module whose bank holds the same rows in both."""

    def made() -> Any:
        torch.manual_seed(1)
        return make()

    return made


REGIONS = [normal(5, 4, 16, seed=i) for i in range(4)]
SHOWN = (numbers(5, 5, 4, seed=7), numbers(5, 5, 4, seed=8))
SCORES = [normal(4, 6, 9, seed=i) for i in (1, 2)]
TEMPERATURES = {"teacher_temp": 0.5, "student_temp": 0.8}
CASES = [
    Case("DetConBLoss", lambda: ours.DetConBLoss(0.2), lambda: theirs.DetConBLoss(0.2), REGIONS,
         lambda m, *x: m(*x, *SHOWN), 1e-7),
    Case("DetConSLoss", ours.DetConSLoss, theirs.DetConSLoss, REGIONS[:2], lambda m, *x: m(*x, *SHOWN), 1e-7),
    Case("DirectCLRLoss", lambda: ours.DirectCLRLoss(5, 0.3), lambda: theirs.DirectCLRLoss(5, 0.3),
         [normal(6, 3, 4), normal(6, 3, 4, seed=1)]),
    Case("HypersphereLoss", lambda: ours.HypersphereLoss(1.3, 0.7, 1.5), lambda: HypersphereLoss(1.3, 0.7, 1.5),
         [normal(9, 16), normal(9, 16, seed=1)]),
    Case("MACLLoss", lambda: ours.MACLLoss(0.2, 0.4, 0.1), lambda: theirs.MACLLoss(0.2, 0.4, 0.1),
         [normal(9, 16), normal(9, 16, seed=1)]),
    Case("SymNegCosineSimilarityLoss", ours.SymNegCosineSimilarityLoss, symmetric_negative_cosine,
         [normal(7, 8, seed=i) for i in range(4)], pairs),
    Case("LeWMLoss", lambda: ours.LeWMLoss(0.3, True, sigreg_num_vectors=32),
         lambda: theirs.LeWMLoss(0.3, True, sigreg_num_vectors=32),
         [normal(5, 2, 8), normal(5, 2, 8, seed=1), normal(5, 3, 8, seed=2)], lewm, 1e-5),
    Case("LeWMLoss-plain", lambda: ours.LeWMLoss(sigreg_num_vectors=32), lambda: theirs.LeWMLoss(sigreg_num_vectors=32),
         [normal(5, 2, 8), normal(5, 2, 8, seed=1), normal(5, 3, 8, seed=2)], lewm, 1e-5),
    Case("CO2Regularizer", lambda: ours.CO2Regularizer(1.5, 0.2), lambda: differentiable_co2(1.5, 0.2),
         [normal(6, 8), normal(6, 8, seed=1)]),
    Case("PatchKernelAlignmentLoss", ours.PatchKernelAlignmentLoss, theirs.PatchKernelAlignmentLoss,
         [normal(4, 6, 3), normal(4, 6, 3, seed=1)], rtol=2e-5),
    Case("PatchKernelAlignmentLoss-masked", ours.PatchKernelAlignmentLoss, theirs.PatchKernelAlignmentLoss,
         [normal(4, 6, 9), normal(4, 6, 9, seed=1)], lambda m, *x: m(*x, MASK), 2e-5),
    Case("PatchKernelAlignmentLoss-some", lambda: ours.PatchKernelAlignmentLoss(4),
         lambda: theirs.PatchKernelAlignmentLoss(4), [normal(4, 6, 9), normal(4, 6, 9, seed=1)],
         lambda m, *x: m(*x, MASK), 2e-5),
    Case("IBOTPlusPlusPatchLoss", lambda: ours.IBOTPlusPlusPatchLoss(9, **TEMPERATURES),
         lambda: theirs.IBOTPlusPlusPatchLoss(9, **TEMPERATURES), SCORES, lambda m, *x: m(*x, MASK), 1e-6),
    Case("IBOTPlusPlusPatchLoss-hidden", lambda: ours.IBOTPlusPlusPatchLoss(9, **TEMPERATURES),
         lambda: theirs.IBOTPlusPlusPatchLoss(9, **TEMPERATURES), [x.flatten(0, 1) for x in SCORES],
         lambda m, *x: m(*x, MASK.view(4, 2, 3), 0.6, visible_loss_weight=0.0), 1e-6),
    Case("IBOTPlusPlusPatchLoss-none", lambda: ours.IBOTPlusPlusPatchLoss(9, **TEMPERATURES),  # no patch counts: 0
         lambda: theirs.IBOTPlusPlusPatchLoss(9, **TEMPERATURES), SCORES,
         lambda m, *x: m(*x, torch.zeros_like(MASK), visible_loss_weight=0.0), 1e-6),
    Case("IBOTPlusPlusPatchLoss-all", lambda: ours.IBOTPlusPlusPatchLoss(9, **TEMPERATURES),
         lambda: theirs.IBOTPlusPlusPatchLoss(9, **TEMPERATURES), SCORES, rtol=1e-6),
]  # fmt: skip
RANDOM = ("LeWMLoss", "LeWMLoss-plain", "PatchKernelAlignmentLoss-some")  # other numbers are drawn by another dtype
SAME_NUMBERS = [case for case in CASES if case.name not in RANDOM]
CONSTANT = {  # inputs that are the teacher's: ours get no gradient, lightly's scores do
    "PatchKernelAlignmentLoss": (1,), "PatchKernelAlignmentLoss-masked": (1,), "PatchKernelAlignmentLoss-some": (1,),
    "LeWMLoss": (1,), "LeWMLoss-plain": (1,),
    "SymNegCosineSimilarityLoss": (0, 2), "IBOTPlusPlusPatchLoss": (0,), "IBOTPlusPlusPatchLoss-hidden": (0,),
    "IBOTPlusPlusPatchLoss-all": (0,), "IBOTPlusPlusPatchLoss-none": (0,),
}  # fmt: skip


def value_and_gradients(case: Case, module: Any, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    torch.manual_seed(7)
    constant = CONSTANT.get(case.name, ())
    leaves = [x.to(dtype, copy=True).requires_grad_(i not in constant) for i, x in enumerate(case.inputs)]
    loss = case.call(module, *leaves)
    loss.backward()
    assert loss.dim() == 0
    return [loss.detach(), *(x.grad for i, x in enumerate(leaves) if i not in constant)]


@pytest.mark.parametrize("pair", CASES, ids=lambda pair: pair.name)
def test_values_and_gradients_are_lightlys(pair):
    case: Case = pair
    mine, other = case.mine(), case.other()
    for _ in range(2):  # twice, as centres move
        found, expected = value_and_gradients(case, mine), value_and_gradients(case, other)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b.to(a.dtype), rtol=case.rtol, atol=case.rtol)
    if isinstance(mine, ours.IBOTPlusPlusPatchLoss):
        torch.testing.assert_close(mine.center.value, other.center.value.float())


@pytest.mark.parametrize("pair", SAME_NUMBERS, ids=lambda pair: pair.name)
def test_float32_is_near_float64(pair):
    case: Case = pair
    exact = value_and_gradients(case, case.mine())
    for a, b in zip(value_and_gradients(case, case.mine(), torch.float32), exact, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, rtol=3e-5, atol=3e-6)


@pytest.mark.exhaustive
@pytest.mark.parametrize("pair", SAME_NUMBERS, ids=lambda pair: pair.name)
def test_compiled_whole(pair):
    case: Case = pair
    torch.compiler.reset()
    expected = value_and_gradients(case, case.mine())
    found = value_and_gradients(case, torch.compile(case.mine(), fullgraph=True))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ["DirectCLRLoss", "CO2Regularizer"])
def test_with_a_memory_bank(name):
    options = {"memory_bank_size": (12, 5)}
    make = {"DirectCLRLoss": ours.DirectCLRLoss, "CO2Regularizer": ours.CO2Regularizer}[name]
    their = {"DirectCLRLoss": theirs.DirectCLRLoss, "CO2Regularizer": differentiable_co2}[name]
    mine = make(5, **options) if name == "DirectCLRLoss" else make(**options)
    other = their(5, **options) if name == "DirectCLRLoss" else their(**options)
    bank = torch.nn.functional.normalize(normal(12, 5, seed=9), dim=1)
    mine.memory_bank.bank = bank.clone()
    module = other if isinstance(other, torch.nn.Module) else other.__closure__[0].cell_contents
    module.memory_bank.bank = bank.clone()
    case = Case(name, lambda: mine, lambda: other, [normal(6, 5), normal(6, 5, seed=1)])
    for _ in range(2):
        found, expected = value_and_gradients(case, mine), value_and_gradients(case, other)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_lightlys_co2_has_no_gradient_and_ours_has():
    x, y = (z.requires_grad_() for z in (normal(6, 8), normal(6, 8, seed=1)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        its = CO2Regularizer()(x, y)
    mine = ours.CO2Regularizer()(x, y)
    assert mine.requires_grad and not its.requires_grad
    torch.testing.assert_close(mine.detach(), its)


def test_dense_structure_of_the_same_clusters(monkeypatch):
    """k-means begins at random; of the same clusters value and gradient are lightly's."""
    x = normal(5, 12, 6).requires_grad_()
    options = {"local_clusters": 2, "global_clusters": 6}
    mine = ours.DSERegularizer(0.7, max_kmeans_iters=5, **options)
    other = DSERegularizer(0.7, max_kmeans_iters=5, **options)
    made: list[tuple[Tensor, Tensor]] = []

    def kept(points: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        centres, labels = clusters(points, *args)
        made.extend(zip(centres, labels, strict=True))
        return centres, labels

    monkeypatch.setattr(sys.modules[F.dense_structure.__module__], "clusters", kept)
    loss = mine(x)
    (gradient,) = torch.autograd.grad(loss, x)
    again = iter(made)
    monkeypatch.setattr(other, "_kmeans", lambda points, count: next(again))
    expected = other(x)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, x)[0], rtol=1e-8, atol=1e-9)
    assert next(again, None) is None


def test_clusters_are_those_of_k_means():
    """Points around centres far apart: every one is found, and its centre is the mean of its points."""
    torch.manual_seed(0)
    centres = torch.tensor([[0.0, 0.0], [50.0, 0.0], [0.0, 50.0]], dtype=torch.float64)
    kind = numbers(3, 2, 30)
    points = centres[kind] + normal(2, 30, 2)
    found, labels = clusters(points, 3, 20, 1e-4)
    for i in range(2):
        for cluster in range(3):
            of_cluster = points[i][labels[i] == cluster]
            torch.testing.assert_close(found[i, cluster], of_cluster.mean(0))
            assert len(kind[i][labels[i] == cluster].unique()) == 1
    one, _ = clusters(torch.ones(1, 4, 2), 6, 3, 1e-4)  # fewer points than clusters, and all alike
    assert one.shape == (1, 4, 2) and torch.equal(one, torch.ones(1, 4, 2))


def test_roi_resample_to_grid():
    maps = normal(2, 3, 8, 6).float().requires_grad_()
    boxes = torch.tensor([[0.5, 1.0, 5.0, 7.5], [1.0, 0.0, 3.0, 4.0]])
    found, expected = ours.roi_resample_to_grid(maps, boxes, 3, 4), theirs.roi_resample_to_grid(maps, boxes, 3, 4)
    torch.testing.assert_close(found, expected)
    for wrong in (boxes[:1], boxes[:, :3]):
        with pytest.raises(ValueError, match=r"roi_resample_to_grid: boxes must be \[2, 4\], got"):
            ours.roi_resample_to_grid(maps, wrong, 3, 4)


@pytest.mark.parametrize("width", [3, 30])
def test_alignment_of_kernels_by_either_product_is_the_formula(width):
    """In float64, which lightly's loss doesn't compute in: of fewer patches than channels, and of more."""
    x, y = normal(4, 6, width).requires_grad_(), normal(4, 6, width, seed=1)
    losses = []
    for image in range(4):
        valid = ~MASK[image]
        if valid.sum() < 2:
            continue
        a, b = (z[image][valid] for z in (x, y))
        centre = torch.eye(len(a), dtype=a.dtype) - 1 / len(a)
        ka, kb = (centre @ z @ z.T @ centre for z in (a, b))
        losses.append(1 - (ka * kb).sum() / (ka.norm() * kb.norm()))
    expected = torch.stack(losses).mean()
    loss = F.patch_kernel_alignment(x, y, MASK)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(loss, x)[0], torch.autograd.grad(expected, x)[0])
    nothing = F.patch_kernel_alignment(x, y, torch.ones_like(MASK))
    assert nothing == 0 and not torch.autograd.grad(nothing, x)[0].any()


def test_macls_temperature_stays_positive():
    z = normal(6, 8)
    opposite = F.macl(z, -z, alpha=1.0, initial_alignment=1.0)
    assert opposite.isfinite() and opposite > 0


@pytest.mark.parametrize(
    ("mine", "other", "widths"),
    [
        (ours.DINOv2ProjectionHead, their_heads.DINOv2ProjectionHead, (12, 10, 6, 20)),
        (ours.DINOv2ProjectionHead, their_heads.DINOv2ProjectionHead, (12, 10, 6, 20, True)),
        (ours.CAPIProjectionHead, their_heads.CAPIProjectionHead, (12, 20)),
        (ours.CAPIProjectionHead, their_heads.CAPIProjectionHead, (12, 20, True, True)),
    ],
)
def test_heads_exchange_their_weights(mine, other, widths):
    assert inspect.signature(mine).parameters.keys() == inspect.signature(other).parameters.keys()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        its = other(*widths)
    head = mine(*widths)
    its.load_state_dict(head.state_dict(), strict=True)
    x = normal(8, 12).float()
    torch.testing.assert_close(head(x), its(x))
    its_trained = {name for name, p in its.named_parameters() if p.requires_grad}
    assert {name for name, p in head.named_parameters() if p.requires_grad} == its_trained


NAMES = [*sorted({case.name.partition("-")[0] for case in CASES} - {"SymNegCosineSimilarityLoss"}), "DSERegularizer"]


@pytest.mark.parametrize("name", NAMES)
def test_arguments_are_lightlys(name):
    other = {"HypersphereLoss": HypersphereLoss, "CO2Regularizer": CO2Regularizer, "DSERegularizer": DSERegularizer}
    its = other[name] if name in other else getattr(theirs, name)
    for method in ("__init__", "forward"):
        found = inspect.signature(getattr(getattr(ours, name), method)).parameters
        for position, (key, parameter) in enumerate(inspect.signature(getattr(its, method)).parameters.items()):
            assert list(found)[position] == key
            assert found[key].default == parameter.default
