"""The contract of every loss, for every implementation: see docs/architecture.md. Cases and oracles: cases.py."""

import pytest
import torch
from cases import DTYPES, LOSSES, Case

import fastjem.functional as F
from fastjem import ops
from fastjem.functional import quick
from fastjem.kernels import tiling
from fastjem.ops import direct

SEEDS = range(5)
UPSTREAM = -0.37  # neither 1 nor a power of two


def _size(case: Case) -> int:
    return sum(x.numel() for x in case.make(torch.Generator()))


def _small(op: str) -> Case:
    """The operator's smallest case with more than a vector's worth of elements, or else its largest."""
    cases = sorted((case for case in LOSSES if case.op == op), key=_size)
    return next((case for case in cases if _size(case) > 100), cases[-1])


SMALL = [_small(op) for op in {case.op: 0 for case in LOSSES}]
by_name = {"ids": str}


def rounding(dtype: torch.dtype) -> float:
    """A unit in the last place; for float64 32 of them, as the oracle itself has no more digits."""
    return torch.finfo(dtype).eps * (32 if dtype == torch.float64 else 1)


def assert_as_good_as(ours, eager, oracle, size: float, what: str) -> None:
    """Over the seeds: at most twice eager's largest error plus 4 eps of the largest value; the RMS error closer still.

    `size` is that of the terms a result is the sum of, where they may cancel: rounding errors are relative to it.
    """
    ours, eager, oracle = (torch.stack(list(x)) for x in (ours, eager, oracle))
    error, bar = (ours.double() - oracle).abs(), (eager.double() - oracle).abs()
    unit = rounding(ours.dtype) * max(oracle.abs().max().item(), size)
    worst, limit = error.max().item(), 2 * bar.max().item() + 4 * unit
    assert worst <= limit, f"{what}: error {worst:.3g}, allowed {limit:.3g}"
    rms, limit = error.square().mean().sqrt().item(), 1.5 * bar.square().mean().sqrt().item() + unit
    assert rms <= limit, f"{what}: RMS error {rms:.3g}, allowed {limit:.3g}"


def check_values_and_gradients(case: Case, dtype: torch.dtype, device: str, layout=lambda x: x) -> None:
    ours, eager, oracle, sizes = [], [], [], []
    for seed in SEEDS:
        inputs = case.inputs(seed, dtype, device)
        exact = [x.double() if x.is_floating_point() else x for x in inputs]
        oracle.append(case.run(case.eager, exact, UPSTREAM))
        eager.append(case.run(case.eager, inputs, UPSTREAM))
        ours.append(case.run(case.call, [layout(x) for x in inputs], UPSTREAM))
        sizes.append(abs(UPSTREAM) * case.gradient_size(*exact))
        loss, gradients = ours[-1]
        assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and loss.dim() == 0
        assert all(g.dtype == dtype for g in gradients)
    values = ([run[0] for run in runs] for runs in (ours, eager, oracle))
    assert_as_good_as(*values, abs(case.loss_size), f"{case} loss")
    for i in range(case.differentiable):
        gradients = ([run[1][i] for run in runs] for runs in (ours, eager, oracle))
        assert_as_good_as(*gradients, max(sizes), f"{case} gradient {i}")


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPES.get)
@pytest.mark.parametrize("case", LOSSES, **by_name)
def test_value_and_gradient(case, dtype, implementation, poisoned):
    if dtype not in case.dtypes:
        pytest.skip("no bar in this dtype, see cases.py")
    check_values_and_gradients(case, dtype, implementation.device)


@pytest.mark.parametrize("op", ["gram_loss"])
def test_value_of_gram_matrices_in_bands(op, implementation, poisoned, monkeypatch):
    """128 rows of an image's 300 at a time, where no more weights are to be in a GPU's memory."""
    monkeypatch.setattr(tiling, "WEIGHTS_BYTES", 1)
    (case,) = (case for case in LOSSES if str(case) == "gram_loss-2x300x4")
    check_values_and_gradients(case, torch.float32, implementation.device)


def _transposed(x: torch.Tensor) -> torch.Tensor:
    return x.mT.contiguous().mT if x.dim() == 2 else x


def _rows_apart(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x, x], -1)[..., : x.shape[-1]] if x.dim() == 2 else x


def _every_second(x: torch.Tensor) -> torch.Tensor:
    return x.repeat_interleave(2, -1)[..., ::2] if x.dim() else x


@pytest.mark.parametrize("layout", [_transposed, _rows_apart, _every_second])
@pytest.mark.parametrize("case", SMALL, **by_name)
def test_non_contiguous(case, layout, implementation, poisoned):
    check_values_and_gradients(case, torch.float32, implementation.device, layout)


@pytest.mark.parametrize("case", LOSSES, **by_name)
def test_same_bits_again_without_gradient_and_under_autocast(case, implementation):
    inputs = case.inputs(0, torch.float32, implementation.device)
    loss, gradients = case.run(case.call, inputs, UPSTREAM)
    for context in (torch.enable_grad(), torch.autocast(implementation.device, torch.bfloat16)):
        with context:
            again, again_gradients = case.run(case.call, inputs, UPSTREAM)
        assert torch.equal(loss, again)
        assert all(map(torch.equal, gradients, again_gradients))
    with torch.no_grad():
        value = case.call(*[x.requires_grad_() if x.is_floating_point() else x for x in inputs])
    assert not value.requires_grad and torch.equal(value, loss)


@pytest.mark.parametrize("case", SMALL, **by_name)
def test_gradient_of_a_retained_graph(case, implementation):
    """The unscaled gradient is scaled in place only when autograd frees it: a second backward sees it untouched."""
    inputs = case.inputs(0, torch.float32, implementation.device)
    leaf = inputs[0].requires_grad_()
    loss = case.call(*inputs)
    (first,) = torch.autograd.grad(loss * 2, leaf, retain_graph=True)
    first = first.clone()
    (second,) = torch.autograd.grad(loss * 2, leaf)
    assert torch.equal(first, second)


@pytest.mark.parametrize("case", SMALL, **by_name)
def test_compiles_in_one_graph(case, implementation):
    inputs = case.inputs(0, torch.float32, implementation.device)
    with direct.off():  # a graph has the operator, and not what few rows take past the dispatcher
        loss, gradients = case.run(case.call, inputs, UPSTREAM)
    torch._dynamo.reset()
    compiled = torch.compile(case.call, fullgraph=True, backend="aot_eager")
    again, again_gradients = case.run(compiled, inputs, UPSTREAM)
    torch.testing.assert_close(again, loss, rtol=1e-6, atol=0)
    for a, b in zip(gradients, again_gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("case", SMALL, **by_name)
def test_compiles_with_inductor(case):
    inputs = case.inputs(0, torch.float32, "cpu")
    with direct.off():
        loss, gradients = case.run(case.call, inputs, UPSTREAM)
    torch._dynamo.reset()
    again, again_gradients = case.run(torch.compile(case.call, fullgraph=True), inputs, UPSTREAM)
    torch.testing.assert_close(again, loss, rtol=1e-6, atol=0)
    for a, b in zip(gradients, again_gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("case", SMALL, **by_name)
def test_differentiates_once(case, implementation, monkeypatch):
    monkeypatch.setattr(quick, "FEW", 0)  # torch's own kernels, which take fewer, differentiate twice
    inputs = case.inputs(0, torch.float32, implementation.device)
    leaf = inputs[0].requires_grad_()
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(case.call(*inputs), leaf, create_graph=True)


@pytest.mark.parametrize("case", [c for c in LOSSES if c.op in ("cross_entropy", "negative_cosine")], **by_name)
def test_nothing_is_saved_but_gradients(case, implementation, monkeypatch):
    monkeypatch.setattr(quick, "FEW", 0)  # torch's own kernels, which take fewer, save labels too
    inputs = case.inputs(0, torch.float32, implementation.device)
    leaves = [x.requires_grad_() if i < case.differentiable else x for i, x in enumerate(inputs)]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.nbytes) or x, lambda x: x):
        case.call(*leaves)
    assert sum(saved) <= sum(x.nbytes for x in leaves[: case.differentiable]) + 16


@pytest.mark.parametrize("op", ["cross_entropy"])
def test_float16_gradients_survive_a_large_batch(op, implementation):
    """1/N inside a float16 gradient would make most of it vanish; it is applied in backward, after the loss scale."""
    case = Case(op, "", lambda g: [], torch.nn.functional.cross_entropy, torch.nn.functional.cross_entropy)
    rows = 300 if implementation.name == "triton" and implementation.device == "cpu" else 10_240
    g = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 100, generator=g).to(implementation.device, torch.float16)
    y = torch.randint(0, 100, (rows,), generator=g).to(implementation.device)
    from fastjem.functional import cross_entropy

    _, (gradient,) = case.run(cross_entropy, [x, y], 65536.0)
    assert (gradient == 0).float().mean() < 0.01


@pytest.mark.parametrize("op", ["nt_xent"])
@pytest.mark.parametrize("n", [230, 250], ids=lambda n: f"{n} rows")  # 8 blocks of 64, and an odd number less than one
@pytest.mark.parametrize("temperature", [0.5, 0.01])
def test_a_symmetric_matrix_in_pieces(op, n, temperature, implementation, monkeypatch):
    """Every two blocks of rows meet once, however few distances from the diagonal are walked at a time."""
    if implementation.name != "triton":
        pytest.skip("how Triton's programs share a symmetric matrix")
    monkeypatch.setattr("fastjem.kernels.tiling.COLUMN_SUMS", 1)
    z = torch.randn(2, n, 8, generator=torch.Generator().manual_seed(0)).to(implementation.device)
    positives, lse = torch.ops.fastjem.nt_xent(z, z, 0, temperature, False, True)
    exact_positives, exact_lse = ops.reference("nt_xent")(z.double(), z.double(), 0, temperature, False, True)
    torch.testing.assert_close(lse, exact_lse, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(positives, exact_positives, rtol=1e-6, atol=1e-5)


def test_offsets_past_2_31_elements(implementation):
    """Rows that lie 2^31 elements apart: the memory between them is never touched."""
    if implementation.device == "cuda":
        pytest.skip("see test_gpu.py")
    from fastjem.functional import cross_entropy, negative_cosine

    apart = 2**31 + 8
    memory = torch.empty(apart + 64, dtype=torch.float16)
    far = memory.as_strided((2, 64), (apart, 1))
    near = torch.randn(2, 64, generator=torch.Generator().manual_seed(0)).half()
    far.copy_(near)
    assert torch.equal(cross_entropy(far, torch.tensor([3, 9])), cross_entropy(near, torch.tensor([3, 9])))
    assert torch.equal(negative_cosine(far, near.flip(0)), negative_cosine(near, near.flip(0)))


JOINED = {  # losses that join their tensors in torch
    "nt_xent": lambda x: F.nt_xent(x, x + 1, reduction="sum"),
    "dcl": lambda x: F.dcl(x, x + 1, temperature=torch.tensor(0.5)),
    "nnclr": lambda x: F.nnclr(x, x + 1, x + 2, x, x),
    "lejepa": lambda x: F.lejepa(x[None], x[None] + 1, torch.eye(4)),
    "visreg": lambda x: F.visreg(x[None], x[None] + 1, torch.eye(4)),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("loss", JOINED.values(), ids=JOINED)
def test_half_precision_within_autocast_of_the_other_one(loss, dtype):
    x = torch.arange(12.0).sin().view(3, 4).to(dtype)
    expected = loss(x)
    with torch.autocast("cpu", torch.float16 if dtype == torch.bfloat16 else torch.bfloat16):
        found = loss(x)
    assert torch.equal(found, expected)


def test_gram_loss_beyond_float32_is_infinite():
    rows = torch.full((1, 5, 3), 1e18)
    assert F.gram_loss(rows, -2 * rows.sign(), normalize=False) == torch.inf
