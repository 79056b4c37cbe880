"""What ranks send: as many bytes as the formulas of benchmarks/traffic.py say, and under the products they are for."""

import importlib
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastjem.functional as F
from fastjem import collectives, nn, turns
from fastjem.bench.traffic import Traffic

ROOT = Path(__file__).parents[1]
# Numbers of rows whose bytes are whole alignments, and squares that are many bytes beside few rows, or few beside many.
SIZES = {"N": 16, "D": 8, "V": 2, "K": 12, "S": 6, "R": 2, "J": 3, "e": 4, "w": 8}
WIDE = {**SIZES, "D": 64}


def rows(*shape: int) -> Tensor:
    return torch.randn(*shape, requires_grad=True)


def views(width: int = SIZES["D"]) -> tuple[Tensor, Tensor]:
    return rows(SIZES["N"], width), rows(SIZES["N"], width)


def scores(count: int) -> list[Tensor]:
    return [rows(SIZES["N"], SIZES["K"]) for _ in range(count)]


def directions() -> Tensor:
    return torch.randn(SIZES["D"], SIZES["S"])


def ids() -> Tensor:
    return torch.arange(SIZES["N"]) % 5


def detcon(group: dist.ProcessGroup) -> Tensor:
    n, regions = SIZES["N"], SIZES["R"]
    masks = torch.arange(regions).expand(n, regions)
    first, second, third, fourth = [rows(n, regions, SIZES["D"]) for _ in range(4)]
    return F.detcon(first, second, third, fourth, masks, masks, group=group)


def codes(group: dist.ProcessGroup) -> Tensor:
    return F.sinkhorn(torch.randn(SIZES["N"], SIZES["K"]), group=group).sum()


def codes_of_many(group: dist.ProcessGroup) -> Tensor:
    with patch.object(collectives, "FEW_RANKS", 1):
        return codes(group)


def prototypes(group: dist.ProcessGroup) -> Tensor:
    student, teacher = scores(2), scores(2)
    return F.prototype_cross_entropy(student, teacher, student_temperature=0.1, teacher_temperature=0.1, group=group)


def head(group: dist.ProcessGroup) -> Tensor:
    weights = torch.randn(SIZES["K"], SIZES["D"])
    options = {"student_temperature": 0.1, "teacher_temperature": 0.1, "group": group}
    return F.prototype_head_cross_entropy(views(), views(), weights, weights, **options)


CASES: dict[str, Callable[[dist.ProcessGroup], Tensor]] = {
    "nt_xent, dcl": lambda group: F.nt_xent(*views(), group=group),
    "nt_xent with ids": lambda group: F.nt_xent(*views(), ids=ids(), group=group),
    "dclw": lambda group: F.dclw(*views(), group=group),
    "nnclr": lambda group: F.nnclr(*views(), *views(), torch.randn(20, SIZES["D"]), group=group),
    "supcon": lambda group: F.supcon(torch.stack(views()), ids(), group=group),
    "detcon": detcon,
    "clip_loss": lambda group: F.clip_loss(*views(), 10.0, group=group),
    "clip_loss, local, no gradient of others": lambda group: F.clip_loss(
        *views(), 10.0, group=group, local_loss=True, gather_with_grad=False
    ),
    "siglip_loss": lambda group: F.siglip_loss(*views(), 10.0, -10.0, group=group),
    "siglip_loss with ids": lambda group: F.siglip_loss(*views(), 10.0, -10.0, ids=ids(), group=group),
    "barlow_twins, squares": lambda group: F.barlow_twins(*views(), group=group),
    "barlow_twins, rows": lambda group: F.barlow_twins(*views(WIDE["D"]), group=group),
    "vicreg, squares": lambda group: F.vicreg(*views(4), group=group),
    "vicreg, rows": lambda group: F.vicreg(*views(WIDE["D"]), group=group),
    "tico, squares": lambda group: F.tico(*views(), group=group)[0],
    "total_coding_rate": lambda group: F.total_coding_rate(torch.stack(views()), group=group),
    "simdino": lambda group: F.simdino(views(), views(), group=group),
    "sigreg, 17 knots": lambda group: F.sigreg(torch.stack(views()), directions(), group=group),
    "lejepa, 17 knots": lambda group: F.lejepa(rows(1, 16, 8), rows(1, 16, 8), directions(), group=group),
    "visreg": lambda group: F.visreg(rows(1, 16, 8), rows(1, 16, 8), directions(), group=group),
    "koleo": lambda group: F.koleo(rows(16, 8), topk=SIZES["J"], group=group),
    "mean_entropy": lambda group: F.mean_entropy(scores(1), group=group),
    "sinkhorn, up to 4 ranks": codes,
    "sinkhorn, more ranks": codes_of_many,
    "prototype_cross_entropy": prototypes,
    "prototype_head_cross_entropy": head,
    "DINOLoss, IBOTPatchLoss: the centre": lambda group: nn.DINOLoss(SIZES["K"])(scores(2), scores(2)),
}
SIZES_OF = {
    "barlow_twins, rows": WIDE,
    "vicreg, rows": WIDE,
    "vicreg, squares": {**SIZES, "D": 4},
}


def formulas():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    return importlib.import_module("traffic")


def check_bytes(world: int, group: dist.ProcessGroup) -> None:
    traffic = formulas()
    assert list(CASES) == [loss.name for loss in traffic.LOSSES]
    for loss in traffic.LOSSES:
        sizes = {**SIZES_OF.get(loss.name, SIZES), "W": world}
        with Traffic() as forward:
            value = CASES[loss.name](group)
        with Traffic() as backward:
            if value.requires_grad:
                value.backward()
        calls = len(forward.collectives) + len(backward.collectives)
        assert calls == loss.collectives(**sizes), loss.name
        found = forward.sent + backward.sent
        assert abs(found - loss.sent(**sizes)) < 1e-6 * found, f"{loss.name}, {found}, {loss.sent(**sizes)}"
        of_backward = (world - 1) * traffic.of(loss.gathered_backward, sizes)
        assert abs(backward.sent - of_backward) < 1e-6 * found, f"{loss.name}, backward"


class GatherLayer(torch.autograd.Function):
    """What is compared with: an all-gather whose backward adds all ranks' gradients of all rows."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x)
        return torch.stack(parts)

    @staticmethod
    def backward(ctx, upstream: Tensor) -> Tensor:
        total = upstream.contiguous()
        dist.all_reduce(total)
        return total[dist.get_rank()]


def check_naive_bytes(world: int) -> None:
    with Traffic() as seen:
        gathered = [GatherLayer.apply(x).flatten(0, 1) for x in views()]
        F.nt_xent(*gathered).backward()
    expected = formulas().naive_nt_xent(**SIZES, W=world)
    assert abs(seen.sent - expected) < 1e-6 * expected


class Products(TorchDispatchMode):
    """Writes P for what compares rows with candidates."""

    NAMES = ("nt_xent", "clip_loss", "siglip_", "similarity_logsumexp")

    def __init__(self, events: list[str]) -> None:
        super().__init__()
        self.events = events

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("fastjem::")
        if func._schema.name != name and name.startswith(self.NAMES):
            self.events.append("P")
        return func(*args, **(kwargs or {}))


RINGS = (
    "nt_xent, dcl", "nt_xent with ids", "dclw", "supcon", "detcon", "clip_loss",
    "clip_loss, local, no gradient of others", "siglip_loss", "siglip_loss with ids",
)  # fmt: skip


def check_order(rank: int, world: int, group: dist.ProcessGroup) -> None:
    """A transfer begins before the products with what came before it: S P S P; the first are of a rank's own rows."""
    events: list[str] = []
    broadcast = dist.broadcast

    def started(x: Tensor, source: int, **options):
        if source != rank:
            events.append("S")
        return broadcast(x, source, **options)

    with patch.object(turns.dist, "broadcast", started):
        for name in RINGS:
            for_ring = "SP" * (world - 1)
            rings = {"detcon": 2, "clip_loss, local, no gradient of others": 2}.get(name, 1)
            before = "S" * (world - 1) if name == "supcon" else ""  # sums over classes go round first
            with Products(events):
                value = CASES[name](group)
                assert re.sub("P+", "P", "".join(events)) == before + rings * for_ring, name
                events.clear()
                value.backward()
            several = rings if name == "detcon" else 1
            expected = "" if name in ("siglip_loss", "clip_loss, local, no gradient of others") else several * for_ring
            assert re.sub("P+", "P", "".join(events)) == expected, f"{name}, backward"
            events.clear()


def check_codes_of_many_ranks(rank: int, group: dist.ProcessGroup) -> None:
    """Sums over ranks of what is left behind the maximum: finite, of no sample, and of infinite scores."""
    x = torch.tensor([1e4, -torch.inf, rank * 900.0, -3.0, torch.inf if rank else 0.0], dtype=torch.float64)
    few = collectives.logsumexp_of_ranks(x, group)
    with patch.object(collectives, "FEW_RANKS", 1):
        torch.testing.assert_close(collectives.logsumexp_of_ranks(x, group), few)
        x[2] = torch.nan if rank == 0 else 0.0
        assert collectives.logsumexp_of_ranks(x, group)[2].isnan()


def check_slow_rank(rank: int, group: dist.ProcessGroup) -> None:
    """One that comes late to everything changes no number."""
    broadcast = dist.broadcast

    def late(x: Tensor, source: int, **options):
        time.sleep(0.02 if rank == 1 else 0)
        return broadcast(x, source, **options)

    def found(name: str) -> list[Tensor]:
        torch.manual_seed(rank)
        value = CASES[name](group)
        return [value.detach(), *torch.autograd.grad(value, leaves_of(value))]

    for name in RINGS:
        expected = found(name)
        with patch.object(turns.dist, "broadcast", late):
            assert all(map(torch.equal, found(name), expected)), name


def leaves_of(value: Tensor) -> list[Tensor]:
    """What a graph's backward would give gradients to."""
    found: dict[int, Tensor] = {}
    waiting = [value.grad_fn]
    while waiting:
        node = waiting.pop()
        variable = getattr(node, "variable", None)
        if variable is not None:
            found[id(variable)] = variable
        waiting += [] if node is None else [function for function, _ in node.next_functions]
    return list(found.values())


def check_rank(rank: int, worlds: tuple[int, ...], folder: str) -> None:
    os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"
    torch.set_num_threads(1)
    for world in worlds:  # the largest first, as ranks that are not needed any more end
        if rank >= world:
            break
        dist.init_process_group("gloo", init_method=f"file://{folder}/{world}", rank=rank, world_size=world)
        group = dist.group.WORLD
        assert group is not None
        check_bytes(world, group)
        check_order(rank, world, group)
        check_naive_bytes(world)
        check_slow_rank(rank, group)
        check_codes_of_many_ranks(rank, group)
        dist.destroy_process_group()


@pytest.mark.parametrize("worlds", [(3, 2), pytest.param((4,), marks=pytest.mark.exhaustive)])
def test_ranks_send_what_the_formulas_say(worlds, tmp_path):
    mp.spawn(check_rank, (worlds, str(tmp_path)), nprocs=worlds[0])


def test_what_isnt_counted_is_said():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with Traffic() as seen:
            dist.all_reduce(torch.ones(3))
            dist.barrier()
            with pytest.raises(NotImplementedError, match="alltoall"):
                dist.all_to_all_single(torch.empty(2), torch.ones(2))
        assert [(call.kind, call.bytes, call.ranks, call.sent) for call in seen.collectives] == [("sum", 12, 1, 0)]
    finally:
        dist.destroy_process_group()


def test_the_page_has_the_tables():
    page = (ROOT / "docs/scaling.md").read_text()
    assert formulas().table() in page
    assert formulas().on_paper() in page
