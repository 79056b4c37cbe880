"""torch.compile of losses over ranks: whole (fullgraph), one graph for all batch sizes, and eager's results."""

import os
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from calls import FUNCTIONS, MODULES, TEMPERATURES, Call, D, K, leaf
from test_compile import _compiled, _run
from torch import Tensor

import fastjem.functional as F
from fastjem import nn
from fastjem.nn import msn

SIZES = (9, 13, 16)


def _learned(b: int) -> list[Tensor]:
    return [leaf(b, D), leaf(b, D), torch.tensor(0.2, requires_grad=True)]


def _statistics(group: dist.ProcessGroup, *x: Tensor) -> Tensor:
    options = {"statistics": True, "group": group, **TEMPERATURES}
    loss, seen = F.prototype_cross_entropy(list(x[:2]), list(x[2:]), **options)
    return loss + seen.mean.sum() + seen.usage.square().sum() + seen.entropy


# name -> (inputs, the function of a group and the inputs)
OF_A_GROUP: dict[str, tuple[Callable[[int], list[Tensor]], Callable[..., Tensor]]] = {
    name: (FUNCTIONS[name].make, lambda group, *x, name=name: getattr(F, name)(*x, group=group))
    for name in ("nt_xent", "dcl", "dclw", "supcon", "clip_loss", "siglip_loss", "barlow_twins", "vicreg")
} | {
    "nt_xent-learned": (_learned, lambda group, a, b, t: F.nt_xent(a, b, temperature=t, group=group)),
    "clip_loss-local": (
        FUNCTIONS["clip_loss"].make,
        lambda group, *x: F.clip_loss(*x, group=group, local_loss=True, gather_with_grad=False),
    ),
    "tico": (FUNCTIONS["tico"].make, lambda group, a, b: F.tico(a, b, group=group)[0]),
    "sigreg": (FUNCTIONS["sigreg"].make, lambda group, z, d: F.sigreg(z, d.sign(), group=group)),
    "lejepa": (FUNCTIONS["lejepa"].make, lambda group, a, b, d: F.lejepa(a, b, torch.ones_like(d), group=group)),
    "visreg": (FUNCTIONS["visreg"].make, lambda group, a, b, d: F.visreg(a, b, torch.ones_like(d), group=group)),
    "prototype_cross_entropy": (FUNCTIONS["prototype_cross_entropy"].make, _statistics),
    "prototype_head_cross_entropy": (
        FUNCTIONS["prototype_head_cross_entropy"].make,
        lambda group, s, r, t, u, w, v: F.prototype_head_cross_entropy(
            [s, r], [t, u], w, v, group=group, **TEMPERATURES
        ),
    ),
    "koleo": (FUNCTIONS["koleo"].make, lambda group, x: F.koleo(x, topk=2, group=group)),
    "total_coding_rate": (
        FUNCTIONS["total_coding_rate"].make,
        lambda group, z: F.total_coding_rate(z, group=group),
    ),
    "simdino": (FUNCTIONS["simdino"].make, lambda group, s, r, t: F.simdino([s, r], [t], group=group)),
    "mean_entropy": (FUNCTIONS["mean_entropy"].make, lambda group, x: F.mean_entropy(x, group=group)),
    "sinkhorn": (FUNCTIONS["sinkhorn"].make, lambda group, x: F.sinkhorn(x, group=group)),
    "sinkhorn_bias": (FUNCTIONS["sinkhorn_bias"].make, lambda group, *x: F.sinkhorn_bias(x, group=group)),
}


def _gathering(name: str, factory: Callable[[], torch.nn.Module]) -> Call:
    of_module = MODULES[name.removesuffix("-features")]
    return Call(of_module.make, of_module.call, module=factory)


def _of_features(factory: Callable[..., torch.nn.Module]) -> torch.nn.Module:
    """A loss whose scores aren't held within a graph, from now on in this process."""
    msn.LARGEST_HELD_OVER_RANKS = 0
    return factory(gather_distributed=True)


OF_ALL_RANKS = {
    "NTXentLoss": lambda: nn.NTXentLoss(gather_distributed=True),
    "DCLLoss": lambda: nn.DCLLoss(gather_distributed=True),
    "DCLWLoss": lambda: nn.DCLWLoss(gather_distributed=True),
    "ClipLoss": lambda: nn.ClipLoss(world_size=2),
    "SigLipLoss": lambda: nn.SigLipLoss(world_size=2),
    "BarlowTwinsLoss": lambda: nn.BarlowTwinsLoss(gather_distributed=True),
    "VICRegLoss": lambda: nn.VICRegLoss(gather_distributed=True),
    "TiCoLoss": lambda: nn.TiCoLoss(gather_distributed=True),
    "MSNLoss": lambda: nn.MSNLoss(gather_distributed=True),
    "PMSNLoss": lambda: nn.PMSNLoss(gather_distributed=True),
    "MSNLoss-features": lambda: _of_features(nn.MSNLoss),
    "PMSNLoss-features": lambda: _of_features(nn.PMSNLoss),
    "KoLeoLoss": lambda: nn.KoLeoLoss(gather_distributed=True),
    "SwaVLoss": lambda: nn.SwaVLoss(sinkhorn_gather_distributed=True),
    "DINOLoss": lambda: nn.DINOLoss(K),
    "DINOLoss-sinkhorn": lambda: nn.DINOLoss(K, centering="sinkhorn"),
    "IBOTPatchLoss": lambda: nn.IBOTPatchLoss(K),
    "SIGReg": lambda: nn.SIGReg(num_vectors=6, gather_distributed=True),
}


def check(
    make: Callable[[int], list[Tensor]], fresh: Callable[[], Callable[..., Tensor]], rank: int, what: str
) -> None:
    """Ranks of uneven batches."""
    compiled, counter = _compiled(fresh(), differentiates=True)
    eager = fresh()
    for size in SIZES:
        torch.manual_seed(100 * size + rank)
        inputs = make(size + rank)
        got = _run(compiled, inputs)
        expected = _run(eager, inputs)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6, msg=lambda m: f"{what}: {m}")
    assert counter.graphs <= 2, what


@pytest.fixture
def group() -> Iterator[dist.ProcessGroup]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    dist.destroy_process_group()


QUICK = ("nt_xent-learned", "vicreg", "sinkhorn", "prototype_cross_entropy")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.exhaustive) for name in OF_A_GROUP]
)
def test_one_rank(name, group):
    make, call = OF_A_GROUP[name]
    check(make, lambda: partial(call, group), 0, name)


def _work(rank: int, world: int, port: int) -> None:
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=world)
    torch.set_num_threads(1)
    group = dist.group.WORLD
    for name, (make, call) in OF_A_GROUP.items():
        check(make, lambda call=call: partial(call, group), rank, name)
    for name, factory in OF_ALL_RANKS.items():
        case = _gathering(name, factory)
        check(case.make, case.fresh, rank, name)
    dist.destroy_process_group()


@pytest.mark.exhaustive
def test_two_ranks():
    mp.spawn(_work, (2, 29_700 + os.getpid() % 200), nprocs=2)
