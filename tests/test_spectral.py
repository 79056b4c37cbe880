"""TiCo, FroSSL, W-MSE, coding rate, SimDINO and MMCR where C++ computes what is between torch's products."""

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from conftest import _C, INTERPRETING
from test_quick import results
from torch import Tensor
from torch.nn.functional import normalize

import fastjem.functional as F
from fastjem.kernels import plain
from fastjem.ops import direct

pytestmark = pytest.mark.skipif(INTERPRETING or not plain.plain([torch.zeros(1)]), reason="C++ doesn't see tensors")


def logdet_rate(z: Tensor, eps: float) -> Tensor:
    identity = torch.eye(z.shape[-1], dtype=z.dtype)
    return torch.logdet(identity + z.shape[-1] / (z.shape[-2] * eps) * z.mT @ z).mean() / 2


def tico(a: Tensor, b: Tensor, before: Tensor | None = None, beta: float = 0.9, rho: float = 8.0) -> Tensor:
    a, b = normalize(a), normalize(b)
    c = (1 - beta) * (a.T @ a / len(a)).detach()
    if before is not None:
        c = c + beta * before.double()
    return 1 - (a * b).sum(1).mean() + rho * torch.einsum("ni,ij,nj->n", a, c, a).mean()


def frossl(*views: Tensor, invariance: float = 1.0) -> Tensor:
    columns = [normalize(z, dim=0) for z in views]
    mean = torch.stack(columns).mean(0)
    loss = torch.zeros((), dtype=torch.float64)
    for x in columns:
        square = x.T @ x
        loss = loss + (square / square.trace().detach()).square().sum().log()
        loss = loss + invariance * len(views) / len(x) * (x - mean).square().sum()
    return loss


def w_mse(a: Tensor, b: Tensor, eps: float) -> Tensor:
    whitened = []
    for z in (a, b):
        covariance = (1 - eps) * torch.cov(z.T) + eps * torch.eye(z.shape[1], dtype=z.dtype)
        whitened.append((z - z.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(covariance)).T)
    return 2 - 2 * torch.cosine_similarity(*whitened).mean()


def simdino(student: list[Tensor], teacher: list[Tensor], mean: bool, eps: float = 0.05, coefficient: float = 1.0):
    student, teacher = [normalize(x) for x in student], [normalize(x).detach() for x in teacher]
    n, d = student[0].shape
    alike = [(s * t).sum(1).mean() for i, s in enumerate(student) for j, t in enumerate(teacher) if i != j]
    views = student[: len(teacher)]
    if mean:
        views = [(s + t) / 2 for s, t in zip(views, teacher, strict=True)]
    rate = logdet_rate(torch.stack(views), eps)
    return -coefficient * torch.stack(alike).mean() - (d + n) / (d * n) * rate


def mmcr(a: Tensor, b: Tensor, lmda: float = 5e-3) -> Tensor:
    z = torch.cat([a, b], 1)
    return lmda * torch.linalg.svdvals(z).sum(1).mean() - torch.linalg.svdvals(z.mean(1)).sum()


def before(like: Tensor) -> Tensor:
    """A covariance of an earlier step that isn't symmetric."""
    d = like.shape[1]
    return torch.linspace(-1, 1, d * d, dtype=torch.promote_types(like.dtype, torch.float32)).view(d, d)


# Ours, the formula, and how many inputs of [N, D]. MMCR's are [N / 2, 2, D].
CALLS: dict[str, tuple[Callable, Callable, int]] = {
    "tico": (lambda a, b: F.tico(a, b)[0], tico, 2),
    "tico of later steps": (
        lambda a, b: F.tico(a, b, before(a), beta=0.3, rho=2.0)[0],
        lambda a, b: tico(a, b, before(a), 0.3, 2.0),
        2,
    ),
    "frossl": (lambda *x: F.frossl(x), frossl, 2),
    "frossl of three views": (lambda *x: F.frossl(x, invariance=0.3), lambda *x: frossl(*x, invariance=0.3), 3),
    "w_mse": (lambda a, b: F.w_mse(a, b, eps=0.1), lambda a, b: w_mse(a, b, 0.1), 2),
    "total_coding_rate": (F.total_coding_rate, lambda z: logdet_rate(z, 0.2), 1),
    "total_coding_rate of views": (
        lambda a, b: F.total_coding_rate(torch.stack([a, b]), eps=0.5),
        lambda a, b: logdet_rate(torch.stack([a, b]), 0.5),
        2,
    ),
    "simdino": (
        lambda *x: F.simdino(list(x), [x[1].detach() + 1, x[0].detach() - 1]),
        lambda *x: simdino([*x], [x[1] + 1, x[0] - 1], False),
        4,
    ),
    "simdino of means": (
        lambda a, b: F.simdino([a, b], [b.detach() + 1], eps=0.2, coefficient=3.0, expansion="mean"),
        lambda a, b: simdino([a, b], [b + 1], True, 0.2, 3.0),
        2,
    ),
    "mmcr": (
        lambda a, b: F.mmcr(a.view(-1, 2, a.shape[1]), b.view(-1, 2, b.shape[1]), lmda=0.3),
        lambda a, b: mmcr(a.view(-1, 2, a.shape[1]), b.view(-1, 2, b.shape[1]), 0.3),
        2,
    ),
}
by_name = pytest.mark.parametrize("name", CALLS)
TWICE = ("total_coding_rate", "total_coding_rate of views", "simdino", "simdino of means", "mmcr")
# Of the norm. Half precision: a gradient is rounded twice. Factorisations of float32 lose two of its digits.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}


def inputs_of(name: str, n: int, d: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    common = torch.randn(n, d, generator=g)
    return [(common + torch.randn(n, d, generator=g)).to(dtype).requires_grad_() for _ in range(CALLS[name][2])]


def is_quick(loss: Tensor) -> bool:
    return type(loss.grad_fn).__name__ in ("_FoundBackward", "_FoundAgainBackward")


def assert_near(given: list[Tensor], truth: list[Tensor], tolerance: float) -> None:
    for x, y in zip(given, truth, strict=True):
        assert x.shape == y.shape
        error = (x.double() - y.double()).norm() / y.double().norm().clamp_min(1e-3)
        assert error <= tolerance, f"{error:.1e}"


@pytest.fixture(params=(0, 1, 2), ids=("c++ baseline", "c++ avx2", "c++ avx512"))
def isa(request) -> Iterator[int]:
    """One after the other of the instruction sets that the processor has."""
    best = max(i for i in range(3) if _usable(i))
    if request.param > best:
        pytest.skip("not on this processor")
    _C.use_isa(request.param)
    yield request.param
    _C.use_isa(best)


def _usable(isa: int) -> bool:
    try:
        _C.use_isa(isa)
    except ValueError:
        return False
    return True


@by_name
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("shape", [(34, 17), (12, 40), (130, 9)])
def test_values_and_gradients(name, shape, dtype, isa, poisoned):
    ours, formula, _ = CALLS[name]
    inputs = inputs_of(name, *shape, dtype)
    if not name.startswith(("simdino", "total_coding_rate of", "mmcr")):
        assert is_quick(ours(*inputs))
    truth = results(formula, [x.detach().double().requires_grad_() for x in inputs])
    found = results(ours, inputs)
    assert [x.dtype for x in found[1:]] == [dtype] * len(inputs)
    # What is in half precision may be added to in it, before a loss sees it: by stack, unbind and view.
    assert_near(found[:1], truth[:1], 2e-2 if dtype.itemsize == 2 and "simdino" in name else TOLERANCES[dtype])
    assert_near(found[1:], truth[1:], TOLERANCES[dtype])


@by_name
def test_more_rows_than_one_thread_takes(name):
    ours, formula, _ = CALLS[name]
    inputs = inputs_of(name, 600, 70)
    truth = results(formula, [x.detach().double().requires_grad_() for x in inputs])
    assert_near(results(ours, inputs), truth, 3e-6)
    assert all(torch.equal(a, b) for a, b in zip(results(ours, inputs), results(ours, inputs), strict=True))


@by_name
def test_gradients_for_some_inputs_alone(name):
    ours, _, count = CALLS[name]
    inputs = inputs_of(name, 20, 8)
    everything = results(ours, inputs)
    assert ours(*[x.detach() for x in inputs]).grad_fn is None
    torch.testing.assert_close(ours(*[x.detach() for x in inputs]), everything[0])
    for i in range(count if count > 1 else 0):
        given = [x if i == j else x.detach() for j, x in enumerate(inputs)]
        (gradient,) = torch.autograd.grad(ours(*given) * 1.7, inputs[i])
        torch.testing.assert_close(gradient, everything[1 + i])


@by_name
def test_rows_and_columns_without_length(name):
    """A row, and a column, of zeros, and a row below the smallest length; and the second view's are its first's."""
    ours, _, _ = CALLS[name]
    inputs = inputs_of(name, 20, 8, torch.float64)
    if name == "mmcr":
        pytest.skip("float64 has its singular values from LAPACK")
    with torch.no_grad():
        inputs[0][3] = 0
        inputs[0][5] *= 1e-14
        inputs[0][:, 2] = 0
    quick = results(ours, inputs)
    with direct.off():
        torch.testing.assert_close(quick, results(ours, inputs), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("place", [(0, 0), (7, 3), slice(None)], ids=["first", "one", "all"])
@by_name
def test_infinities_and_nan_are_what_the_long_way_makes_of_them(name, place, value):
    inputs = inputs_of(name, 20, 8)
    with torch.no_grad():
        inputs[0][place] = value
    quick = results(CALLS[name][0], inputs)
    with direct.off():
        torch.testing.assert_close(quick, results(CALLS[name][0], inputs), rtol=1e-4, atol=1e-5, equal_nan=True)


@by_name
def test_a_graph_that_is_kept_gives_its_gradients_again(name):
    inputs = inputs_of(name, 20, 8)
    loss = CALLS[name][0](*inputs)
    first = [x.clone() for x in torch.autograd.grad(loss, inputs, retain_graph=True)]
    torch.testing.assert_close(list(torch.autograd.grad(loss * 2, inputs)), [2 * x for x in first])


@pytest.mark.parametrize("name", TWICE)
def test_differentiable_twice_where_the_formula_is(name):
    ours, formula, _ = CALLS[name]
    dtype = torch.float32 if name == "mmcr" else torch.float64
    seconds = []
    for call, inputs in (
        (ours, inputs_of(name, 12, 6, dtype)),
        (formula, [x.detach().double().requires_grad_() for x in inputs_of(name, 12, 6, dtype)]),
    ):
        gradients = torch.autograd.grad(call(*inputs), inputs, create_graph=True)
        seconds.append(list(torch.autograd.grad(sum(x.square().sum() for x in gradients), inputs)))
    assert_near(*seconds, 1e-4 if dtype == torch.float32 else 1e-9)


@pytest.mark.parametrize("name", [name for name in CALLS if name not in TWICE])
def test_differentiable_once_elsewhere(name):
    inputs = inputs_of(name, 12, 6)
    with pytest.raises(RuntimeError, match=f"{name.split()[0]}: differentiable once only"):
        torch.autograd.grad(CALLS[name][0](*inputs), inputs, create_graph=True)


@pytest.mark.parametrize("std, eps", [(1.0, 0.2), (10.0, 0.01), (100.0, 0.2)])
def test_a_rate_of_long_rows_in_float16_keeps_its_gradient(std, eps):
    """The inverse of the covariance is below what float16 holds; the gradient, which is times the scale, isn't."""
    z = (torch.randn(8, 512, generator=torch.Generator().manual_seed(0)) * std).half().requires_grad_()
    (got,) = torch.autograd.grad(F.total_coding_rate(z, eps=eps), z)
    wide = z.detach().double().requires_grad_()
    (truth,) = torch.autograd.grad(logdet_rate(wide, eps), wide)
    assert (got.double() - truth).norm() <= 4e-3 * truth.norm()


@by_name
def test_a_default_dtype_of_half_precision_changes_nothing(name):
    """Memory that C++ writes floats to is of floats."""
    call = CALLS[name][0]
    given = inputs_of(name, 240, 33)
    expected = results(call, given)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = results(call, given)
    finally:
        torch.set_default_dtype(before)
    for got, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(got, truth, rtol=0, atol=0)


def test_views_that_are_alike():
    """Singular values of 0: their directions are anybody's choice, and ours is none. The others' are right."""
    z = torch.randn(30, 1, 16, generator=torch.Generator().manual_seed(0))
    inputs = [z.clone().requires_grad_(), z.clone().requires_grad_()]
    loss = F.mmcr(*inputs, lmda=0.5)
    assert is_quick(loss)
    torch.testing.assert_close(loss.double(), mmcr(*[x.detach().double() for x in inputs], 0.5), rtol=1e-6, atol=0)
    of_images = 0.5 / 30 * normalize(z, dim=2) / math.sqrt(2)  # u v^T, u = (1, 1) / sqrt(2)
    u, _, vt = torch.linalg.svd(z[:, 0].double(), full_matrices=False)
    expected = of_images.double() - ((u @ vt) / 2)[:, None]
    for gradient in torch.autograd.grad(loss, inputs):
        assert_near([gradient], [expected], 1e-6)


@by_name
def test_layouts_dtypes_numbers_and_watchers_go_the_long_way(name):
    ours, _, _ = CALLS[name]
    inputs = inputs_of(name, 20, 8)
    expected = results(ours, inputs)
    if name not in ("mmcr", "simdino", "total_coding_rate of views"):
        strided = [x.detach().T.contiguous().T.requires_grad_() for x in inputs]
        assert is_quick(ours(*strided)) == (name == "total_coding_rate")  # which is products of it alone
        assert_near(results(ours, strided), expected, 1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        loss = ours(*inputs)
    assert_near([loss.detach(), *torch.autograd.grad(loss * 1.7, inputs)], expected, 1e-5)
    assert not is_quick(F.tico(*inputs[:1] * 2, rho=torch.tensor(8.0))[0])
    assert not is_quick(F.frossl([inputs[0], inputs[0].double()]))
    assert not is_quick(F.w_mse(*inputs[:1] * 2, eps=torch.tensor(0.1)))
    assert not is_quick(F.total_coding_rate(inputs[0], eps=torch.tensor(0.1)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: F.tico(x, x[:3]), "tico: z0 and z1 must be"),
        (lambda x: F.tico(x, x, x), "tico: covariance must be"),
        (lambda x: F.tico(x, x, beta=1.5), "tico: beta must be"),
        (lambda x: F.frossl([x, x[:3]]), "frossl: views must be"),
        (lambda x: F.frossl([x]), "frossl: views must be at least two"),
        (lambda x: F.w_mse(x, x[:, 1:]), "w_mse: z0 and z1 must be"),
        (lambda x: F.w_mse(x, x), "w_mse: the covariance must be positive definite"),
        (lambda x: F.w_mse(x, x, eps=2.0), "w_mse: eps must be"),
        (lambda x: F.w_mse(x[:1], x[:1]), "w_mse: z0 and z1 must have N >= 2"),
        (lambda x: F.total_coding_rate(x, eps=0.0), "total_coding_rate: eps must be"),
        (lambda x: F.simdino([x, x[:3]], [x]), "simdino: student and teacher must be"),
        (lambda x: F.simdino([x], [x]), "simdino: student and teacher must be"),
        (lambda x: F.simdino([x, x], [x], expansion="other"), "simdino: expansion must be"),
        (lambda x: F.simdino([x, x], [x], eps=-1.0), "simdino: eps must be"),
        (lambda x: F.mmcr(x, x), "mmcr: online and momentum must be"),
        (lambda x: F.mmcr(x[None], x[None, :3]), "mmcr: online and momentum must be"),
    ],
)
def test_mistakes_are_told_by_the_long_way(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.randn(4, 16))


@by_name
def test_freed_memory_is_refused(name):
    inputs = [x.detach() for x in inputs_of(name, 20, 8)]
    if name in ("total_coding_rate of views", "simdino", "mmcr"):
        pytest.skip("the call makes other tensors of them first")
    inputs[-1].untyped_storage().resize_(8)
    with pytest.raises(ValueError, match=r"a tensor's storage must hold its elements|must"):
        CALLS[name][0](*inputs)
