"""Values and gradients of the packages that people come from."""

import pytest
import torch

import fastjem.functional as F

lightly = pytest.importorskip("lightly.loss", reason="lightly is not installed")


def views(n: int, d: int, seed: int = 0, count: int = 2) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return list(torch.randn(count, n, d, generator=g, dtype=torch.float64).unbind())


def assert_same(ours, theirs, inputs: list[torch.Tensor]) -> None:
    results = []
    for function in (ours, theirs):
        leaves = [x.clone().requires_grad_() for x in inputs]
        loss = function(*leaves).squeeze()
        results.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("n, d", [(1, 8), (6, 5), (20, 33)])
@pytest.mark.parametrize("temperature", [0.05, 0.5])
def test_nt_xent(n, d, temperature):
    assert_same(lambda *z: F.nt_xent(*z, temperature=temperature), lightly.NTXentLoss(temperature), views(n, d))


def test_info_nce_is_nt_xent_with_a_memory_bank():
    theirs = lightly.NTXentLoss(0.2, memory_bank_size=(50, 12)).double()
    bank = theirs.memory_bank.bank.clone()
    z0, z1 = views(7, 12)
    expected = theirs(z0, z1)
    torch.testing.assert_close(F.info_nce(z0, z1, bank, temperature=0.2), expected)


@pytest.mark.parametrize("n, d", [(2, 3), (8, 30), (30, 8)])
def test_barlow_twins_and_vicreg(n, d):
    assert_same(F.barlow_twins, lightly.BarlowTwinsLoss(), views(n, d))
    assert_same(F.vicreg, lightly.VICRegLoss(), views(n, d))


def test_negative_cosine():
    assert_same(F.negative_cosine, lightly.NegativeCosineSimilarity(), views(9, 17))


def test_sinkhorn():
    from lightly.loss.swav_loss import sinkhorn

    scores = views(40, 30)[0].clamp(-1, 1)
    for epsilon, iterations in ((0.05, 3), (0.3, 1), (0.1, 10)):
        ours = F.sinkhorn(scores, epsilon=epsilon, iterations=iterations)
        torch.testing.assert_close(ours, sinkhorn(scores, iterations=iterations, epsilon=epsilon))


def test_prototype_cross_entropy_is_swav_and_dino():
    def swav(*crops: torch.Tensor) -> torch.Tensor:
        bias = torch.stack([F.sinkhorn_bias(x) for x in crops[:2]])
        return F.prototype_cross_entropy(
            crops, crops[:2], student_temperature=0.1, teacher_temperature=0.05, teacher_bias=bias, pairs="different"
        )

    crops = [x.clamp(-1, 1) for x in views(10, 20, count=5)]
    assert_same(swav, lambda *x: lightly.SwaVLoss()(list(x[:2]), list(x[2:])), crops)

    teacher = views(10, 20, seed=1)
    centre = torch.randn(20, dtype=torch.float64)

    def dino(*student: torch.Tensor) -> torch.Tensor:
        theirs = lightly.DINOLoss(output_dim=20, teacher_temp=0.05, warmup_teacher_temp=0.05).double()
        theirs.center.copy_(centre.reshape(1, 1, -1))
        return theirs(teacher, list(student), epoch=0)

    ours = {"student_temperature": 0.1, "teacher_temperature": 0.05, "teacher_bias": -centre / 0.05}
    assert_same(lambda *student: F.prototype_cross_entropy(student, teacher, **ours), dino, crops)
