"""This process among the ranks that `torchrun` or `srun` started; alone, rank 0 of 1."""

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist

from fastjem import launchers
from fastjem.errors import ToldElsewhereError, UserError
from fastjem.machine import available_cores

SLURM_WAIT = timedelta(minutes=5)  # for the other tasks
numbers = itertools.count()  # of the times that this process has joined its ranks
stores: dict[tuple[str, int], dist.Store] = {}  # where ranks meet, kept: a port can't be opened a second time


@dataclass(frozen=True)
class Ranks:
    rank: int
    size: int
    device: torch.device
    group: dist.ProcessGroup | None = None  # for losses and gradients
    control: dist.ProcessGroup | None = None  # gloo, on the host: agreeing on a stop costs the device nothing
    initialised: bool = False  # torch.distributed, by `join` and not by the caller
    local_size: int = 1  # ranks of this machine
    store: dist.Store | None = None  # what ranks tell each other without meeting

    @property
    def cores(self) -> int:
        """Of this machine that this process may use, a fair share of them; at least 1."""
        return max(available_cores() // self.local_size, 1)

    @property
    def first(self) -> bool:
        return self.rank == 0

    def any(self, *flags: bool) -> list[bool]:
        """For each flag, whether any rank raises it. A collective call."""
        if self.control is None:
            return list(flags)
        votes = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=self.control)
        return [bool(vote) for vote in votes.tolist()]

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

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """A block after which all ranks go on, or none: an error of one is everybody's, and the lowest tells it.

        A collective call behind the block; within it there must be none, as a rank that has failed wouldn't take part.
        """
        try:
            yield
        except Exception as error:
            if self._first_failed(self.rank) != self.rank:
                raise ToldElsewhereError(str(error)) from error
            raise
        failed = self._first_failed(self.size)
        if failed < self.size:
            raise ToldElsewhereError(f"rank {failed} can't go on; what it printed says why")

    def tells(self) -> bool:
        """Whether this rank is the first that asks: of several that fail alike, or after each other, one tells why."""
        if self.store is None:
            return True
        try:
            return self.store.add("failures", 1) == 1
        except Exception:  # the store has ended with another rank
            return True

    def _first_failed(self, mine: int) -> int:
        """The lowest rank that has failed. mine: this rank if it has, else the number of ranks."""
        if self.control is None:
            return mine
        failed = torch.tensor([mine])
        dist.all_reduce(failed, op=dist.ReduceOp.MIN, group=self.control)
        return int(failed.item())


def join(device: str = "auto") -> Ranks:
    """Initialise torch.distributed where torchrun or srun started several processes. device: "auto", "cpu" or "cuda".

    Raises:
        UserError: if the other ranks don't come, or their variables are incomplete.
    """
    here = launchers.place()
    gpu = device != "cpu" and torch.cuda.is_available()
    local = torch.device("cuda", here.local % torch.cuda.device_count()) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(local)
    if here.size == 1:
        return Ranks(0, 1, local)
    initialise = not dist.is_initialized()
    # With a backend for the host's memory the ranks agree on sizes without a wait for the GPU.
    backend = "cpu:gloo,cuda:nccl" if gpu else "gloo"
    store = _initialise(here, backend) if initialise else None
    control = cast(dist.ProcessGroup, dist.new_group(backend="gloo"))  # every rank belongs to it
    return Ranks(here.rank, here.size, local, dist.group.WORLD, control, initialise, here.local_size, store)


def _initialise(here: launchers.Place, backend: str) -> dist.Store:
    """torch.distributed with keys of its own each time: those of an earlier group lead to ranks that have hung up."""
    try:
        store = _store(here)
        own = dist.PrefixStore(f"fastjem-{next(numbers)}", store)
        dist.init_process_group(backend, store=own, rank=here.rank, world_size=here.size)
        return own
    except (ValueError, RuntimeError) as error:  # torch's errors of a store and of a group are RuntimeErrors
        reason = (str(error).splitlines() or [""])[0]
        way = "start with torchrun, or with srun for all tasks"
        raise UserError(f"rank {here.rank} of {here.size} can't reach the others ({reason}); {way}") from error


def _store(here: launchers.Place) -> dist.Store:
    key = here.address or ("environment", 0)
    if key not in stores:
        if here.address is None:
            stores[key] = next(iter(dist.rendezvous("env://")))[0]
        else:
            host, port = here.address
            stores[key] = dist.TCPStore(host, port, here.size, is_master=here.rank == 0, timeout=SLURM_WAIT)
    return stores[key]


def leave(ranks: Ranks) -> None:
    """End what `join` began."""
    if not dist.is_initialized():
        return
    if ranks.initialised:
        dist.destroy_process_group()
    elif ranks.control is not None:
        with contextlib.suppress(Exception):  # the caller's group may be gone with another rank
            dist.destroy_process_group(cast(Any, ranks.control))


__all__ = ["Ranks", "join", "leave"]
