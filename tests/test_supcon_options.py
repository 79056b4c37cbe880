"""Options of the supervised contrastive loss, against a formula of all N x N logits (option_formulas.py)."""

import option_formulas as formulas
import pytest
import torch
from test_options import D, Draw, N, check

import fastjem.functional as F
from fastjem.nn import SupConLoss


@pytest.mark.parametrize("seed", range(32))
def test_value_and_gradients_are_the_formula_s(seed):
    draw = Draw(seed)
    views = draw.of(1, 2, 3)
    anchors = draw.of("all", "all", "one")
    count = views if anchors == "all" else 1
    options = {
        "labels": draw.of(draw.ids(N), draw.ids(N), draw.ids(N) / 2, None),
        "reduction": draw.of("mean", "sum", "none"),
        "weights": draw.of(None, draw.uniform(N), draw.uniform(count, N)),
        "exclude": draw.of(None, draw.bools(N), draw.bools(N, N)),
        "hard_negatives": draw.of(None, draw.normal(N, 3, D)),
        "hardness": draw.of(0.0, 0.7),
        "normalize": draw.of(True, True, False),
    }
    if draw.of(True, False, False) and not options["hardness"]:
        options |= {"labels": None, "mask": draw.uniform(N, N) * draw.bools(N, N, share=0.6)}
    options = {name: value for name, value in options.items() if value is not None}
    shape = draw.of((), (N,), (views, N))
    learned = {"temperature": draw.uniform(*shape) / 2 + 0.5}
    check(F.supcon, formulas.supcon, [draw.normal(views, N, D)], learned, options | {"anchors": anchors})


def test_a_learned_temperature_where_an_anchor_has_no_positive():
    z = Draw(3).normal(1, N, D)
    labels = torch.arange(N) // 2  # the last image is alone in its class
    check(F.supcon, formulas.supcon, [z], {"temperature": torch.tensor(0.4, dtype=torch.float64)}, {"labels": labels})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes(dtype):
    draw = Draw(1)
    z = draw.normal(2, N, D).to(dtype)
    options = {"labels": draw.ids(N), "hardness": 0.5, "temperature": 0.2, "reduction": "none"}
    results = []
    for function, rows in ((F.supcon, z), (formulas.supcon, z.double())):
        leaf = rows.clone().requires_grad_()
        loss = function(leaf, **options)
        results.append((loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]))
    (loss, gradient), (exact, exact_gradient) = results
    assert loss.dtype == torch.float32 and gradient.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(loss.double(), exact, rtol=tolerance, atol=tolerance)
    assert (gradient.double() - exact_gradient).norm() <= tolerance * exact_gradient.norm()


def test_options_as_they_are_by_default_change_nothing():
    z = Draw(0).normal(2, N, D)
    labels = Draw(1).ids(N)
    nobody = torch.zeros(N, dtype=torch.bool)
    for anchors in ("all", "one"):
        plain = F.supcon(z, labels, anchors=anchors)
        torch.testing.assert_close(F.supcon(z, labels, anchors=anchors, exclude=nobody), plain)
        losses = F.supcon(z, labels, anchors=anchors, reduction="none")
        assert losses.shape == (2 if anchors == "all" else 1, N)
        torch.testing.assert_close(losses.mean(), plain)


def test_padding_is_nobodys_candidate():
    z = Draw(0).normal(2, N, D)
    labels = Draw(1).ids(N)
    padded = torch.cat([z, torch.full((2, 3, D), torch.nan, dtype=z.dtype)], 1)
    is_padding = torch.arange(N + 3) >= N
    loss = F.supcon(padded, torch.cat([labels, labels[:3]]), exclude=is_padding, weights=(~is_padding).double())
    torch.testing.assert_close(loss, F.supcon(z, labels))


def test_module():
    draw = Draw(2)
    z, labels, weights = draw.normal(N, 2, D), draw.ids(N), draw.uniform(N)
    temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    module = SupConLoss(temperature, base_temperature=0.3, hardness=0.4, reduction="sum")
    given = {"weights": weights, "exclude": draw.bools(N), "hard_negatives": draw.normal(N, 2, D)}
    loss = module(z, labels, **given)
    options = {"hardness": 0.4, "reduction": "sum", "normalize": False, **given}
    expected = formulas.supcon(z.transpose(0, 1), labels, temperature=temperature, **options) * temperature / 0.3
    torch.testing.assert_close(loss, expected)
    for x, y in zip(*(torch.autograd.grad(x, temperature) for x in (loss, expected)), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"exclude": torch.zeros(N)}, "supcon: exclude must be bool, got torch.float32"),
        ({"exclude": torch.zeros(N, 2).bool()}, r"supcon: exclude must be \[11\] or \[11, 11\], got \(11, 2\)"),
        ({"weights": torch.ones(3)}, r"supcon: weights must be \[11\] or \[2, 11\]"),
        ({"hardness": -1.0}, "supcon: hardness must be"),
        (
            {"mask": torch.ones(N, N), "hardness": 1.0},
            "with hardness, classes must be given as labels, got mask",
        ),
        ({"temperature": torch.ones(N - 1)}, "supcon: temperature must be a number or a 0-dim tensor"),
        ({"reduction": "all"}, "supcon: reduction must be one of mean, sum, none"),
    ],
    ids=lambda x: "" if isinstance(x, dict) else x[:40],
)
def test_mistakes(options, message):
    with pytest.raises(ValueError, match=message):
        F.supcon(Draw(0).normal(2, N, D), **options)
