"""InfoNCE of one rank, whole in one operator: a queue and negatives that learn, temperatures, few queries and many."""

import pytest
import torch
from conftest import INTERPRETING, half_and_float32
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

import fastjem.functional as F
from fastjem.kernels import tiling

# Queries, negatives, width, temperature and the first query's place among the negatives: several blocks of either,
# ragged; one pivot for all and running ones, in float16 too; negatives of other ranks; wider than a block on the chip;
# one row; one column. The interpreter takes minutes for the large ones.
LARGE = [pytest.mark.exhaustive] if INTERPRETING else []
SHAPES = [
    pytest.param((150, 300, 40, 0.2, None), marks=LARGE),
    pytest.param((140, 70, 128, 0.5, -30), marks=LARGE),
    pytest.param((70, 130, 64, 0.5, 20), marks=LARGE),
    pytest.param((30, 70, 128, 0.0135, None), marks=LARGE),
    (20, 70, 16, 0.5, 3),
    (21, 40, 16, 0.01, None),
    pytest.param((9, 40, 300, 0.3, 0), marks=LARGE),
    (1, 1, 8, 0.3, None),
    (9, 5, 1, 0.5, None),
]


def eager(query: Tensor, positive: Tensor, negatives: Tensor, temperature: float | Tensor, offset: int | None):
    q, p, k = (normalize(x, dim=1) for x in (query, positive, negatives))
    logits = q @ k.T / temperature
    if offset is not None:
        own = torch.arange(len(q))[:, None] + offset == torch.arange(len(k))
        logits = logits.masked_fill(own, -torch.inf)
    logits = torch.cat([(q * p).sum(1, keepdim=True) / temperature, logits], 1)
    return cross_entropy(logits, torch.zeros(len(q), dtype=torch.long))


def rows(n: int, k: int, d: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(number, d, generator=generator, dtype=torch.float64) for number in (n, n, k)]


ALL = (True, True, True)


def check(
    inputs: list[Tensor],
    temperature: float,
    offset: int | None,
    dtype: torch.dtype,
    device: str,
    wanted: tuple[bool, ...] = ALL,
    learned: bool = False,
) -> None:
    leaves = [x.to(device, dtype).requires_grad_(want) for x, want in zip(inputs, wanted, strict=True)]
    same = [x.detach().cpu().double().requires_grad_(x.requires_grad) for x in leaves]
    of_ours = of_theirs = temperature
    asked = [[x for x in of if x.requires_grad] for of in (leaves, same)]
    if learned:
        of_ours = torch.tensor(temperature, device=device, requires_grad=True)
        of_theirs = of_ours.detach().cpu().double().requires_grad_()
        asked = [[*asked[0], of_ours], [*asked[1], of_theirs]]
    loss, again = (F.info_nce(*leaves, temperature=of_ours, label_offset=offset) for _ in range(2))
    gradients, repeated = (torch.autograd.grad(x, asked[0], torch.full_like(x, -0.7)) for x in (loss, again))
    truth = eager(*same, of_theirs, offset)
    expected = torch.autograd.grad(truth, asked[1], torch.full_like(truth, -0.7))
    assert torch.equal(loss, again) and all(map(torch.equal, gradients, repeated))
    tolerance = {torch.float32: 3e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(loss.detach().cpu().double(), truth.detach(), rtol=tolerance, atol=tolerance)
    for gradient, x, leaf in zip(gradients, expected, asked[0], strict=True):
        assert gradient.dtype == leaf.dtype and gradient.shape == leaf.shape
        # of one column the gradient is 0, and its terms as large as 1 / |z|
        one_column = 2e-5 if leaf.shape[-1:] == (1,) else 1e-6
        assert (gradient.cpu().double() - x).norm() <= tolerance * x.norm() + one_column


@pytest.mark.parametrize("dtype", half_and_float32(), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape, dtype, implementation):
    n, k, d, temperature, offset = shape
    inputs = rows(n, k, d)
    check(inputs, temperature, offset, dtype, implementation.device)
    check(inputs, temperature, offset, dtype, implementation.device, (True, True, False))
    if temperature > 0.05 and offset is None:  # the formula's own gradient for a masked logit is NaN
        check(inputs, temperature, offset, dtype, implementation.device, learned=True)
        check(inputs, temperature, offset, dtype, implementation.device, (True, False, False), learned=True)


@pytest.mark.parametrize("dtype", half_and_float32(), ids=str)
@pytest.mark.parametrize("wanted", [(i == 0, i == 1, i == 2) for i in range(4)], ids=str)
def test_only_what_is_wanted(wanted, dtype, implementation):
    """The last of them: a temperature alone."""
    inputs = rows(24, 40, 24)
    if any(wanted):
        check(inputs, 0.3, None, dtype, implementation.device, wanted)
    check(inputs, 0.3, None, dtype, implementation.device, wanted, learned=True)


@pytest.mark.parametrize("dtype", [pytest.param(torch.float16, marks=LARGE), torch.float32], ids=str)
def test_many_queries_and_weights_in_bands(dtype, implementation, monkeypatch):
    """Of many queries several programs make the loss; of weights a band is in memory at a time."""
    if not INTERPRETING:
        pytest.skip("a GPU's alone")
    from fastjem.kernels.contrastive import gpu_queries

    monkeypatch.setattr(gpu_queries, "FEW", 20)
    monkeypatch.setattr(tiling, "WEIGHTS_BYTES", 1)
    check(rows(1030, 7, 16), 0.4, None, dtype, implementation.device, learned=True)


@pytest.mark.parametrize("wanted", [(True, True, True), (True, True, False), (False, False, True)], ids=str)
def test_torchs_product_of_many_rows(wanted, implementation, monkeypatch):
    if not INTERPRETING:
        pytest.skip("a GPU's alone")
    monkeypatch.setattr(tiling, "WEIGHTS_BYTES", 1 << 16)  # one tile of 128 x 128 and no more
    check(rows(9, 130, 24), 0.4, None, torch.float32, implementation.device, wanted, learned=True)


@pytest.mark.parametrize("temperature", [0.3, 0.01])
def test_a_bank_whose_exponentials_are_kept(temperature, implementation, monkeypatch):
    """Five tiles: programs of two each, as sums of products have memory for three programs and not for five.

    A small temperature has maxima, which grow from tile to tile.
    """
    if not INTERPRETING:
        pytest.skip("a GPU's alone")
    from fastjem.kernels.contrastive import query_products

    inputs = rows(9, 260, 24)
    inputs[2] = torch.cat([inputs[2][:200], inputs[0] + 0.1 * inputs[1], inputs[2][:51]])  # the nearest ones come late
    monkeypatch.setattr(query_products, "PARTS_BYTES", 0)
    monkeypatch.setattr(query_products.products, "bytes_of", lambda *_: 8 * 3 * 9 * 24 * 4)
    check(inputs, temperature, None, torch.float32, implementation.device, (True, True, False))


@pytest.mark.parametrize("programs", [pytest.param(1, marks=LARGE), 264])
def test_a_walk_is_one_program_s_or_shared(programs, implementation, monkeypatch):
    if not INTERPRETING:
        pytest.skip("a GPU's alone")
    from fastjem.kernels.contrastive import gpu_queries

    monkeypatch.setattr(tiling, "PROGRAMS", programs)
    monkeypatch.setattr(
        gpu_queries,
        "splits_in_waves",
        lambda blocks, tiles, _: (min(tiles, programs), -(-tiles // min(tiles, programs))),
    )
    check(rows(70, 140, 16), 0.4, None, half_and_float32()[0], implementation.device)
    check(rows(70, 140, 16), 0.1, 0, half_and_float32()[0], implementation.device, (True, True, False))
    check(rows(70, 140, 16), 0.01, None, torch.float32, implementation.device, (True, True, False))


def test_rows_of_zeros_that_are_not_dense_and_the_same_tensor_thrice(implementation):
    z = rows(20, 1, 16)[0].float().to(implementation.device)
    z[3] = 0
    z = z.T.contiguous().T.requires_grad_()
    loss = F.info_nce(z, z, z, label_offset=0)
    (gradient,) = torch.autograd.grad(loss, z)
    parts = [z.detach().clone().contiguous().requires_grad_() for _ in range(3)]
    expected = F.info_nce(*parts, label_offset=0)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, sum(torch.autograd.grad(expected, parts)), rtol=1e-5, atol=1e-5)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("value", [0.0, -0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_learned_temperature_that_isnt_positive_gives_nan(dtype, value, implementation):
    """Nobody can tell beforehand, as a tensor isn't read; a number is refused."""
    inputs = [x.to(implementation.device, dtype).requires_grad_() for x in rows(9, 20, 8)]
    temperature = torch.tensor(value, dtype=dtype, device=implementation.device, requires_grad=True)
    loss = F.info_nce(*inputs, temperature=temperature)
    loss.backward()
    assert loss.isnan() and all(x.grad.isnan().all() for x in (*inputs, temperature))


def test_a_graph_that_is_kept_gives_the_same_twice_and_batched_gradients_are_those_one_by_one():
    inputs = [x.requires_grad_() for x in rows(70, 1100, 40)]
    inputs.append(torch.tensor(0.3, dtype=torch.float64, requires_grad=True))
    loss = F.info_nce(*inputs[:3], temperature=inputs[3])
    upstream = torch.tensor([1.0, -2.0], dtype=torch.float64)
    batched = torch.autograd.grad(loss, inputs, upstream, retain_graph=True, is_grads_batched=True)
    for i, u in enumerate(upstream):
        one, same = (torch.autograd.grad(loss, inputs, u, retain_graph=True) for _ in range(2))
        assert all(map(torch.equal, one, same))
        for got, expected in zip(batched, one, strict=True):
            torch.testing.assert_close(got[i], expected)


def test_no_multiprocessor_waits_for_another_at_the_end():
    """The goal's shape, and one whose last wave was half empty when programs were 264 at the most."""
    pytest.importorskip("triton")
    from fastjem.kernels.contrastive.gpu_queries import splits_in_waves

    assert splits_in_waves(32, 1024, 132) == (8, 128)
    for blocks, tiles, multiprocessors in ((32, 1024, 132), (157, 1024, 132), (47, 1024, 108), (79, 1024, 148)):
        splits, tiles_per_program = splits_in_waves(blocks, tiles, multiprocessors)
        assert splits * tiles_per_program >= tiles > (splits - 1) * tiles_per_program
        programs = -(-blocks * splits // multiprocessors)
        assert blocks * tiles >= 0.9 * multiprocessors * programs * tiles_per_program
    assert splits_in_waves(1, 1, 132) == (1, 1) and splits_in_waves(100_000, 7, 132) == (1, 7)
