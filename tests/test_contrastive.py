"""The contrastive modules against lightly and the authors' formulas; memory bank, saved tensors, ranks, extremes."""

import os
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from cases import LOSSES, eager_clip, eager_nt_xent, eager_siglip
from torch.nn.functional import cross_entropy, normalize

import fastjem.functional as F
from fastjem.nn import (
    ClipLoss,
    DCLLoss,
    DCLWLoss,
    MemoryBankModule,
    NNMemoryBankModule,
    NTXentLoss,
    SigLipLoss,
    SupConLoss,
)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_same(ours, theirs, inputs, tolerance=1e-9) -> None:
    results = []
    for function in (ours, theirs):
        leaves = [x.clone().requires_grad_() for x in inputs]
        loss = function(*leaves)
        results.append((loss.detach(), *torch.autograd.grad(loss * -0.7, leaves)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("n, d", [(2, 8), (7, 5), (20, 33)])
@pytest.mark.parametrize("temperature", [0.05, 0.5])
def test_lightly(n, d, temperature):
    theirs = pytest.importorskip("lightly.loss")
    z = [draw(n, d), draw(n, d, seed=1)]
    assert_same(NTXentLoss(temperature), theirs.NTXentLoss(temperature), z)
    assert_same(DCLLoss(temperature), theirs.DCLLoss(temperature), z)
    with pytest.warns(UserWarning):
        assert_same(DCLWLoss(temperature, 0.4), theirs.DCLWLoss(temperature, 0.4), z)
    distance = lambda a, b: ((a - b) ** 2).sum(1)  # noqa: E731
    assert_same(DCLLoss(temperature, distance), theirs.DCLLoss(temperature, distance), z)


def test_lightly_memory_bank():
    theirs = pytest.importorskip("lightly.loss").NTXentLoss(0.2, memory_bank_size=(50, 12)).double()
    ours = NTXentLoss(0.2, memory_bank_size=(50, 12)).double()
    ours.memory_bank.bank.copy_(theirs.memory_bank.bank)
    for seed in range(5):
        z = [draw(10, 12, seed=2 * seed), draw(10, 12, seed=2 * seed + 1)]
        assert_same(ours, theirs, z, 1e-6)  # the bank's first rows were normalised in float32, here once more
        torch.testing.assert_close(ours.memory_bank.bank, theirs.memory_bank.bank)
        assert torch.equal(ours.memory_bank.bank_ptr, theirs.memory_bank.bank_ptr)
    before = ours.memory_bank.bank.clone()
    with torch.no_grad():
        ours(*z)
    assert torch.equal(before, ours.memory_bank.bank)  # no gradient, no enqueueing


def test_nearest_neighbours_of_lightly():
    theirs = pytest.importorskip("lightly.models.modules").NNMemoryBankModule(size=(40, 12))
    ours = NNMemoryBankModule(size=(40, 12))
    ours.bank.copy_(theirs.bank)
    for seed in range(4):
        z = draw(10, 12, seed=seed).float()
        assert torch.equal(ours(z, update=True), theirs(z, update=True))


def test_enqueueing_wraps_around_and_loses_nothing():
    bank = MemoryBankModule((7, 2))
    rows = torch.arange(2 * 24.0).reshape(24, 2)
    for start, stop in ((0, 5), (5, 10), (10, 12), (12, 24)):
        bank.enqueue(rows[start:stop])
        last = rows[max(0, stop - 7) : stop]
        kept = {tuple(row) for row in bank.bank.tolist()}
        assert {tuple(row) for row in last.tolist()} <= kept
        assert bank.bank_ptr.item() == stop % 7


def test_the_memory_bank_is_in_the_state_dict_and_only_where_there_is_one():
    first, second = NTXentLoss(memory_bank_size=(16, 4)), NTXentLoss(memory_bank_size=(16, 4))
    first(draw(5, 4).float().requires_grad_(), draw(5, 4).float())
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.memory_bank.bank, second.memory_bank.bank) and second.memory_bank.bank_ptr == 5
    assert not NTXentLoss().state_dict()
    output, bank = MemoryBankModule((16, 4), feature_dim_first=False)(draw(5, 4))
    assert output.shape == (5, 4) and bank.shape == (16, 4)
    with pytest.raises(ValueError, match="does not specify the feature dimension"):
        MemoryBankModule(16)
    with pytest.raises(ValueError, match="Illegal temperature"):
        NTXentLoss(temperature=0)


def official_supcon(features, labels=None, mask=None, temperature=0.07, mode="all", base=0.07):
    """As Khosla et al. define it, with an N V x N V matrix."""
    n, v, _ = features.shape
    mask = torch.eye(n) if labels is None and mask is None else mask if labels is None else (labels[:, None] == labels)
    rows = features.transpose(0, 1).reshape(v * n, -1)
    anchors = v * n if mode == "all" else n
    logits = rows[:anchors] @ rows.T / temperature
    itself = torch.eye(v * n, dtype=torch.bool)[:anchors]
    mask = mask.to(rows).repeat(v, v)[:anchors].masked_fill(itself, 0)
    log_p = logits - logits.masked_fill(itself, -torch.inf).logsumexp(1, keepdim=True)
    count = mask.sum(1)
    return -(temperature / base) * ((mask * log_p).sum(1) / count.where(count >= 1e-6, 1)).mean()


@pytest.mark.parametrize("mode", ["all", "one"])
@pytest.mark.parametrize("views", [1, 2, 3])
def test_supcon_is_the_authors(mode, views):
    features = normalize(draw(11, views, 13), dim=2) * 1.1  # taken as given: not of unit length here
    labels = torch.tensor([0, 1, 1, 2, 5, 5, 5, 0, 9, -3, 2])
    graded = (draw(11, 11) > 0.3).double()
    for arguments in ({"labels": labels}, {}, {"mask": graded}):
        ours = SupConLoss(0.1, mode, 0.2)
        assert_same(
            lambda z: ours(z, **arguments),  # noqa: B023
            lambda z: official_supcon(z, temperature=0.1, mode=mode, base=0.2, **arguments),  # noqa: B023
            [features],
        )


def test_open_clip():
    x, y = normalize(draw(9, 20), dim=1), normalize(draw(9, 20, seed=1), dim=1)
    scale, bias = torch.tensor(20.0, dtype=torch.float64), torch.tensor(-3.0, dtype=torch.float64)
    assert_same(ClipLoss(), eager_clip, [x, y, scale])
    assert_same(SigLipLoss(), eager_siglip, [x, y, scale, bias])
    assert_same(lambda x, y, s: ClipLoss()(x, y, s, output_dict=True)["contrastive_loss"], eager_clip, [x, y, scale])
    assert_same(ClipLoss(), eager_clip, [x, y, -scale])
    assert_same(ClipLoss(), eager_clip, [x, y, 0 * scale])


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_identical_and_opposite_pairs_at_a_low_temperature(sign, dtype):
    z = draw(64, 128).to(dtype)
    ours, exact = [], []
    for results, function, x in ((ours, F.nt_xent, z), (exact, eager_nt_xent, z.double())):
        leaves = [x.clone().requires_grad_(), (sign * x).requires_grad_()]
        loss = function(*leaves, temperature=0.01)
        results += [loss.detach(), *torch.autograd.grad(loss, leaves)]
    assert all(x.isfinite().all() for x in ours)
    torch.testing.assert_close(ours[0].double(), exact[0], rtol=3e-5, atol=0)
    for a, b in zip(ours[1:], exact[1:], strict=True):
        assert (a.double() - b).norm() <= (1e-3 if dtype == torch.float32 else 2e-2) * b.norm()


def test_a_bank_that_is_not_saved_may_change_before_backward():
    bank, q = draw(3000, 16).float(), draw(8, 16, seed=1).float().requires_grad_()
    expected = torch.autograd.grad(F.info_nce(q, q.detach(), bank), q)[0]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.nbytes) or x, lambda x: x):
        loss = F.info_nce(q, q.detach(), bank)
    bank.fill_(torch.nan)
    loss.backward()
    assert torch.equal(q.grad, expected) and sum(saved) <= 2 * q.nbytes + 64


@pytest.mark.parametrize("case", [c for c in LOSSES if c.name in ("dcl-12x33", "2x20x33-4", "dclw-12x33")], ids=str)
def test_compiles(case):
    inputs = case.inputs(0, torch.float32, "cpu")
    loss, gradients = case.run(case.call, inputs, 0.3)
    torch._dynamo.reset()
    again, again_gradients = case.run(torch.compile(case.call, fullgraph=True, backend="aot_eager"), inputs, 0.3)
    torch.testing.assert_close(again, loss, rtol=1e-6, atol=0)
    for a, b in zip(gradients, again_gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)


def test_nearest_neighbors(implementation):
    query, bank = draw(40, 24).float(), draw(3000, 24, seed=1).float() * 5
    truth = (normalize(query.double(), dim=1) @ normalize(bank.double(), dim=1).T).argmax(1)
    device = implementation.device
    for dtype in (torch.float32, torch.float64):
        assert torch.equal(F.nearest_neighbors(query.to(device, dtype), bank.to(device, dtype)).cpu(), truth)
    index = F.nearest_neighbors(bank[[5, 2999, 0]].to(device), bank.to(device))
    assert index.tolist() == [5, 2999, 0]
    with pytest.raises(ValueError, match="nearest_neighbors: query must be"):
        F.nearest_neighbors(query, bank[:, :3])


SIZES = {2: (5, 3), 3: (4, 1, 6)}
SCALE, BIAS = torch.tensor(8.0, dtype=torch.float64), torch.tensor(-2.0, dtype=torch.float64)
RANKED = {
    "nt_xent": partial(F.nt_xent, temperature=0.2),
    "nt_xent, running maximum": partial(F.nt_xent, temperature=0.001),
    "three views": lambda x, y, group=None: F.nt_xent(torch.stack([x, y, x + 2 * y]), group=group),
    "dcl": F.dcl,
    "dclw": F.dclw,
    "clip": lambda x, y, group=None: F.clip_loss(x, y, SCALE, group=group),
    "siglip": lambda x, y, group=None: F.siglip_loss(x, y, SCALE, BIAS, group=group),
}


def check_classes_over_ranks(whole, mine: slice, world: int, group) -> None:
    labels = torch.tensor([3, 0, 0, 3, 7, 1, 3, 7, 0, 1, 2])[: len(whole[0])]  # classes on several ranks, and on one
    for mode in ("all", "one"):
        for y in (labels, None):
            leaves = [z.clone().requires_grad_() for z in whole]
            ranked = partial(F.supcon, temperature=0.2, anchors=mode)
            expected = ranked(torch.stack(leaves), y)
            own = official_supcon(
                normalize(torch.stack(leaves, 1), dim=2), y, temperature=0.2, mode=mode, base=0.2
            )  # fmt: skip
            torch.testing.assert_close(expected, own)
            gradients = torch.autograd.grad(-0.7 * own, leaves)
            parts = [z[mine].clone().requires_grad_() for z in whole]
            loss = ranked(torch.stack(parts), None if y is None else y[mine], group=group)
            torch.testing.assert_close(loss, expected, msg=f"supcon, {mode}")
            for part, full in zip(torch.autograd.grad(-0.7 * loss, parts), gradients, strict=True):
                torch.testing.assert_close(part / world, full[mine], msg=f"supcon, gradient, {mode}")


def check_local_clip(whole, mine: slice, world: int, group) -> None:
    """open_clip's: rows of this rank against all candidates, whose gradient arrives if they are gathered with it."""

    def local(x: torch.Tensor, y: torch.Tensor, scale: torch.Tensor, xs: torch.Tensor, ys: torch.Tensor):
        pairs = torch.arange(mine.start, mine.stop)
        return (cross_entropy(scale * x @ ys.T, pairs) + cross_entropy(scale * y @ xs.T, pairs)) / 2

    ours = [z[mine].clone().requires_grad_() for z in whole] + [SCALE.clone().requires_grad_()]
    theirs = [z.detach().clone().requires_grad_() for z in ours]
    loss, expected = ClipLoss(local_loss=True, world_size=world)(*ours), local(*theirs, *whole)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(-0.7 * loss, ours), torch.autograd.grad(-0.7 * expected, theirs))

    loss = ClipLoss(local_loss=True, gather_with_grad=True, world_size=world)(*ours)
    torch.testing.assert_close(loss, expected)
    everything = [z.clone().requires_grad_() for z in whole]
    of_all = torch.autograd.grad(eager_clip(*everything, SCALE), everything)
    for part, full in zip(torch.autograd.grad(loss, ours[:2]), of_all, strict=True):
        torch.testing.assert_close(part / world, full[mine])


def check_rank(rank: int, world: int, store: str) -> None:
    os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    group = dist.group.WORLD
    whole = draw(2, sum(SIZES[world]), 7, seed=world).unbind()
    mine = slice(sum(SIZES[world][:rank]), sum(SIZES[world][: rank + 1]))
    for name, function in RANKED.items():
        leaves = [z.clone().requires_grad_() for z in whole]
        expected = function(*leaves)
        gradients = torch.autograd.grad(-0.7 * expected, leaves)
        parts = [z[mine].clone().requires_grad_() for z in whole]
        loss = function(*parts, group=group)
        torch.testing.assert_close(loss, expected, msg=f"{name}, rank {rank}")
        for part, full in zip(torch.autograd.grad(-0.7 * loss, parts), gradients, strict=True):
            torch.testing.assert_close(part / world, full[mine], msg=f"{name}, gradient, rank {rank}")

    for module, parameters in ((ClipLoss(world_size=world), [SCALE]), (SigLipLoss(world_size=world), [SCALE, BIAS])):
        eager = eager_clip if len(parameters) == 1 else eager_siglip
        leaves = [p.clone().requires_grad_() for p in parameters]
        expected = torch.autograd.grad(eager(*whole, *leaves), leaves)
        got = torch.stack(torch.autograd.grad(module(whole[0][mine], whole[1][mine], *leaves), leaves))
        dist.all_reduce(got)
        torch.testing.assert_close(got / world, torch.stack(expected))

    check_classes_over_ranks(whole, mine, world, group)
    check_local_clip(whole, mine, world, group)

    # distributed, but local negatives
    parts = [z[mine].clone() for z in whole]
    torch.testing.assert_close(NTXentLoss()(*parts), eager_nt_xent(*parts))
    gathered = NTXentLoss(0.2, gather_distributed=True)(*parts)
    torch.testing.assert_close(gathered, eager_nt_xent(*whole, temperature=0.2))

    distance = lambda a, b: ((a - b) ** 2).sum(1)  # noqa: E731
    leaves = [z.clone().requires_grad_() for z in whole]
    expected = DCLLoss(0.3, distance)(*leaves)
    gradients = torch.autograd.grad(expected, leaves)
    parts = [z[mine].clone().requires_grad_() for z in whole]
    loss = DCLLoss(0.3, distance, gather_distributed=True)(*parts)
    torch.testing.assert_close(loss, expected)
    for part, full in zip(torch.autograd.grad(loss, parts), gradients, strict=True):
        torch.testing.assert_close(part / world, full[mine])

    bank = MemoryBankModule((20, 7), gather_distributed=True).double()
    bank.enqueue(whole[0][mine])
    torch.testing.assert_close(bank.bank[: len(whole[0])], whole[0])
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.exhaustive)])
def test_ranks(world, tmp_path):
    mp.spawn(check_rank, (world, str(tmp_path / "store")), nprocs=world)
