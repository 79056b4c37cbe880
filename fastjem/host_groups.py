"""Ranks tell each other numbers through the host's memory, whatever their group's backend is.

A group that was made for NCCL alone sends what lies on a GPU, and whoever reads it waits for all that the GPU has still
to do. So each such group is given one of gloo beside it, of the same ranks, when its ranks first talk: they come to
that together, as to any collective call.
"""

import weakref
from typing import cast

import torch
import torch.distributed as dist

_beside: "weakref.WeakKeyDictionary[dist.ProcessGroup, dist.ProcessGroup]" = weakref.WeakKeyDictionary()


def host_group(group: dist.ProcessGroup) -> dist.ProcessGroup | None:
    """The group itself where it sends what lies in the host's memory, else gloo's beside it; None: torch has no gloo.

    A collective call, of the group's ranks, when it is first called with that group.
    """
    if "cpu:" in dist.get_backend_config(group):
        return group
    if group not in _beside and dist.is_gloo_available():
        ranks = dist.get_process_group_ranks(group)
        made = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
        _beside[group] = cast(dist.ProcessGroup, made)
    return _beside.get(group)


def numbers_of_ranks(numbers: list[int], group: dist.ProcessGroup) -> list[list[int]]:
    """Every rank's numbers, as many on each. Nothing waits for a device, but where torch has no gloo."""
    on_host = host_group(group)
    device = torch.device("cpu") if on_host else torch.device("cuda", torch.cuda.current_device())
    mine = torch.tensor(numbers, device=device)
    of_ranks = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(of_ranks, mine, group=on_host or group)
    return torch.stack(of_ranks).tolist()


__all__ = ["host_group", "numbers_of_ranks"]
