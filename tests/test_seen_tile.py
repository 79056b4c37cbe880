"""Contrastive losses with options whose similarities fit one tile: values and gradients by formulas of all logits."""

import option_formulas as formulas
import pytest
import torch
from test_options import Draw, check
from torch import Tensor
from torch.nn.functional import normalize

import fastjem.functional as F
from fastjem.functional import one_tile
from fastjem.ops import direct

_C = pytest.importorskip("fastjem.kernels._C")
N, K, D = 71, 130, 19
OPS = {"nt_xent": "of_views", "info_nce": "info_nce", "clip_loss": "clip_loss"}


@pytest.fixture
def taken(monkeypatch):
    """Which calls were computed in one tile."""
    found = []

    def watched(original):
        def run(*args):
            result = original(*args)
            found.append(result is not None)
            return result

        return run

    for name in OPS.values():
        monkeypatch.setattr(one_tile, name, watched(getattr(one_tile, name)))
    return found


def ids(draw: Draw, n: int) -> Tensor:
    return torch.randint(0, 20, (n,), generator=draw.g)


def drawn(op: str, draw: Draw) -> tuple[list[Tensor], dict, dict]:
    """Rows, what is learned, and the other options."""
    options = {
        "reduction": draw.of("mean", "sum", "none"),
        "weights": draw.of(None, draw.uniform(N)),
        "label_smoothing": draw.of(None, 0.1, torch.tensor(0.3)),
        "ids": ids(draw, N),
        "exclude": draw.of(None, draw.bools(N, K if op == "info_nce" else N)),
    }
    if op == "nt_xent":
        learned = draw.of({}, {"temperature": draw.uniform() / 2 + 0.2})
        options |= {} if learned else {"temperature": 0.3}
        return [draw.normal(draw.of(2, 3), N, D)], learned, options
    if op == "info_nce":
        options |= {"negative_ids": ids(draw, K), "label_offset": draw.of(None, 2)}
        return [draw.normal(N, D), draw.normal(N, D), draw.normal(K, D)], {"temperature": draw.uniform() + 0.2}, options
    rows = [normalize(draw.normal(N, D), dim=1) for _ in range(2)]
    return rows, {"logit_scale": draw.of(1, -1) * draw.uniform() * 3 + 2}, options


@pytest.fixture(params=range(3), ids=["c++ baseline", "c++ avx2", "c++ avx512"])
def isa(request):
    best = _C.isa()
    if request.param > best:
        pytest.skip("this processor has no such instructions")
    _C.use_isa(request.param)
    yield
    _C.use_isa(best)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("op", OPS)
def test_value_and_gradients_are_the_formula_s(op, seed, isa, taken):
    rows, learned, options = drawn(op, Draw(seed))
    options = {name: value for name, value in options.items() if value is not None}
    check(getattr(F, op), getattr(formulas, op), rows, learned, options)
    assert taken == [True]


def results(op: str, rows: list[Tensor], options: dict, formula: bool = False) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in rows]
    loss = getattr(formulas if formula else F, op)(*leaves, **options)
    return [loss.detach(), *torch.autograd.grad(-0.37 * loss.sum(), leaves)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op", OPS)
def test_dtypes(op, dtype, isa, taken):
    rows, _, options = drawn(op, Draw(2))
    options |= {"reduction": "none", "weights": None, "label_smoothing": 0.1}
    options |= {"logit_scale": torch.tensor(9.0)} if op == "clip_loss" else {"temperature": 0.1}
    rows = [x.to(dtype) for x in rows]
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        found = results(op, rows, options)
    tolerance = 2e-6 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    for got, truth in zip(found, results(op, [x.double() for x in rows], options, formula=True), strict=True):
        assert (got.double() - truth).norm() <= tolerance * truth.norm()
    assert [x.dtype for x in found] == [torch.float32, *(x.dtype for x in rows)]
    assert len({x.untyped_storage().data_ptr() for x in found}) == len(found)
    assert taken == [True]


def call(op: str, *rows: Tensor, **options) -> Tensor:
    scale = {"logit_scale": torch.tensor(9.0)} if op == "clip_loss" else {"temperature": 0.1}
    return getattr(F, op)(*rows, **scale, **options)


def rows_of(op: str, n: int = N, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    draw = Draw(5)
    first = [draw.normal(2, n, D)] if op == "nt_xent" else [draw.normal(n, D), draw.normal(n, D)]
    if op == "info_nce":
        first.append(draw.normal(K, D))
    return [normalize(x, dim=-1).to(dtype).requires_grad_() for x in first]


@pytest.mark.parametrize("op", OPS)
def test_a_graph_that_is_kept_has_its_exponentials(op, taken):
    rows = rows_of(op)
    loss = call(op, *rows, label_smoothing=0.1)
    first = torch.autograd.grad(loss, rows, retain_graph=True)
    second = torch.autograd.grad(2 * loss, rows)
    for x, y in zip(first, second, strict=True):
        torch.testing.assert_close(2 * x, y, rtol=1e-6, atol=0)
    assert taken == [True]


@pytest.mark.parametrize("op", OPS)
def test_one_row_and_layouts(op, taken):
    for n in (1, 2):
        rows = rows_of(op, n, torch.float64)
        exact = call(op, *rows, label_smoothing=0.1)
        with direct.off():
            torch.testing.assert_close(call(op, *rows, label_smoothing=0.1), exact)
    rows = rows_of(op)
    others = [x.detach().transpose(-1, -2).contiguous().transpose(-1, -2).requires_grad_() for x in rows]
    mask = torch.zeros(K if op == "info_nce" else N, N, dtype=torch.bool)
    mask[3, 5] = True
    dense = call(op, *rows, exclude=mask.T.contiguous())
    turned = call(op, *others, exclude=mask.T)
    gradients = (torch.autograd.grad(loss, x) for loss, x in ((dense, rows), (turned, others)))
    torch.testing.assert_close(dense, turned)
    for x, y in zip(*gradients, strict=True):
        torch.testing.assert_close(x, y)
    assert taken[0] and taken[-2:] == [True, True]


@pytest.mark.parametrize("op", OPS)
def test_what_one_tile_is_no_help_for_goes_the_long_way(op, taken):
    rows = rows_of(op)
    many = rows_of(op, 1025)
    call(op, *many, label_smoothing=0.1)
    call(op, *rows, hardness=0.5)
    call(op, *rows, prior=0.1)
    call(op, *rows, false_negative_margin=0.1)
    torch.compile(lambda: call(op, *rows, label_smoothing=0.1), backend="eager")()
    wide = {"logit_scale": 400.0} if op == "clip_loss" else {"temperature": 0.005}
    loss = getattr(F, op)(*rows, **wide, label_smoothing=0.1)
    exact = getattr(formulas, op)(*[x.double() for x in rows], **wide, label_smoothing=0.1)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-5)
    assert not any(taken)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("op", OPS)
def test_what_isn_t_finite_is_what_it_is_without_a_tile(op, bad):
    rows = rows_of(op)
    with torch.no_grad():
        rows[0].view(-1, D)[3, 5] = bad
    options = {"reduction": "none", "ids": torch.arange(N) // 2}
    if op == "info_nce":
        options["negative_ids"] = torch.arange(K)
    found = results_of_call(op, rows, options)
    with direct.off():
        expected = results_of_call(op, rows, options)
    for got, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(got, truth, equal_nan=True, rtol=1e-4, atol=1e-6)


def results_of_call(op: str, rows: list[Tensor], options: dict) -> list[Tensor]:
    loss = call(op, *rows, **options)
    return [loss, *torch.autograd.grad(loss.sum(), rows)]


@pytest.mark.parametrize("temperature", [0.0, torch.nan, torch.inf, -0.5])
@pytest.mark.parametrize("op", ["nt_xent", "info_nce", "supcon"])
def test_a_learned_temperature_of_any_value_is_what_it_is_without_a_tile(op, temperature):
    """Learning may end there: a loss that isn't finite tells, an exception ends the training."""
    draw = Draw(12)
    rows = [draw.normal(2, 5, D)] if op != "info_nce" else [draw.normal(5, D), draw.normal(5, D), draw.normal(9, D)]
    given = torch.tensor(temperature, requires_grad=True)

    def results() -> list[Tensor]:
        loss = getattr(F, op)(*rows, temperature=given, reduction="sum")
        return [loss.detach(), *torch.autograd.grad(loss, given)]

    found = results()
    with direct.off():
        expected = results()
    for got, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(got, truth, equal_nan=True, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("op", OPS)
def test_derivatives_that_there_are_none_of_are_refused(op, taken):
    rows = rows_of(op)
    loss = call(op, *rows, label_smoothing=0.1)
    with pytest.raises(RuntimeError, match=f"{op}: differentiable once only"):
        torch.autograd.grad(loss, rows, create_graph=True)
    with pytest.raises(NotImplementedError, match=f"{op}: with options, gradients must be asked for one by one"):
        torch.autograd.grad(call(op, *rows, label_smoothing=0.1), rows, torch.ones(2), is_grads_batched=True)
    assert taken == [True, True]


def test_only_what_is_wanted(taken):
    x, y = rows_of("clip_loss")
    scale = torch.tensor(9.0, requires_grad=True)
    everything = torch.autograd.grad(F.clip_loss(x, y, scale, label_smoothing=0.1), (x, y, scale))
    for i, alone in enumerate((x, y, scale)):
        given = [z if z is alone else z.detach() for z in (x, y, scale)]
        (found,) = torch.autograd.grad(F.clip_loss(*given, label_smoothing=0.1), alone)
        torch.testing.assert_close(found, everything[i])
    with torch.no_grad():
        assert not F.clip_loss(x, y, scale, label_smoothing=0.1).requires_grad
    assert all(taken)
