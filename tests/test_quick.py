"""Losses that go past the dispatcher in one call of C++: as good as the long way, and only where nobody looks on."""

import gc
import math
from collections.abc import Callable
from typing import ClassVar

import pytest
import torch
from cases import LOSSES
from conftest import INTERPRETING
from test_losses import _size, check_values_and_gradients
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastjem.functional as F
from fastjem.kernels import plain
from fastjem.ops import direct

pytestmark = pytest.mark.skipif(INTERPRETING or not plain.plain([torch.zeros(1)]), reason="C++ doesn't see tensors")

LABELS = torch.tensor([0, 1, 0, 2])
SCALE, BIAS = torch.tensor(2.0), torch.tensor(-1.0)
CALLS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "nt_xent": lambda x, y: F.nt_xent(x, y, temperature=0.2),
    "nt_xent of views": lambda x, y: F.nt_xent(torch.stack([x, y, x + y])),
    "dcl": lambda x, y: F.dcl(x, y),
    "supcon": lambda x, y: F.supcon(torch.stack([x, y]), LABELS),
    "supcon of one view": lambda x, y: F.supcon((x + y)[None], LABELS),
    "supcon of one anchor": lambda x, y: F.supcon(torch.stack([x, y]), anchors="one", normalize=False, temperature=1.0),
    "info_nce": lambda x, y: F.info_nce(x, y, x + y, label_offset=0),
    "clip_loss": lambda x, y: F.clip_loss(x, y, SCALE),
    "siglip_loss": lambda x, y: F.siglip_loss(x, y, SCALE, BIAS),
    "cross_entropy": lambda x, y: F.cross_entropy(x + y, LABELS),
    "negative_cosine": lambda x, y: F.negative_cosine(x, y),
    "regression": lambda x, y: F.regression(x, y),
    "regression of squares": lambda x, y: F.regression(x, y, beta=0.0, normalize=False),
    "vicreg": lambda x, y: F.vicreg(x, y),
    "vicreg of many rows": lambda x, y: F.vicreg(x.reshape(16, 4), y.reshape(16, 4), nu_param=2.0),
    "barlow_twins": lambda x, y: F.barlow_twins(x, y),
    "barlow_twins of many rows": lambda x, y: F.barlow_twins(x.reshape(16, 4), y.reshape(16, 4), lambda_param=0.3),
}
OPS = {name.split()[0] for name in CALLS}
by_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


def pair(*shape: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=g).to(dtype).requires_grad_() for _ in range(2)]


def supcon_of_one_anchor(x: Tensor, y: Tensor) -> Tensor:
    """At temperature 1, of rows as given, each image a class of its own."""
    logits = x.double() @ torch.cat([x, y]).double().T
    lse = logits.masked_fill(torch.eye(len(x), 2 * len(x), dtype=torch.bool), -math.inf).logsumexp(1)
    return (lse - (x.double() * y.double()).sum(1)).mean().float()


def results(call: Callable, inputs: list[Tensor]) -> list[Tensor]:
    loss = call(*inputs)
    return [loss.detach(), *torch.autograd.grad(loss * 1.7, inputs, materialize_grads=True)]


def is_quick(loss: Tensor) -> bool:
    return type(loss.grad_fn).__name__ == "_FoundBackward" or is_torchs(loss)


def is_torchs(loss: Tensor) -> bool:
    return type(loss.grad_fn).__name__ in ("NllLossBackward0", "MseLossBackward0", "SmoothL1LossBackward0")


@by_call
def test_the_long_way_comes_to_the_same(call):
    inputs = pair(4, 16, dtype=torch.float64)
    assert is_quick(call(*inputs))
    quick = results(call, inputs)
    with direct.off():
        assert not is_quick(call(*inputs))
        torch.testing.assert_close(quick, results(call, inputs), rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("size", [0.0, 1e-14])
@pytest.mark.parametrize("name", ["nt_xent", "dcl", "supcon", "info_nce"])
def test_rows_shorter_than_what_they_are_divided_by_at_the_least(name, size):
    inputs = pair(4, 16, dtype=torch.float64)
    with torch.no_grad():
        inputs[0][1] *= size
    quick = results(CALLS[name], inputs)
    with direct.off():
        torch.testing.assert_close(quick, results(CALLS[name], inputs), rtol=1e-7, atol=1e-12)


def test_one_image_has_no_candidates_in_dcl():
    inputs = pair(1, 16, dtype=torch.float64)
    loss, *gradients = results(F.dcl, inputs)
    assert loss == -math.inf
    with direct.off():
        torch.testing.assert_close(gradients, results(F.dcl, inputs)[1:], rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("place", [(0, 0), (3, 2), slice(None)], ids=["first", "one", "all"])
@by_call
def test_infinities_and_nan_are_what_the_reference_makes_of_them(call, place, value, reference_alone):
    inputs = pair(4, 16)
    with torch.no_grad():
        inputs[0][place] = value
    quick = results(call, inputs)
    if call is CALLS["supcon of one anchor"]:  # the long way subtracts a row's own similarity, an infinity, from itself
        quick = quick[:1]
        truth = [supcon_of_one_anchor(*inputs).detach()]
    else:
        with reference_alone():
            truth = results(call, inputs)
    torch.testing.assert_close(quick, truth, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.fixture
def reference_alone():
    from conftest import Implementation

    return Implementation("reference").active


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", [case for case in LOSSES if case.op in OPS and _size(case) <= 4096], ids=str)
def test_the_operators_take_few_rows_too(case, dtype, poisoned):
    if dtype in case.dtypes:
        with direct.off():
            check_values_and_gradients(case, dtype, "cpu")


@by_call
def test_a_graph_that_is_kept_gives_its_gradients_again(call):
    inputs = pair(4, 16)
    loss = call(*inputs)
    first = [
        g.clone() for g in torch.autograd.grad(loss, inputs, retain_graph=True, allow_unused=True) if g is not None
    ]
    again = [g for g in torch.autograd.grad(loss * 2, inputs, allow_unused=True) if g is not None]
    torch.testing.assert_close(again, [2 * g for g in first])
    if is_torchs(call(*inputs)):
        return
    with pytest.raises(RuntimeError, match="differentiable once only"):
        torch.autograd.grad(call(*inputs), inputs, create_graph=True, allow_unused=True)


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(func.name())
        return func(*args, **(kwargs or {}))


def test_whoever_watches_operators_sees_them():
    x, y = pair(4, 16)
    with Recorder() as recorder:
        assert not is_quick(F.clip_loss(x, y, SCALE))
        assert not is_quick(F.cross_entropy(x, LABELS))
    assert {"fastjem::clip_loss_of_pairs", "fastjem::cross_entropy"} <= recorder.seen
    with torch.profiler.profile() as profile:
        F.cross_entropy(x, LABELS)
    assert any("fastjem::cross_entropy" in event.name for event in profile.events() or [])
    constants = x.detach(), y.detach()
    with torch._subclasses.FakeTensorMode() as mode:
        assert F.nt_xent(*map(mode.from_tensor, constants)).shape == ()
    with torch.device("meta"), torch.no_grad():
        assert not direct.nothing_watches()
    with torch.autograd.forward_ad.dual_level():
        assert not direct.nothing_watches()
    seen = []
    torch.func.vmap(lambda row: (seen.append(direct.nothing_watches()), row)[1])(x)
    torch.jit.trace(lambda a: (seen.append(direct.nothing_watches()), a)[1], (constants[0],), check_trace=False)
    assert seen and not any(seen)
    assert direct.nothing_watches()


class Watched(Tensor):
    """A subclass sees every function that it is given to."""

    seen: ClassVar[list] = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


def test_only_plain_tensors_are_given_to_cpp():
    x = torch.randn(4, 16)
    assert plain.plain((x, torch.nn.Parameter(x), [x.T, x[:0], x[1:, ::2]], None, 1.5, "s"))
    F.nt_xent(x.as_subclass(Watched), x)
    assert Watched.seen
    strange = [
        x.as_subclass(Watched),
        x.to("meta"),
        x.to_sparse(),
        torch.randn(4, 3, dtype=torch.complex64).conj().imag,
        torch.randn(1, 1, dtype=torch.complex64).conj().imag,
        torch._to_functional_tensor(x),
        torch._efficientzerotensor(3, 3),
        torch.nested.nested_tensor([x, x[:2]]),
        torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
    ]
    for tensor in strange:
        assert not plain.plain((tensor,)) and not plain.plain((x, [x, tensor])), type(tensor)
        assert not plain.plain_matrices((tensor,), 2, True)
        assert plain.facts([x], [tensor]) is None
    seen = []
    torch.func.vmap(lambda row: (seen.append(plain.plain((row,))), row)[1])(x)
    torch.func.grad(lambda y: (seen.append(plain.plain((y,))), y.sum())[1])(x)
    assert seen and not any(seen)
    assert not plain.plain_matrices((x, x.T), 2, True) and plain.plain_matrices((x, x.T), 2, False)
    assert not plain.plain_matrices((x[:0],), 2, True) and not plain.plain_matrices((x.long(),), 2, True)
    assert plain.facts([x], []) != plain.facts([x[:, :8]], []) != plain.facts([x.T], [])


@pytest.mark.parametrize("name", ["cross_entropy", "regression", "regression of squares"])
def test_what_is_torchs_own_is_differentiable_twice(name):
    inputs = pair(4, 16, dtype=torch.float64)
    assert is_torchs(CALLS[name](*inputs))
    assert torch.autograd.gradgradcheck(lambda x: CALLS[name](x, inputs[1].detach()), inputs[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ignore_index", [-100, 1, 17])
def test_ignored_labels_of_few_logits(dtype, ignore_index):
    x = torch.randn(5, 7, generator=torch.Generator().manual_seed(0), dtype=dtype).requires_grad_()
    for labels in ([0, ignore_index, 6, 2, ignore_index], [ignore_index] * 5):
        call = lambda x, labels=labels: F.cross_entropy(x, torch.tensor(labels), ignore_index=ignore_index)  # noqa: E731
        quick = results(call, [x])
        with direct.off():
            torch.testing.assert_close(quick, results(call, [x]), equal_nan=True)


@pytest.mark.parametrize("name", ["cross_entropy", "regression", "vicreg", "barlow_twins"])
def test_autocast_changes_nothing(name):
    inputs = pair(4, 16)
    expected = CALLS[name](*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(CALLS[name](*inputs), expected)


def test_freed_logits_and_labels_are_refused():
    logits, labels = torch.randn(4, 16), LABELS.clone()
    labels.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="a tensor's storage must hold its elements"):
        F.cross_entropy(logits, labels)
    logits.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="a tensor's storage must hold its elements"):
        F.cross_entropy(logits, LABELS)


FREED = ["nt_xent", "clip_loss", "siglip_loss", "negative_cosine", "regression", "vicreg", "barlow_twins"]


@pytest.mark.parametrize("left", [0, 8])
@pytest.mark.parametrize("name", FREED)
def test_freed_memory_is_refused(name, left):
    x, y = pair(4, 16)
    y.untyped_storage().resize_(left)
    with pytest.raises(ValueError, match=f"{name}: a tensor's storage must hold its elements"):
        CALLS[name](x.detach(), y.detach())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, y: F.nt_xent(x, y[:3]), "nt_xent: z0 and z1 must be"),
        (lambda x, y: F.info_nce(x, y, y[:, :3]), "info_nce: query and positive"),
        (lambda x, y: F.info_nce(x, y[:2], y), "info_nce: query and positive"),
        (lambda x, y: F.clip_loss(x, y[:, :5], SCALE), "clip_loss: x and y"),
        (lambda x, y: F.info_nce(x, y, y[:, :3].contiguous()), "info_nce: query and positive"),
        (lambda x, y: F.clip_loss(x, y[:3], SCALE), "clip_loss: x and y"),
        (lambda x, y: F.supcon(x[None], LABELS[:3]), "supcon: labels must be"),
        (lambda x, y: F.cross_entropy(x, LABELS[:3]), "cross_entropy: labels must be"),
        (lambda x, y: F.cross_entropy(x, LABELS + 14), "labels must be in"),
        (lambda x, y: F.negative_cosine(x, y[:, 1:]), "negative_cosine: p and z"),
        (lambda x, y: F.regression(x, y[1:]), "regression: prediction and target"),
        (lambda x, y: F.vicreg(x, y[1:]), "vicreg: z0 and z1 must be"),
        (lambda x, y: F.vicreg(x, y, eps=-1.0), "vicreg: eps must be"),
        (lambda x, y: F.vicreg(x, y, nu_param=math.nan), "vicreg: nu_param must be"),
        (lambda x, y: F.vicreg(x[:1], y[:1]), "vicreg: z0 and z1 must have N >= 2"),
        (lambda x, y: F.barlow_twins(x, y[:, 1:]), "barlow_twins: z0 and z1 must be"),
        (lambda x, y: F.barlow_twins(x, y, lambda_param=math.inf), "barlow_twins: lambda_param must be"),
    ],
)
def test_mistakes_are_told_by_the_long_way(call, message):
    with pytest.raises(ValueError, match=message):
        call(*pair(4, 16))


def test_other_dtypes_layouts_and_sizes_go_the_long_way():
    x, y = pair(4, 16)
    assert not is_quick(F.nt_xent(x, y.double()))
    assert not is_quick(F.nt_xent(x.T, y.T))
    assert not is_quick(F.nt_xent(torch.stack(pair(64, 128))))
    assert not is_quick(F.clip_loss(x, y, 2.0))
    assert not is_quick(F.nt_xent(x, y, temperature=torch.tensor(0.5)))
    assert is_quick(F.negative_cosine(*pair(640, 128)))  # which have no limit
    assert not is_torchs(F.regression(*pair(64, 128))) and not is_torchs(F.cross_entropy(x.bfloat16(), LABELS))
    assert not is_quick(F.vicreg(x, y.double())) and not is_quick(F.vicreg(x.T, y.T))
    assert not is_quick(F.vicreg(x, y, mu_param=torch.tensor(1.0))) and not is_quick(F.vicreg(x, y, health=F.Health()))
    with torch.autocast("cpu", torch.bfloat16):
        assert is_quick(F.barlow_twins(x, y)) and not is_quick(F.barlow_twins(*pair(64, 64)))


@pytest.mark.parametrize("loss", [F.vicreg, F.barlow_twins])
@pytest.mark.parametrize("shape", [(64, 96), (96, 64)])
def test_one_product_of_torch_a_view_and_gradient(loss, shape):
    """More rows than a call of C++ alone takes: loss and gradients without the operator, and the same."""
    inputs = pair(*shape)
    assert is_quick(loss(*inputs))
    quick = results(loss, inputs)
    with direct.off():
        torch.testing.assert_close(quick, results(loss, inputs), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["vicreg", "barlow_twins"])
def test_a_loss_beyond_float32_is_infinite(name):
    x, y = pair(4, 16)
    many = torch.cat([x, y] * 64).detach() * 1e10, torch.cat([y, x] * 64).detach() * -1e10
    for a, b in ((x.detach() * 1e10, y.detach() * -1e10), many):
        loss = getattr(F, name)(a, b, lambda_param=1e38)
        with direct.off():
            assert loss == math.inf == getattr(F, name)(a, b, lambda_param=1e38)


def test_nothing_is_left_behind():
    inputs = pair(4, 16)
    gc.collect()
    for call in CALLS.values():
        results(call, inputs)
    before = sum(isinstance(x, Tensor) for x in gc.get_objects())
    for _ in range(3):
        for call in CALLS.values():
            results(call, inputs)
    assert sum(isinstance(x, Tensor) for x in gc.get_objects()) <= before


def test_the_gradients_of_a_scale_and_a_bias():
    x, y = pair(4, 16, dtype=torch.float64)
    numbers = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (2.0, -1.0)]
    for call in (lambda s, b: F.siglip_loss(x, y, s, b), lambda s, b: F.clip_loss(x, y, s) + 0 * b):
        assert torch.autograd.gradcheck(call, numbers)
        loss = call(*numbers)
        torch.testing.assert_close(
            torch.autograd.grad(loss, numbers[0]), torch.autograd.grad(call(*numbers), numbers)[:1]
        )
