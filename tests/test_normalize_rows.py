"""Rows of unit length and the gradient through it: torch's `normalize` in float64 is the oracle."""

import pytest
import torch
from conftest import half_and_float32
from torch import Tensor
from torch.nn.functional import normalize

import fastjem.functional as F
from fastjem.functional.unit import unit_rows

# Rows are float32 whatever they came in; gradients are rounded to the rows' dtype.
TOLERANCES = {torch.float64: 1e-13, torch.float32: 5e-7, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def check(x: Tensor, eps: float) -> None:
    slopes = drawn(*x.shape, seed=1)
    x = x.detach().requires_grad_()
    exact = x.detach().double().requires_grad_()
    unit, expected = unit_rows(x, eps), normalize(exact, dim=-1, eps=eps)
    assert unit.dtype == (torch.float64 if x.dtype == torch.float64 else torch.float32)
    tolerance = TOLERANCES[unit.dtype]
    torch.testing.assert_close(unit.detach().double(), expected.detach(), rtol=tolerance, atol=tolerance)
    (found,) = torch.autograd.grad(unit, x, slopes.to(unit.dtype))
    (gradient,) = torch.autograd.grad(expected, exact, slopes)
    assert found.dtype == x.dtype
    length = exact.detach().norm(dim=-1, keepdim=True).clamp_min(eps)
    size = slopes.abs().amax(-1, keepdim=True) / length  # of terms that may cancel: of one column they do
    assert ((found.double() - gradient).abs() <= 4 * TOLERANCES[x.dtype] * size).all()


@pytest.mark.parametrize("dtype", [torch.float64, *half_and_float32()], ids=str)
@pytest.mark.parametrize("shape", [(5, 7), (300, 40), (2, 3, 128), (4, 1)], ids=str)
def test_values_and_gradients(shape, dtype, implementation):
    check(drawn(*shape).to(dtype), 1e-12)


def test_rows_shorter_than_eps_have_a_radial_gradient_too(implementation):
    x = drawn(6, 5)
    x[2] = 0
    x[4] *= 1e-3
    check(x.float(), 0.01)


def test_rows_that_are_apart_in_memory(implementation):
    check(drawn(6, 9).float()[:, :5], 1e-12)
    check(drawn(5, 6).float().T, 1e-12)


def test_gradients_of_a_number_and_of_rows_apart(implementation):
    """An expanded gradient, and one that is a part of another's memory."""
    for slopes in (torch.ones(()).expand(4, 5), drawn(4, 9, seed=1).float()[:, 2:7]):
        x = drawn(4, 5).float().requires_grad_()
        exact = x.detach().double().requires_grad_()
        (found,) = torch.autograd.grad(unit_rows(x), x, slopes)
        (gradient,) = torch.autograd.grad(normalize(exact, dim=1), exact, slopes.double())
        torch.testing.assert_close(found.double(), gradient, rtol=1e-5, atol=1e-6)


def test_a_second_derivative_and_batched_gradients_are_torchs():
    x = drawn(4, 5).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda z: unit_rows(z), (x,))
    slopes = drawn(3, 4, 5, seed=1)
    (found,) = torch.autograd.grad(unit_rows(x), x, slopes, is_grads_batched=True)
    for of, slope in zip(found, slopes, strict=True):
        torch.testing.assert_close(of, torch.autograd.grad(normalize(x, dim=1), x, slope)[0])


def test_the_gradient_stays_as_it_was_given():
    """Of rows whose gradient has other uses."""
    x = drawn(4, 5).float().requires_grad_()
    unit = unit_rows(x)
    slopes = drawn(4, 5, seed=1).float()
    before = slopes.clone()
    first = torch.autograd.grad(unit, x, slopes, retain_graph=True)[0].clone()
    assert torch.equal(slopes, before) and torch.equal(torch.autograd.grad(unit, x, slopes)[0], first)


def test_simdino_is_differentiable_twice():
    views = [drawn(6, 4, seed=i).requires_grad_() for i in range(2)]
    teacher = drawn(6, 4, seed=3)
    assert torch.autograd.gradgradcheck(lambda *z: F.simdino(list(z), [teacher]), views)
