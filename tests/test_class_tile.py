"""The supervised contrastive loss with options whose similarities fit one tile: by a formula of all logits."""

import option_formulas as formulas
import pytest
import torch
from test_options import Draw, check
from torch import Tensor

import fastjem.functional as F
from fastjem.functional import one_tile
from fastjem.ops import direct

_C = pytest.importorskip("fastjem.kernels._C")
N = 71
D = 19


@pytest.fixture
def taken(monkeypatch):
    """Which calls were computed in one tile."""
    found = []
    original = one_tile.supcon

    def watched(*args):
        result = original(*args)
        found.append(result is not None)
        return result

    monkeypatch.setattr(one_tile, "supcon", watched)
    return found


@pytest.fixture(params=range(3), ids=["c++ baseline", "c++ avx2", "c++ avx512"])
def isa(request):
    best = _C.isa()
    if request.param > best:
        pytest.skip("this processor has no such instructions")
    _C.use_isa(request.param)
    yield
    _C.use_isa(best)


def labels_of(draw: Draw) -> Tensor:
    """Of 15 classes, and of one whose only image is the last."""
    labels = torch.randint(0, 15, (N,), generator=draw.g)
    labels[-1] = 15
    return labels


@pytest.mark.parametrize("seed", range(10))
def test_value_and_gradients_are_the_formula_s(seed, isa, taken):
    draw = Draw(seed)
    views = draw.of(1, 2, 3)
    options = {
        "labels": draw.of(labels_of(draw), labels_of(draw) / 2, None),
        "anchors": draw.of("all", "all", "one"),
        "reduction": draw.of("sum", "none"),
        "weights": draw.of(None, draw.uniform(N)),
        "hardness": draw.of(0.0, 0.7, 2.0),
        "normalize": draw.of(True, True, False),
    }
    options = {name: value for name, value in options.items() if value is not None}
    learned = {"temperature": draw.of(1, 1, -1) * (draw.uniform() / 2 + 0.3)}
    check(F.supcon, formulas.supcon, [draw.normal(views, N, D)], learned, options)
    assert taken == [True]


def results(rows: Tensor, formula: bool = False, **options) -> list[Tensor]:
    leaf = rows.clone().requires_grad_()
    loss = (formulas if formula else F).supcon(leaf, **options)
    return [loss.detach(), *torch.autograd.grad(-0.37 * loss.sum(), leaf)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype, isa, taken):
    draw = Draw(2)
    options = {"labels": labels_of(draw), "hardness": 0.5, "reduction": "none", "temperature": 0.1}
    rows = draw.normal(2, N, D).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        found = results(rows, **options)
    tolerance = 2e-6 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    for got, truth in zip(found, results(rows.double(), True, **options), strict=True):
        assert (got.double() - truth).norm() <= tolerance * truth.norm()
    assert [x.dtype for x in found] == [torch.float32, dtype]
    assert taken == [True]


@pytest.mark.parametrize("temperature", [0.002, -0.002])
def test_logits_of_any_size(temperature, isa, taken):
    """Positives may be 1000 below negatives, and above."""
    draw = Draw(4)
    rows = draw.normal(2, N, D).float()
    rows[1, : N // 2] = rows[0, : N // 2]
    options = {"labels": labels_of(draw), "hardness": 0.5, "reduction": "none"}
    options["temperature"] = torch.tensor(temperature)
    found = results(rows, **options)
    for got, truth in zip(found, results(rows.double(), True, **options), strict=True):
        assert (got.double() - truth).norm() <= 1e-5 * truth.norm()
    assert taken == [True]


def test_a_temperature_s_gradient_may_be_beyond_its_dtype(taken):
    temperature = torch.tensor(1e-30, requires_grad=True)
    loss = F.supcon(Draw(7).normal(2, 5, D), temperature=temperature, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, temperature)
    assert loss.isfinite() and gradient.isinf()
    assert taken == [True]


def test_more_columns_than_a_block_has(taken):
    draw = Draw(6)
    rows = draw.normal(30, 45, 3)
    options = {"labels": draw.ids(45), "anchors": "one", "hardness": 0.5, "temperature": 0.5, "reduction": "none"}
    with direct.off():
        expected = results(rows, **options)
    for got, truth in zip(results(rows, **options), expected, strict=True):
        torch.testing.assert_close(got, truth)
    assert taken == [False, True]


def test_classes_of_one_or_of_all(taken):
    rows = Draw(3).normal(1, N, D)
    for labels in (torch.arange(N), torch.zeros(N, dtype=torch.int64)):
        check(F.supcon, formulas.supcon, [rows], {}, {"labels": labels, "hardness": 0.5, "temperature": 0.3})
    assert taken == [True, True]


def test_a_graph_that_is_kept_has_its_derivatives(taken):
    rows = Draw(5).normal(2, N, D).requires_grad_()
    loss = F.supcon(rows, hardness=0.5)
    (first,) = torch.autograd.grad(loss, rows, retain_graph=True)
    (second,) = torch.autograd.grad(2 * loss, rows)
    torch.testing.assert_close(2 * first, second)
    assert taken == [True]


def test_what_one_tile_is_no_help_for_goes_the_long_way(taken):
    draw = Draw(5)
    rows = draw.normal(2, N, D)
    F.supcon(draw.normal(2, 1025, D), hardness=0.5)
    F.supcon(rows, hardness=0.5, exclude=draw.bools(N))
    F.supcon(rows, hardness=0.5, hard_negatives=draw.normal(N, 2, D))
    F.supcon(rows, hardness=0.5, temperature=draw.uniform(N) + 0.1)
    torch.compile(lambda: F.supcon(rows, hardness=0.5), backend="eager")()
    assert not any(taken)
    with torch.no_grad():
        assert not F.supcon(rows.requires_grad_(), hardness=0.5).requires_grad
    assert taken[-1]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_isn_t_finite_is_what_it_is_without_a_tile(bad):
    rows = Draw(5).normal(2, N, D).float()
    rows[1, 3, 5] = bad
    options = {"hardness": 0.5, "reduction": "none", "labels": torch.arange(N) // 2}
    found = results(rows, **options)
    with direct.off():
        expected = results(rows, **options)
    for got, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(got, truth, equal_nan=True, rtol=1e-4, atol=1e-6)


def test_derivatives_that_there_are_none_of_are_refused(taken):
    rows = Draw(5).normal(2, N, D).requires_grad_()
    with pytest.raises(RuntimeError, match="supcon: differentiable once only"):
        torch.autograd.grad(F.supcon(rows, hardness=0.5), rows, create_graph=True)
    with pytest.raises(NotImplementedError, match="supcon: with options, gradients must be asked for one by one"):
        torch.autograd.grad(F.supcon(rows, hardness=0.5), rows, torch.ones(2), is_grads_batched=True)
    assert taken == [True, True]
