"""Masked patches as rows, SimDINO and the coding rate, SMoG: against what users would write."""

import pytest
import torch
import torch.nn.functional as TF

import fastjem.functional as F
from fastjem import nn
from fastjem.bench.cases.spectral import simdino


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("count", [None, 7, 9])
def test_masked_rows_are_those_of_the_mask_and_each_image_counts_alike(count):
    mask = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0], [0, 1, 0, 0], [1, 1, 1, 0]], dtype=torch.bool).view(4, 2, 2)
    rows, weights = F.masked_rows(mask, count)
    assert rows[:7].tolist() == [0, 2, 3, 9, 12, 13, 14]
    assert len(rows) == len(set(rows.tolist())) == (count or 7)
    expected = torch.tensor([1 / 3, 1 / 3, 1 / 3, 1, 1 / 3, 1 / 3, 1 / 3])
    torch.testing.assert_close(weights, torch.cat([expected, torch.zeros(len(rows) - 7)]))
    x, y = drawn(16, 5).requires_grad_(), drawn(16, 5, seed=1)
    loss = F.regression(x, y, rows=rows, weights=weights)
    of_image = [TF.smooth_l1_loss(x[at], TF.layer_norm(y, (5,))[at]) for at in ([0, 2, 3], [9], [12, 13, 14])]
    truth = torch.stack(of_image).mean()
    torch.testing.assert_close(loss, truth)
    for got, wanted in zip(torch.autograd.grad(loss, x), torch.autograd.grad(truth, x), strict=True):
        torch.testing.assert_close(got, wanted)


def test_capis_loss_is_made_of_a_bias_for_each_position():
    """docs/drop-in.md's lines: codes by position, over images, of the masked patches alone."""
    scores, predictions = drawn(6, 5, 9), drawn(6, 5, 9, seed=1).requires_grad_()
    rows, _ = F.masked_rows(drawn(6, 5, seed=2) > 0.3)
    bias = F.sinkhorn_bias(scores.transpose(0, 1), epsilon=0.3)
    logits = (scores / 0.3 + bias).flatten(0, 1)[rows]
    chosen = predictions.flatten(0, 1)[rows]
    loss = F.prototype_cross_entropy(
        [chosen], [logits], student_temperature=0.12, teacher_temperature=1.0, pairs="same"
    )
    codes = (scores / 0.3).exp()
    for _ in range(3):  # as CAPI's code has it: over images, then over clusters
        codes = codes / codes.sum(0, keepdim=True)
        codes = codes / codes.sum(2, keepdim=True)
    truth = -(codes * (predictions / 0.12).log_softmax(2)).sum(2).flatten()[rows].mean()
    torch.testing.assert_close(loss, truth)
    torch.testing.assert_close(torch.autograd.grad(loss, predictions)[0], torch.autograd.grad(truth, predictions)[0])


@pytest.mark.parametrize("width", [3, 8200])  # in registers, and longer than that
def test_rows_of_no_weight_may_be_any_and_rows_out_of_range_are_refused(width, implementation):
    x = drawn(4, width).float().to(implementation.device)
    x[2] = torch.nan
    x.requires_grad_()
    rows = torch.tensor([1, 3, 2, 3], device=x.device)
    weights = torch.tensor([1.0, 0.5, 0.0, 0.0], device=x.device)
    loss = F.regression(x, x.detach() * 2, rows=rows, weights=weights)
    torch.testing.assert_close(loss, F.regression(x, x.detach() * 2, rows=rows[:2], weights=weights[:2]))
    loss.backward()
    assert x.grad[[1, 3]].any(1).all() and not x.grad[[0, 2]].any()
    for outside in (4, -1):
        if implementation.name == "c++":
            with pytest.raises(ValueError, match=rf"regression_rows: rows must be in \[0, 4\), got {outside} at 0"):
                F.regression(x, x, rows=rows[:1] * 0 + outside)
        else:
            assert F.regression(x, x, rows=rows[:1] * 0 + outside).isnan()


@pytest.mark.parametrize("rows, width", [(9, 5), (5, 9)])
@pytest.mark.parametrize("views", [2, 4])
def test_simdino_is_the_authors(rows, width, views):
    teacher = [drawn(rows, width, seed=i) for i in range(2)]
    student = [drawn(rows, width, seed=5 + i).requires_grad_() for i in range(views)]
    loss = nn.SimDINOLoss()(teacher, student)
    truth = simdino(*teacher, *student)
    torch.testing.assert_close(loss, truth)
    for got, wanted in zip(
        torch.autograd.grad(-0.7 * loss, student), torch.autograd.grad(-0.7 * truth, student), strict=True
    ):
        torch.testing.assert_close(got, wanted)
    half = F.simdino([x.detach().half() for x in student], teacher, coefficient=2.0, expansion="mean")
    assert half.dtype == torch.float32 and half.isfinite()


@pytest.mark.parametrize("shape", [(9, 5), (2, 5, 9)])
def test_the_coding_rate_is_differentiable_twice_and_for_its_distortion(shape):
    z, eps = drawn(*shape).requires_grad_(), torch.tensor(0.3, dtype=torch.float64, requires_grad=True)

    def rate(z, eps):
        return F.total_coding_rate(z, eps=eps)

    assert torch.autograd.gradcheck(rate, (z, eps)) and torch.autograd.gradgradcheck(rate, (z, eps))


def test_groups_are_lightlys():
    theirs = pytest.importorskip("lightly.models.modules.heads").SMoGPrototypes(drawn(6, 4).float(), 0.9)
    ours = nn.SMoGPrototypes(drawn(6, 4).float(), 0.9)
    x = drawn(20, 4, seed=1).float()
    assert torch.equal(ours.assign_groups(x), theirs.assign_groups(x))
    moved = ours.get_updated_group_features(x)
    torch.testing.assert_close(moved, theirs.get_updated_group_features(x))
    torch.testing.assert_close(ours(x, moved), theirs(x, moved))
    ours.set_group_features(moved)
    assert torch.equal(ours.state_dict()["group_features"], moved)
