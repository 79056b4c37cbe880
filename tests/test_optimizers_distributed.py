"""With gloo at two ranks, FSDP2: LARS, SGD and AdamW on shards are those of one rank, and so is the teacher."""

import copy
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from fastjem import optim

if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("no gloo", allow_module_level=True)

OPTIMIZERS: dict[str, Callable[[list[dict]], optim.Fused]] = {
    "lars": lambda groups: optim.LARS(groups, lr=0.5, trust_coeff=0.05),
    "larc": lambda groups: optim.LARS(groups, lr=0.5, always_adapt=True, trust_clip=True, decay_in_norm=True),
    "sgd": lambda groups: optim.SGD(groups, lr=0.05, momentum=0.9, nesterov=True),
    "adamw": lambda groups: optim.AdamW(groups, lr=0.01),
}


def network() -> nn.Module:
    """Of one row among its weights, which only one of two ranks has."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3), nn.Tanh(), nn.Linear(3, 1))


def groups_of(model: nn.Module) -> list[dict]:
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


def train(model: nn.Module, teacher: nn.Module, optimizer: optim.Fused, rank: int, ranks: int) -> None:
    optimizer.attach_teacher(teacher.parameters(), model.parameters(), 0.9)
    for step in range(4):
        x = torch.randn(8, 5, generator=torch.Generator().manual_seed(step)).chunk(ranks)[rank]
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def check_rank(rank: int, store: str) -> None:
    os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"
    torch.set_num_threads(1)
    wait = timedelta(seconds=20)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=wait)
    check(rank, 2)
    dist.destroy_process_group()


def check(rank: int, ranks: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (ranks,))
    for make in OPTIMIZERS.values():
        whole, sharded = network(), network()
        teachers = copy.deepcopy(whole), copy.deepcopy(sharded)
        for model in (sharded, teachers[1]):
            fully_shard(model, mesh=mesh)
        train(whole, teachers[0], make(groups_of(whole)), 0, 1)
        optimizer = make(groups_of(sharded))
        train(sharded, teachers[1], optimizer, rank, ranks)
        for one, other in ((whole, sharded), teachers):
            for p, q in zip(one.parameters(), other.parameters(), strict=True):
                torch.testing.assert_close(q.full_tensor(), p, rtol=1e-5, atol=1e-6)
    plain = network()
    optimizer = optim.LARS(list(sharded.parameters()))
    optimizer.attach_teacher(plain.parameters(), sharded.parameters())
    sharded(torch.ones(2, 5)).sum().backward()
    with pytest.raises(ValueError, match="LARS: a parameter, its gradient and its teacher must be sharded alike, got"):
        optimizer.step()


def test_one_rank_with_shards_is_one_without():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        check(0, 1)
    finally:
        dist.destroy_process_group()


@pytest.mark.exhaustive
def test_shards_are_updated_as_one_rank_would(tmp_path: Path) -> None:
    mp.spawn(check_rank, (str(tmp_path / "store"),), nprocs=2)
