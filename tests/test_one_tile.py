"""Contrastive losses whose similarities fit one tile, and the engine's way, which tests of small shapes would miss."""

import pytest
import torch
from cases import LOSSES
from test_losses import check_values_and_gradients

import fastjem.functional as F
from fastjem.ops import direct

one_tile = pytest.importorskip("fastjem.kernels.contrastive.one_tile")
pytestmark = pytest.mark.usefixtures("one_thread")

CONTRASTIVE = [case for case in LOSSES if case.op in ("nt_xent", "clip_loss", "siglip_loss")]


@pytest.mark.parametrize("case", CONTRASTIVE, ids=str)
def test_the_engine_is_as_good(case):
    with direct.off():
        check_values_and_gradients(case, torch.float32, "cpu")


def pair(n: int, d: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(n + d)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    y = x + torch.randn(n, d, generator=generator, dtype=torch.float64)
    return [torch.nn.functional.normalize(z, dim=1).to(dtype) for z in (x, y)]


def views_loss(z0, z1, temperature, decoupled):
    z = torch.nn.functional.normalize(torch.cat([z0, z1]).double(), dim=1)
    n = len(z0)
    logits = z @ z.T / temperature
    image = torch.arange(2 * n) % n
    itself = torch.eye(2 * n, dtype=torch.bool)
    unseen = image == image[:, None] if decoupled else itself
    lse = logits.masked_fill(unseen, -torch.inf).logsumexp(1)
    return (lse - logits[torch.arange(2 * n), torch.arange(2 * n).roll(n)]).mean()


def clip(x, y, scale):
    logits = scale * x.double() @ y.double().T
    return (logits.logsumexp(0) + logits.logsumexp(1) - 2 * logits.diagonal()).mean() / 2


def siglip(x, y, scale, bias):
    logits = scale * x.double() @ y.double().T + bias
    labels = 2 * torch.eye(len(x)) - 1
    return torch.nn.functional.softplus(-labels * logits).sum() / len(x)


def number(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


CALLS = {
    "nt_xent": (lambda a, b: F.nt_xent(a, b, temperature=0.1), lambda a, b: views_loss(a, b, 0.1, False), ()),
    "dcl": (lambda a, b: F.dcl(a, b, temperature=0.1), lambda a, b: views_loss(a, b, 0.1, True), ()),
    "clip": (F.clip_loss, clip, (14.0,)),
    "clip, large": (F.clip_loss, clip, (100.0,)),
    "clip, negative": (F.clip_loss, clip, (-5.0,)),
    "clip, zero": (F.clip_loss, clip, (0.0,)),
    "siglip": (F.siglip_loss, siglip, (10.0, -10.0)),
}


@pytest.fixture
def taken(monkeypatch):
    """Which calls were computed in one tile."""
    found = []

    def watched(original):
        def run(*args, **options):
            result = original(*args, **options)
            found.append(result is not None)
            return result

        return run

    for name in ("of_two_views", "clip_loss", "siglip_loss"):
        monkeypatch.setattr(one_tile, name, watched(getattr(one_tile, name)))
    return found


def run(call, inputs, wanted):
    inputs = [x.detach().clone().requires_grad_(i in wanted) for i, x in enumerate(inputs)]
    loss = call(*inputs)
    return [loss, *torch.autograd.grad(-0.37 * loss, [inputs[i] for i in wanted])]


@pytest.mark.parametrize("wanted", ["all", "last"])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", CALLS)
def test_value_and_gradients_are_the_formula_s(name, threads, wanted, taken):
    call, formula, numbers = CALLS[name]
    inputs = [*pair(71, 67), *map(number, numbers)]
    which = range(len(inputs)) if wanted == "all" else [len(inputs) - 1]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        results = run(call, inputs, which)
    finally:
        torch.set_num_threads(before)
    for got, truth in zip(results, run(formula, inputs, which), strict=True):
        torch.testing.assert_close(got, truth.to(got.dtype), rtol=1e-9, atol=1e-12)
    assert taken == [True]


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_and_gradients_of_their_own_memory(name, dtype, taken):
    call, formula, numbers = CALLS[name]
    inputs = [*pair(71, 67, dtype), *[number(x).float() for x in numbers]]
    results = run(call, inputs, range(len(inputs)))
    truths = run(formula, [x.double() for x in inputs], range(len(inputs)))
    tolerance = 2e-6 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    for got, truth in zip(results, truths, strict=True):
        assert (got.double() - truth).norm() <= tolerance * 10 * truth.norm() + 1e-7
    assert results[0].dtype == torch.float32 and [g.dtype for g in results[1:]] == [x.dtype for x in inputs]
    assert len({g.untyped_storage().data_ptr() for g in results[1:]}) == len(inputs)
    assert taken == [True]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("scale", [0.0, -0.0, 1e-40, -1e-37, 1e-36])
def test_a_scale_of_next_to_nothing_without_a_tile(scale, dtype):
    """What a row doesn't see has a logit as near to 0 as the others then, and yet no weight."""
    inputs = [*pair(71, 67, dtype), number(scale)]
    with direct.off():
        results = run(F.clip_loss, inputs, range(3))
    truths = run(clip, [x.double() for x in inputs], range(3))
    for got, truth in zip(results, truths, strict=True):
        torch.testing.assert_close(got, truth.to(got.dtype), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("scale", [400.0, -400.0])
def test_what_one_shift_is_too_little_for_goes_the_long_way(scale, taken):
    x, y = pair(71, 67, torch.float32)
    inputs = [x, y.flip(0), number(scale).float()]
    results = run(F.clip_loss, inputs, range(3))
    truths = run(clip, [z.double() for z in inputs], range(3))
    for got, truth in zip(results, truths, strict=True):
        assert (got.double() - truth).norm() <= 1e-4 * truth.norm()
    assert taken == [False]


def test_logits_far_from_0_but_near_each_other_take_one_shift(taken):
    """Two threads have columns' sums of their own. (exp(100) is infinite in float32.)"""
    x, y = pair(131, 67)
    inputs = [torch.nn.functional.normalize(z * 0.01 + x[:1], dim=1).float() for z in (x, y)]
    inputs = [*inputs, number(100.0).float()]
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        results = run(F.clip_loss, inputs, range(3))
    finally:
        torch.set_num_threads(before)
    truths = run(clip, [z.double() for z in inputs], range(3))
    for got, truth in zip(results, truths, strict=True):
        assert (got.double() - truth).norm() <= 1e-3 * truth.norm() + 1e-6
    assert taken == [True]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["nt_xent", "dcl", "clip", "siglip"])
def test_what_isn_t_finite_is_what_it_is_without_a_tile(name, bad):
    call, _, numbers = CALLS[name]
    inputs = [*pair(71, 67, torch.float32), *[number(x).float() for x in numbers]]
    inputs[0][3, 5] = bad
    results = run(call, inputs, range(len(inputs)))
    with direct.off():
        expected = run(call, inputs, range(len(inputs)))
    for got, truth in zip(results, expected, strict=True):
        torch.testing.assert_close(got, truth, equal_nan=True, rtol=1e-4, atol=1e-6)


def test_too_many_rows_for_a_tile(taken):
    x, y = pair(1025, 3, torch.float32)
    F.clip_loss(x, y, number(3.0).float())
    F.nt_xent(*pair(513, 3, torch.float32))
    assert taken == [False, False]
