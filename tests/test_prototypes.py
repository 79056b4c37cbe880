"""Sinkhorn against float64 and the official loops, the statistics of the teacher, and the modules against lightly's."""

import math
import re

import pytest
import torch
import torch.nn.functional as TF
from conftest import INTERPRETING

import fastjem.functional as F
import fastjem.nn as nn

MODULE_OF_HEAD = "fastjem.kernels.prototypes.prototype_head_cross_entropy"
ITERATIONS = (1, 3, 10)
# samples x prototypes: one sample; more and fewer samples than prototypes; K of a block and beyond, odd
SHAPES = [(1, 3), (5, 1000), (64, 7), (100, 3000), (40, 4099)]


def randn(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def log_sinkhorn(scores: torch.Tensor, epsilon: float, iterations: int, samples_first: bool = False) -> torch.Tensor:
    """Every normalisation as a subtraction of logarithms, in the order of the paper's code."""
    log_q = scores / epsilon
    if samples_first:
        log_q = log_q.log_softmax(1)
    for _ in range(iterations):
        log_q = log_q.log_softmax(0)
        log_q = log_q.log_softmax(1)
    return log_q.exp()


def official_sinkhorn(scores: torch.Tensor, epsilon: float, iterations: int) -> torch.Tensor:
    """facebookresearch/swav and dinov2: rows, / K, columns, / B."""
    q = torch.exp(scores / epsilon).T
    k, b = q.shape
    q = q / q.sum()
    for _ in range(iterations):
        q = q / q.sum(1, keepdim=True) / k
        q = q / q.sum(0, keepdim=True) / b
    return (q * b).T


@pytest.mark.parametrize("op", ["sinkhorn"])
@pytest.mark.parametrize("iterations", ITERATIONS)
@pytest.mark.parametrize("b, k", SHAPES)
def test_sinkhorn_is_the_official_one(b, k, iterations, op, implementation, poisoned):
    if implementation.name == "triton" and implementation.device == "cpu" and b * k * iterations > 20_000:
        pytest.skip("too slow for the interpreter")
    scores = randn(b, k, scale=0.3).clamp(-1, 1)
    expected = official_sinkhorn(scores, 0.05, iterations)
    torch.testing.assert_close(log_sinkhorn(scores, 0.05, iterations), expected, rtol=1e-9, atol=1e-300)
    codes = F.sinkhorn(scores.float().to(implementation.device), epsilon=0.05, iterations=iterations).cpu().double()
    torch.testing.assert_close(codes, log_sinkhorn(scores.float().double(), 0.05, iterations), rtol=2e-5, atol=1e-9)


@pytest.mark.parametrize("op", ["sinkhorn"])
@pytest.mark.parametrize("samples_first", [False, True])
@pytest.mark.parametrize("std", [0.3, 1, 5, 50])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_sinkhorn_of_large_scores(dtype, std, samples_first, op, implementation, poisoned):
    """Logits of sd 50 at epsilon 0.04 span thousands: float32 knows them to 1e-4, so the codes as well."""
    scores = randn(48, 300, seed=round(std), scale=std).to(dtype)
    expected = log_sinkhorn(scores.double(), 0.04, 3, samples_first)
    codes = F.sinkhorn(scores.to(implementation.device), epsilon=0.04, normalize_samples_first=samples_first).cpu()
    assert codes.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = 1e-9 if dtype == torch.float64 else 3e-6 * (1 + std / 0.04 / 10)
    if dtype == torch.float32 and implementation.name == "c++" and implementation.isa:
        eager = log_sinkhorn(scores, 0.04, 3, samples_first).double()  # with fused multiply-add: the losses' contract
        tolerance = 2 * (eager - expected).abs().max().item() + 4 * torch.finfo(dtype).eps * expected.max().item()
    torch.testing.assert_close(codes.double(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("op", ["sinkhorn"])
def test_a_prototype_that_nobody_likes_and_samples_alike(op, implementation):
    scores = randn(30, 40)
    scores[:, 7] -= 400  # 8000 below the others at epsilon 0.05
    scores[3:6] = scores[3]
    codes = F.sinkhorn(scores.float().to(implementation.device)).cpu().double()
    torch.testing.assert_close(codes, log_sinkhorn(scores.float().double(), 0.05, 3), rtol=0, atol=5e-4)
    assert torch.equal(codes[3], codes[4]) and codes[:, 7].sum() > 0.1
    alike = torch.full((9, 4), 3.0).to(implementation.device)
    torch.testing.assert_close(F.sinkhorn(alike).cpu(), torch.full((9, 4), 0.25))


@pytest.mark.parametrize("op", ["sinkhorn"])
@pytest.mark.parametrize("iterations", ITERATIONS)
def test_a_prototype_at_the_end_of_the_world(iterations, op, implementation):
    """Potentials of 600,000, whose last float32 digit is 0.06; its codes are as exact as others all the same."""
    exact = implementation.isa if implementation.name == "c++" else implementation.name == "triton"
    if not exact or (implementation.name, implementation.device) == ("triton", "cpu"):
        pytest.skip("potentials are float32 in eager, and without fused multiply-add (baseline, interpreter)")
    scores = randn(50, 70).float()
    scores[:, 7] -= 30_000
    codes = F.sinkhorn(scores.to(implementation.device), iterations=iterations).cpu().double()
    torch.testing.assert_close(codes, log_sinkhorn(scores.double(), 0.05, iterations), rtol=0, atol=3e-6)


@pytest.mark.parametrize("op", ["sinkhorn"])
@pytest.mark.parametrize("samples_first", [False, True])
@pytest.mark.parametrize("apart", [0.3, 1.2, 2.5, 6, 1000])
def test_samples_and_prototypes_apart(apart, samples_first, op, implementation, poisoned):
    """Exponentials of one shift for all where that is safe: samples, prototypes or both leave that range one by one."""
    scores = randn(40, 70, scale=0.1)
    steps = torch.linspace(-1, 1, 40, dtype=torch.float64)[randn(40, seed=1).argsort()]
    for x in (scores + apart * steps[:, None], scores + apart * torch.cat([steps, steps[:30]]), scores * 10 * apart):
        expected = log_sinkhorn(x.float().double(), 0.05, 3, samples_first)
        codes = F.sinkhorn(x.float().to(implementation.device), normalize_samples_first=samples_first).cpu().double()
        # Logits of hundreds, rounded once more where there is no fused multiply-add: plain torch, and the interpreter
        interpreted = implementation.name == "triton" and implementation.device == "cpu"
        unfused = interpreted or implementation.name == "reference"
        known = 3e-6 if apart < 1000 and not unfused else 3e-6 + 2e-7 * 20 * apart
        torch.testing.assert_close(codes, expected, rtol=0, atol=known)


@pytest.mark.parametrize("op", ["sinkhorn"])
def test_subnormal_scores(op, implementation):
    """float16 has few digits below 6e-5, but it has some: kernels flush what is subnormal in float32 alone."""
    scores = (randn(40, 6, scale=3e-5)).half()
    codes = F.sinkhorn(scores.to(implementation.device), epsilon=1e-4).cpu().double()
    torch.testing.assert_close(codes, log_sinkhorn(scores.double(), 1e-4, 3), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("op", ["sinkhorn"])
def test_sinkhorn_of_many_rows_a_program(op, implementation, monkeypatch):
    if implementation.name != "triton":
        pytest.skip("how Triton's programs share the rows")
    monkeypatch.setattr("fastjem.kernels.tiling.PROGRAMS", 2)
    scores = randn(29, 300, scale=2).float()
    codes = F.sinkhorn(scores.to(implementation.device), iterations=4).cpu().double()
    torch.testing.assert_close(codes, log_sinkhorn(scores.double(), 0.05, 4), rtol=0, atol=1e-5)


@pytest.mark.parametrize("op", ["sinkhorn"])
def test_sinkhorn_of_any_layout_and_code_dtype(op, implementation, poisoned):
    scores = randn(33, 50).float().to(implementation.device)
    codes = F.sinkhorn(scores)
    for layout in (
        scores.mT.contiguous().mT,
        torch.cat([scores, scores], 1)[:, :50],
        scores.repeat_interleave(2, 1)[:, ::2],
    ):
        torch.testing.assert_close(F.sinkhorn(layout), codes, rtol=2e-5, atol=1e-9)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        if dtype == torch.bfloat16 and INTERPRETING:
            continue  # the interpreter rounds to bfloat16 towards zero
        torch.testing.assert_close(F.sinkhorn(scores, dtype=dtype), codes.to(dtype), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("op", ["sinkhorn_bias"])
@pytest.mark.parametrize("samples_first", [False, True])
@pytest.mark.parametrize(
    "scale", [0.1, 8.0], ids=["near", "far"]
)  # of each other: in C++, without maxima and with them
@pytest.mark.parametrize("registers", [True, False])  # whether Triton's rows stay there
def test_rows_that_fill_up_are_as_if_they_were_not_there(
    registers, scale, samples_first, op, implementation, poisoned, monkeypatch
):
    """Whatever is in them; of one problem, of several, and in each step."""
    if not registers:
        monkeypatch.setattr("fastjem.kernels.tiling.sinkhorn_rows", lambda *_: None)
    scores = randn(2, 21, 70, scale=scale).float().to(implementation.device)
    options = {"normalize_samples_first": samples_first}
    for count in (21, 17, 1):
        filled = scores.clone()
        filled[:, count:] = torch.tensor([torch.nan, torch.inf, 1e30, -torch.inf, 3.0], device=filled.device)[
            torch.arange(21 - count, device=filled.device) % 5, None
        ]
        rows = torch.tensor(count, device=filled.device)
        for given, whole in ((filled[0], scores[0, :count]), (filled, scores[:, :count])):
            ours = F.sinkhorn_bias(given, rows=rows, **options)
            torch.testing.assert_close(ours, F.sinkhorn_bias(whole, **options), rtol=1e-6, atol=1e-5 * scale)
    assert (F.sinkhorn_bias(scores[0], rows=torch.zeros_like(rows), **options) == torch.inf).all()
    assert (F.sinkhorn_bias(scores[0], rows=torch.zeros_like(rows), iterations=1, **options) == torch.inf).all()


@pytest.mark.parametrize("op", ["sinkhorn_bias"])
def test_bias_gives_the_codes_and_takes_a_batch_in_parts(op, implementation):
    scores = randn(70, 500, scale=0.3).float().to(implementation.device)
    bias = F.sinkhorn_bias(scores)
    torch.testing.assert_close((scores / 0.05 + bias).softmax(1), F.sinkhorn(scores), rtol=1e-5, atol=1e-7)
    parts = F.sinkhorn_bias([scores[:13], scores[13:14], scores[14:]])
    torch.testing.assert_close(parts, bias, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("op", ["sinkhorn"])
@pytest.mark.parametrize("samples_first", [False, True])
@pytest.mark.parametrize("problems, n, k", [(1, 1, 1), (3, 9, 41), (2, 140, 5), (5, 3, 301)])
def test_sinkhorn_of_several_problems_is_that_of_each(
    problems, n, k, samples_first, op, implementation, poisoned, monkeypatch
):
    """As they lie in [B, P, K], where a problem's rows are far apart; with scores near each other, and not."""
    if k > 300:  # as rows that are too long for registers
        monkeypatch.setattr("fastjem.kernels.tiling.sinkhorn_rows", lambda *_: None)
    g = torch.Generator().manual_seed(0)
    scores = torch.randn(n, problems, k, generator=g, dtype=torch.float64).float() * 0.1
    scores[:, 0] *= 40
    scores = scores.to(implementation.device).transpose(0, 1)
    options = {"epsilon": 0.05, "normalize_samples_first": samples_first}
    expected = torch.stack([log_sinkhorn(x.cpu().double(), 0.05, 3, samples_first) for x in scores])
    codes = F.sinkhorn(scores, **options)
    torch.testing.assert_close(codes.cpu().double(), expected, rtol=2e-4, atol=1e-6)
    bias = F.sinkhorn_bias(scores, **options)
    assert bias.shape == (problems, k)
    in_parts = F.sinkhorn_bias([scores[:, : n // 2 + 1], scores[:, n // 2 + 1 :]], **options) if n > 1 else bias
    for f in (bias, in_parts):
        codes = (scores.double() / 0.05 + f.double()[:, None]).softmax(2)
        torch.testing.assert_close(codes.cpu(), expected, rtol=3e-4, atol=1e-5)
    none = F.sinkhorn(scores, iterations=0, **options)
    torch.testing.assert_close(none, torch.stack([F.sinkhorn(x, iterations=0, **options) for x in scores]))


@pytest.mark.parametrize("op", ["sinkhorn_step"])
@pytest.mark.parametrize("row", [0, 3, 6])
def test_a_sample_of_nothing_but_minus_infinity_adds_nothing_to_floors(op, row, implementation):
    """Wherever it stands among the samples, the others' sums are there."""
    scores = torch.randn(7, 9)
    scores[row] = -torch.inf
    bias = torch.randn(9, dtype=torch.float64)
    floors = torch.randn(7, dtype=torch.float64)
    others = [i for i in range(7) if i != row]
    step = torch.ops.fastjem.sinkhorn_step
    device = implementation.device
    found = step(scores.to(device), bias.to(device), 0.5, None, floors.to(device)).cpu()
    exact = scores[others].double() / 0.5
    exact = exact - torch.logaddexp((exact + bias).logsumexp(1), floors[others])[:, None]
    torch.testing.assert_close(found, exact.logsumexp(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("op", ["sinkhorn_step"])
def test_potentials_of_a_batch_in_parts_are_float64(op, implementation):
    """A float32 potential of 600,000 would be off by 0.03."""
    scores = randn(50, 70).float()
    scores[:, 7] -= 30_000
    step = torch.ops.fastjem.sinkhorn_step(scores.to(implementation.device), None, 0.05).cpu()
    expected = (scores.double() / 0.05).logsumexp(0)
    exact = implementation.name in ("c++", "triton")
    torch.testing.assert_close(step, expected, rtol=1e-9 if exact else 1e-6, atol=1e-6)


@pytest.mark.parametrize("op", ["prototype_cross_entropy"])
@pytest.mark.parametrize("grad", [True, False])
def test_statistics_of_the_teacher(grad, op, implementation, poisoned):
    n, k = (9, 130) if implementation.name == "triton" and implementation.device == "cpu" else (70, 1100)
    student = [randn(n, k, seed=i).float().to(implementation.device).requires_grad_(grad) for i in range(3)]
    teacher = [randn(n, k, seed=5 + i).float().to(implementation.device) for i in range(2)]
    bias = randn(k, seed=9).float().to(implementation.device)
    options = {"student_temperature": 0.1, "teacher_temperature": 0.5, "teacher_bias": bias}
    loss, (mean, usage, entropy) = F.prototype_cross_entropy(student, teacher, **options, statistics=True)
    assert torch.equal(loss, F.prototype_cross_entropy(student, teacher, **options)) and loss.requires_grad == grad
    t = torch.stack(teacher).double()
    q = (t / 0.5 + bias).softmax(2)
    torch.testing.assert_close(mean.double(), t.mean((0, 1)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(usage.double(), q.mean((0, 1)), rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(entropy.double(), -(q * q.log()).sum(2).mean(), rtol=1e-5, atol=0)
    assert not (mean.requires_grad or usage.requires_grad or entropy.requires_grad)


@pytest.mark.parametrize("op", ["prototype_cross_entropy"])
@pytest.mark.parametrize("upstream", [0.0, math.inf, math.nan, 1e30, 1e-30])
def test_upstream_gradients_at_the_ends(upstream, op, implementation):
    """A float32 gradient may carry its scale from the forward pass: no upstream gradient tells, twice if need be."""
    scores = [randn(5, 40, seed=i).float().to(implementation.device) for i in range(4)]
    leaf = scores[0].requires_grad_()
    options = {"student_temperature": 0.1, "teacher_temperature": 0.04}
    loss = F.prototype_cross_entropy([leaf, scores[1]], scores[2:], **options)
    exact = leaf.detach().double().requires_grad_()
    truth = (scores[3].double() / 0.04).softmax(1), (exact / 0.1).log_softmax(1)
    pair = -(truth[0] * truth[1]).sum(1).mean() / 2
    (expected,) = torch.autograd.grad(pair, exact)
    for retain in (True, False):
        (gradient,) = torch.autograd.grad(loss * upstream, leaf, retain_graph=retain)
        if math.isfinite(upstream):
            error = (gradient.double() - expected * upstream).abs().max().item()
            assert error <= 2e-6 * upstream * expected.abs().max().item()
        else:  # as autograd multiplies: infinity with a sign, NaN where nothing is left of it
            assert torch.equal(gradient.isnan(), torch.isnan(expected.float() * upstream))


@pytest.mark.parametrize("op", ["prototype_cross_entropy"])
@pytest.mark.parametrize("k", [3, 65_536, 131_072])
def test_temperatures_and_sizes_of_dino(k, op, implementation):
    if implementation.name == "triton" and implementation.device == "cpu" and k > 3:
        pytest.skip("too slow for the interpreter")
    views = [randn(2, k, seed=i, scale=3).float().to(implementation.device) for i in range(5)]
    options = {"student_temperature": 0.1, "teacher_temperature": 0.04}
    leaves = [x.clone().requires_grad_() for x in views[:3]]
    F.prototype_cross_entropy(leaves, views[3:], **options).backward()
    exact = [x.double().requires_grad_() for x in views[:3]]
    q = [(x.double() / 0.04).softmax(1) for x in views[3:]]
    pairs = [-(q[t] * (exact[s] / 0.1).log_softmax(1)).sum(1).mean() for s in range(3) for t in range(2) if s != t]
    torch.stack(pairs).mean().backward()
    for leaf, truth in zip(leaves, exact, strict=True):
        torch.testing.assert_close(leaf.grad.double(), truth.grad, rtol=0, atol=1e-5 * truth.grad.abs().max().item())


def test_head_fused_equals_plain_and_takes_weight_norm():
    head = nn.DINOProjectionHead(6, 10, 12, 50, norm_last_layer=False)
    features = [head.features(randn(5, 6, seed=i).float()) for i in range(4)]
    options = {"student_temperature": 0.1, "teacher_temperature": 0.04, "teacher_bias": randn(50).float()}
    plain = F.prototype_cross_entropy(
        [head.last_layer(x) for x in features], [x @ head.prototypes().T for x in features[:2]], **options
    )
    fused = F.prototype_head_cross_entropy(features, features[:2], head.prototypes(), head.prototypes(), **options)
    torch.testing.assert_close(fused, plain)
    for a, b in zip(
        torch.autograd.grad(fused, head.parameters(), retain_graph=True),
        torch.autograd.grad(plain, head.parameters()),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * b.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("rise", "stays"),
    [
        (3.9, True),
        (16.0, True),
        (16.0, False),
        (2.0**40, True),
        *(pytest.param(rise, True, marks=pytest.mark.exhaustive) for rise in (0.1, 512.0)),
    ],
)
@pytest.mark.parametrize("op", ["prototype_head_cross_entropy"])
def test_head_fused_of_logits_that_grow(op, rise, stays, dtype, implementation, monkeypatch):
    """From tile to tile, less and more than a pivot may be left behind; a teacher without the first and last ones."""
    if dtype == torch.float16 and rise > 100:
        pytest.skip("more than float16 holds")
    if implementation.name == "triton":
        monkeypatch.setattr("fastjem.kernels.tiling.PROGRAMS", 1)
        monkeypatch.setattr(f"{MODULE_OF_HEAD}._pivot_stays", lambda columns: stays)
    if not stays and not INTERPRETING:
        pytest.skip("of the kernel's two forms the other one is in all other tests")
    directions = torch.tensor([[1.0], [-1.0], [0.5], [0.0], [1.0]], dtype=torch.float64)  # of growth, of each row
    x = [torch.cat([directions.roll(i), randn(5, 15, seed=i)], 1).to(dtype) for i in range(2)]
    k = torch.arange(300)
    # Each its own logit: of equal ones in the thousands a log-sum-exp in float32 has too few digits to say how many.
    w = torch.cat([(k * (rise / 32))[:, None], randn(300, 15, seed=7) * (rise < 100)], 1).to(dtype)
    bias = torch.zeros(300).masked_fill((k < 70) | (k > 290), -math.inf)
    given = [v.to(implementation.device).requires_grad_() for v in (*x, w)]
    options = {"student_temperature": 1.0, "teacher_temperature": 1.0}
    with_bias = {**options, "teacher_bias": bias.to(implementation.device)}
    loss = F.prototype_head_cross_entropy(given[:2], given[:2], given[2], given[2].detach(), **with_bias)
    found = [loss, *torch.autograd.grad(loss, given)]

    def eager(wide: torch.dtype) -> list[torch.Tensor]:
        leaves = [v.to(wide).requires_grad_() for v in (*x, w)]
        student = [v @ leaves[2].T for v in leaves[:2]]
        teacher = [(v.detach() + bias.to(wide)).softmax(1) for v in student]
        pairs = ((teacher[1], student[0]), (teacher[0], student[1]))
        total = -sum((t * s.log_softmax(1)).sum(1).mean() for t, s in pairs) / 2
        return [total, *torch.autograd.grad(total, leaves)]

    # A softmax is exp(logit - log-sum-exp), both in float32: it has as many digits less as these are large.
    digits = 8 * torch.finfo(dtype).eps + min(torch.finfo(torch.float32).eps * 10 * rise, 1e-3)
    for a, single, truth in zip(found, eager(torch.float32), eager(torch.float64), strict=True):
        bar = 2 * (single.double() - truth).abs().max() + digits * truth.abs().max()
        assert (a.cpu().double() - truth).abs().max() <= bar

    rows = [v.detach().clone() for v in given[:2]]
    rows[0][1, 3] = math.nan
    bad = F.prototype_head_cross_entropy(rows, rows, given[2], given[2].detach(), **with_bias)
    assert bad.isnan()


@pytest.mark.parametrize("op", ["prototype_head_cross_entropy"])
def test_head_fused_in_many_tiles(op, implementation, monkeypatch):
    if implementation.name == "c++":
        monkeypatch.setattr("fastjem.kernels.tiling.CPU_HEAD_BYTES", 4096)
    if implementation.name == "triton":
        monkeypatch.setattr("fastjem.kernels.tiling.PROGRAMS", 1)  # one program walks over all blocks
    x = [randn(9, 24, seed=i, scale=0.2).float().to(implementation.device).requires_grad_() for i in range(3)]
    w = randn(333, 24, seed=7).float().to(implementation.device).requires_grad_()
    options = {
        "student_temperature": 0.1,
        "teacher_temperature": 0.04,
        "teacher_bias": randn(2, 333).float().to(w.device),
    }
    fused = torch.autograd.grad(F.prototype_head_cross_entropy(x, x[:2], w, w, **options), [*x, w])

    def unfused(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        leaves = [v.detach().to(dtype).requires_grad_() for v in [*x, w]]
        logits = [v @ leaves[-1].T for v in leaves[:-1]]
        own = {**options, "teacher_bias": options["teacher_bias"].to(dtype)}
        return torch.autograd.grad(F.prototype_cross_entropy(logits, logits[:2], **own), leaves)

    for a, eager, truth in zip(fused, unfused(torch.float32), unfused(torch.float64), strict=True):
        bar = 2 * (eager.double() - truth).abs().max() + 4 * torch.finfo(torch.float32).eps * truth.abs().max()
        assert (a.double() - truth).abs().max() <= max(bar, 1e-5 * truth.abs().max())


def test_koleo_is_finite_on_duplicates_one_row_and_zeros():
    for x in (randn(1, 5), torch.ones(4, 5).double(), torch.zeros(3, 5).double(), randn(1, 5).expand(6, 5)):
        for dtype in (torch.float32, torch.float16):
            leaf = x.to(dtype).requires_grad_()
            loss = F.koleo(leaf)
            loss.backward()
            assert loss.isfinite() and leaf.grad.isfinite().all()


def test_equal_rows_pull_each_other_nowhere_but_from_others():
    """The slopes of two equal rows, of size 1 / eps, cancel to the last bit."""
    x = torch.tensor([[1.0, 2, 3], [1, 2, 3], [3, -1, 0.5], [3, -1, 0.5]], requires_grad=True)
    F.koleo(x).backward()
    assert (x.grad == 0).all()


def test_the_nearest_of_koleo_are_what_a_sort_finds():
    x = randn(1300, 6).float()
    for offset, n, topk, group_size in ((0, 1300, 4, 1300), (0, 1300, 2, 20), (0, 1300, 3, 650), (300, 500, 2, 325)):
        u = torch.nn.functional.normalize(x, dim=1)
        number = torch.arange(1300)
        similarities = (u @ u.T).masked_fill(number[:, None] // group_size != number // group_size, -3)
        similarities.fill_diagonal_(-2)
        expected = similarities.sort(1, descending=True).values[offset : offset + n, :topk]
        found = torch.ops.fastjem.koleo_neighbors(x[offset : offset + n], x, offset, topk, group_size, 1e-8)
        torch.testing.assert_close(similarities[offset : offset + n].gather(1, found), expected)
        assert (found.sort(1).values.diff(dim=1) > 0).all()


def test_neighbours_out_of_range_are_refused():
    wrong = torch.tensor([[1], [3], [0]])
    with pytest.raises(ValueError, match=r"neighbors must be in \[0, 3\), got 3 at row 1"):
        torch.ops.fastjem.koleo(randn(3, 4), wrong, 2.0, 1e-8, [True])


MISTAKES = [
    (
        lambda: F.sinkhorn_bias([torch.zeros(2, 3, 4), torch.zeros(3, 3, 4)]),
        "sinkhorn_bias: scores must be [B, K] or [P, B, K] with the same P and K, got (2, 3, 4) and (3, 3, 4)",
    ),
    (lambda: F.sinkhorn(torch.zeros(2, 0, 4)), "sinkhorn: scores must be [B, K] or [P, B, K], got (2, 0, 4)"),
    (lambda: F.sinkhorn_bias([]), "sinkhorn_bias: scores must be [B, K], or a list of them, got list"),
    (
        lambda: F.sinkhorn_bias([torch.zeros(2, 3), torch.zeros(2, 4)]),
        "sinkhorn_bias: scores must be [B, K] or [P, B, K] with the same P and K, got (2, 3) and (2, 4)",
    ),
    (lambda: F.sinkhorn(torch.ones(2, 3), dtype=torch.int8), "sinkhorn: dtype must be floating-point, got torch.int8"),
    (lambda: F.koleo(torch.zeros(3)), "koleo: x must be [N, D], got (3,)"),
    (lambda: F.koleo(torch.zeros(3, 4), p=0.5), "koleo: p must be at least 1 and finite, got 0.5"),
    (
        lambda: F.mean_entropy(torch.zeros(3)),
        "mean_entropy: scores must be [B, K], [V, B, K] or a list of [B, K], got (3,)",
    ),
    (
        lambda: F.prototype_head_cross_entropy(
            [torch.zeros(2, 3)], [torch.zeros(2, 3)], torch.zeros(5, 4), torch.zeros(5, 4),
            student_temperature=0.1, teacher_temperature=0.1, pairs="all",
        ),
        "prototype_head_cross_entropy: student and teacher must be [S, B, D] and [T, B, D], or lists of [B, D], "
        "both prototypes [K, D], got (2, 3) and (5, 4)",
    ),
    (lambda: nn.DINOLoss(7, centering="no"), "DINOLoss: centering must be one of center, sinkhorn, got 'no'"),
    (lambda: nn.DINOLoss(7, center_mode="no"), "DINOLoss: the centre's mode must be mean, got 'no'"),
    (
        lambda: nn.IBOTPatchLoss(7)(torch.zeros(3, 7), torch.zeros(3, 7), torch.zeros(1, 2, 2, dtype=torch.bool)),
        "IBOTPatchLoss: the mask must have as many true entries as there are patches, got 0 and 3",
    ),
]  # fmt: skip


@pytest.mark.parametrize("mistake, message", MISTAKES, ids=[message[:50] for _, message in MISTAKES])
def test_a_mistake_is_told(mistake, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        mistake()


# Modules against lightly's ---------------------------------------------------------------------------

lightly_loss = pytest.importorskip("lightly.loss")


def same_loss_and_gradients(ours, theirs, inputs, constants=()) -> None:
    a, b = ([x.clone().requires_grad_() for x in inputs] for _ in range(2))
    first, second = ours(*a), theirs(*b)
    assert first.dim() == 0 and first.dtype == torch.float32
    torch.testing.assert_close(first, second.squeeze(), rtol=1e-5, atol=1e-6)
    for x, y in zip(torch.autograd.grad(first, a), torch.autograd.grad(second, b), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6 * max(1.0, y.abs().max().item()))


@pytest.mark.parametrize("queue", [False, True])
@pytest.mark.parametrize("high, low", [(2, 6), (2, 0), (3, 1)])
def test_swav_loss(high, low, queue):
    scores = [randn(12, 30, seed=i, scale=0.3).float() for i in range(high + low)]
    extra = [randn(20, 30, seed=50 + i, scale=0.3).float() for i in range(high)] if queue else None
    for options in ({}, {"temperature": 0.2, "sinkhorn_iterations": 5, "sinkhorn_epsilon": 0.1}):
        ours, theirs = nn.SwaVLoss(**options), lightly_loss.SwaVLoss(**options)
        same_loss_and_gradients(
            lambda *x, f=ours: f(list(x[:high]), list(x[high:]), extra),
            lambda *x, f=theirs: f(list(x[:high]), list(x[high:]), extra),
            scores,
        )


def test_dino_loss_over_steps():
    ours, theirs = nn.DINOLoss(40, 0.04, 0.07, 5), lightly_loss.DINOLoss(40, 0.04, 0.07, 5)
    for step, kwargs in enumerate([{}, {"teacher_temp": 0.06}, {"epoch": 2}, {"epoch": 9}]):
        student = [randn(8, 40, seed=10 * step + i).float() for i in range(5)]
        teacher = [randn(8, 40, seed=10 * step + 7 + i).float() for i in range(2)]
        same_loss_and_gradients(
            lambda *x, k=kwargs, t=teacher: ours([v.clone().requires_grad_() for v in t], list(x), **k),
            lambda *x, k=kwargs, t=teacher: theirs(t, list(x), **k),
            student,
        )
        torch.testing.assert_close(ours.center, theirs.center)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    with pytest.raises(ValueError, match="at least two views"):
        ours([teacher[0]], [student[0]])


def test_dino_loss_with_sinkhorn_is_dinov2s():
    student, teacher = ([randn(8, 40, seed=i + s).float() for i in range(2)] for s in (0, 5))
    loss = nn.DINOLoss(40, centering="sinkhorn", teacher_temp=0.07)
    codes = official_sinkhorn(torch.cat(teacher).double(), 0.07, 3).split(8)
    expected = -sum((codes[1 - i] * (student[i].double() / 0.1).log_softmax(1)).sum(1).mean() for i in range(2)) / 2
    torch.testing.assert_close(loss(teacher, student).double(), expected, rtol=1e-5, atol=0)
    assert not loss.center.any()


def test_ibot_patch_loss_over_steps():
    ours, theirs = nn.IBOTPatchLoss(30), lightly_loss.IBOTPatchLoss(30)
    for step in range(3):
        mask = randn(4, 5, 5, seed=step) > 0.3
        mask[1] = False  # an image without a masked patch
        m = int(mask.sum())
        teacher = randn(m, 30, seed=20 + step).float()
        same_loss_and_gradients(
            lambda x, t=teacher, k=mask: ours(t, x, k),
            lambda x, t=teacher, k=mask: theirs(t, x, k),
            [randn(m, 30, seed=step).float()],
        )
        torch.testing.assert_close(ours.center.value, theirs.center.value)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    none = torch.zeros(0, 30, requires_grad=True)
    assert ours(none, none, torch.zeros(2, 3, 3, dtype=torch.bool)) == 0


def test_koleo_with_dinov3s_options_is_the_mean_over_groups():
    x = randn(40, 17).float()
    loss = nn.KoLeoLoss(topk=2, group_size=20)
    expected = F.koleo(x, topk=2, group_size=20)
    torch.testing.assert_close(loss(x), expected)
    torch.testing.assert_close(expected, (F.koleo(x[:20], topk=2) + F.koleo(x[20:], topk=2)) / 2)
    loss.pairwise_distance = torch.nn.PairwiseDistance(p=1)
    with pytest.raises(ValueError, match="KoLeoLoss: with a pairwise_distance of its own"):
        loss(x)


@pytest.mark.parametrize("options", [{}, {"p": 1, "eps": 1e-6}, {"p": 3}])
def test_koleo_loss(options):
    same_loss_and_gradients(nn.KoLeoLoss(**options), lightly_loss.KoLeoLoss(**options), [randn(40, 17).float()])


@pytest.mark.parametrize(
    "options", [{}, {"sinkhorn_iterations": 0}, {"temperature": 0.2, "regularization_weight": 0.0}]
)
@pytest.mark.parametrize("views", [1, 3])
def test_msn_loss(views, options):
    inputs = [randn(views * 10, 16).float(), randn(25, 16, seed=2).float()]
    targets = randn(10, 16, seed=1).float()
    ours, theirs = nn.MSNLoss(**options), lightly_loss.MSNLoss(**options)
    same_loss_and_gradients(lambda a, p: ours(a, targets, p), lambda a, p: theirs(a, targets, p), inputs)


def test_center():
    from lightly.models.modules.center import Center

    ours, theirs = nn.Center((1, 1, 6), momentum=0.8), Center((1, 1, 6), momentum=0.8)
    for step in range(3):
        x = randn(2, 5, 6, seed=step).float()
        ours.update(x)
        theirs.update(x)
        torch.testing.assert_close(ours.value, theirs.value)


def test_sinkhorn_function():
    from lightly.loss.swav_loss import sinkhorn

    scores = randn(20, 30, scale=0.3).float()
    torch.testing.assert_close(nn.sinkhorn(scores), sinkhorn(scores), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(nn.sinkhorn(scores, 5, 0.1), sinkhorn(scores, 5, 0.1), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_dino_head(batch_norm):
    from lightly.models.modules.heads import DINOProjectionHead

    widths = {"input_dim": 6, "hidden_dim": 9, "bottleneck_dim": 5, "output_dim": 20}
    options = {**widths, "batch_norm": batch_norm, "freeze_last_layer": 1}
    ours, theirs = nn.DINOProjectionHead(**options), DINOProjectionHead(**options)
    ours.load_state_dict(theirs.state_dict())  # strict
    assert [(n, p.requires_grad) for n, p in sorted(ours.named_parameters())] == [
        (n, p.requires_grad) for n, p in sorted(theirs.named_parameters())
    ]
    x = randn(7, 6).float()
    torch.testing.assert_close(ours(x), theirs(x))
    ours(x).sum().backward()
    ours.cancel_last_layer_gradients(0)
    assert ours.last_layer.weight_v.grad is None and ours.layers[0].weight.grad is not None


def test_swav_prototypes():
    from lightly.models.modules.heads import SwaVPrototypes

    for k in (12, [4, 7]):
        ours, theirs = nn.SwaVPrototypes(6, k, 3), SwaVPrototypes(6, k, 3)
        ours.load_state_dict(theirs.state_dict())
        with torch.no_grad():
            theirs.normalize()
        ours.normalize()
        a, b = (m(randn(5, 6).float(), step=2) for m in (ours, theirs))
        torch.testing.assert_close(a, b)
        assert not any(p.requires_grad for p in ours.parameters())
        ours(randn(5, 6).float(), step=3)
        assert all(p.requires_grad for p in ours.parameters())
    with pytest.raises(ValueError, match="step"):
        ours(randn(5, 6).float())


def test_mean_entropy_ends():
    assert math.isclose(F.mean_entropy(torch.zeros(4, 8)).item(), 0, abs_tol=1e-6)
    hard = torch.zeros(4, 8)
    hard[:, 2] = 100.0
    assert math.isclose(F.mean_entropy(hard).item(), math.log(8), rel_tol=1e-6)
    x = hard.clone().requires_grad_()
    F.mean_entropy(x).backward()
    assert x.grad.isfinite().all()
    assert TF.softmax(hard / 0.1, 1)[0, 2] == 1
