"""Ranks tell each other numbers through the host's memory, whatever their group's backend is.

A group that was made for NCCL alone sends what lies on a GPU, and whoever reads it waits for all that the GPU has still
to do. So each such group is given gloo beside it, of the same ranks, when its ranks first talk: they come to that
together, as to any collective call.
"""

import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d
from torch.distributed.constants import default_pg_timeout

_beside: "weakref.WeakKeyDictionary[dist.ProcessGroup, Any]" = weakref.WeakKeyDictionary()


def sends_from_host(group: dist.ProcessGroup) -> bool:
    """Whether the group itself sends what lies in the host's memory."""
    return "cpu:" in dist.get_backend_config(group)


def gloo_beside(group: dist.ProcessGroup) -> Any:
    """A ProcessGroupGloo of the same ranks. The first call with a group is a collective one, of its ranks.

    They find each other in the group's own store. `new_group` of these ranks alone would name it by how many groups a
    rank is in: of ranks that are in several each waits for a name of its own.
    """
    if group not in _beside:
        store = dist.PrefixStore("fastjem", distributed_c10d._get_process_group_store(group))
        _beside[group] = distributed_c10d.ProcessGroupGloo(store, group.rank(), group.size(), default_pg_timeout)
    return _beside[group]


def numbers_of_ranks(numbers: list[int], group: dist.ProcessGroup) -> list[list[int]]:
    """Every rank's numbers, as many on each. Nothing waits for a device, but where torch has no gloo."""
    on_host = sends_from_host(group) or dist.is_gloo_available()
    device = torch.device("cpu") if on_host else torch.device("cuda", torch.cuda.current_device())
    mine = torch.tensor(numbers, device=device)
    of_ranks: list[Tensor] = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    if sends_from_host(group) or not on_host:
        dist.all_gather(of_ranks, mine, group=group)
    else:
        gloo_beside(group).allgather([of_ranks], [mine]).wait()
    return torch.stack(of_ranks).tolist()


__all__ = ["gloo_beside", "numbers_of_ranks", "sends_from_host"]
