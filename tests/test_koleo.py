"""KoLeo's C++ where it is delicate: NaN, distances and rows of next to no length, gradients beyond float16."""

import math

import pytest
import torch
from torch import Tensor

import fastjem.functional as F

pytest.importorskip("fastjem.kernels._C")


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("place", [5, 150, 650])
def test_a_nan_anywhere_is_the_nearest(place):
    """As in torch.argmax. Rows are looked at in blocks, and those behind the first strip as columns of its tile."""
    x = randn(700, 6)
    x[place, 2] = torch.nan
    nearest = torch.ops.fastjem.koleo_neighbors(x, x, 0, 1, 700, 1e-8)[:, 0]
    others = torch.arange(700) != place
    assert (nearest[others] == place).all()


def test_a_distance_whose_square_is_below_float32():
    x = torch.ones(2, 4)
    eps = 1e-25
    torch.testing.assert_close(F.koleo(x, eps=eps).item(), -math.log(2 * eps + eps), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_shorter_than_eps_are_divided_by_it(dtype):
    x = (randn(12, 5) * torch.linspace(0.02, 1, 12)[:, None]).to(dtype)
    eps = 0.9
    ours, exact = x.clone().requires_grad_(), x.double().requires_grad_()
    loss = F.koleo(ours, eps=eps)
    loss.backward()
    length = exact.norm(dim=1, keepdim=True)
    assert 2 < (length < eps).sum() < 12
    unit = exact / length.clamp_min(eps)
    nearest = (unit @ unit.T).fill_diagonal_(-2).argmax(1)
    formula = -((unit - unit[nearest] + eps).norm(dim=1) + eps).log().mean()
    formula.backward()
    assert exact.grad is not None and ours.grad is not None
    torch.testing.assert_close(loss.double(), formula.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=1e-5, atol=1e-6)


def test_gradients_beyond_float16_are_its_largest_numbers():
    x = torch.tensor([[1e-3, 2e-3], [1e-3, 2.01e-3], [-1e-3, 1e-3]], dtype=torch.float16)
    neighbors = torch.tensor([[1], [0], [0]])
    (gradient,) = torch.ops.fastjem.koleo(x, neighbors, 2.0, 1e-8, [True])[1]
    largest = torch.finfo(torch.float16).max
    assert gradient.isfinite().all()
    assert gradient.max() == largest and gradient.min() == -largest


@pytest.mark.parametrize("wrong", [-1, 3])
def test_neighbours_out_of_range_are_refused(wrong):
    message = ""
    try:
        torch.ops.fastjem.koleo(randn(3, 4), torch.tensor([[1], [wrong], [0]]), 2.0, 1e-8, [False])
    except ValueError as error:
        message = str(error)
    assert f"neighbors must be in [0, 3), got {wrong} at row 1" in message
