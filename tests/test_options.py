"""Options of contrastive losses, in many combinations, against formulas of all N x N logits (option_formulas.py)."""

import random
from typing import Any

import numpy as np
import option_formulas as formulas
import pytest
import torch
from torch import Tensor

import fastjem.functional as F
from fastjem.nn import ClipLoss, DCLLoss, NTXentLoss

N = 11
D = 7
K = 19


class Draw:
    """Options of a call, drawn by a seed."""

    def __init__(self, seed: int):
        self.g = torch.Generator().manual_seed(seed)
        self.random = random.Random(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.g, dtype=torch.float64)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.g, dtype=torch.float64)

    def bools(self, *shape: int, share: float = 0.3) -> Tensor:
        return self.uniform(*shape) < share

    def ids(self, n: int) -> Tensor:
        return torch.randint(0, 6, (n,), generator=self.g)

    def of(self, *choices):
        """One of them; None stands for an option that isn't given."""
        return self.random.choice(choices)


def some_options(draw: Draw, exclude: tuple, views: int | None) -> dict:
    rows = (N,) if views is None else (views, N)
    options = {
        "reduction": draw.of("mean", "sum", "none"),
        "weights": draw.of(None, draw.uniform(N), draw.uniform(*rows)),
        "label_smoothing": draw.of(None, 0.1, torch.tensor(0.3)),
        "ids": draw.of(None, draw.ids(N)),
        "exclude": draw.of(None, *exclude),
        "false_negative_margin": draw.of(None, 0.1, -0.2),
        "hard_negatives": draw.of(None, draw.normal(N, 3, D)),
        "prior": draw.of(None, 0.1, draw.uniform(N) / 5),
        "hardness": draw.of(None, None, 0.7),
    }
    return {name: value for name, value in options.items() if value is not None}


def check(function, formula, rows: list[Tensor], learned: dict, options: dict, tolerance: float = 1e-9) -> None:
    """Value, and gradients of the rows, of what is learned and of hard negatives; upstream gradients differ by row."""
    results = []
    for call in (function, formula):
        leaves = [x.clone().requires_grad_() for x in rows]
        given = dict(options)
        for name, value in learned.items():
            given[name] = value.clone().requires_grad_()
        if "hard_negatives" in given:
            given["hard_negatives"] = given["hard_negatives"].clone().requires_grad_()
        loss = call(*leaves, **given)
        upstream = torch.linspace(-0.7, 1.1, loss.numel(), dtype=loss.dtype).view(loss.shape)
        inputs = [*leaves, *(given[name] for name in learned)]
        if "hard_negatives" in given:
            inputs.append(given["hard_negatives"])
        results.append((loss.detach(), *torch.autograd.grad((loss * upstream).sum(), inputs)))
    for ours, exact in zip(*results, strict=True):
        size = exact.abs().max().item()
        torch.testing.assert_close(ours, exact.to(ours.dtype), rtol=tolerance, atol=tolerance * max(size, 1e-3))


@pytest.mark.parametrize("seed", range(24))
def test_nt_xent(seed, implementation):
    draw = Draw(seed)
    views = draw.of(2, 3)
    options = some_options(draw, (draw.bools(N, N), draw.bools(N)), views)
    if draw.of(True, False):
        options["temperature"] = 0.3
        learned = {}
    else:
        shape = draw.of((), (N,), (views, N))
        learned = {"temperature": draw.uniform(*shape) / 2 + 0.2}
    z = draw.normal(views, N, D)
    check(F.nt_xent, formulas.nt_xent, [z], learned, options)


@pytest.mark.parametrize("seed", range(100, 108))
def test_dcl(seed, implementation):
    draw = Draw(seed)
    options = some_options(draw, (draw.bools(N, N), draw.bools(N)), 2)
    for name in ("weights", "label_smoothing"):
        options.pop(name, None)
    if "false_negative_margin" in options:  # a row without any negative has a loss of -inf
        options["hard_negatives"] = draw.normal(N, 3, D)
    formula = lambda z, **given: formulas.nt_xent(z, decoupled=True, **given)  # noqa: E731
    check(F.dcl, formula, [draw.normal(2, N, D)], {"temperature": draw.uniform() / 2 + 0.2}, options)


@pytest.mark.parametrize("seed", range(200, 216))
def test_info_nce(seed, implementation):
    draw = Draw(seed)
    options = some_options(draw, (draw.bools(N, K), draw.bools(K)), None)
    if "ids" in options:
        options["negative_ids"] = draw.ids(K)
    options["label_offset"] = draw.of(None, 2)
    learned = {"temperature": draw.uniform(*draw.of((), (N,))) / 2 + 0.2}
    rows = [draw.normal(N, D), draw.normal(N, D), draw.normal(K, D)]
    check(F.info_nce, formulas.info_nce, rows, learned, options)


@pytest.mark.parametrize("seed", range(300, 324))
def test_clip_loss(seed, implementation):
    draw = Draw(seed)
    options = some_options(draw, (draw.bools(N, N), draw.bools(N)), None)
    x, y = (torch.nn.functional.normalize(draw.normal(N, D), dim=1) for _ in range(2))
    learned = {"logit_scale": draw.uniform(*draw.of((), (N,))) * 3 + 2}
    check(F.clip_loss, formulas.clip_loss, [x, y], learned, options)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return Draw(seed).normal(*shape)


def test_modules():
    z0, z1 = drawn(N, D), drawn(N, D, seed=1)
    ids = Draw(2).ids(N)
    ours = NTXentLoss(0.3, label_smoothing=0.1, prior=0.05, reduction="none")(z0, z1, ids=ids)
    z = torch.stack([z0, z1])
    exact = formulas.nt_xent(z, 0.3, label_smoothing=0.1, prior=0.05, reduction="none", ids=ids)
    torch.testing.assert_close(ours, exact)

    ours = DCLLoss(0.3, false_negative_margin=0.5)(z0, z1, ids=ids)
    exact = formulas.nt_xent(z, 0.3, decoupled=True, false_negative_margin=0.5, ids=ids)
    torch.testing.assert_close(ours, exact)

    bank = NTXentLoss(0.3, memory_bank_size=(K, D), hardness=0.4).double()
    exclude = Draw(3).bools(K)
    queue = bank.memory_bank.bank.clone()
    exact = formulas.info_nce(z0, z1, queue, 0.3, exclude=exclude, hardness=0.4)
    torch.testing.assert_close(bank(z0, z1, exclude=exclude), exact)

    scale = torch.tensor(3.0, dtype=torch.float64)
    options = {"weights": Draw(4).uniform(N), "hard_negatives": drawn(N, 2, D)}
    ours = ClipLoss(label_smoothing=0.1)(z0, z1, scale, **options)
    torch.testing.assert_close(ours, formulas.clip_loss(z0, z1, scale, label_smoothing=0.1, **options))


def test_module_refuses_options_of_other_formulas():
    module = NTXentLoss(label_smoothing=0.1)
    module.cross_entropy = torch.nn.CrossEntropyLoss(reduction="sum")
    with pytest.raises(ValueError, match="NTXentLoss: with options, cross_entropy must be"):
        module(drawn(N, D), drawn(N, D))
    with pytest.raises(ValueError, match="with a memory bank, which has no ids"):
        NTXentLoss(memory_bank_size=(K, D))(drawn(N, D), drawn(N, D), ids=Draw(0).ids(N))


def test_padding_is_nobodys_candidate():
    """Rows that are excluded and weigh nothing change nothing, whatever they hold."""
    z = drawn(2, N, D)
    padded = torch.cat([z, torch.full((2, 3, D), torch.nan, dtype=z.dtype)], 1).requires_grad_()
    is_padding = torch.arange(N + 3) >= N
    loss = F.nt_xent(padded, exclude=is_padding, weights=(~is_padding).double())
    torch.testing.assert_close(loss, F.nt_xent(z))


def test_the_queue_may_change_before_backward():
    query, positive, queue = drawn(N, D).requires_grad_(), drawn(N, D, seed=1), drawn(K, D, seed=2)
    exclude = Draw(3).bools(K)
    expected = torch.autograd.grad(F.info_nce(query, positive, queue, exclude=exclude), query)
    loss = F.info_nce(query, positive, queue, exclude=exclude)
    queue.zero_()
    torch.testing.assert_close(torch.autograd.grad(loss, query), expected)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"exclude": [[False] * N] * N}, "nt_xent: exclude must be a bool tensor, got list"),
        ({"prior": np.zeros(N)}, "nt_xent: prior must be a number, got array"),
        ({"label_smoothing": None}, "nt_xent: label_smoothing must be a number, got None"),
        ({"temperature": torch.ones(N, dtype=torch.bool)}, "nt_xent: temperature must be real numbers, got torch.bool"),
        (
            {"temperature": torch.ones(N - 1)},
            r"a number or a 0-dim tensor, or \[11\] or \[2, 11\], got \(10,\)",
        ),
    ],
    ids=lambda x: "" if isinstance(x, dict) else x[:40],
)
def test_mistakes(options, message):
    with pytest.raises(ValueError, match=message):
        F.nt_xent(drawn(2, N, D), **options)


@pytest.mark.parametrize("name", ["weights", "ids", "exclude", "hard_negatives", "prior", "temperature"])
def test_freed_memory_is_refused(name):
    """torch crashes where it reads it."""
    options = {
        "weights": torch.ones(N), "ids": torch.arange(N), "exclude": torch.zeros(N, N).bool(),
        "hard_negatives": drawn(N, 2, D), "prior": torch.ones(N) / 9, "temperature": torch.ones(N),
    }  # fmt: skip
    options[name].untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="nt_xent: a tensor's storage must hold its elements"):
        F.nt_xent(drawn(2, N, D), **{name: options[name]})


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("op", ["nt_xent", "clip_loss", "info_nce"])
def test_transforms(op, seed):
    """The gradient by torch.func, and that of each of a batch, are autograd's."""
    draw = Draw(seed)
    options = some_options(draw, (draw.bools(N, K if op == "info_nce" else N),), None)
    rows = [draw.normal(N, D), draw.normal(N, D), draw.normal(K, D)][: 3 if op == "info_nce" else 2]
    if op == "info_nce" and "ids" in options:
        options["negative_ids"] = draw.ids(K)
    number = draw.uniform() / 2 + 0.5
    name = "logit_scale" if op == "clip_loss" else "temperature"

    def loss(learned, *x):
        given: dict[str, Any] = {name: learned, **options}
        return getattr(F, op)(*x, **given).square().sum()

    places = tuple(range(1 + len(rows)))
    leaves = [x.clone().requires_grad_() for x in (number, *rows)]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    got = torch.func.grad(loss, argnums=places)(number, *rows)
    batched = [torch.stack([x, 0.9 * x]) for x in (number, *rows)]
    of_each = torch.func.vmap(torch.func.grad(loss, argnums=places))(*batched)
    for x, y, z in zip(got, expected, of_each, strict=True):
        torch.testing.assert_close(x, y)
        torch.testing.assert_close(z[0], y)


def test_a_transform_of_weights():
    z = drawn(2, N, D)
    weights = Draw(1).uniform(3, N)
    got = torch.func.vmap(lambda w: F.nt_xent(z, weights=w))(weights)
    torch.testing.assert_close(got, torch.stack([F.nt_xent(z, weights=w) for w in weights]))


def test_what_there_is_no_rule_for_is_refused():
    z = drawn(2, N, D)
    leaf = z.clone().requires_grad_()
    with pytest.raises(NotImplementedError, match="with options, gradients must be asked for one by one"):
        torch.autograd.grad(F.nt_xent(leaf, label_smoothing=0.1), leaf, torch.ones(2), is_grads_batched=True)
    with pytest.raises(NotImplementedError, match="nt_xent: forward-mode"):
        torch.func.jvp(lambda x: F.nt_xent(x, label_smoothing=0.1), (z,), (z,))
    with pytest.raises(NotImplementedError, match="supcon: forward-mode"):
        torch.func.jvp(lambda x: F.supcon(x, hardness=0.1), (z,), (z,))
    with pytest.raises(RuntimeError, match="nt_xent: differentiable once only, got a second derivative"):
        torch.func.jacrev(torch.func.grad(lambda x: F.nt_xent(x, label_smoothing=0.1)))(z)


OF_CLIP = [
    {"ids": torch.arange(6)},
    {"reduction": "sum"},
    {"weights": torch.ones(6)},
    {"false_negative_margin": 1.0},
    {"label_smoothing": 0.1},
]


@pytest.mark.parametrize("options", OF_CLIP, ids=[next(iter(options)) for options in OF_CLIP])
def test_an_infinite_positive_makes_no_loss(options):
    """As without options: the log-sum-exp of infinity less infinity."""
    x, y = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))
    y[:, 0] = -1
    y[0, 0] = 1
    x[0, 0] = float("inf")
    assert F.clip_loss(x, y, 5.0).isnan()
    x.requires_grad_()
    loss = F.clip_loss(x, y, 5.0, **options)
    (gradient,) = torch.autograd.grad(loss, x)
    assert loss.isnan() and gradient[0].isnan().any()


def test_a_positive_infinitely_far_is_an_infinite_loss():
    x, y = torch.tensor([[1e30, 0.0], [0.0, 1.0]]), torch.tensor([[-1e30, 0.0], [0.0, 1.0]])
    assert F.clip_loss(x, y, 1.0, ids=torch.arange(2)) == float("inf")
