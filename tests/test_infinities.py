"""-inf, +inf and NaN anywhere give what an operator's specification gives, at every temperature (docs/architecture.md:
"Infinities and NaN are values"); and float64 has float64's range."""

import math

import pytest
import torch
from conftest import INTERPRETING
from poisoned import (
    DTYPES,
    OF_DRAWN,
    OF_IMAGES,
    TEMPERATURES,
    VALUES,
    WITH_BACKWARD,
    WITHOUT_TEMPERATURE,
    Inputs,
    differences,
    results,
    same,
)

import fastjem.functional as F
from fastjem import ops

OTHERWISE = OF_IMAGES | OF_DRAWN | {f"{op}_backward" for op in WITH_BACKWARD}
OPERATORS = sorted(name for name, op in ops.OPERATORS.items() if (op.cpu or op.gpu) and name not in OTHERWISE)
MASKED = -math.inf


def dispatched(op):
    return getattr(torch.ops.fastjem, op)


def some(*differences):
    """For a message: the first of them."""
    return [line for found in differences for line in found][:5]


@pytest.mark.parametrize("op", OPERATORS)
def test_a_kernel_gives_what_its_specification_gives(op, implementation):
    if implementation.name == "reference":
        pytest.skip("compared with itself")
    if INTERPRETING:
        if op == "prototype_head_cross_entropy":
            pytest.skip("too slow for the interpreter: see the exhaustive test")
        values = ("-inf",) if op in ("prototype_cross_entropy", "info_nce") else ("-inf", "nan")
        assert not some(differences(op, dispatched(op), Inputs(torch.float32, 0.05, 7), ("element",), values))
        return
    # a temperature whose inverse float32 rounds down, one that it rounds up; half precision, whose gradients aren't
    # scaled; more than a block of a row
    assert not some(
        differences(op, dispatched(op), Inputs(torch.float32, 0.05, 7), ("element", "half a row", "column")),
        differences(op, dispatched(op), Inputs(torch.float32, 0.07, 7), ("row",), ("-inf",)),
        differences(op, dispatched(op), Inputs(torch.bfloat16, 0.1, 7), ("element",), ("-inf", "nan")),
        differences(op, dispatched(op), Inputs(torch.float32, 0.05, 1030), ("half a row",), ("-inf",)),
        differences(op, dispatched(op), Inputs(torch.float64, 0.05, 7), ("element",), ("-inf",)),
    )


@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPERATORS)
def test_a_kernel_gives_what_its_specification_gives_for_every_dtype_and_temperature(op, dtype, implementation):
    if implementation.name == "reference":
        pytest.skip("compared with itself")
    if INTERPRETING and dtype == torch.bfloat16:
        pytest.skip("the interpreter computes bfloat16 products wrongly")
    if INTERPRETING and op == "nearest_k" and dtype == torch.float64:
        pytest.skip("which of several NaN comes first is torch.topk's choice")
    temperatures = TEMPERATURES[:1] if op in WITHOUT_TEMPERATURE else TEMPERATURES
    for temperature in temperatures[:: 4 if INTERPRETING else 1]:
        for width in (7,) if INTERPRETING else (7, 1500):
            assert not some(differences(op, dispatched(op), Inputs(dtype, temperature, width)))


def logits(*shape: int, seed: int = 0, device: str = "cpu") -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device) * 0.3


@pytest.mark.parametrize("op", ["prototype_cross_entropy"])
@pytest.mark.parametrize("temperature", TEMPERATURES if not INTERPRETING else TEMPERATURES[:1])
def test_a_prototype_ruled_out_on_both_sides_is_as_if_it_were_not_there(op, temperature, implementation):
    """And ruled out by the student alone, the loss is infinite, as long as the teacher gives it anything."""
    student, teacher = logits(2, 5, 9, device=implementation.device).float(), logits(2, 5, 9, seed=1).float()
    teacher = teacher.to(implementation.device)
    options = {"student_temperature": 0.1, "teacher_temperature": temperature, "statistics": True}
    wanted, statistics = F.prototype_cross_entropy(student[..., :8], teacher[..., :8], **options)
    student[..., 8] = MASKED
    assert F.prototype_cross_entropy(student, teacher, **options)[0] == math.inf
    teacher[..., 8] = MASKED
    student.requires_grad_()
    loss, masked = F.prototype_cross_entropy(student, teacher, **options)
    loss.backward()
    torch.testing.assert_close(loss.detach(), wanted)
    torch.testing.assert_close(masked.entropy, statistics.entropy)
    torch.testing.assert_close(masked.usage[:8], statistics.usage)
    assert masked.usage[8] == 0
    assert student.grad.isfinite().all() and not student.grad[..., 8].any()


@pytest.mark.parametrize("op", ["sinkhorn"])
@pytest.mark.parametrize("epsilon", TEMPERATURES if not INTERPRETING else TEMPERATURES[:1])
def test_a_masked_score_has_the_code_0(op, epsilon, implementation):
    """Whether the scores lie near each other, or so far apart that sums are taken with maxima."""
    for scale in (0.1,) if INTERPRETING else (0.1, 30):
        scores = logits(12, 9) * scale
        scores[torch.arange(12), torch.arange(12) % 9] = MASKED
        weights = (scores / epsilon - scores.max() / epsilon).exp()
        if scale < 1:
            for _ in range(3):
                weights = weights / weights.sum(0)
                weights = weights / weights.sum(1, keepdim=True)
        codes = F.sinkhorn(scores.float().to(implementation.device), epsilon=epsilon).cpu()
        assert not codes[weights == 0][: 12 if scale < 1 else 0].any()
        torch.testing.assert_close(codes.sum(1), torch.ones(12))
        if scale < 1:
            torch.testing.assert_close(codes.double(), weights, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("op", ["prototype_cross_entropy"])
@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_statistics_of_a_broken_teacher_are_not_healthy(op, value, implementation):
    student, teacher = logits(2, 5, 9).float(), logits(2, 5, 9, seed=1).float()
    teacher[1, 3] = value  # a whole row: its softmax is NaN
    options = {"student_temperature": 0.1, "teacher_temperature": 0.05, "statistics": True}
    _, statistics = F.prototype_cross_entropy(
        student.to(implementation.device), teacher.to(implementation.device), **options
    )
    assert statistics.entropy.isnan() and statistics.usage.isnan().all()
    assert not statistics.mean.isfinite().any()


@pytest.mark.parametrize("op", ["barlow_twins", "vicreg"])
def test_the_deviation_of_a_column_with_nan_is_nan(op, implementation):
    z = logits(6, 5).float()
    y = logits(6, 5, seed=1).float()
    z[2, 3] = math.nan
    options = {"barlow_twins": (5e-3,), "vicreg": (25.0, 25.0, 1.0, 1e-4)}[op]
    inputs = (z.to(implementation.device), y.to(implementation.device))
    *_, (health, *_) = dispatched(op)(*inputs, *options, 1, [False, False])
    assert health[0, 3].isnan() and health[0, -1].isnan()
    assert health[0, :3].isfinite().all()


@pytest.mark.parametrize("op", ["clip_loss"])
@pytest.mark.parametrize("scale", [10.0, 88.0, 100.0, 300.0, 700.0])
def test_float64_has_its_own_range(op, scale, implementation):
    """All logits are `scale`, or less that: no row prefers a column, and the gradients are 0."""
    for sign in (1.0, -1.0):
        x = torch.ones(2, 1, dtype=torch.float64, device=implementation.device)
        y = (x * sign).requires_grad_()
        x.requires_grad_()
        F.clip_loss(x, y, torch.tensor(scale, dtype=torch.float64, device=implementation.device)).backward()
        torch.testing.assert_close(x.grad, torch.zeros_like(x), atol=1e-6, rtol=0)
        torch.testing.assert_close(y.grad, torch.zeros_like(y), atol=1e-6, rtol=0)


@pytest.mark.parametrize("op", ["nt_xent"])
@pytest.mark.parametrize("temperature", [0.0015, 0.005])
def test_float64_has_its_own_range_where_rows_are_opposite(op, temperature, implementation):
    """Two images whose views point away from everybody: a row's log-sum-exp is far below -87."""
    views = torch.eye(2, dtype=torch.float64, device=implementation.device) + 1e-3 * logits(3, 2, 2).to(
        implementation.device
    )
    views[1] *= -1
    leaves = [views.clone().requires_grad_() for _ in range(2)]
    F.dcl(leaves[0], temperature=temperature).backward()
    unit = torch.nn.functional.normalize(leaves[1], dim=2).reshape(6, 2)
    image = torch.arange(6, device=unit.device) % 2
    similarities = unit @ unit.T / temperature
    lse = similarities.masked_fill(image == image[:, None], MASKED).logsumexp(1)
    own = (image == image[:, None]).double() - torch.eye(6, dtype=torch.float64, device=unit.device)
    (lse - (similarities * own).sum(1) / 2).mean().backward()
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad)


@pytest.mark.parametrize("temperature", [0.0015, 0.005, 0.02])
@pytest.mark.parametrize("op", sorted(set(OPERATORS) - WITHOUT_TEMPERATURE))
def test_float64_at_extreme_temperatures(op, temperature, implementation):
    """Logits of several hundred: whatever fits in float64 and not in float32."""
    if implementation.name == "reference" or INTERPRETING:
        pytest.skip("compared with itself; on a GPU float64 is mostly the specification's")
    make = Inputs(torch.float64, temperature, 7)
    expected = results(op, ops.plain(ops.reference(op)), make(op))
    for i, (got, wanted) in enumerate(zip(results(op, dispatched(op), make(op)), expected, strict=True)):
        assert same(got, wanted, torch.float64), (i, got, wanted)


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
@pytest.mark.parametrize("loss", [F.total_coding_rate, F.emp_ssl, lambda z: F.mmcr(z, z), F.whiten, F.frossl])
def test_a_factorisation_of_broken_embeddings_is_nan_and_so_is_its_gradient(loss, value):
    """An exception would end a run where a GradScaler skips the step."""
    z = logits(3, 12, 5).float()
    z[1, 2, 3] = value
    z = (z[1] if loss is F.whiten else z).requires_grad_()
    result = loss(z)
    result = result[0] if isinstance(result, tuple) else result
    assert result.isnan().any() if loss is F.whiten else result.isnan()
    result.sum().backward()
    assert z.grad.isnan().any()


@pytest.mark.parametrize("loss", [F.vicreg, F.barlow_twins])
@pytest.mark.parametrize("rows", [4, 12])
def test_the_spectrum_of_broken_embeddings_is_nan(loss, rows):
    z = logits(rows, 6).float()
    z[1, 2] = math.nan
    health = F.Health(keep_spectrum=True)
    assert loss(z, logits(rows, 6, seed=1).float(), health=health).isnan()
    spectrum = health.spectrum()
    assert spectrum.shape == (2, min(rows, 6)) and spectrum[0].isnan().all()
    # VICReg's second view has a covariance of its own; Barlow Twins' matrix is that of both.
    assert spectrum[1].isfinite().all() if loss is F.vicreg else spectrum[1].isnan().all()
