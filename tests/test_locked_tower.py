"""A tower that needs no gradient costs no product: the FLOPs of a loss, forward and backward."""

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import fastjem.functional as F

N, D = 512, 64
PRODUCT = 2 * N * N * D  # FLOPs of one product of all pairs


def products(loss, *inputs: Tensor) -> float:
    """FLOPs, in products of all pairs; the profiler itself counts none for addmm_."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        loss(*inputs).backward()
    flops = 0
    for event in seen.events():
        if event.name in ("aten::mm", "aten::addmm_"):
            left, right = event.input_shapes[:2] if event.name == "aten::mm" else event.input_shapes[1:3]
            flops += 2 * left[0] * left[1] * right[1]
    return flops / PRODUCT


def siglip(x: Tensor, y: Tensor, s: Tensor) -> Tensor:
    return F.siglip_loss(x, y, s, -s)


def siglip_with_ids(x: Tensor, y: Tensor, s: Tensor) -> Tensor:
    return F.siglip_loss(x, y, s, -s, ids=torch.arange(N) // 2)


def info_nce(x: Tensor, y: Tensor, s: Tensor) -> Tensor:
    return F.info_nce(x, x.detach(), y)


@pytest.mark.parametrize(
    "loss, both, one",
    [(F.clip_loss, 4, 3), (siglip, 3, 2), (siglip_with_ids, 3, 2), (info_nce, 4, 2)],
    ids=["clip_loss", "siglip_loss", "siglip_loss with ids", "info_nce"],
)
def test_no_product_for_a_locked_tower(loss, both, one):
    """CLIP: similarities twice, and a product for each tower. SigLIP's gradients come with the loss, with ids too, and
    InfoNCE's where the negatives are constants."""
    x, y = torch.randn(2, N, D)
    scale = torch.tensor(5.0, requires_grad=True)
    learned = products(loss, x.clone().requires_grad_(), y.clone().requires_grad_(), scale)
    locked = products(loss, x.clone().requires_grad_(), y, scale)
    assert learned == pytest.approx(both, abs=0.01)
    assert locked == pytest.approx(one, abs=0.01)
