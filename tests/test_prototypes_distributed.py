"""With gloo, two and three ranks, uneven batches: losses, codes and centre are those of one rank on the whole batch."""

import os
from functools import partial
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import fastjem.functional as F
import fastjem.nn as nn
from fastjem.functional import held

SIZES = {2: (5, 3), 3: (4, 1, 6)}  # rows of each rank
K = 9


def drawn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def swav(views, group, mine):
    queue = [drawn(11, K, seed=70 + i)[mine] for i in range(2)]
    loss = nn.SwaVLoss(sinkhorn_epsilon=0.3, sinkhorn_gather_distributed=group is not None)
    return loss(views[:2], views[2:], queue)


def weighted(views, group, mine):
    return F.prototype_cross_entropy(
        views,
        views[:2],
        student_temperature=0.1,
        teacher_temperature=0.5,
        weights=drawn(11, seed=80)[mine].abs(),
        group=group,
    )


def head_fused(views, group, mine):
    prototypes = drawn(5, K, seed=81)
    options = {"student_temperature": 0.1, "teacher_temperature": 0.5, "group": group}
    return F.prototype_head_cross_entropy(views, views[:2], prototypes, prototypes, **options)


def msn(views, group, mine):
    return nn.MSNLoss(gather_distributed=group is not None)(torch.cat(views), views[0], drawn(6, K, seed=82))


def pmsn(views, group, mine):
    return nn.PMSNLoss(gather_distributed=group is not None)(torch.cat(views), views[0], drawn(6, K, seed=82))


def some_images_at_a_time(loss, largest=0):
    """Scores that aren't held, or are by a rank with few images alone if it asked no other rank."""

    def function(views, group, mine):
        with patch.object(held, "LARGEST_SCORES", largest):
            return loss(views, group, mine)

    return function


def mean_entropy(views, group, mine):
    return F.mean_entropy(views, temperature=0.5, group=group)


def check_centres_of_micro_batches(everything: list[torch.Tensor], mine: slice, rank: int) -> None:
    """Ranks with as many micro-batches of other sizes, and a rank that holds nothing."""
    expected = torch.stack(everything[:2]).mean((0, 1))
    parts = [x[mine] for x in everything]
    dino = nn.DINOLoss(K, defer_center_update=True).double()
    for some in (slice(0, 1), slice(1, None)):
        if len(parts[0][some]):
            dino([x[some] for x in parts[:2]], [x[some] for x in parts])
    assert not dino.center.any()
    dino.step_ends()
    torch.testing.assert_close(dino.center.flatten(), 0.1 * expected)
    dino.step_ends()  # nobody holds anything
    torch.testing.assert_close(dino.center.flatten(), 0.1 * expected)

    centre = nn.Center((K,)).double()
    if rank:
        centre.hold(everything[0].mean(0), len(everything[0]))
    centre.step_ends(dist.group.WORLD)
    torch.testing.assert_close(centre.value, 0.1 * everything[0].mean(0))


def check_rank(rank: int, world: int, store: str) -> None:
    os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    group, rows = dist.group.WORLD, sum(SIZES[world])
    everything = [drawn(rows, K, seed=i) for i in range(3)]
    mine = slice(sum(SIZES[world][:rank]), sum(SIZES[world][: rank + 1]))
    # Three views: 2 x 9 rows against 6 prototypes are 864 bytes, and 2 x 15 are 1440.
    of_features = [some_images_at_a_time(loss, largest) for loss in (msn, pmsn) for largest in (0, 1000)]
    for function in (swav, weighted, head_fused, msn, pmsn, *of_features, mean_entropy):
        leaves = [x.clone().requires_grad_() for x in everything]
        expected = function(leaves, None, slice(0, rows))
        expected_gradients = torch.autograd.grad(-0.7 * expected, leaves)
        parts = [x[mine].clone().requires_grad_() for x in everything]
        loss = function(parts, group, mine)
        torch.testing.assert_close(loss, expected, msg=f"{function.__name__}, rank {rank}")
        for gradient, whole in zip(torch.autograd.grad(-0.7 * loss, parts), expected_gradients, strict=True):
            torch.testing.assert_close(gradient / world, whole[mine], msg=f"{function.__name__}, gradient, rank {rank}")

    for codes in (F.sinkhorn, partial(F.sinkhorn, iterations=10, epsilon=0.3, normalize_samples_first=True)):
        torch.testing.assert_close(codes(everything[0][mine], group=group), codes(everything[0])[mine])
    positions = torch.stack(everything)
    torch.testing.assert_close(F.sinkhorn(positions[:, mine], group=group), F.sinkhorn(positions)[:, mine])
    nothing = positions[:, mine] if rank else positions[:, :0]  # a rank without images
    bias = F.sinkhorn_bias(positions[:, SIZES[world][0] :])
    torch.testing.assert_close(F.sinkhorn_bias(nothing, group=group), bias)
    filled = torch.cat([nothing, torch.full((3, 2, K), torch.nan)], 1)  # a rank's rows are all filled up
    counted = torch.tensor(nothing.shape[1])
    torch.testing.assert_close(F.sinkhorn_bias(filled, rows=counted, group=group), bias)
    parts = F.sinkhorn_bias([x[mine] for x in everything], group=group)
    torch.testing.assert_close(parts, F.sinkhorn_bias(torch.cat(everything)))

    centre = nn.Center((1, K)).double()
    centre.update(everything[0][mine])
    torch.testing.assert_close(centre.value, 0.1 * everything[0].mean(0, keepdim=True))
    dino = nn.DINOLoss(K).double()
    dino([x[mine] for x in everything[:2]], [x[mine] for x in everything])
    torch.testing.assert_close(dino.center.flatten(), 0.1 * torch.stack(everything[:2]).mean((0, 1)))
    dino = nn.DINOLoss(K, centering="sinkhorn").double()
    dino(
        [x[mine] for x in everything[:2]], [x[mine] for x in everything]
    )  # its Sinkhorn is over all ranks: must not hang

    check_centres_of_micro_batches(everything, mine, rank)
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.exhaustive)])
def test_ranks_compute_the_global_loss(world, tmp_path):
    mp.spawn(check_rank, (world, str(tmp_path / "store")), nprocs=world)
