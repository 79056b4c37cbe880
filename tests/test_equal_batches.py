"""Within `equal_batches` a compiled loss is a graph with its collectives in it, whose results are one rank's.

Every loss with a group, at two and three ranks in float64: value and gradient are the eager ones of the whole batch.
"""

import os
from collections.abc import Callable
from functools import partial

import pytest
import test_agreement
import test_distributed
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_compile import Counter
from torch import Tensor

import fastjem.functional as F
from fastjem.in_graph import equal_batches

SIZES = (6, 8)  # rows of each rank
# k-means goes on for as many rounds as the data ask for, which no graph holds; it has no gradient either.
NO_GRAPH = {"kmeans"}


def of_rows(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """As those of test_distributed are called."""
    return lambda a, b, group=None: function(a, b, group, slice(0, len(a)))


# Without the health figures, whose spectrum is computed behind the graph, where it is asked for.
WITH_SEVEN_COLUMNS = test_distributed.LOSSES | {
    "barlow_twins": F.barlow_twins,
    "vicreg": F.vicreg,
    "vicreg_narrow": lambda z0, z1, group=None: F.vicreg(z0[:, :3] / 3, z1[:, :3] / 3, group=group),
}
WITH_FIVE_COLUMNS = {name: of_rows(f) for name, f in test_agreement.GLOBAL.items() if name not in NO_GRAPH}
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
