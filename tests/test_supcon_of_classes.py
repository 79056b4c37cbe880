"""SupCon of one batch, whole in one operator: few rows and many, classes of any size, one anchor, rows as they come."""

import pytest
import torch
from conftest import INTERPRETING, half_and_float32
from test_nt_xent_of_views import check, draw, rows_are  # noqa: F401
from torch import Tensor
from torch.nn.functional import normalize

import fastjem.functional as F
from fastjem.kernels import tiling


def eager(
    z: Tensor, labels: Tensor | None, temperature: float | Tensor, anchors: str = "all", unit: bool = True
) -> Tensor:
    v, n, d = z.shape
    rows = (normalize(z, dim=-1) if unit else z).reshape(v * n, d)
    logits = rows @ rows.T / temperature
    classes = (torch.arange(n) if labels is None else labels.cpu()).repeat(v)
    itself = torch.eye(v * n, dtype=torch.bool)
    positive = (classes[:, None] == classes) & ~itself
    lse = logits.masked_fill(itself, -torch.inf).logsumexp(1)
    count = positive.sum(1)
    losses = (lse - logits.masked_fill(~positive, 0).sum(1) / count.clamp_min(1)).where(count > 0, 0)
    return losses[: n if anchors == "one" else v * n].mean()


def some_labels(n: int, classes: int) -> Tensor:
    """Some classes have one image alone."""
    labels = torch.randint(classes, (n,), generator=torch.Generator().manual_seed(2))
    labels[::7] = -5 - torch.arange(len(labels[::7]))
    return labels


# Views, images, width, classes and temperature: several blocks of rows, even and odd; blocks that end within a view;
# widths of whole blocks and others; one view; running maxima; a pivot; one image; one column.
# The interpreter takes minutes for the large ones.
LARGE = [pytest.mark.exhaustive] if INTERPRETING else []
SHAPES = [
    pytest.param((2, 150, 40, 11, 0.5), marks=LARGE),
    pytest.param((2, 64, 128, 9, 0.01), marks=LARGE),
    (1, 90, 16, 30, 0.1),
    (3, 9, 16, 3, 0.0135),
    (2, 9, 1, 3, 0.3),
    (2, 1, 16, 1, 0.3),
]


@pytest.mark.parametrize("dtype", half_and_float32(), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape, dtype, rows_are, implementation):  # noqa: F811
    v, n, d, classes, temperature = shape
    z = draw(v, n, d)
    labels = some_labels(n, classes)
    on_device = labels.to(implementation.device)
    for anchors in ("all", "one"):
        check(
            lambda z: F.supcon(z, on_device, temperature=temperature, anchors=anchors),  # noqa: B023
            lambda z: eager(z, labels, temperature, anchors),  # noqa: B023
            [z],
            dtype,
            implementation.device,
        )
    if temperature > 0.05:
        short = z / (2 * d**0.5)
        check(
            lambda z, t: F.supcon(z, on_device, temperature=t, normalize=False),
            lambda z, t: eager(z, labels, t, unit=False),
            [short, torch.tensor(temperature, dtype=torch.float64)],
            dtype,
            implementation.device,
        )
        check(
            lambda z, t: F.supcon(z.transpose(0, 1).contiguous().transpose(0, 1), temperature=t, anchors="one"),
            lambda z, t: eager(z, None, t, "one"),
            [z, torch.tensor(temperature, dtype=torch.float64)],
            dtype,
            implementation.device,
        )


@pytest.mark.parametrize("labels", [None, torch.zeros(40).long(), torch.arange(40)], ids=["none", "alike", "different"])
def test_all_labels_alike_or_different(labels, rows_are, implementation):  # noqa: F811
    z = draw(2, 40, 16)
    given = None if labels is None else labels.to(implementation.device)
    check(
        lambda z: F.supcon(z, given),
        lambda z: eager(z, labels, 0.07),
        [z],
        torch.float32,
        implementation.device,
    )


HUGE = 1 << 40
LABELS = {
    "bytes": torch.tensor([3, 250, 3, 7, 250, 7, 3], dtype=torch.uint8),
    "alike in 32 bits": torch.tensor([1, 1 + (1 << 32), 1, HUGE, 0, HUGE, 1 + (1 << 32)]),
    "float64": torch.tensor([0.5, -0.0, 0.5, 1e300, 0.0, 1e300, 1e-300], dtype=torch.float64),
    "float16": torch.tensor([0.5, -0.0, 0.5, 3.0, 0.0, 2.0, 2.0], dtype=torch.float16),
    "bool": torch.tensor([True, False, True, True, False, True, False]),
    "not dense": torch.arange(14)[::2] % 3,
}


@pytest.mark.parametrize("name", LABELS)
def test_labels_of_any_dtype(name, implementation):
    labels = LABELS[name]
    given = labels.to(implementation.device)
    check(
        lambda z: F.supcon(z, given, temperature=0.2),
        lambda z: eager(z, labels, 0.2),
        [draw(2, 7, 16)],
        torch.float32,
        implementation.device,
    )


def test_one_row_has_nothing_to_be_compared_with(implementation):
    z = draw(1, 1, 16).float().to(implementation.device).requires_grad_()
    loss = F.supcon(z)
    assert loss == 0 and not torch.autograd.grad(loss, z)[0].any()


def test_walks_in_pieces_are_joined(implementation, monkeypatch):
    """Of very many rows, columns' sums don't fit in memory at once."""
    if not INTERPRETING:
        pytest.skip("a GPU's alone")
    monkeypatch.setattr(tiling, "PROGRAMS", 2)
    monkeypatch.setattr(tiling, "COLUMN_SUMS", 400)
    labels = some_labels(190, 20)
    check(
        lambda z: F.supcon(z, labels, temperature=0.01),
        lambda z: eager(z, labels, 0.01),
        [draw(2, 190, 16)],
        torch.float32,
        implementation.device,
    )


def test_a_row_that_is_no_number_makes_the_loss_none(rows_are, implementation):  # noqa: F811
    z = draw(2, 40, 16).float().to(implementation.device)
    z[1, 3, 2] = torch.nan
    labels = torch.arange(40, device=implementation.device) // 2
    leaf = z.requires_grad_()
    loss = F.supcon(leaf, labels)
    (gradient,) = torch.autograd.grad(loss, leaf)
    assert loss.isnan() and gradient.isnan().all()


def test_nobody_is_pulled_by_a_row_without_positives_that_is_no_number(implementation):
    """It is everybody's candidate all the same, so that the loss is no number either."""
    z = draw(1, 6, 16).float().to(implementation.device)
    z[0, 5] = torch.nan
    labels = torch.tensor([0, 0, 1, 1, 2, 3], device=implementation.device)
    assert F.supcon(z, labels).isnan()
    assert F.supcon(z[:, :5], labels[:5]).isfinite()


@pytest.mark.parametrize("value", [0.0, -0.5])
def test_a_learned_temperature_that_isnt_positive_gives_no_number(value, implementation):
    z = draw(2, 8, 16).float().to(implementation.device).requires_grad_()
    temperature = torch.tensor(value, device=implementation.device, requires_grad=True)
    loss = F.supcon(z, torch.arange(8, device=z.device) // 2, temperature=temperature)
    assert all(x.isnan().all() for x in (loss, *torch.autograd.grad(loss, (z, temperature))))


def test_rows_shorter_than_the_least_divisor(implementation):
    """They are divided by 1e-12, so that their gradient is along them, too."""
    z = draw(2, 5, 16)
    z[0, 2] *= 3e-13 / z[0, 2].norm()
    leaf = z.to(implementation.device, torch.float32).requires_grad_()
    same = leaf.detach().cpu().double().requires_grad_()
    labels = torch.tensor([0, 1, 0, 1, 2])
    F.supcon(leaf, labels.to(leaf.device), temperature=0.5).backward()
    eager(same, labels, 0.5).backward()
    for row, expected in zip(leaf.grad.cpu().double().flatten(0, 1), same.grad.flatten(0, 1), strict=True):
        assert (row - expected).norm() <= 2e-6 * expected.norm()


def test_backward_again_and_batched_upstream_gradients():
    z, t = draw(2, 8, 16).requires_grad_(), torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    loss = F.supcon(z, torch.arange(8) // 3, temperature=t)
    upstream = torch.tensor([1.0, -2.0], dtype=torch.float64)
    batched = torch.autograd.grad(loss, (z, t), upstream, retain_graph=True, is_grads_batched=True)
    for i, u in enumerate(upstream):
        for got, expected in zip(batched, torch.autograd.grad(loss, (z, t), u, retain_graph=True), strict=True):
            torch.testing.assert_close(got[i], expected)
