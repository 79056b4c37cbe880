"""CoCa's and the distilling loss against open_clip's formulas, in float64, float32 and compiled."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from fastjem import nn

N = 9


def rows(width: int, seed: int, dtype: torch.dtype) -> Tensor:
    return normalize(torch.randn(N, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(
        dtype
    )


def similarities(x: Tensor, y: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    logits = scale * x @ y.T
    return logits, logits.T


def clip(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    labels = torch.arange(N)
    return sum(cross_entropy(logits, labels) for logits in similarities(x, y, scale)) / 2


def distilled(x: Tensor, y: Tensor, scale: Tensor, its: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    pairs = zip(similarities(x, y, scale), similarities(*its), strict=True)
    return sum(-(b.softmax(1) * a.log_softmax(1)).sum(1).mean() for a, b in pairs) / 2


def captions(logits: Tensor, labels: Tensor, pad: int) -> Tensor:
    return cross_entropy(logits.permute(0, 2, 1), labels, ignore_index=pad)


def gradients(outputs: tuple[Tensor, Tensor], *leaves: Tensor) -> list[Tensor]:
    return [*(x.detach() for x in outputs), *torch.autograd.grad(outputs[0] + 1.7 * outputs[1], leaves)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("width", [12, 16, 20])  # the teacher's, below, as and above the student's
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_distilling(dtype, width, compiled):
    x, y = (rows(16, i, dtype).requires_grad_() for i in (0, 1))
    scale = torch.tensor(12.0, dtype=dtype, requires_grad=True)
    its = (rows(width, 2, dtype), rows(width, 3, dtype), torch.tensor(20.0, dtype=dtype))
    loss = nn.DistillClipLoss()
    module = torch.compile(loss, fullgraph=True) if compiled else loss
    found = gradients(module(x, y, scale, *its), x, y, scale)
    expected = gradients((clip(x, y, scale), distilled(x, y, scale, its)), x, y, scale)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10 if dtype == torch.float64 and not compiled else 1e-5, atol=2e-6)
    named = loss(x, y, scale, *its, output_dict=True)
    assert torch.equal(named["distill_loss"], loss(x, y, scale, *its)[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("weight", [0, 1.5])
def test_captions(dtype, weight):
    x, y = (rows(16, i, dtype).requires_grad_() for i in (0, 1))
    scale = torch.tensor(12.0, dtype=dtype, requires_grad=True)
    logits = torch.randn(N, 5, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    logits.requires_grad_()
    labels = torch.randint(0, 11, (N, 5), generator=torch.Generator().manual_seed(1))
    loss = nn.CoCaLoss(2.0, weight, pad_id=3)
    leaves = (x, y, scale, logits) if weight else (logits,)
    found = gradients(loss(x, y, logits, labels, scale), *leaves)
    expected = (weight * clip(x, y, scale), 2.0 * captions(logits, labels, 3))
    for a, b in zip(found, gradients(expected, *leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=2e-6)
    assert set(loss(x, y, logits, labels, scale, output_dict=True)) == {"contrastive_loss", "caption_loss"}


def test_what_does_not_fit_is_refused():
    x, y, scale = rows(16, 0, torch.float32), rows(16, 1, torch.float32), torch.tensor(10.0)
    with pytest.raises(ValueError, match=r"CoCaLoss: logits and labels must be \[N, L, words\] and \[N, L\], got"):
        nn.CoCaLoss(1, 1)(x, y, torch.zeros(N, 5, 11), torch.zeros(N, 4, dtype=torch.long), scale)
    with pytest.raises(
        ValueError, match=r"DistillClipLoss: image_features and text_features must be \[N, D\] both, dist"
    ):
        nn.DistillClipLoss()(x, y, scale, x[:3], y, scale)
    with pytest.raises(ValueError, match="DistillClipLoss: dist_logit_scale must be a positive finite number, got 0"):
        nn.DistillClipLoss()(x, y, scale, x, y, 0.0)
