"""Losses of single rows, weighted, and of Matryoshka prefixes, against formulas in float64."""

from collections.abc import Callable

import option_formulas as formulas
import pytest
import torch
import torch.nn.functional as TF
from torch import Tensor

import fastjem.functional as F
from fastjem.nn import ClipLoss, NTXentLoss

N = 9
D = 12
DIMS = (3, 4, 11)
DIM_WEIGHTS = (0.5, 2.0, 1.5)
LABELS = torch.arange(N)
REDUCTIONS = ("mean", "sum", "none")
DTYPES = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def check(ours: Callable, formula: Callable, rows: list[Tensor], dtype: torch.dtype = torch.float64) -> None:
    """Value and gradients, in a dtype of `ours` and in float64 of the formula; upstream gradients differ by row."""
    rows = [x.to(dtype) for x in rows]
    results = []
    for call, of in ((ours, dtype), (formula, torch.float64)):
        leaves = [x.to(of).requires_grad_() for x in rows]
        loss = call(*leaves)
        upstream = torch.linspace(-0.7, 1.1, loss.numel(), dtype=torch.float64).view(loss.shape)
        gradients = torch.autograd.grad((loss * upstream).sum(), leaves)
        assert all(g.dtype == of for g in gradients)
        results.append((loss.detach(), *gradients))
    for got, exact in zip(*results, strict=True):
        tolerance = DTYPES[dtype] * max(exact.abs().max().item(), 1e-3)
        torch.testing.assert_close(got.double(), exact, rtol=DTYPES[dtype], atol=4 * tolerance)


def reduced(losses: Tensor, weights: Tensor | None, reduction: str) -> Tensor:
    return formulas.reduced(losses, {"weights": weights, "reduction": reduction})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_cross_entropy(reduction, weighted, dtype, implementation):
    labels = torch.arange(N) % D
    labels[2] = 77
    weights = drawn(N).abs() if weighted else None
    if weights is not None:
        weights[4] = 0
    counted = (labels != 77) * (1 if weights is None else weights)
    for smoothing in (0.0, torch.tensor(0.3)):
        options: dict = {"ignore_index": 77, "reduction": reduction, "label_smoothing": smoothing}
        ours = lambda x: F.cross_entropy(x, labels, weights=weights, **options)  # noqa: E731, B023
        formula = lambda x: reduced(  # noqa: E731
            TF.cross_entropy(x, labels, ignore_index=77, reduction="none", label_smoothing=float(smoothing)),  # noqa: B023
            counted,
            reduction,
        )
        check(ours, formula, [3 * drawn(N, D)], dtype)


def test_cross_entropys_reductions_are_torchs(implementation):
    x, labels = drawn(N, D), torch.arange(N) % D
    labels[0] = -100
    for reduction in REDUCTIONS:
        for smoothing in (0.0, 0.1):
            options: dict = {"reduction": reduction, "label_smoothing": smoothing}
            torch.testing.assert_close(F.cross_entropy(x, labels, **options), TF.cross_entropy(x, labels, **options))


def test_a_row_of_weight_0_may_hold_anything(implementation):
    x, labels, weights = drawn(N, D), torch.arange(N) % D, torch.ones(N)
    x[3] = torch.nan
    labels[3] = -1
    weights[3] = 0
    for reduction in REDUCTIONS:
        given = x.clone().requires_grad_()
        F.cross_entropy(given, labels, weights=weights, reduction=reduction).sum().backward()
        assert given.grad is not None and given.grad.isfinite().all() and not given.grad[3].any()
        p = x.clone().requires_grad_()
        F.negative_cosine(p, x.flip(1), weights=weights, reduction=reduction).sum().backward()
        assert p.grad is not None and p.grad.isfinite().all() and not p.grad[3].any()
        F.regression(p, x.flip(1), weights=weights, reduction=reduction).sum().backward()
        assert p.grad.isfinite().all() and not p.grad[3].any()


def test_second_derivatives_are_refused():
    x = drawn(N, D).requires_grad_()
    asked: list[dict] = [{"reduction": "none"}, {"label_smoothing": 0.1}]
    for options in asked:
        loss = F.cross_entropy(x, torch.arange(N), **options).sum()
        with pytest.raises(RuntimeError, match="cross_entropy: differentiable once only"):
            torch.autograd.grad(loss, x, create_graph=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_negative_cosine(reduction, dtype):
    for weights in (None, drawn(N, seed=2).abs()):
        ours = lambda p, z: F.negative_cosine(p, z, weights=weights, reduction=reduction)  # noqa: E731, B023
        formula = lambda p, z: reduced(-TF.cosine_similarity(p, z, dim=1), weights, reduction)  # noqa: E731, B023
        check(ours, formula, [drawn(N, D), drawn(N, D, seed=1)], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_regression(reduction, dtype):
    target = drawn(3, N, D, seed=1).to(dtype)
    for beta in (0.0, 0.7):
        for weights in (None, drawn(3 * N, seed=2).abs()):
            options: dict = {"beta": beta, "reduction": reduction}
            ours = lambda p: F.regression(p, target, weights=weights, **options)  # noqa: E731, B023

            def formula(p: Tensor, weights=weights, beta=beta) -> Tensor:
                y = TF.layer_norm(target.double(), (D,))
                errors = TF.smooth_l1_loss(p, y, beta=beta, reduction="none") if beta else (p - y).square()
                losses = errors.mean(-1)
                loss = reduced(losses.flatten(), weights, reduction)
                return loss.view(3, N) if reduction == "none" else loss

            check(ours, formula, [drawn(3, N, D)], dtype)


def of_prefixes(formula, dims=DIMS, weights=DIM_WEIGHTS):
    """The weighted sum of a formula of the rows' prefixes; hard negatives are cut off, too."""

    def call(*rows: Tensor, **options) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for d, weight in zip(dims, weights, strict=True):
            given = dict(options)
            if "hard_negatives" in given:
                given["hard_negatives"] = given["hard_negatives"][..., :d]
            total = total + weight * formula(*[x[..., :d] for x in rows], **given)
        return total

    return call


def clip_of_unit_rows(x: Tensor, y: Tensor, **options) -> Tensor:
    hard = options.pop("hard_negatives", None)
    if hard is not None:
        options["hard_negatives"] = TF.normalize(hard, dim=-1)
    return formulas.clip_loss(TF.normalize(x, dim=-1), TF.normalize(y, dim=-1), 5.0, **options)


SOME = {"ids": torch.arange(N) // 2, "label_smoothing": 0.1, "hard_negatives": drawn(N, 2, D, seed=5)}
PREFIXES = {
    "nt_xent": (F.nt_xent, formulas.nt_xent, [(2, N, D)], SOME),
    "info_nce": (F.info_nce, formulas.info_nce, [(N, D), (N, D), (17, D)], SOME | {"negative_ids": torch.arange(17)}),
    "clip_loss": (lambda x, y, **o: F.clip_loss(x, y, 5.0, **o), clip_of_unit_rows, [(N, D), (N, D)], SOME),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", PREFIXES)
def test_prefixes(op, dtype, implementation):
    if dtype == torch.bfloat16 and implementation.name == "triton" and implementation.device == "cpu":
        pytest.skip("the interpreter computes bfloat16 products wrongly")
    function, formula, shapes, some = PREFIXES[op]
    rows = [drawn(*shape, seed=i) for i, shape in enumerate(shapes)]
    for options in ({}, some, {"reduction": "none"}, {"reduction": "sum", "weights": drawn(N, seed=9).abs()}):
        ours = lambda *x: function(*x, dims=DIMS, dim_weights=DIM_WEIGHTS, **options)  # noqa: E731, B023
        check(ours, lambda *x: of_prefixes(formula)(*x, **options), rows, dtype)  # noqa: B023


def test_modules_of_prefixes():
    z0, z1 = drawn(N, D), drawn(N, D, seed=1)
    torch.testing.assert_close(
        NTXentLoss(0.3, dims=[4, D])(z0, z1), F.nt_xent(z0, z1, temperature=0.3, dims=(4, D), dim_weights=(1, 1))
    )
    bank = NTXentLoss(0.3, memory_bank_size=(17, D), dims=DIMS).double()
    queue = bank.memory_bank.bank.clone()
    torch.testing.assert_close(bank(z0, z1), F.info_nce(z0, z1, queue, temperature=0.3, dims=DIMS))
    scale = torch.tensor(3.0, dtype=torch.float64)
    torch.testing.assert_close(ClipLoss(dims=DIMS)(z0, z1, scale), F.clip_loss(z0, z1, scale, dims=DIMS))
    module = NTXentLoss(dims=DIMS)
    module.cross_entropy = torch.nn.CrossEntropyLoss(reduction="sum")
    with pytest.raises(ValueError, match="NTXentLoss: with options, cross_entropy must be"):
        module(z0, z1)


MISTAKES = [
    ({"dims": (4, 3)}, r"nt_xent: dims must be ascending and at most D = 12, got \(4, 3\)"),
    ({"dims": (4, 13)}, r"nt_xent: dims must be ascending and at most D = 12, got \(4, 13\)"),
    ({"dims": (0, 3)}, "nt_xent: dims must be at least 1, got 0"),
    ({"dims": ()}, r"nt_xent: dims must be lengths of prefixes, ascending and at most D, got \(\)"),
    ({"dims": (2.0,)}, r"nt_xent: dims must be an integer, got 2.0 \(float\)"),
    ({"dim_weights": (1,)}, "nt_xent: dim_weights must come with dims, got dim_weights alone"),
    ({"dims": (3, 4), "dim_weights": (1,)}, r"nt_xent: dim_weights must be 2 numbers, one of each of dims, got \(1,\)"),
]


@pytest.mark.parametrize(("options", "message"), MISTAKES)
def test_mistakes_in_prefixes(options, message):
    with pytest.raises(ValueError, match=message):
        F.nt_xent(drawn(N, D), drawn(N, D), **options)
    with pytest.raises(ValueError, match="with dims, all rows must be of one length D, got"):
        F.nt_xent(drawn(N, D), drawn(N, D + 1), dims=(3,))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda x: F.cross_entropy(x, torch.arange(N), reduction="max"),
            "cross_entropy: reduction must be one of mean",
        ),
        (lambda x: F.cross_entropy(x, LABELS, weights=torch.ones(3)), r"cross_entropy: weights must be \[9\]"),
        (
            lambda x: F.cross_entropy(x, LABELS, label_smoothing=1.5),
            r"cross_entropy: label_smoothing must be in \[0, 1\], got 1.5",
        ),
        (lambda x: F.negative_cosine(x, x, weights=x), r"negative_cosine: weights must be \[9\], got \(9, 12\)"),
        (lambda x: F.regression(x, x, reduction="all"), "regression: reduction must be one of mean, sum, none"),
        (
            lambda x: F.regression(x, x, reduction="none", rows=torch.arange(2)),
            "regression: with rows, reduction must be mean",
        ),
    ],
)
def test_mistakes(call, message):
    with pytest.raises(ValueError, match=message):
        call(drawn(N, D))
