"""NNCLR's loss: the nearest neighbours of one view are the positives of the other's predictions."""

import pytest
import torch
from cases import eager_nt_xent
from torch import Tensor
from torch.nn.functional import normalize

import fastjem.functional as F
from fastjem.nn import NNCLRLoss

N, K, D = 7, 40, 5


def formula(z0: Tensor, z1: Tensor, p0: Tensor, p1: Tensor, bank: Tensor, temperature: float) -> Tensor:
    near = [bank[(normalize(z, dim=1) @ normalize(bank, dim=1).T).argmax(1)] for z in (z0, z1)]
    losses = [eager_nt_xent(near[0], p1, temperature=temperature), eager_nt_xent(near[1], p0, temperature=temperature)]
    return sum(losses) / 2


def inputs(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(n, D, generator=g, dtype=torch.float64).to(dtype) for n in (N, N, N, N, K)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_value_and_gradient(dtype, temperature):
    given = inputs(dtype)
    predictions = [p.requires_grad_() for p in given[2:4]]
    loss = F.nnclr(*given, temperature=temperature)
    exact = [x.detach().double() for x in given]
    leaves = [p.requires_grad_() for p in exact[2:4]]
    expected = formula(*exact, temperature)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
    got = torch.autograd.grad(-3 * loss, predictions)
    for g, e in zip(got, torch.autograd.grad(-3 * expected, leaves), strict=True):
        torch.testing.assert_close(g.double(), e, rtol=1e-5, atol=1e-6)


def test_a_learned_temperature_and_projections_that_are_constants():
    z0, z1, p0, p1, bank = (x.requires_grad_() for x in inputs())
    temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    loss = F.nnclr(z0, z1, p0, p1, bank, temperature=temperature)
    given = (z0, z1, bank, temperature)
    *constants, learned = torch.autograd.grad(loss, given, allow_unused=True)
    assert constants == [None] * 3
    step = 1e-6
    ends = [F.nnclr(z0, z1, p0, p1, bank, temperature=0.3 + sign * step) for sign in (1, -1)]
    torch.testing.assert_close(learned, (ends[0] - ends[1]) / (2 * step), rtol=1e-6, atol=1e-8)


def test_module_enqueues_after_the_loss_and_the_bank_may_change_before_backward():
    torch.manual_seed(0)
    loss = NNCLRLoss(0.2, (K, D)).double()
    *views, _ = inputs()
    before = loss.memory_bank.bank.clone()
    predictions = [p.requires_grad_() for p in views[2:]]
    got = loss(*views)
    torch.testing.assert_close(loss.memory_bank.bank[:N], views[1])
    torch.testing.assert_close(got, formula(*views, before, 0.2))
    expected = torch.autograd.grad(formula(*views, before, 0.2), predictions)
    torch.testing.assert_close(torch.autograd.grad(got, predictions), expected)
    after = loss.memory_bank.bank.clone()
    loss.eval()(*views)
    assert torch.equal(loss.memory_bank.bank, after)


def test_mistakes():
    z0, z1, p0, p1, bank = inputs()
    with pytest.raises(ValueError, match=r"nnclr: z0, z1, p0 and p1 must be \[N, D\], bank \[K, D\], got"):
        F.nnclr(z0, z1, p0[1:], p1, bank)
    with pytest.raises(ValueError, match=r"nnclr: .* got \(7, 5\) and \(40, 4\)"):
        F.nnclr(z0, z1, p0, p1, bank[:, 1:])
