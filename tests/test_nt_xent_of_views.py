"""NT-Xent and DCL of one batch, whole in one operator: few rows and many, views, weights, a learned temperature."""

import pytest
import torch
from conftest import INTERPRETING, half_and_float32
from torch import Tensor
from torch.nn.functional import normalize

import fastjem.functional as F
from fastjem.kernels import tiling
from fastjem.kernels.contrastive import of_views


def eager(z: Tensor, temperature: float | Tensor, weights: Tensor | None = None, decoupled: bool = False) -> Tensor:
    v, n, d = z.shape
    rows = normalize(z, dim=-1).reshape(v * n, d)
    logits = rows @ rows.T / temperature
    image = torch.arange(v * n) % n
    same_image = image[:, None] == image
    itself = torch.eye(v * n, dtype=torch.bool)
    lse = logits.masked_fill(same_image if decoupled else itself, -torch.inf).logsumexp(1)
    positives = logits.masked_fill(~same_image | itself, 0).sum(1) / (v - 1)
    if weights is not None:
        positives = positives * weights.expand(v, n).reshape(-1)
    return (lse - positives).mean()


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Views, images, width and temperature: several blocks of rows, an even number of them and an odd one; a view that ends
# within a block; widths of whole blocks and others; a pivot; running maxima; one image; one column.
# The interpreter takes minutes for the large ones.
LARGE = [pytest.mark.exhaustive] if INTERPRETING else []
SHAPES = [
    pytest.param((2, 150, 40, 0.5), marks=LARGE),
    pytest.param((2, 64, 128, 0.01), marks=LARGE),
    pytest.param((3, 50, 200, 0.0135), marks=LARGE),
    (3, 44, 72, 0.0135),
    (2, 9, 200, 0.05),
    (4, 21, 16, 0.1),
    (2, 3, 300, 0.5),
    (2, 9, 1, 0.3),
]


@pytest.fixture(params=["few", "many"])
def rows_are(request, monkeypatch, implementation):
    """A GPU's programs share the gradient of few rows; of many, each finishes its own, or torch multiplies."""
    if request.param == "many":
        if not INTERPRETING and implementation.name != "triton":
            pytest.skip("a GPU's alone")
        monkeypatch.setattr(tiling, "PROGRAMS", 2)
        if INTERPRETING:  # a GPU would have to compile as many kernels again
            from fastjem.kernels.contrastive import products

            monkeypatch.setattr(products, "MOST_ROWS", 0)
    return request.param


def check(ours, exact, inputs: list[Tensor], dtype: torch.dtype, device: str) -> None:
    leaves = [x.to(device, dtype if x.dim() else torch.float32).requires_grad_() for x in inputs]
    same = [x.detach().cpu().double().requires_grad_() for x in leaves]
    loss, again = ours(*leaves), ours(*leaves)
    gradients, repeated = (torch.autograd.grad(x, leaves, torch.full_like(x, -0.7)) for x in (loss, again))
    truth = exact(*same)
    assert torch.equal(loss, again) and all(map(torch.equal, gradients, repeated))
    tolerance = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}[dtype]
    torch.testing.assert_close(loss.cpu().double(), truth, rtol=tolerance / 10, atol=1e-6)
    for gradient, x, leaf in zip(
        gradients, torch.autograd.grad(truth, same, -0.7 * truth.new_ones(())), leaves, strict=True
    ):
        assert gradient.dtype == leaf.dtype and gradient.shape == leaf.shape
        # of one column the gradient is 0, and its terms as large as 1 / |z|
        assert (gradient.cpu().double() - x).norm() <= tolerance * x.norm() + (
            2e-5 if leaf.shape[-1:] == (1,) else 1e-6
        )


@pytest.mark.parametrize("dtype", half_and_float32(), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape, dtype, rows_are, implementation):
    v, n, d, temperature = shape
    z = draw(v, n, d)
    device = implementation.device
    check(lambda z: F.nt_xent(z, temperature=temperature), lambda z: eager(z, temperature), [z], dtype, device)
    weights = torch.rand(v, n, generator=torch.Generator().manual_seed(1))
    check(
        lambda z: F.dcl(z, temperature=temperature, weights=weights.to(device)),
        lambda z: eager(z, temperature, weights.double(), True),
        [z],
        dtype,
        device,
    )
    if v == 2:  # two tensors, one of which isn't dense
        z0, z1 = z
        check(
            lambda a, b: F.nt_xent(a.T.contiguous().T, b, temperature=temperature),
            lambda a, b: eager(torch.stack([a, b]), temperature),
            [z0, z1],
            dtype,
            device,
        )
    if temperature > 0.05:
        check(
            lambda z, t: F.nt_xent(z, temperature=t),
            lambda z, t: eager(z, t),
            [z, torch.tensor(temperature, dtype=torch.float64)],
            dtype,
            device,
        )


@pytest.mark.parametrize("lies", ["transposed", "apart", "repeated"])
def test_the_second_view_lies_otherwise(lies, implementation, poisoned):
    """A copy of it lives until the kernel has read it: nothing but a distance in memory names it."""
    n, d = 5, 100
    z0, z1 = draw(2, n, d)
    if lies == "repeated":
        z1 = z1[:1]
    otherwise = {
        "transposed": lambda x: x.T.contiguous().T,
        "apart": lambda x: torch.cat([x, x], 1)[:, :d],
        "repeated": lambda x: x.expand(n, d),
    }[lies]
    check(
        lambda a, b: F.nt_xent(a, otherwise(b), temperature=0.2),
        lambda a, b: eager(torch.stack([a, b.expand(n, d)]), 0.2),
        [z0, z1],
        torch.float32,
        implementation.device,
    )


def test_walks_in_pieces_are_joined(implementation, monkeypatch):
    """Of very many rows, columns' sums don't fit in memory at once."""
    if not INTERPRETING:
        pytest.skip("a GPU's alone")
    monkeypatch.setattr(tiling, "PROGRAMS", 2)
    monkeypatch.setattr(tiling, "COLUMN_SUMS", 400)
    z = draw(2, 190, 16)
    for temperature in (0.5, 0.01):
        check(
            lambda z: F.nt_xent(z, temperature=temperature),  # noqa: B023
            lambda z: eager(z, temperature),  # noqa: B023
            [z],
            torch.float32,
            implementation.device,
        )


def test_rows_of_zeros_and_the_same_tensor_twice(implementation):
    z = draw(20, 16).float().to(implementation.device)
    z[3] = 0
    z.requires_grad_()
    loss = F.nt_xent(z, z)
    (gradient,) = torch.autograd.grad(loss, z)
    stacked = torch.stack([z.detach(), z.detach()]).requires_grad_()
    expected = F.nt_xent(stacked)
    assert torch.equal(loss, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, stacked)[0].sum(0))
    assert gradient.isfinite().all()


def test_what_rounding_weights_adds_along_a_row_is_taken_away(implementation):
    """Of rows that are nearly alike the sum of the others is along the row, and so is the error of rounded weights."""
    if not INTERPRETING:
        pytest.skip("a GPU's alone")
    z = (draw(1, 1, 300) + 0.01 * draw(2, 9, 300, seed=1)).half().requires_grad_()
    (gradient,) = torch.autograd.grad(F.nt_xent(z, temperature=0.5), z, torch.tensor(256.0))
    along = (gradient.double() * normalize(z.detach().double(), dim=-1)).sum(-1)
    assert along.norm() <= 2e-4 * gradient.double().norm()  # 1.9e-5; 1.3e-2 if <u, dL/du> is that of exact weights


def test_rows_shorter_than_the_least_divisor(rows_are, implementation):
    """They are divided by 1e-12, so that their gradient is along them, too."""
    z = draw(2, 5, 16)
    z[0, 2] *= 3e-13 / z[0, 2].norm()
    leaf = z.to(implementation.device, torch.float32).requires_grad_()
    same = leaf.detach().cpu().double().requires_grad_()
    loss, truth = F.nt_xent(*leaf, temperature=0.5), eager(same, 0.5)
    torch.testing.assert_close(loss.detach().cpu().double(), truth.detach(), rtol=1e-6, atol=1e-6)
    loss.backward()
    truth.backward()
    for row, expected in zip(leaf.grad.cpu().double().flatten(0, 1), same.grad.flatten(0, 1), strict=True):
        assert (row - expected).norm() <= 2e-6 * expected.norm()


@pytest.mark.parametrize("value", [0.0, -0.5])
def test_a_learned_temperature_that_isnt_positive_gives_no_number(value, implementation):
    """Its value is known to the device alone. A finite loss would go on as if there were such a temperature."""
    z = draw(2, 8, 16).float().to(implementation.device).requires_grad_()
    temperature = torch.tensor(value, device=implementation.device, requires_grad=True)
    loss = F.nt_xent(z, temperature=temperature)
    assert all(x.isnan().all() for x in (loss, *torch.autograd.grad(loss, (z, temperature))))


def test_batched_upstream_gradients_are_those_one_by_one():
    z, t = draw(2, 8, 16).requires_grad_(), torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    loss = F.nt_xent(z, temperature=t)
    upstream = torch.tensor([1.0, -2.0], dtype=torch.float64)
    batched = torch.autograd.grad(loss, (z, t), upstream, retain_graph=True, is_grads_batched=True)
    for i, u in enumerate(upstream):
        for got, expected in zip(batched, torch.autograd.grad(loss, (z, t), u, retain_graph=True), strict=True):
            torch.testing.assert_close(got[i], expected)


def test_the_state_is_read_in_whole_tiles():
    assert of_views.state_rows(1) == of_views.state_rows(128) == 128 and of_views.state_rows(129) == 256
