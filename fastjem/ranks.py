"""This process among the ranks that `torchrun` started; alone, rank 0 of 1."""

import os
from dataclasses import dataclass
from typing import cast

import torch
import torch.distributed as dist

from fastjem.machine import available_cores


@dataclass(frozen=True)
class Ranks:
    rank: int
    size: int
    device: torch.device
    group: dist.ProcessGroup | None = None  # for losses and gradients
    control: dist.ProcessGroup | None = None  # gloo, on the host: agreeing on a stop costs the device nothing
    initialised: bool = False  # torch.distributed, by `join` and not by the caller

    @property
    def cores(self) -> int:
        """Of this machine that this process may use, a fair share of them; at least 1."""
        here = int(os.environ.get("LOCAL_WORLD_SIZE", self.size)) if self.size > 1 else 1
        return max(available_cores() // here, 1)

    @property
    def first(self) -> bool:
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether any rank says so. A collective call."""
        if self.control is None:
            return flag
        votes = torch.tensor([int(flag)])
        dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=self.control)
        return bool(votes.item())

    def agree(self, value: float) -> float:
        """The first rank's value. A collective call."""
        if self.control is None:
            return value
        agreed = torch.tensor([value], dtype=torch.float64)
        dist.broadcast(agreed, 0, group=self.control)
        return agreed.item()

    def barrier(self) -> None:
        if self.control is not None:
            dist.barrier(self.control)


def join(device: str = "auto") -> Ranks:
    """Initialise torch.distributed when torchrun's variables are there. device: "auto", "cpu" or "cuda"."""
    size = int(os.environ.get("WORLD_SIZE", 1))
    rank = int(os.environ.get("RANK", 0))
    local = int(os.environ.get("LOCAL_RANK", 0))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    here = torch.device("cuda", local) if device == "cuda" else torch.device("cpu")
    if here.type == "cuda":
        torch.cuda.set_device(here)
    if size == 1:
        return Ranks(0, 1, here)
    initialise = not dist.is_initialized()
    if initialise:
        dist.init_process_group("nccl" if here.type == "cuda" else "gloo")
    control = cast(dist.ProcessGroup, dist.new_group(backend="gloo"))  # every rank belongs to it
    return Ranks(rank, size, here, dist.group.WORLD, control, initialise)


def leave(ranks: Ranks) -> None:
    """End what `join` began."""
    if ranks.initialised and dist.is_initialized():
        dist.destroy_process_group()
