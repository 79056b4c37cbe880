"""Within `equal_batches` a compiled loss is a graph with its collectives in it, whose results are one rank's.

Every loss with a group, at two and three ranks in float64: value and gradient are the eager ones of the whole batch.
"""

import os
from collections.abc import Callable
from datetime import timedelta
from functools import partial

import pytest
import test_agreement
import test_compile
import test_compile_distributed
import test_distributed
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_compile import Counter
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

import fastjem.functional as F
from fastjem import collectives
from fastjem.in_graph import equal_batches

SIZES = (6, 8)  # rows of each rank


def of_rows(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """As those of test_distributed are called."""
    return lambda a, b, group=None: function(a, b, group, slice(0, len(a)))


# Without the health figures, whose spectrum is computed behind the graph, where it is asked for.
WITH_SEVEN_COLUMNS = test_distributed.LOSSES | {
    "barlow_twins": F.barlow_twins,
    "vicreg": F.vicreg,
    "supcon": lambda z0, z1, group=None: F.supcon(torch.stack([z0, z1]), (z0.detach()[:, 0] * 1.5).long(), group=group),
    "vicreg_narrow": lambda z0, z1, group=None: F.vicreg(z0[:, :3] / 3, z1[:, :3] / 3, group=group),
}
# k-means goes on for as many rounds as the data ask for, which no graph holds, and ids and labels are of few rows;
# modules are made outside of a graph: see OF_ALL_RANKS.
WITH_FIVE_COLUMNS = {
    name: of_rows(function)
    for name, function in test_agreement.GLOBAL.items()
    if name.islower() and name != "kmeans" and "ids" not in name and "supcon" not in name
}
LOSSES: dict[str, Callable[..., Tensor]] = {
    **{f"{name}, 7": function for name, function in WITH_SEVEN_COLUMNS.items()},
    **{f"{name}, 5": function for name, function in WITH_FIVE_COLUMNS.items()},
}


def whole_batch(world: int, rows: int, width: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(rows)
    return list(torch.randn(2, world * rows, width, generator=g, dtype=torch.float64).unbind())


def results(function: Callable[..., Tensor], views: list[Tensor]) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in views]
    loss = function(*leaves)
    gradients = torch.autograd.grad(-0.7 * loss, leaves, allow_unused=True)
    return [loss.detach(), *(torch.zeros_like(x) if g is None else g for x, g in zip(leaves, gradients, strict=True))]


def check(name: str, rank: int, world: int) -> None:
    function = LOSSES[name]
    torch._dynamo.reset()
    counter = Counter(differentiates=True)
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    for rows in SIZES:
        mine = slice(rank * rows, (rank + 1) * rows)
        views = whole_batch(world, rows, int(name[-1]))
        loss, *gradients = results(function, views)
        with equal_batches():
            found = results(partial(compiled, group=dist.group.WORLD), [x[mine] for x in views])
        torch.testing.assert_close(found[0], loss, msg=lambda m: f"{name}: {m}")
        for got, expected in zip(found[1:], gradients, strict=True):
            torch.testing.assert_close(got / world, expected[mine], msg=lambda m: f"{name}, gradient: {m}")
    assert counter.graphs <= 2, name


def check_module(name: str, rank: int) -> None:
    """Against the same module over the same ranks without a graph, which test_distributed holds against one rank's."""
    case = test_compile_distributed._gathering(name, test_compile_distributed.OF_ALL_RANKS[name])
    eager = case.fresh()
    torch._dynamo.reset()
    counter = Counter(differentiates=True)
    compiled = torch.compile(case.fresh(), fullgraph=True, dynamic=True, backend=counter)
    for rows in SIZES:
        torch.manual_seed(10 * rows + rank)
        inputs = case.make(rows)
        expected = test_compile._run(eager, inputs)
        with equal_batches():
            found = test_compile._run(compiled, inputs)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6, msg=lambda m: f"{name}: {m}")
    assert counter.graphs <= 2, name


def check_broken_promise(rank: int) -> None:
    """An error on every rank, before a rank waits for rows that don't come."""
    for name in ("nt_xent, 5", "mean_entropy, 5"):
        torch._dynamo.reset()
        compiled = torch.compile(LOSSES[name], fullgraph=True, dynamic=True, backend="aot_eager")
        views = [x[: 4 + rank] for x in whole_batch(2, 6, 5)]
        with equal_batches(), pytest.raises(RuntimeError, match="every rank must have as many rows"):
            compiled(*views, group=dist.group.WORLD)
    assert collectives.sum_over_ranks(torch.ones(()), dist.group.WORLD) == dist.get_world_size()


def check_inductor(rank: int, world: int) -> None:
    """What users compile with, and without the promise the same function is compiled anew, for uneven batches."""
    torch._dynamo.reset()
    compiled = torch.compile(LOSSES["nt_xent, 5"], fullgraph=True, dynamic=True)
    views = whole_batch(world, 6, 5)
    with equal_batches():
        found = results(partial(compiled, group=dist.group.WORLD), [x[6 * rank : 6 * rank + 6] for x in views])
    expected = results(LOSSES["nt_xent, 5"], views)
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1] / world, expected[1][6 * rank : 6 * rank + 6])
    mine = slice(0, 4) if rank == 0 else slice(4, 4 + 5 * rank)
    uneven = results(partial(compiled, group=dist.group.WORLD), [x[mine] for x in views])
    if world == 2:
        expected = results(LOSSES["nt_xent, 5"], [x[:9] for x in views])
        torch.testing.assert_close(uneven[0], expected[0])
        torch.testing.assert_close(uneven[1] / world, expected[1][mine])


def check_rank(rank: int, world: int, store: str, names: list[str]) -> None:
    os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"
    torch.set_num_threads(1)
    options = {"rank": rank, "world_size": world, "timeout": timedelta(seconds=300)}
    dist.init_process_group("gloo", init_method=f"file://{store}", **options)
    for name in names:
        if name in LOSSES:
            check(name, rank, world)
        else:
            check_module(name, rank)
    if names == QUICK:
        check_broken_promise(rank)
    if names == INDUCTOR:
        check_inductor(rank, world)
    dist.destroy_process_group()


QUICK = ["nt_xent, 5", "sinkhorn_bias, 5"]
INDUCTOR: list[str] = []
# So many a start of the ranks: a loss takes seconds of compiling, and which one doesn't end should be seen.
SEVERAL = 5
NAMES = [*LOSSES, *test_compile_distributed.OF_ALL_RANKS]


def test_two_ranks(tmp_path):
    mp.spawn(check_rank, (2, str(tmp_path / "store"), QUICK), nprocs=2)


@pytest.mark.exhaustive
@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("names", [INDUCTOR, *(NAMES[i : i + SEVERAL] for i in range(0, len(NAMES), SEVERAL))], ids=str)
def test_every_loss(world, names, tmp_path):
    mp.spawn(check_rank, (world, str(tmp_path / "store"), names), nprocs=world)


def collectives_of_graph(world: int, name: str) -> list[str]:
    """In the graph of the first of so many ranks, which needn't be there for it."""
    found: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        for module in graph.modules():
            if isinstance(module, torch.fx.GraphModule):
                found.extend(str(node.target) for node in module.graph.nodes if node.op == "call_function")
        return graph.forward

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        torch._dynamo.reset()
        with equal_batches():
            torch.compile(LOSSES[name], fullgraph=True, backend=backend)(
                *(x.requires_grad_() for x in whole_batch(1, 6, 5)), group=dist.group.WORLD
            )
    finally:
        dist.destroy_process_group()
    assert not any("over_ranks" in target for target in found)
    return [target for target in found if "_c10d_functional" in target and "wait" not in target]


@pytest.mark.parametrize("name", ["nt_xent, 5", "clip_loss, 5", "siglip_loss, 5"])
def test_a_graph_holds_as_many_collectives_for_any_number_of_ranks(name):
    few = collectives_of_graph(2, name)
    assert few == collectives_of_graph(512, name)
    sides = 1 if name.startswith("nt_xent") else 2
    forward = ["all_reduce", *["all_gather_into_tensor"] * sides, "all_reduce"]  # the first: whether rows are as many
    backward = [] if name.startswith("siglip") else ["all_gather_into_tensor"] * 2 * sides
    assert [target.split(".")[1] for target in few] == forward + backward
