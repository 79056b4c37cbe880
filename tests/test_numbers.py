"""Numbers that people schedule or learn: what they may be, their gradients, and that the default dtype has no part."""

import math
from collections.abc import Callable, Iterator

import cases
import numpy as np
import pytest
import torch
import torch.nn.functional as TF
from torch import Tensor

import fastjem.functional as F
from fastjem import nn


def _rows(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _eager_prototypes(students: Tensor, teachers: Tensor, tau: Tensor | float) -> Tensor:
    q = (teachers / 0.3).softmax(2)
    pairs = [(0, 1), (1, 0)]
    return -torch.stack([(q[t] * (students[s] / tau).log_softmax(1)).sum(1).mean() for s, t in pairs]).mean()


def _eager_mean_entropy(scores: Tensor, tau: Tensor | float) -> Tensor:
    p = (scores / tau).softmax(1).mean(0)
    return (p * p.log()).sum() + math.log(scores.shape[1])


def _eager_dclw(z: Tensor, sigma: Tensor | float) -> Tensor:
    cosines = TF.cosine_similarity(z[0], z[1], dim=1).detach()
    return cases.eager_dcl(z[0], z[1], 2 - len(cosines) * (cosines / sigma).softmax(0))


def _eager_lejepa(z: Tensor, weight: Tensor | float, slices: Tensor) -> Tensor:
    spread = (z - z[:1].mean(0)).square().mean()
    return weight * F.sigreg(z, slices) + (1 - weight) * spread


def _eager_tico(z: Tensor, beta: Tensor | float, rho: Tensor | float) -> Tensor:
    a, b = (TF.normalize(x, dim=1) for x in z)
    covariance = (1 - beta) * a.detach().T @ a.detach() / len(a)
    return 1 - (a * b).sum(1).mean() + (rho * (a @ covariance * a).sum(1)).mean()


LABELS = torch.tensor([0, 1, 0, 2, 1])
# Both are bfloat16 numbers, so that they are the same in every dtype.
SLICES = _rows(6, 8, dtype=torch.bfloat16, seed=4).double()
BANK = _rows(9, 6, dtype=torch.bfloat16, seed=3).double()

# name -> (ours, the formula), both of views [2, 5, 6] and the number
NUMBERS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "nt_xent": (lambda z, t: F.nt_xent(z, temperature=t), lambda z, t: cases.eager_nt_xent(*z, temperature=t)),
    "dcl": (lambda z, t: F.dcl(z, temperature=t), lambda z, t: cases.eager_dcl(*z, temperature=t)),
    "dclw": (lambda z, t: F.dclw(z[0], z[1], sigma=t), _eager_dclw),
    "supcon": (
        lambda z, t: F.supcon(z, LABELS, temperature=t),
        lambda z, t: cases.eager_supcon(*z, LABELS, temperature=t),
    ),
    "supcon of rows as given": (
        lambda z, t: F.supcon(TF.normalize(z, dim=2), LABELS, temperature=t, normalize=False),
        lambda z, t: cases.eager_supcon(*z, LABELS, temperature=t),
    ),
    "info_nce": (
        lambda z, t: F.info_nce(z[0], z[1], BANK.to(z), temperature=t),
        lambda z, t: cases.eager_info_nce(z[0], z[1], BANK.to(z), t),
    ),
    "info_nce of a queue with the positives": (
        lambda z, t: F.info_nce(z[0], z[1], z[1], temperature=t, label_offset=0),
        lambda z, t: TF.cross_entropy(TF.normalize(z[0], dim=1) @ TF.normalize(z[1], dim=1).T / t, torch.arange(5)),
    ),
    "clip_loss": (lambda z, t: F.clip_loss(z[0], z[1], t), lambda z, t: cases.eager_clip(z[0], z[1], t)),
    "siglip_loss scale": (
        lambda z, t: F.siglip_loss(z[0], z[1], t, -1.5),
        lambda z, t: cases.eager_siglip(z[0], z[1], t, -1.5),
    ),
    "siglip_loss bias": (
        lambda z, t: F.siglip_loss(z[0], z[1], 2.5, t),
        lambda z, t: cases.eager_siglip(z[0], z[1], 2.5, t),
    ),
    "prototype_cross_entropy": (
        lambda z, t: F.prototype_cross_entropy(z, z.detach(), student_temperature=t, teacher_temperature=0.3),
        lambda z, t: _eager_prototypes(z, z.detach(), t),
    ),
    "prototype_head_cross_entropy": (
        lambda z, t: F.prototype_head_cross_entropy(
            z, z.detach(), BANK.to(z), BANK.to(z), student_temperature=t, teacher_temperature=0.3
        ),
        lambda z, t: _eager_prototypes(z @ BANK.to(z).T, z.detach() @ BANK.to(z).T, t),
    ),
    "mean_entropy": (lambda z, t: F.mean_entropy(z[0], temperature=t), lambda z, t: _eager_mean_entropy(z[0], t)),
    "barlow_twins": (
        lambda z, t: F.barlow_twins(z[0], z[1], lambda_param=t),
        lambda z, t: (1 - t) * F.barlow_twins(z[0], z[1], lambda_param=0) + t * F.barlow_twins(*z, lambda_param=1),
    ),
    **{
        f"vicreg {name}": (
            lambda z, t, name=name: F.vicreg(z[0], z[1], **{name: t}),
            lambda z, t, name=name: (1 - t) * F.vicreg(z[0], z[1], **{name: 0}) + t * F.vicreg(z[0], z[1], **{name: 1}),
        )
        for name in ("lambda_param", "mu_param", "nu_param", "variance_factor")
    },
    "tico beta": (lambda z, t: F.tico(z[0], z[1], beta=t)[0], lambda z, t: _eager_tico(z, t, 8)),
    "tico rho": (lambda z, t: F.tico(z[0], z[1], rho=t)[0], lambda z, t: _eager_tico(z, 0.9, t)),
    "lejepa": (
        lambda z, t: F.lejepa(z[1:], z[:1], SLICES.to(z), lambda_param=t),
        lambda z, t: _eager_lejepa(z, t, SLICES.to(z)),
    ),
    "emp_ssl": (
        lambda z, t: F.emp_ssl(z, invariance=t),
        lambda z, t: F.emp_ssl(z, invariance=0) - t * TF.cosine_similarity(z, z.mean(0, keepdim=True), dim=-1).mean(),
    ),
    "total_coding_rate": (
        lambda z, t: F.total_coding_rate(z[0], eps=t),
        lambda z, t: torch.logdet(torch.eye(6, dtype=z.dtype) + 6 / (5 * t) * z[0].T @ z[0]) / 2,
    ),
    "mmcr": (
        lambda z, t: F.mmcr(z[:1], z[1:], lmda=t),
        lambda z, t: F.mmcr(z[:1], z[1:], lmda=0) + t * torch.linalg.svdvals(torch.cat([z[:1], z[1:]], 1)).sum(),
    ),
    "frossl": (
        lambda z, t: F.frossl(z, invariance=t),
        lambda z, t: (1 - t) * F.frossl(z, invariance=0) + t * F.frossl(z, invariance=1),
    ),
}
by_name = {"ids": str}
KINDS = {
    "numpy.float32": np.float32,
    "numpy.float64": np.float64,
    "0-dim numpy array": np.array,
    "0-dim float64": lambda t: torch.tensor(t, dtype=torch.float64),
    "0-dim float32": lambda t: torch.tensor(t, dtype=torch.float32),
    "a parameter of one element": lambda t: torch.nn.Parameter(torch.tensor([t], dtype=torch.float64)),
}
EXACT = 0.25  # the same number in every dtype


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_may_be_pythons_numpys_or_a_tensor(name):
    ours, _ = NUMBERS[name]
    z = _rows(2, 5, 6)
    expected = ours(z, EXACT)
    for kind, make in KINDS.items():
        got = ours(z, make(EXACT))
        assert got.shape == () and got.dtype == torch.float64, kind
        torch.testing.assert_close(
            got.detach(), expected, rtol=1e-12, atol=1e-12, msg=lambda m, kind=kind: f"{kind}: {m}"
        )


@pytest.mark.parametrize("name", NUMBERS)
def test_what_is_no_number_is_refused_in_words(name):
    ours, _ = NUMBERS[name]
    z = _rows(2, 5, 6)
    for wrong, came in ((True, "True (bool)"), ("0.1", "'0.1' (str)"), (None, "None (NoneType)"), (math.nan, "nan")):
        with pytest.raises(ValueError, match="must be ") as error:
            ours(z, wrong)
        assert came in str(error.value)
    with pytest.raises(ValueError, match="must be a number or a 0-dim tensor"):
        ours(z, torch.ones(3))


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_learned_number_gets_its_gradient(name, dtype):
    if "as given" in name and dtype == torch.bfloat16:
        pytest.skip("the caller has rounded the rows")
    ours, formula = NUMBERS[name]
    z = _rows(2, 5, 6, dtype=dtype)
    given = z.clone().requires_grad_()
    number = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    loss = ours(given, number)
    exact_rows = z.double().requires_grad_()
    exact_number = number.detach().clone().requires_grad_()
    exact = formula(exact_rows, exact_number)
    got = torch.autograd.grad(loss * 3, [number, given])
    expected = torch.autograd.grad(exact * 3, [exact_number, exact_rows])
    rtol = {torch.float64: 1e-9, torch.float32: 2e-5, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(loss.detach().double(), exact.detach(), rtol=min(rtol, 1e-4), atol=1e-6 * rtol)
    torch.testing.assert_close(got[0], expected[0], rtol=min(rtol, 1e-4), atol=1e-4 * rtol)
    assert got[1].dtype == dtype
    size = expected[1].abs().max().item()
    torch.testing.assert_close(got[1].double(), expected[1], rtol=rtol, atol=rtol * size)


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float64], ids=str)
def default_dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(before)


@pytest.mark.parametrize("name", NUMBERS)
def test_the_default_dtype_has_no_part_in_a_number(name, default_dtype):
    """0.3 is no float32: a scale of it that went through one is off by 4e-9 of itself, through bfloat16 by 0.2 %."""
    ours, formula = NUMBERS[name]
    z = _rows(2, 5, 6)
    torch.testing.assert_close(ours(z, 0.3), formula(z, torch.tensor(0.3, dtype=torch.float64)), rtol=1e-12, atol=1e-12)
    assert ours(z.float(), 0.3).dtype == torch.float32


def test_temperatures_of_constants():
    """Sinkhorn's epsilon and the teacher's temperature get no gradient, but may be tensors; statistics are the same."""
    scores = _rows(7, 6)
    tau = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    for function in (F.sinkhorn, F.sinkhorn_bias):
        torch.testing.assert_close(function(scores, epsilon=tau), function(scores, epsilon=0.3), rtol=1e-10, atol=1e-12)
    views = [scores, _rows(7, 6, seed=1)]
    bias = _rows(6, seed=2)

    def both(t: float | Tensor) -> tuple[Tensor, F.TeacherStatistics]:
        return F.prototype_cross_entropy(
            views, views, student_temperature=0.2, teacher_temperature=t, teacher_bias=bias, statistics=True
        )

    (loss, seen), (expected, expected_seen) = both(tau), both(0.3)
    assert not loss.requires_grad
    torch.testing.assert_close([loss, *seen], [expected, *expected_seen], rtol=1e-10, atol=1e-12)


def test_half_precision_keeps_what_the_operator_keeps():
    """A tensor is divided by in float32: bfloat16 scores over 0.3 would have three digits."""
    views = [_rows(64, 40, dtype=torch.bfloat16, seed=i) * 4 for i in range(2)]
    exact = F.prototype_cross_entropy(
        [x.double() for x in views], views, student_temperature=0.3, teacher_temperature=0.3
    )
    tau = torch.tensor(0.3)
    got = F.prototype_cross_entropy(views, views, student_temperature=tau, teacher_temperature=tau)
    torch.testing.assert_close(got.double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("iterations", [3, np.int64(3), torch.tensor(3)], ids=["int", "numpy", "tensor"])
def test_a_whole_number_may_be_numpys(iterations):
    scores = _rows(7, 6)
    assert torch.equal(F.sinkhorn(scores, iterations=iterations), F.sinkhorn(scores, iterations=3))
    assert torch.equal(nn.sinkhorn(scores, iterations=iterations), F.sinkhorn(scores, iterations=3))


@pytest.mark.parametrize("wrong", [2.5, 3.0, True, "3", None, torch.tensor(True)], ids=repr)
def test_what_is_no_whole_number_is_refused(wrong):
    with pytest.raises(ValueError, match="sinkhorn: iterations must be an integer, got"):
        F.sinkhorn(_rows(7, 6), iterations=wrong)
    with pytest.raises(ValueError, match="knots must be an integer, got"):
        F.sigreg(_rows(7, 6), SLICES, knots=wrong)


def test_a_constant_of_the_arithmetic_may_be_numpys_and_is_checked():
    z = _rows(2, 5, 6)
    assert torch.equal(F.koleo(z[0], p=np.int64(2), eps=np.float64(1e-8)), F.koleo(z[0]))
    assert torch.equal(
        F.negative_cosine(z[0], z[1], eps=torch.tensor(1e-8, dtype=torch.float64)), F.negative_cosine(*z)
    )
    for wrong in (True, math.nan, "1", -1.0):
        with pytest.raises(ValueError, match="koleo: eps must be a"):
            F.koleo(z[0], eps=wrong)
    with pytest.raises(ValueError, match="eps must be a number, or a constant on the CPU, got"):
        F.koleo(z[0], eps=torch.tensor(1e-8, requires_grad=True))


@pytest.mark.parametrize("momentum", [0.75, np.float32(0.75), torch.tensor(0.75), torch.tensor([0.75])], ids=repr)
def test_a_momentum_may_be_numpys(momentum):
    teacher, student = torch.zeros(3), torch.ones(3)
    F.ema_update_([teacher], [student], momentum)
    assert teacher.tolist() == [0.25] * 3


@pytest.mark.parametrize(
    "make, call",
    [
        (nn.NTXentLoss, lambda loss, z: loss(z[0], z[1])),
        (lambda t: nn.NTXentLoss(t, memory_bank_size=(8, 6)), lambda loss, z: loss(z[0], z[1])),
        (nn.DCLLoss, lambda loss, z: loss(z[0], z[1])),
        (nn.DCLWLoss, lambda loss, z: loss(z[0], z[1])),
        (nn.SupConLoss, lambda loss, z: loss(TF.normalize(z, dim=2).transpose(0, 1), LABELS)),
        (nn.SwaVLoss, lambda loss, z: loss([z[0], z[1]], [])),
        (lambda t: nn.DINOLoss(6, student_temp=t), lambda loss, z: loss(list(z.detach()), list(z))),
        (
            lambda t: nn.IBOTPatchLoss(6, student_temp=t),
            lambda loss, z: loss(z[0].detach(), z[1], torch.tensor([[[True] * 5]])),
        ),
    ],
    ids=["NTXentLoss", "a memory bank", "DCLLoss", "DCLWLoss", "SupConLoss", "SwaVLoss", "DINO", "iBOT"],
)
def test_a_learned_temperature_of_a_module(make, call):
    """It is a parameter of the module, and its gradient is what a small step of the number tells."""
    z = _rows(2, 5, 6)
    torch.manual_seed(0)
    loss = make(torch.nn.Parameter(torch.tensor([0.3], dtype=torch.float64)))
    (tau,) = loss.parameters()
    state = {k: v.clone() for k, v in loss.state_dict().items()}
    value = call(loss.double(), z)
    assert value.shape == ()
    value.backward()

    def at(t: float) -> float:
        loss.load_state_dict(state)
        with torch.no_grad():
            tau.fill_(t)
            return call(loss, z).item()

    slope = (at(0.3 + 1e-5) - at(0.3 - 1e-5)) / 2e-5
    assert tau.grad is not None
    torch.testing.assert_close(tau.grad.item(), slope, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("bias", [torch.tensor(-3.0), torch.tensor([-3.0])], ids=["0-dim", "one element"])
def test_clip_keeps_its_bias_in_the_graph(bias):
    """open_clip adds it to the logits. DistributedDataParallel waits for a gradient of every parameter."""
    z = TF.normalize(_rows(2, 5, 6), dim=2)
    x = z[0].clone().requires_grad_()
    bias = bias.clone().requires_grad_()
    scale = torch.tensor(10.0, requires_grad=True)
    loss = nn.ClipLoss()(x, z[1], scale, bias)
    got = torch.autograd.grad(loss, [x, scale, bias], retain_graph=True)
    assert torch.equal(got[2], torch.zeros_like(bias)) and loss.shape == ()
    expected = torch.autograd.grad(nn.ClipLoss()(x, z[1], scale), [x, scale])
    torch.testing.assert_close(got[:2], expected)
    assert torch.equal(nn.ClipLoss()(x, z[1], scale, bias, output_dict=True)["contrastive_loss"], loss)
