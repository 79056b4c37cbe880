"""CLIP of one batch, whole in one operator: few pairs and many, a learned scale of either sign, one tower alone."""

import pytest
import torch
from cases import eager_clip
from conftest import INTERPRETING, half_and_float32
from torch import Tensor
from torch.nn.functional import normalize

import fastjem.functional as F
from fastjem.kernels import tiling

# Pairs, width and scale: several blocks, ragged; columns of whole blocks and others; wider than a block on the chip, in
# more than one piece; a large scale, a negative one, none; one pair; one column.
# The interpreter takes minutes for the large ones.
LARGE = [pytest.mark.exhaustive] if INTERPRETING else []
SHAPES = [
    pytest.param((150, 40, 14.0), marks=LARGE),
    pytest.param((128, 128, 100.0), marks=LARGE),
    (70, 200, -20.0),
    (40, 300, 5.0),
    (21, 16, 0.0),
    (1, 8, 3.0),
    (9, 1, 2.0),
]


def pairs(n: int, d: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [normalize(torch.randn(n, d, generator=generator, dtype=torch.float64), dim=1) for _ in range(2)]


def check(inputs: list[Tensor], wanted: list[bool], dtype: torch.dtype, device: str) -> None:
    leaves = [x.to(device, dtype if x.dim() else torch.float32) for x in inputs]
    for x, want in zip(leaves, wanted, strict=True):
        x.requires_grad_(want)
    same = [x.detach().cpu().double().requires_grad_(x.requires_grad) for x in leaves]
    asked = [[x for x in of if x.requires_grad] for of in (leaves, same)]
    loss, again = F.clip_loss(*leaves), F.clip_loss(*leaves)
    gradients, repeated = (torch.autograd.grad(x, asked[0], torch.full_like(x, -0.7)) for x in (loss, again))
    truth = eager_clip(*same)
    assert torch.equal(loss, again) and all(map(torch.equal, gradients, repeated))
    tolerance = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}[dtype]
    torch.testing.assert_close(loss.detach().cpu().double(), truth.detach(), rtol=tolerance / 10, atol=1e-6)
    expected = torch.autograd.grad(truth, asked[1], torch.full_like(truth, -0.7))
    for gradient, x, leaf in zip(gradients, expected, asked[0], strict=True):
        assert gradient.dtype == leaf.dtype and gradient.shape == leaf.shape
        assert (gradient.cpu().double() - x).norm() <= tolerance * x.norm() + 1e-6


@pytest.mark.parametrize("dtype", half_and_float32(), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape, dtype, implementation):
    n, d, scale = shape
    inputs = [*pairs(n, d), torch.tensor(scale, dtype=torch.float64)]
    check(inputs, [True, True, True], dtype, implementation.device)


@pytest.mark.parametrize("dtype", half_and_float32(), ids=str)
@pytest.mark.parametrize("wanted", ["x", "y", "scale", "x, y", "y, scale", "x, scale"])
def test_only_what_is_wanted(wanted, dtype, implementation):
    inputs = [*pairs(40, 24), torch.tensor(14.0, dtype=torch.float64)]
    check(inputs, [name in wanted.split(", ") for name in ("x", "y", "scale")], dtype, implementation.device)


@pytest.mark.parametrize("wanted", [(True, True, True), (False, True, True), (True, False, False)], ids=str)
def test_torchs_product_of_many_pairs(wanted, implementation, monkeypatch):
    if not INTERPRETING:
        pytest.skip("a GPU's alone")
    from fastjem.kernels.contrastive import products

    monkeypatch.setattr(products, "MOST_ROWS", 8)
    inputs = [*pairs(9, 24), torch.tensor(14.0, dtype=torch.float64)]
    check(inputs, list(wanted), torch.float32, implementation.device)


def test_walks_in_pieces_are_joined(implementation, monkeypatch):
    """Of very many pairs neither columns' sums nor weights are in memory at once; programs don't share a block."""
    if not INTERPRETING:
        pytest.skip("a GPU's alone")
    monkeypatch.setattr(tiling, "PROGRAMS", 1)
    monkeypatch.setattr(tiling, "COLUMN_SUMS", 700)
    monkeypatch.setattr(tiling, "WEIGHTS_BYTES", 1)
    for dtype in half_and_float32():
        check([*pairs(200, 16), torch.tensor(14.0, dtype=torch.float64)], [True] * 3, dtype, implementation.device)


def test_the_same_tensor_twice_and_rows_that_are_not_dense(implementation):
    x = pairs(20, 16)[0].float().to(implementation.device).T.contiguous().T.requires_grad_()
    loss = F.clip_loss(x, x, 5.0)
    (gradient,) = torch.autograd.grad(loss, x)
    a, b = (x.detach().contiguous().requires_grad_() for _ in range(2))
    expected = F.clip_loss(a, b, 5.0)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, sum(torch.autograd.grad(expected, (a, b))))


def test_batched_upstream_gradients_are_those_one_by_one():
    inputs = [*pairs(70, 1100), torch.tensor(5.0, dtype=torch.float64)]
    for x in inputs:
        x.requires_grad_()
    loss = F.clip_loss(*inputs)
    upstream = torch.tensor([1.0, -2.0], dtype=torch.float64)
    batched = torch.autograd.grad(loss, inputs, upstream, retain_graph=True, is_grads_batched=True)
    for i, u in enumerate(upstream):
        for got, expected in zip(batched, torch.autograd.grad(loss, inputs, u, retain_graph=True), strict=True):
            torch.testing.assert_close(got[i], expected)
