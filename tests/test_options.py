"""Options of contrastive losses, in many combinations, against formulas of all N x N logits (option_formulas.py)."""

import random

import option_formulas as formulas
import pytest
import torch
from torch import Tensor

import fastjem.functional as F

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
