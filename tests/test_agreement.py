"""With gloo at two ranks: what is wrong on one rank is an error on both that names it, and a rank may have no rows.

Every case ends with a sum over the ranks. Had one of them made a collective that the other didn't, it would be wrong or
wait; and what waits for 20 s fails.
"""

import os
from collections.abc import Callable
from datetime import timedelta
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

import fastjem.functional as F
from fastjem import nn
from fastjem.functional import held
from fastjem.nn.parts import unit_keys

N, D = 6, 5
PROTOTYPES = torch.arange(20.0, dtype=torch.float64).reshape(4, D).sin()
LABELS = torch.tensor([0, 1, 0, 2, 1, 0])


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


DIRECTIONS = drawn(D, 3)  # drawn here, as no graph can hold a generator


def of_scores(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda a, b, group, rows: function([a, b], [a.detach(), b.detach()], group, rows)


def prototypes(student, teacher, group, rows, **options):
    temperatures = {"student_temperature": 0.2, "teacher_temperature": 0.5}
    return F.prototype_cross_entropy(student, teacher, **temperatures, **options, group=group)


def fused_head(student, teacher, group, rows):
    weights = PROTOTYPES.clone()
    options = {"student_temperature": 0.2, "teacher_temperature": 0.5, "group": group}
    return F.prototype_head_cross_entropy(student, teacher, weights, weights, **options)


def supcon(a, b, group, rows):
    return F.supcon(torch.stack([a, b]), LABELS[rows], group=group)


def supcon_with_options(a, b, group, rows):
    return F.supcon(torch.stack([a, b]), LABELS[rows], hardness=0.5, temperature=0.5, group=group)


def codes(a, b, group, rows):
    """Sums of squares, as codes themselves are of this rank's rows."""
    bias = F.sinkhorn_bias([a, b], group=group)
    return bias.square().sum() + (a + b).sum() * 0


def module(make: Callable[[bool], torch.nn.Module]) -> Callable[..., Tensor]:
    return lambda a, b, group, rows: make(group is not None).double()(a, b)


def of_features(make: Callable[..., torch.nn.Module]) -> Callable[..., Tensor]:
    """MSN's losses where the scores aren't held in memory."""

    def function(a, b, group, rows):
        with patch.object(held, "LARGEST_SCORES", 0):
            return make(gather_distributed=group is not None)(torch.cat([a, b, a]), b, PROTOTYPES)

    return function


def detcon(a, b, group, rows):
    """Of two regions of each image."""
    first, second = torch.stack([a, b], 1), torch.stack([b, a + b], 1)
    masks = torch.arange(2).expand(len(first), 2)
    return F.detcon(first, second, second, first, masks, masks, group=group)


def lejepa(a, b, group, rows):
    return F.lejepa(a[None], b[None], DIRECTIONS, group=group)


# Losses of the global batch by two views [N, D] of this rank, which has `rows` of all.
GLOBAL: dict[str, Callable[..., Tensor]] = {
    "nt_xent": lambda a, b, group, rows: F.nt_xent(a, b, group=group),
    "nt_xent of views": lambda a, b, group, rows: F.nt_xent(torch.stack([a, b, a + b]), group=group),
    "dcl": lambda a, b, group, rows: F.dcl(a, b, group=group),
    "dclw": lambda a, b, group, rows: F.dclw(a, b, group=group),
    "nt_xent with ids": lambda a, b, group, rows: F.nt_xent(a, b, ids=LABELS[rows], group=group),
    "clip_loss with ids": lambda a, b, group, rows: F.clip_loss(a, b, 2.0, ids=LABELS[rows], group=group),
    "siglip_loss with ids": lambda a, b, group, rows: F.siglip_loss(a, b, 2.0, -1.0, ids=LABELS[rows], group=group),
    "nnclr": lambda a, b, group, rows: F.nnclr(a, b, b, a, PROTOTYPES, group=group),
    "detcon": detcon,
    "supcon": supcon,
    "supcon with options": supcon_with_options,
    "clip_loss": lambda a, b, group, rows: F.clip_loss(a, b, 2.0, group=group),
    "siglip_loss": lambda a, b, group, rows: F.siglip_loss(a, b, 2.0, -1.0, group=group),
    "barlow_twins": lambda a, b, group, rows: F.barlow_twins(a, b, group=group),
    "barlow_twins of squares": lambda a, b, group, rows: F.barlow_twins(a[:, :2], b[:, :2], group=group),
    "vicreg": lambda a, b, group, rows: F.vicreg(a, b, group=group),
    "vicreg of squares": lambda a, b, group, rows: F.vicreg(a[:, :1], b[:, :1], group=group),
    "tico": lambda a, b, group, rows: F.tico(a, b, group=group)[0],
    "total_coding_rate": lambda a, b, group, rows: F.total_coding_rate(torch.stack([a, b]), group=group),
    "simdino": lambda a, b, group, rows: F.simdino([a, b], [b, a], group=group),
    "kmeans": lambda a, b, group, rows: F.kmeans(a, PROTOTYPES, group=group).inertia + (a + b).sum() * 0,
    "sigreg": lambda a, b, group, rows: F.sigreg(a + b, DIRECTIONS, group=group),
    "lejepa": lejepa,
    "visreg": lambda a, b, group, rows: F.visreg(a[None], b[None], DIRECTIONS, group=group),
    "koleo": lambda a, b, group, rows: F.koleo(a + b, topk=2, group=group),
    "sinkhorn_bias": codes,
    "mean_entropy": lambda a, b, group, rows: F.mean_entropy([a, b], group=group),
    "prototype_cross_entropy": of_scores(prototypes),
    "prototype_head_cross_entropy": of_scores(fused_head),
    "NTXentLoss": module(lambda several: nn.NTXentLoss(gather_distributed=several)),
    "DCLLoss": module(lambda several: nn.DCLLoss(gather_distributed=several)),
    "DCLWLoss": module(lambda several: nn.DCLWLoss(gather_distributed=several)),
    "BarlowTwinsLoss": module(lambda several: nn.BarlowTwinsLoss(gather_distributed=several)),
    "VICRegLoss": module(lambda several: nn.VICRegLoss(gather_distributed=several)),
    "TiCoLoss": module(lambda several: nn.TiCoLoss(gather_distributed=several)),
    "ClipLoss": lambda a, b, group, rows: nn.ClipLoss(world_size=1 + (group is not None))(a, b, torch.tensor(2.0)),
    "SigLipLoss": lambda a, b, group, rows: nn.SigLipLoss(world_size=1 + (group is not None))(a, b, torch.tensor(2.0)),
    "SwaVLoss": lambda a, b, group, rows: nn.SwaVLoss(sinkhorn_gather_distributed=group is not None)([a, b], []),
    "MSNLoss": lambda a, b, group, rows: nn.MSNLoss(gather_distributed=group is not None)(a, b, PROTOTYPES),
    "PMSNLoss": lambda a, b, group, rows: nn.PMSNLoss(gather_distributed=group is not None)(a, b, PROTOTYPES),
    "MSNLoss of features": of_features(nn.MSNLoss),
    "PMSNLoss of features": of_features(nn.PMSNLoss),
    "CAPILoss": lambda a, b, group, rows: nn.CAPILoss(gather_distributed=group is not None)(a[:, None], b[:, None]),
}


def bank(a, b, group, rows):
    loss = nn.NTXentLoss(memory_bank_size=(8, D), gather_distributed=True)
    loss.memory_bank.bank.zero_()
    value = loss.double()(a.requires_grad_(a.is_floating_point()), b)
    assert (loss.memory_bank.bank.norm(dim=1) > 0).sum() == N  # every rank has all rows
    return value


def centred(centering: str) -> Callable[..., Tensor]:
    def dino(a, b, group, rows):
        loss = nn.DINOLoss(D, centering=centering).double()
        value = loss([a, b], [a, b])
        expected = 0.1 * torch.cat([drawn(N, D), drawn(N, D, seed=1)]).mean(0) if centering == "center" else 0
        torch.testing.assert_close(loss.center.flatten(), expected + torch.zeros(D, dtype=torch.float64))
        return value

    return dino


def patches(centering: str) -> Callable[..., Tensor]:
    def ibot(a, b, group, rows):
        loss = nn.IBOTPatchLoss(D, centering=centering).double()
        mask = torch.zeros(2, 2, 3, dtype=torch.bool)
        mask.view(-1)[: a.shape[0]] = True
        value = loss(a, b, mask)
        expected = 0.1 * drawn(N, D).mean(0) if centering == "center" else 0
        torch.testing.assert_close(loss.center.value.flatten(), expected + torch.zeros(D, dtype=torch.float64))
        return value

    return ibot


def centre(a, b, group, rows):
    of_all = nn.Center((1, D)).double()
    of_all.update(a)
    torch.testing.assert_close(of_all.value[0], 0.1 * drawn(N, D).mean(0))
    return b.sum() * 0


def keys(a, b, group, rows):
    torch.testing.assert_close(unit_keys(a, group), torch.nn.functional.normalize(drawn(N, D), dim=1))
    return b.sum() * 0


def enqueued(a, b, group, rows):
    memory = nn.MemoryBankModule((8, D), gather_distributed=True).double()
    memory(a, update=True)
    torch.testing.assert_close(memory.bank[:N], drawn(N, D))
    return b.sum() * 0


# Losses of this rank's rows, or none, that move something by the rows of all ranks.
LOCAL: dict[str, Callable[..., Tensor]] = {
    "clip_loss": lambda a, b, group, rows: F.clip_loss(a, b, 2.0, group=group, local_loss=True),
    "clip_loss of constants": lambda a, b, group, rows: F.clip_loss(
        a, b, 2.0, group=group, local_loss=True, gather_with_grad=False
    ),
    "SIGReg": lambda a, b, group, rows: nn.SIGReg(gather_distributed=True, num_vectors=4)(a),
    "LeJEPALoss": lambda a, b, group, rows: nn.LeJEPALoss(gather_distributed=True, sigreg_num_vectors=4)(
        local_proj=a[None], global_proj=b[None]
    ),
    "VISRegLoss": lambda a, b, group, rows: nn.VISRegLoss(gather_distributed=True, num_slices=4)(
        local_proj=a[None], global_proj=b[None]
    ),
    "VICRegLoss of maps": lambda a, b, group, rows: nn.VICRegLoss(gather_distributed=True)(
        torch.stack([a, b], 1), torch.stack([b, a], 1)
    ),
    "NTXentLoss": bank,
    "DINOLoss": centred("center"),
    "DINOLoss by Sinkhorn": centred("sinkhorn"),
    "IBOTPatchLoss": patches("center"),
    "IBOTPatchLoss by Sinkhorn": patches("sinkhorn"),
    "Center": centre,
    "unit_keys": keys,
    "MemoryBankModule": enqueued,
}


def check_in_step(name: str, rank: int) -> None:
    total = torch.tensor([rank + 1.0])
    dist.all_reduce(total)
    assert total == 3, f"{name}: the ranks are out of step"


def check_no_rows(name: str, function: Callable[..., Tensor], rank: int, everything: list[Tensor]) -> None:
    """Rank 1 has no rows, and rank 0 has all."""
    rows = slice(0, N) if rank == 0 else slice(N, N)
    parts = [x[rows].clone().requires_grad_() for x in everything]
    loss = function(*parts, dist.group.WORLD, rows)
    loss.sum().backward()
    if name in GLOBAL and function is GLOBAL[name]:
        leaves = [x.clone().requires_grad_() for x in everything]
        expected = function(*leaves, None, slice(0, N))
        torch.testing.assert_close(loss, expected, msg=f"{name} with no rows on a rank")
        gradients = torch.autograd.grad(expected, leaves, allow_unused=True)  # MSN's targets have none
        for part, whole in zip(parts, gradients, strict=True):
            assert (part.grad is None) == (whole is None), name
            if whole is not None:
                torch.testing.assert_close(part.grad / 2, whole[rows], msg=f"{name}, gradient")
    assert loss.isfinite().all(), name


def check_refused(name: str, function: Callable[..., Tensor], rank: int, everything: list[Tensor]) -> None:
    """Rank 1 alone does something wrong."""
    if "of squares" in name:  # which looks at some of the columns
        return
    good = [x[: N // 2].clone() for x in everything]
    narrow = [x[:, : D - 1].contiguous() for x in good]
    flat = [x[0] for x in good]
    integers = [x.long() for x in good]
    takes_any = name in ("Center", "unit_keys", "MemoryBankModule")  # dtype or, the centre, dimensions
    for wrong in (narrow,) if takes_any else (narrow, flat, integers):
        parts = good if rank == 0 else wrong
        try:
            function(*parts, dist.group.WORLD, slice(0, N // 2))
        except ValueError as error:
            assert "rank 1" in str(error), f"{name}: {error}"
        else:
            raise AssertionError(f"{name}: rank {rank} was told nothing")
        check_in_step(name, rank)


def swav(rank: int, options: dict, *queues: Tensor) -> Tensor:
    scores = [drawn(N, D), drawn(N, D, seed=1)]
    return nn.SwaVLoss(sinkhorn_gather_distributed=True, **options)(scores, [], queues)


def vicregl(rank: int, width: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    """Another width, or dtype, of the second view's features."""
    local = drawn(N, 2, 2, D)
    features = [(drawn(N, 3), local), (drawn(N, width), local.to(dtype))]
    return nn.VICRegLLoss(gather_distributed=True)(features, [drawn(N, 2, 2, 2)] * 2)


def subloss(rank: int) -> Tensor:
    def fails_on_one(self, z, q):
        if rank:
            raise ValueError("subloss: no")
        return z.sum() + q.sum()

    scores = [drawn(N, D), drawn(N, D, seed=1)]
    return type("Mine", (nn.SwaVLoss,), {"subloss": fails_on_one})(sinkhorn_gather_distributed=True)(scores, [])


def views(**options) -> Tensor:
    return F.nt_xent(drawn(2, N, D), **options, group=dist.group.WORLD)


def msn(rank: int, **options) -> Tensor:
    anchors = drawn(N, D)
    return nn.MSNLoss(gather_distributed=True, **options)(anchors, anchors, PROTOTYPES)


def dino(rank: int, centering: str) -> Tensor:
    scores = [drawn(N, D), drawn(N, D, seed=1)]
    return nn.DINOLoss(D, student_temp=0.1 - rank, centering=centering)(scores, scores)


# What one rank has otherwise, or wrong, between two collectives.
ON_ONE_RANK: dict[str, Callable[[int], Tensor]] = {
    "a queue of other prototypes": lambda rank: swav(rank, {}, drawn(3, D), drawn(3, D - rank)),
    "without iterations": lambda rank: swav(rank, {"sinkhorn_iterations": 0}, drawn(3, D), drawn(3, D - rank)),
    "a queue that is no matrix": lambda rank: swav(rank, {"sinkhorn_iterations": 0}, *[drawn(*[3, D][rank:])] * 2),
    "subloss": subloss,
    "VICRegLLoss, width": lambda rank: vicregl(rank, 3 + rank),
    "VICRegLLoss, dtype": lambda rank: vicregl(rank, dtype=[torch.float64, torch.float16][rank]),
    "VICRegLoss of nothing": lambda rank: nn.VICRegLoss(gather_distributed=True)(
        *[[drawn(N, D), None][rank]] * 2  # type: ignore[list-item]
    ),
    "MSNLoss without regulariser": lambda rank: msn(rank, regularization_weight=1.0 - rank),
    "MSNLoss without Sinkhorn": lambda rank: msn(rank, sinkhorn_iterations=3 * rank),
    "DINOLoss": lambda rank: dino(rank, "center"),
    "DINOLoss by Sinkhorn": lambda rank: dino(rank, "sinkhorn"),
    "an exclude that is no tensor": lambda rank: views(exclude=[torch.zeros(N, 2 * N).bool(), [0]][rank]),
    "a prior that is an array": lambda rank: views(prior=[0.1, torch.ones(N).numpy()][rank]),
    "temperatures of rows": lambda rank: views(temperature=[torch.ones(N), 1.0][rank]),
    "siglip_loss, scale or bias of rows": lambda rank: F.siglip_loss(
        drawn(N, D), drawn(N, D), *[torch.ones(N), 1.0][:: 1 - 2 * rank], group=dist.group.WORLD
    ),
    "DCLLoss, learned weights and a sum": lambda rank: nn.DCLLoss(
        weight_fn=lambda a, b: (a * b).sum(1), reduction=["mean", "sum"][rank], gather_distributed=True
    )(drawn(N, D).requires_grad_(), drawn(N, D, seed=1)),
}


def check_one_rank(rank: int) -> None:
    for name, function in ON_ONE_RANK.items():
        with pytest.raises(ValueError, match="rank 1"):
            function(rank)
        check_in_step(name, rank)


def check_rows_without_weight(rank: int, everything: list[Tensor]) -> None:
    """Rank 1's rows count nothing: the loss is rank 0's, and rank 1's gradient is 0."""
    leaves = [x.clone().requires_grad_() for x in everything]
    teacher = [x.detach() for x in leaves]
    weights = torch.full((N,), 1.0 - rank)
    loss = prototypes(leaves, teacher, dist.group.WORLD, None, weights=weights)
    gradients = torch.autograd.grad(loss, leaves)
    expected = prototypes(leaves, teacher, None, None)
    torch.testing.assert_close(loss, expected)
    for gradient, whole in zip(gradients, torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(gradient / 2, whole * (1 - rank))


def check_groups(rank: int, everything: list[Tensor]) -> None:
    """The other rank isn't in the group: an error there, and nobody waits."""
    alone = dist.new_group([0])
    if rank == 0:
        torch.testing.assert_close(F.nt_xent(*everything, group=alone), F.nt_xent(*everything))
    else:
        with pytest.raises(ValueError, match=r"nt_xent: group must have this rank \(1\) in it"):
            F.nt_xent(*everything, group=alone)
    grads = [x.clone().requires_grad_(rank == 0) for x in everything]
    with pytest.raises(ValueError, match=r"rank 0: nt_xent: .* with a gradient; rank 1: nt_xent: .* without a gr"):
        F.nt_xent(*grads, group=dist.group.WORLD)
    function = F.vicreg if rank else F.barlow_twins
    with pytest.raises(ValueError, match="must differ in their number of rows alone, got rank 0: barlow_twins: "):
        function(*everything, group=dist.group.WORLD)
    with pytest.raises(ValueError, match="barlow_twins: at least one rank must have rows, got none on all 2"):
        F.barlow_twins(*(x[:0] for x in everything), group=dist.group.WORLD)
    nothing = nn.IBOTPatchLoss(D).double()(*(x[:0] for x in everything), torch.zeros(2, 3, 3, dtype=torch.bool))
    assert nothing == 0


def check_sharded_models() -> None:
    """FSDP2's parameters are updated shard by shard; what is sharded otherwise, or not at all, is refused."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    torch.manual_seed(0)
    for ranks in (2, 1):
        mesh = init_device_mesh("cpu", (2 // ranks, ranks), mesh_dim_names=("all", "sharded"))["sharded"]
        student, teacher = (torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.BatchNorm1d(3)) for _ in range(2))
        for seed, model in ((3, student), (4, teacher)):
            torch.nn.utils.vector_to_parameters(drawn(24, seed=seed).float(), model.parameters())
        pairs = zip(teacher.parameters(), student.parameters(), strict=True)
        expected = [(0.9 * t + 0.1 * s).detach() for t, s in pairs]
        plain = [torch.zeros_like(x) for x in expected]
        for model in (student, teacher):
            fully_shard(model, mesh=mesh)
        nn.update_momentum(student, teacher, 0.9, buffers="average")
        for parameter, value in zip(teacher.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.full_tensor(), value)
        whole = [distribute_tensor(x, mesh, [Replicate()]) for x in plain]
        for other in (plain, whole):
            with pytest.raises(ValueError, match=r"ema_update_: teacher and student must be sharded alike, got"):
                F.ema_update_(teacher.parameters(), other, 0.9)
    parts = [distribute_tensor(torch.full((3, 2), value), mesh, [Shard(1)]) for value in (0.0, 1.0)]
    F.ema_update_(parts[:1], parts[1:], torch.tensor(0.25))
    torch.testing.assert_close(parts[0].full_tensor(), torch.full((3, 2), 0.75))


def check_rank(rank: int, store: str) -> None:
    os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"
    torch.set_num_threads(1)
    wait = timedelta(seconds=20)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=wait)
    everything = [drawn(N, D), drawn(N, D, seed=1)]
    for cases in (GLOBAL, LOCAL):
        for name, function in cases.items():
            check_no_rows(name, function, rank, everything)
            check_in_step(name, rank)
            check_refused(name, function, rank, everything)
    check_one_rank(rank)
    check_rows_without_weight(rank, everything)
    check_groups(rank, everything)
    check_in_step("groups", rank)
    check_sharded_models()
    dist.destroy_process_group()


def test_ranks_agree_before_they_wait(tmp_path):
    mp.spawn(check_rank, (str(tmp_path / "store"),), nprocs=2)
