"""SigLIP of one batch, whole in one operator: few pairs and many, numbers and learned ones, one tower alone; and CLIP's
scale as a number."""

from collections.abc import Callable

import pytest
import torch
from cases import eager_clip, eager_siglip
from conftest import INTERPRETING, half_and_float32
from test_clip_of_pairs import pairs
from torch import Tensor

import fastjem.functional as F
from fastjem.kernels import tiling

# Pairs, width, scale and bias: several blocks, ragged; wider than a block, in more than one piece; saturated; one pair.
SHAPES = [(150, 40, 14.0, -10.0), (70, 200, -20.0, 1.0), (40, 8, 200.0, -3.0), (1, 8, 3.0, 0.0), (9, 1, 2.0, -1.0)]
NAMES = ("x", "y", "scale", "bias")


def check(
    loss_of: Callable[..., Tensor],
    truth_of: Callable[..., Tensor],
    rows: list[Tensor],
    numbers: list[float],
    learned: list[bool],  # the others stay Python's numbers
    wanted: list[bool],
    dtype: torch.dtype,
    device: str,
) -> None:
    leaves = [x.to(device, dtype) for x in rows]
    given = [
        torch.tensor(value, device=device) if as_is else value for value, as_is in zip(numbers, learned, strict=True)
    ]
    same = [x.detach().cpu().double() for x in leaves] + [torch.tensor(value, dtype=torch.float64) for value in numbers]
    inputs = [*leaves, *given]
    asked = []
    for x, twin, want in zip(inputs, same, wanted, strict=True):
        if want:
            asked.append((x.requires_grad_(), twin.requires_grad_()))
    of, of_twins = ([pair[i] for pair in asked] for i in range(2))
    loss, again = loss_of(*inputs), loss_of(*inputs)
    gradients, repeated = (torch.autograd.grad(z, of, torch.full_like(z, -0.7)) for z in (loss, again))
    assert torch.equal(loss, again) and all(map(torch.equal, gradients, repeated))
    truth = truth_of(*same)
    tolerance = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}[dtype]
    torch.testing.assert_close(loss.detach().cpu().double(), truth.detach(), rtol=tolerance / 10, atol=1e-6)
    expected = torch.autograd.grad(truth, of_twins, torch.full_like(truth, -0.7))
    for gradient, x, leaf in zip(gradients, expected, of, strict=True):
        assert gradient.dtype == leaf.dtype and gradient.shape == leaf.shape
        assert (gradient.cpu().double() - x).norm() <= tolerance * x.norm() + 1e-6


def siglip(rows: list[Tensor], numbers: list[float], learned: list[bool], wanted: list[bool], *where) -> None:
    check(F.siglip_loss, eager_siglip, rows, numbers, learned, wanted, *where)


@pytest.mark.parametrize("dtype", half_and_float32(), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape, dtype, implementation):
    n, d, *numbers = shape
    siglip(pairs(n, d), numbers, [True, True], [True] * 4, dtype, implementation.device)


@pytest.mark.parametrize("dtype", half_and_float32(), ids=str)
@pytest.mark.parametrize("wanted", ["x", "y", "scale", "bias", "x, bias", "y, scale"])
def test_only_what_is_wanted(wanted, dtype, implementation):
    asked = [name in wanted.split(", ") for name in NAMES]
    siglip(pairs(40, 24), [14.0, -5.0], [True, True], asked, dtype, implementation.device)


@pytest.mark.parametrize("learned", [(False, False), (True, False), (False, True)], ids=str)
def test_numbers_of_python(learned, implementation):
    for dtype in half_and_float32():
        asked = [True, True, *learned]
        siglip(pairs(21, 24), [14.3, -5.7], list(learned), asked, dtype, implementation.device)


@pytest.mark.parametrize("width", [24, 300])
def test_clips_scale_as_a_number_of_python(width, implementation):
    for dtype in half_and_float32():
        rows, where = pairs(21, width), (dtype, implementation.device)
        check(F.clip_loss, eager_clip, rows, [14.3], [False], [True, True, False], *where)
        check(F.clip_loss, eager_clip, rows, [-3.7], [False], [False, True, False], *where)


def test_bands_of_weights_are_joined(implementation, monkeypatch):
    if not INTERPRETING:
        pytest.skip("a GPU's alone")
    monkeypatch.setattr(tiling, "WEIGHTS_BYTES", 1)
    rows, where = pairs(130, 16), (torch.float32, implementation.device)
    siglip(rows, [14.0, -5.0], [True, True], [True] * 4, *where)
    check(F.clip_loss, eager_clip, rows, [2.0], [True], [True] * 3, *where)


def test_one_tensor_for_several(implementation):
    """For both sides, and for scale and bias."""
    x = pairs(20, 16)[0].float().to(implementation.device).T.contiguous().T.requires_grad_()
    t = torch.tensor(2.0, device=implementation.device, requires_grad=True)
    loss = F.siglip_loss(x, x, t, t)
    gradients = torch.autograd.grad(loss, (x, t))
    inputs = [z.detach().contiguous().clone().requires_grad_() for z in (x, x, t, t)]
    expected = F.siglip_loss(*inputs)
    torch.testing.assert_close(loss, expected)
    a, b, scale, bias = torch.autograd.grad(expected, inputs)
    torch.testing.assert_close(gradients, (a + b, scale + bias))


def test_a_graph_that_is_kept_gives_its_gradients_again(implementation):
    x, y = (z.float().to(implementation.device).requires_grad_() for z in pairs(20, 16))
    loss = F.siglip_loss(x, y, 5.0, -2.0)
    first = torch.autograd.grad(loss, (x, y), retain_graph=True)
    again = torch.autograd.grad(loss, (x, y), torch.full_like(loss, 3.0))
    torch.testing.assert_close(again, tuple(3 * g for g in first))


def test_batched_upstream_gradients_are_those_one_by_one():
    inputs = [*pairs(70, 1100), *(torch.tensor(number, dtype=torch.float64) for number in (5.0, -2.0))]
    for x in inputs:
        x.requires_grad_()
    loss = F.siglip_loss(*inputs)
    upstream = torch.tensor([1.0, -2.0], dtype=torch.float64)
    batched = torch.autograd.grad(loss, inputs, upstream, retain_graph=True, is_grads_batched=True)
    for i, u in enumerate(upstream):
        for got, expected in zip(batched, torch.autograd.grad(loss, inputs, u, retain_graph=True), strict=True):
            torch.testing.assert_close(got[i], expected)
