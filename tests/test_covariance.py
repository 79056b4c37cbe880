"""Barlow Twins and VICReg: their memory, and where Gram forms are delicate.

That is with N near D, constant columns, large means and half precision.
"""

import cases
import pytest
import torch
from torch import Tensor

import fastjem.functional as F
from fastjem.ops import direct

OPS = ("barlow_twins", "vicreg")
EAGER = {"barlow_twins": cases.eager_barlow_twins, "vicreg": cases.eager_vicreg}
op_parameter = pytest.mark.parametrize("op", OPS)


def constant(a: Tensor, b: Tensor) -> None:
    a[:, ::3] = 0.7
    b[:, 1::3] = -1e3


def duplicated(a: Tensor, b: Tensor) -> None:
    a[1:] = a[0].clone() + 1e-3 * a[1:]
    b[::2] = b[0].clone()


def large_means(a: Tensor, b: Tensor) -> None:
    a += 1000
    b -= 300 * torch.arange(b.shape[1])


def decorrelated(a: Tensor, b: Tensor) -> None:
    """Orthogonal columns: all of the covariance is on the diagonal, which the Gram form subtracts from the total."""
    for x in (a, b):
        q = torch.linalg.qr(x.T if x.shape[0] < x.shape[1] else x)[0]
        x.copy_((q.T if x.shape[0] < x.shape[1] else q) * 3)


def untouched(a: Tensor, b: Tensor) -> None:
    pass


def run(function, inputs: list[Tensor], dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, list[Tensor]]:
    leaves = [x.to(device, dtype).requires_grad_() for x in inputs]
    loss = function(*leaves)
    return loss.detach(), list(torch.autograd.grad(loss, leaves))


@op_parameter
@pytest.mark.parametrize("n, d", [(140, 160), (150, 144)])
def test_squares_in_large_tiles(op, n, d, implementation, monkeypatch):
    """As many rows as give each of Hopper's multiprocessors one have them; here any."""
    if implementation.name != "triton":
        pytest.skip("Triton's tiles")
    from fastjem.kernels import launch
    from fastjem.kernels.covariance import products

    monkeypatch.setattr(products, "PROGRAMS", 0)
    tiles = []
    launched = launch.launch

    def noting(kernel, *arguments, **meta):
        tiles.append((getattr(kernel, "fn", kernel).__name__, meta.get("BM")))
        launched(kernel, *arguments, **meta)

    monkeypatch.setattr(launch, "launch", noting)
    g = torch.Generator().manual_seed(0)
    inputs = [torch.randn(n, d, generator=g) for _ in range(2)]
    loss, gradients = run(getattr(F, op), inputs, torch.float32, implementation.device)
    expected, wanted = run(EAGER[op], inputs, torch.float64)
    # Barlow Twins makes both views' squares at once where there are fewer rows than columns, in smaller tiles.
    assert (("_squares_kernel", 128) in tiles) == (op == "vicreg" or n > d) or implementation.device == "cuda"
    torch.testing.assert_close(loss.cpu().double(), expected, rtol=1e-5, atol=0)
    for a, b in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(a.cpu().double(), b, rtol=0, atol=1e-5 * b.abs().max().item())


@op_parameter
@pytest.mark.parametrize(
    "change", [untouched, constant, duplicated, large_means, decorrelated], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("n, d", [(2, 9), (8, 70), (32, 33), (33, 33), (34, 33), (70, 8), (2, 1), (1500, 130)])
def test_delicate_inputs(op, change, n, d, implementation, poisoned):
    if implementation.name == "triton" and n * d > 4000:
        pytest.skip("too slow for the interpreter")
    ours, eager, oracle = [], [], []
    for seed in range(2):
        g = torch.Generator().manual_seed(seed)
        inputs = [torch.randn(n, d, generator=g) for _ in range(2)]
        change(*inputs)
        ours.append(run(getattr(F, op), inputs, torch.float32, implementation.device))
        eager.append(run(EAGER[op], inputs, torch.float32, implementation.device))
        oracle.append(run(EAGER[op], inputs, torch.float64, implementation.device))
        # what rounding is relative to: the sum of the loss's positive terms (nothing cancels in eager), each input's
        # gradient by its largest entry
    unit = torch.finfo(torch.float32).eps

    def worst(results, get) -> float:
        return max((get(r).double() - get(o)).abs().max().item() for r, o in zip(results, oracle, strict=True))

    def largest(get) -> float:
        return max(get(o).abs().max().item() for o in oracle)

    def terms(z: Tensor) -> float:
        """The size of the gradient's terms before the batch norm or the subtraction of the diagonal cancels them."""
        size = z.abs().max().item()
        z = z.double() - z.double().mean(0)
        if op == "barlow_twins":
            return 2 / n / (z.var(0, correction=0) + 1e-5).sqrt().min().item()
        centring = (
            12.5 * size / (z.var(0) + 1e-4).sqrt().min().item() / n / d
        )  # the input's rounding, through the variance
        return max(centring, 4 * (z.abs().max() * z.square().sum(0).max() / (n - 1) ** 2 / d).item())

    get = lambda r: r[0]  # noqa: E731
    diagonal = d if op == "barlow_twins" else 2 * max((inputs[i].var(0) ** 2).mean().item() for i in (0, 1))
    limit = 2 * worst(eager, get) + 8 * unit * (largest(get) + (diagonal if op == "vicreg" else 5e-3 * diagonal))
    assert worst(ours, get) <= limit
    for i in range(2):
        get = lambda r: r[1][i]  # noqa: E731, B023
        limit = 2 * worst(eager, get) + 8 * unit * max(largest(get), max(terms(x) for x in inputs))
        assert worst(ours, get) <= limit, f"gradient {i}: error {worst(ours, get):.3g}, allowed {limit:.3g}"


@op_parameter
@pytest.mark.parametrize("n, d", [(20, 25), (25, 20), (40, 45), (45, 40)])  # an even number of blocks, and an odd one
def test_squares_of_several_blocks(op, n, d, implementation, poisoned, monkeypatch):
    """Every two blocks of a symmetric square meet once; half of an even number of blocks away they meet twice."""
    if implementation.name != "triton":
        pytest.skip("how Triton's programs share a square")
    tile = {"BM": 16, "BLOCK_K": 16, "num_warps": 4, "num_stages": 1}
    monkeypatch.setattr("fastjem.kernels.tiling.covariance_squares", lambda *_: tile)
    g = torch.Generator().manual_seed(0)
    inputs = [torch.randn(n, d, generator=g) for _ in range(2)]
    loss, gradients = run(getattr(F, op), inputs, torch.float32, implementation.device)
    expected, exact = run(EAGER[op], inputs, torch.float64, implementation.device)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    for gradient, e in zip(gradients, exact, strict=True):
        torch.testing.assert_close(gradient.double(), e, rtol=0, atol=2e-6 * e.abs().max().item())


@op_parameter
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n, d", [(16, 40), (40, 16)])
def test_half_precision_is_rounded_once(op, dtype, n, d, implementation, poisoned):
    """The oracle sees the same half-precision inputs: only the gradient is rounded."""
    if dtype == torch.bfloat16 and implementation.name == "triton" and implementation.device == "cpu":
        pytest.skip("the interpreter rounds bfloat16 towards zero")
    g = torch.Generator().manual_seed(0)
    inputs = [torch.randn(n, d, generator=g).to(dtype).float() for _ in range(2)]
    loss, gradients = run(getattr(F, op), inputs, dtype, implementation.device)
    expected, exact = run(EAGER[op], inputs, torch.float64, implementation.device)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=2e-6, atol=0)
    for gradient, e in zip(gradients, exact, strict=True):
        assert gradient.dtype == dtype
        # once more in backward, where the scale is applied
        torch.testing.assert_close(gradient.double(), e, rtol=1.1 * torch.finfo(dtype).eps, atol=3e-8)


@op_parameter
def test_one_gradient_and_none(op, implementation):
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(6, 20, generator=g).to(implementation.device) for _ in range(2))
    loss, (_, expected) = run(getattr(F, op), [a, b], torch.float32, implementation.device)
    b = b.requires_grad_()
    alone = getattr(F, op)(a, b)
    alone.backward()
    assert torch.equal(alone.detach(), loss) and torch.equal(b.grad, expected)
    with torch.no_grad():
        assert torch.equal(getattr(F, op)(a, b), loss)


def test_the_papers_variance_weighs_twice():
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(12, 7, generator=g) * 0.3 for _ in range(2))
    official, paper = F.vicreg(a, b), F.vicreg(a, b, variance_factor=1.0)
    variance = sum((1 - (z.var(0) + 1e-4).sqrt()).relu().mean() for z in (a, b))
    torch.testing.assert_close(paper - official, 25 * 0.5 * variance)


@op_parameter
def test_memory_without_the_square_of_the_wider_side(op):
    """Peak of resident memory above the inputs, measured in a process of its own: D x D would be 1 GiB."""
    import subprocess
    import sys

    script = f"""
import resource, torch
import fastjem.functional as F
torch.set_num_threads(2)
a, b = (torch.randn(64, 16384, requires_grad=True) for _ in range(2))
small = torch.randn(8, 8, requires_grad=True)
F.{op}(small, small).backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
F.{op}(a, b).backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    from fastjem import ops

    if ops.implementations()[op]["cpu"] != "C++":
        pytest.skip("the reference builds D x D")
    grown = float(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout)
    assert grown < 100  # two centred copies and two gradients are 16 MiB, products' work space the rest


@op_parameter
@pytest.mark.parametrize("n, d", [(9, 30), (30, 9)])
def test_health_figures_come_with_the_loss(op, n, d, implementation, poisoned):
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n, d, generator=g) * torch.linspace(0.1, 2, d) for _ in range(2))
    b = b + a
    health = F.Health(keep_spectrum=True)
    leaves = [x.to(implementation.device).requires_grad_() for x in (a, b)]
    loss = getattr(F, op)(*leaves, health=health)
    loss.backward()
    with direct.off():  # the few rows of a plain call are summed in double
        assert torch.equal(loss, getattr(F, op)(*leaves))
    torch.testing.assert_close(loss, getattr(F, op)(*leaves), rtol=1e-6, atol=0)
    z = [x.double() for x in (a, b)]
    if op == "vicreg":
        std = [(x.var(0) + 1e-4).sqrt() for x in z]
        spectra = torch.stack([torch.linalg.eigvalsh(x.T.cov()).flip(0) for x in z])
        rank = spectra.sum(1) ** 2 / spectra.square().sum(1)
    else:
        std = [(x.var(0, correction=0) + 1e-5).sqrt() for x in z]
        c = ((z[0] - z[0].mean(0)) / std[0]).T @ ((z[1] - z[1].mean(0)) / std[1]) / n
        spectra = torch.linalg.svdvals(c).expand(2, -1)
        rank = (c.trace() ** 2 / c.square().sum()).expand(2)
    seen = health.std, health.effective_rank, health.spectrum()
    for came, expected in zip(seen, (torch.stack(std), rank, spectra[:, : min(n, d)]), strict=True):
        assert came.shape == expected.shape and not came.requires_grad
        # the last eigenvalue of n centred rows is 0, and a singular value its root
        torch.testing.assert_close(came.double().cpu(), expected, rtol=1e-5, atol=1e-6 if op == "vicreg" else 1e-3)


def test_modules_keep_their_health():
    import fastjem.nn

    a, b = torch.randn(2, 8, 5, generator=torch.Generator().manual_seed(0)).unbind()
    for module in (fastjem.nn.VICRegLoss(track_health=True), fastjem.nn.BarlowTwinsLoss(track_health=True)):
        module(a, b)
        correction = int(isinstance(module, fastjem.nn.VICRegLoss))
        expected = torch.stack([a, b]).std(1, correction=correction)
        torch.testing.assert_close(module.health.std, expected, rtol=2e-3, atol=0)
        assert (module.health.effective_rank > 0).all() and (module.health.effective_rank <= 5).all()
        with pytest.raises(ValueError, match="health: spectrum needs Health"):
            module.health.spectrum()
        module.track_spectrum = True
        module(a, b)
        assert module.health.spectrum().shape == (2, 5)
    assert fastjem.nn.VICRegLoss().health is None


@op_parameter
def test_health_of_a_compiled_loss(op):
    a, b = torch.randn(2, 8, 5, generator=torch.Generator().manual_seed(0)).unbind()
    seen, compiled = F.Health(keep_spectrum=True), F.Health(keep_spectrum=True)
    getattr(F, op)(a, b.requires_grad_(), health=seen)
    torch._dynamo.reset()
    torch.compile(getattr(F, op), fullgraph=True, backend="aot_eager")(a, b, health=compiled).backward()
    assert torch.equal(seen.std, compiled.std) and torch.equal(seen.effective_rank, compiled.effective_rank)
    assert torch.equal(seen.spectrum(), compiled.spectrum())


@op_parameter
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_gradient_before_its_scale_stays_in_range(op, dtype, implementation):
    """Thousands of columns that are all alike: the unscaled gradient grows with D, and float16 ends at 65504."""
    g = torch.Generator().manual_seed(0)
    n, d = (4, 300) if implementation.name == "triton" and implementation.device == "cpu" else (16, 3000)
    inputs = [(3 * torch.randn(n, 1, generator=g) + torch.randn(n, d, generator=g)).to(dtype).float() for _ in range(2)]
    _, gradients = run(getattr(F, op), inputs, dtype, implementation.device)
    _, exact = run(EAGER[op], inputs, torch.float64, implementation.device)
    for gradient, e in zip(gradients, exact, strict=True):
        assert (gradient.double() - e).abs().max() < 3 * torch.finfo(dtype).eps * e.abs().max()
