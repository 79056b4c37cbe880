"""With gloo, at two and three ranks and uneven batches: every rank returns the one-rank loss on the whole batch, and
the ranks' gradients are, divided by their number (what DistributedDataParallel does), the one-rank gradients."""

import os
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import fastjem.functional as F

SIZES = {2: (5, 3), 3: (4, 1, 6)}  # rows of each rank
LOSSES = {
    "nt_xent": partial(F.nt_xent, temperature=0.2),
    "barlow_twins": F.barlow_twins,
    "vicreg": F.vicreg,
}
CODES = {
    "sinkhorn": F.sinkhorn,
    "sinkhorn_samples_first": partial(F.sinkhorn, epsilon=0.2, normalize_samples_first=True),
}


def whole_batch(world: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(world)
    rows = sum(SIZES[world])
    return torch.randn(2, rows, 7, generator=g, dtype=torch.float64).unbind()


def check_rank(rank: int, world: int, store: str) -> None:
    os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    group = dist.group.WORLD
    z0, z1 = whole_batch(world)
    mine = slice(sum(SIZES[world][:rank]), sum(SIZES[world][: rank + 1]))
    for name, function in LOSSES.items():
        leaves = [z.clone().requires_grad_() for z in (z0, z1)]
        expected = function(*leaves)
        expected_gradients = torch.autograd.grad(-0.7 * expected, leaves)

        parts = [z[mine].clone().requires_grad_() for z in (z0, z1)]
        loss = function(*parts, group=group)
        gradients = torch.autograd.grad(-0.7 * loss, parts)
        torch.testing.assert_close(loss, expected, msg=f"{name}, rank {rank}")
        for gradient, whole in zip(gradients, expected_gradients, strict=True):
            torch.testing.assert_close(gradient / world, whole[mine], msg=f"{name}, gradient, rank {rank}")

        one_sided = function(z0[mine].clone(), parts[1], group=group)
        (gradient,) = torch.autograd.grad(one_sided, parts[1])
        torch.testing.assert_close(gradient / world, expected_gradients[1][mine] / -0.7, msg=f"{name}, one-sided")
        with torch.no_grad():
            torch.testing.assert_close(function(*parts, group=group), expected)
    for name, function in CODES.items():
        torch.testing.assert_close(function(z0[mine], group=group), function(z0)[mine], msg=f"{name}, rank {rank}")
    codes = (z0[mine] / 0.05 + F.sinkhorn_bias(z0[mine], group=group)).softmax(1)
    torch.testing.assert_close(codes, F.sinkhorn(z0)[mine])
    dist.destroy_process_group()


@pytest.mark.parametrize("world", SIZES)
def test_ranks_compute_the_global_loss(world, tmp_path):
    mp.spawn(check_rank, (world, str(tmp_path / "store")), nprocs=world)
