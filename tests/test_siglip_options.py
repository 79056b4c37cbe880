"""SigLIP's options, each and together, against a formula in float64; on one rank and over ranks."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import logsigmoid, normalize

import fastjem.functional as F
from fastjem.nn import SigLipLoss

N, D = 13, 9


def formula(
    x, y, scale, bias, *, ids=None, positives=None, exclude=None, weights=None, reduction="mean", label_smoothing=0.0
) -> Tensor:
    scale, bias = (z[:, None] if z.dim() else z for z in (scale, bias))
    logits = scale * (x @ y.T) + bias
    together = torch.eye(len(x), dtype=torch.bool) if positives is None else positives
    if ids is not None:
        together = together | (ids[:, None] == ids)
    target = together.to(x.dtype) * (1 - label_smoothing) + label_smoothing / 2
    pairs = -(target * logsigmoid(logits) + (1 - target) * logsigmoid(-logits))
    if exclude is not None:
        pairs = pairs.masked_fill(exclude, 0)
    losses = pairs.sum(1)
    if weights is not None:
        losses = losses * weights
    if reduction == "none":
        return losses
    return losses.sum() / (1 if reduction == "sum" else len(x) if weights is None else weights.sum())


def inputs(n: int = N, d: int = D, dtype: torch.dtype = torch.float64, of_rows: bool = False) -> list[Tensor]:
    g = torch.Generator().manual_seed(n * d)
    x, y = (normalize(torch.randn(n, d, generator=g, dtype=torch.float64), dim=1) for _ in range(2))
    shape = (n,) if of_rows else ()
    scale, bias = (torch.rand(shape, generator=g, dtype=torch.float64) * 4 + low for low in (3, -4))
    return [z.to(dtype).requires_grad_() for z in (x, y, scale, bias)]


def masks(n: int = N) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(0, n // 2 + 1, (n,), generator=g)
    positives, exclude = (torch.rand(n, n, generator=g) < 0.3 for _ in range(2))
    return ids, positives, exclude, torch.rand(n, generator=g, dtype=torch.float64) + 0.1


IDS, POSITIVES, EXCLUDE, WEIGHTS = masks()
OPTIONS = {
    "ids": {"ids": IDS},
    "positives": {"positives": POSITIVES},
    "exclude": {"exclude": EXCLUDE},
    "weights": {"weights": WEIGHTS},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "smoothing": {"label_smoothing": 0.2},
    "all with ids": {
        "ids": IDS, "exclude": EXCLUDE, "weights": WEIGHTS, "reduction": "none",
        "label_smoothing": torch.tensor(0.1, dtype=torch.float64),
    },
    "all with positives": {"positives": POSITIVES, "exclude": EXCLUDE, "weights": WEIGHTS, "label_smoothing": 0.3},
}  # fmt: skip
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def check(options: dict, dtype: torch.dtype, of_rows: bool, n: int = N, d: int = D) -> None:
    given = inputs(n, d, dtype, of_rows)
    exact = [z.detach().double().requires_grad_() for z in given]
    loss, expected = F.siglip_loss(*given, **options), formula(*exact, **options)
    upstream = torch.linspace(-1, 2, expected.numel(), dtype=torch.float64).reshape(expected.shape)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    of_dtype = 1e-12 if dtype == torch.float64 else 2e-6
    torch.testing.assert_close(loss.double(), expected, rtol=of_dtype, atol=of_dtype)
    got = torch.autograd.grad((loss * upstream).sum(), given)
    wanted = torch.autograd.grad((expected * upstream).sum(), exact)
    for g, e, x in zip(got, wanted, given, strict=True):
        assert g.dtype == x.dtype
        rounding = of_dtype if dtype.itemsize > 2 else 2 * torch.finfo(dtype).eps
        torch.testing.assert_close(g.double(), e, rtol=2 * rounding, atol=4 * rounding * max(1, e.abs().max().item()))


@pytest.mark.parametrize("of_rows", [False, True], ids=["", "scale and bias of rows"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_value_and_gradient(name, dtype, of_rows):
    check(OPTIONS[name], dtype, of_rows)


@pytest.mark.parametrize("n, d", [(1, 1), (1, 5), (700, 3), (5, 1300)])
def test_sizes(n, d):
    ids, positives, exclude, weights = masks(n)
    check({"ids": ids, "exclude": exclude, "weights": weights}, torch.float32, False, n, d)
    check({"positives": positives.T, "exclude": exclude.T, "reduction": "none"}, torch.float64, True, n, d)


def test_default_options_are_the_plain_loss_and_keep_its_bits():
    given = inputs(dtype=torch.float32)
    assert torch.equal(F.siglip_loss(*given), F.siglip_loss(*given, reduction="mean", label_smoothing=0.0))
    diagonal = torch.eye(N, dtype=torch.bool)
    torch.testing.assert_close(F.siglip_loss(*given, positives=diagonal), F.siglip_loss(*given))


def test_numbers_layouts_and_what_needs_no_gradient():
    x, y, scale, bias = (z.detach() for z in inputs())
    options = {"ids": IDS, "exclude": EXCLUDE}
    expected = formula(x, y, torch.tensor(5.0), torch.tensor(-2.0), **options)
    torch.testing.assert_close(F.siglip_loss(x, y, 5.0, -2.0, **options), expected)
    torch.testing.assert_close(F.siglip_loss(x.T.contiguous().T, y, 5.0, -2.0, **options), expected)
    leaf = y.requires_grad_()
    (got,) = torch.autograd.grad(F.siglip_loss(x, leaf, scale, bias, **options), leaf)
    (wanted,) = torch.autograd.grad(formula(x, leaf, scale, bias, **options), leaf)
    torch.testing.assert_close(got, wanted)


def test_weights_of_zero_make_the_mean_nan():
    x, y = torch.eye(3).requires_grad_(), torch.eye(3)
    loss = F.siglip_loss(x, y, 10.0, -10.0, weights=torch.zeros(3))
    assert loss.isnan()
    assert torch.autograd.grad(loss, x)[0].isnan().all()


def test_transforms_of_the_options():
    x, y, scale, bias = (z.detach() for z in inputs())

    def loss(*z: Tensor) -> Tensor:
        return F.siglip_loss(*z, ids=IDS, weights=WEIGHTS)

    def expected(*z: Tensor) -> Tensor:
        return formula(*z, ids=IDS, weights=WEIGHTS)

    places = (0, 1, 2, 3)
    torch.testing.assert_close(
        torch.func.grad(loss, places)(x, y, scale, bias), torch.func.grad(expected, places)(x, y, scale, bias)
    )
    both = [torch.stack([z, z / 2]) for z in (x, y, scale, bias)]
    gradients = torch.func.vmap(torch.func.grad(loss, places))(*both)
    torch.testing.assert_close(gradients, torch.func.vmap(torch.func.grad(expected, places))(*both))

    def of_rows(z: Tensor) -> Tensor:
        return F.siglip_loss(z, y, scale, bias, ids=IDS, reduction="none")

    torch.testing.assert_close(
        torch.func.jacrev(of_rows)(x),
        torch.func.jacrev(lambda z: formula(z, y, scale, bias, ids=IDS, reduction="none"))(x),
    )
    with pytest.raises(RuntimeError, match="siglip_loss: differentiable once only"):
        torch.func.grad(lambda z: torch.func.grad(lambda w: of_rows(w).sum())(z).square().sum())(x)
    leaves = inputs()
    with pytest.raises(RuntimeError, match="siglip_loss: differentiable once only"):
        torch.autograd.grad(loss(*leaves), leaves, create_graph=True)


def test_one_graph_for_many_batch_sizes():
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")

    def loss(x, y, scale, bias, ids, exclude, weights):
        options = {"ids": ids, "exclude": exclude, "weights": weights, "label_smoothing": 0.1}
        return F.siglip_loss(x, y, scale, bias, **options)

    compiled = torch.compile(loss, backend=graphs, fullgraph=True)
    for n in (5, 7, 12):
        given = inputs(n, D, torch.float32)
        ids, _, exclude, weights = masks(n)
        got = compiled(*given, ids, exclude, weights)
        expected = loss(*given, ids, exclude, weights)
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(
            torch.autograd.grad(got, given), torch.autograd.grad(expected, given), rtol=1e-5, atol=1e-6
        )
    assert graphs.frame_count <= 2


@pytest.mark.parametrize(
    "options, message",
    [
        ({"ids": IDS[:-1]}, r"siglip_loss: ids must be \[13\], got \(12,\)"),
        ({"ids": IDS.int()}, "siglip_loss: ids must be int64, got torch.int32"),
        ({"positives": POSITIVES[:, 1:]}, r"siglip_loss: positives must be \[13, 13\], got \(13, 12\)"),
        ({"positives": POSITIVES.float()}, r"siglip_loss: positives must be bool, got torch.float32"),
        ({"positives": POSITIVES, "ids": IDS}, "siglip_loss: ids or positives must be given, not both, got both"),
        ({"exclude": EXCLUDE[0]}, r"siglip_loss: exclude must be \[13, 13\], got \(13,\)"),
        ({"weights": WEIGHTS[None]}, r"siglip_loss: weights must be \[13\], got \(1, 13\)"),
        ({"reduction": "avg"}, "siglip_loss: reduction must be one of mean, sum, none, got 'avg'"),
        ({"label_smoothing": 1.5}, r"siglip_loss: label_smoothing must be in \[0, 1\], got 1.5"),
    ],
    ids=lambda x: "" if isinstance(x, dict) else x[:50],
)
def test_mistakes(options, message):
    with pytest.raises(ValueError, match=message):
        F.siglip_loss(*inputs(), **options)


def test_module():
    x, y, scale, bias = inputs()
    got = SigLipLoss(label_smoothing=0.1)(x, y, scale, bias, ids=IDS, weights=WEIGHTS)
    torch.testing.assert_close(got, formula(x, y, scale, bias, ids=IDS, weights=WEIGHTS, label_smoothing=0.1))


SIZES = {2: (5, 1), 3: (4, 0, 1)}  # of one row, a scale of each row looks like a number
RANKED = [
    {"ids": IDS},
    {"positives": POSITIVES, "exclude": EXCLUDE, "weights": WEIGHTS, "label_smoothing": 0.2},
    {"ids": IDS, "exclude": EXCLUDE, "weights": WEIGHTS, "reduction": "sum"},
    {"ids": IDS, "weights": WEIGHTS, "reduction": "none"},
]


def check_rank(rank: int, world: int, store: str) -> None:
    os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    n = sum(SIZES[world])
    mine = slice(sum(SIZES[world][:rank]), sum(SIZES[world][: rank + 1]))
    for of_rows in (False, True):
        for options in RANKED:
            whole = {name: of[:n, :n] if name in ("positives", "exclude") else of[:n] if isinstance(of, Tensor) else of
                     for name, of in options.items()}  # fmt: skip
            leaves = inputs(n, D, of_rows=of_rows)
            expected = formula(*leaves, **whole)
            each = options.get("reduction") == "none"
            upstream = torch.linspace(-1, 2, n, dtype=torch.float64) if each else torch.tensor(-0.7)
            gradients = torch.autograd.grad((expected * upstream).sum(), leaves)
            own = {name: of[mine] if isinstance(of, Tensor) else of for name, of in whole.items()}
            parts = [(z[mine] if z.dim() else z).detach().clone().requires_grad_() for z in leaves]
            loss = F.siglip_loss(*parts, group=dist.group.WORLD, **own)
            told = f"{[*options]}, rank {rank}"
            torch.testing.assert_close(loss, expected[mine] if each else expected, msg=told)
            got = torch.autograd.grad((loss * (upstream[mine] if each else upstream)).sum(), parts)
            for part, full, of in zip(got, gradients, leaves, strict=True):
                if not of.dim():  # a number's gradient is the sum of all ranks' parts
                    dist.all_reduce(part)
                factor = 1 if each else world  # DistributedDataParallel divides by it
                torch.testing.assert_close(part / factor, full[mine] if of.dim() else full, msg=f"{told}, gradient")
    with pytest.raises(ValueError, match=r"exclude must be \[\d, \d+\], got \(\d, 7\) .on rank 0"):
        F.siglip_loss(*parts, group=dist.group.WORLD, exclude=EXCLUDE[: parts[0].shape[0], : n if rank else 7])
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.exhaustive)])
def test_ranks(world, tmp_path):
    mp.spawn(check_rank, (world, str(tmp_path / "store")), nprocs=world)
