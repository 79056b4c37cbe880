"""This process among the ranks that `torchrun` or `srun` started; alone, rank 0 of 1."""

import contextlib
import gc
import itertools
import json
import re
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist

from fastjem import launchers
from fastjem.advice import OTHER_RANK, advice
from fastjem.errors import TimedOutError, ToldElsewhereError, UserError
from fastjem.machine import available_cores
from fastjem.presence import Presence

WAIT = 600.0  # seconds, where no time-out is given that could be one
START = 60.0  # seconds that processes may differ in as they start, whatever the time-out is
POLL = 0.05  # seconds between two looks at the store, as ranks gather
MARGIN = 60.0  # seconds more for what GPUs do together: NCCL ends a process without a word, so the host's goes first
TIMED_OUT = r"Timed out waiting|wait timeout after|Application timeout|[Tt]imed out after"  # gloo's, a store's
numbers = itertools.count()  # of the times that this process has gathered with its ranks
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
    presence: Presence | None = None  # who is there; none in a group of the caller's

    @property
    def cores(self) -> int:
        """Of this machine that this process may use, a fair share of them; at least 1."""
        return max(available_cores() // self.local_size, 1)

    @property
    def first(self) -> bool:
        return self.rank == 0

    def reached(self, step: int) -> None:
        """So many steps are taken; costs nothing."""
        if self.presence is not None:
            self.presence.done = step

    def meet(self) -> None:
        """Wait for the first rank behind what it alone does (a checkpoint, kNN, a page), longer than the time-out while
        it lives. Every other collective call here begins with that, so that the first rank's work keeps nobody waiting
        in a call that has no patience."""
        if self.presence is not None:
            self.presence.meet()

    def any(self, *flags: bool) -> list[bool]:
        """For each flag, whether any rank raises it. A collective call."""
        if self.control is None:
            return list(flags)
        self.meet()
        votes = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=self.control)
        return [bool(vote) for vote in votes.tolist()]

    def agree(self, value: float) -> float:
        """The first rank's value. A collective call."""
        if self.control is None:
            return value
        self.meet()
        agreed = torch.tensor([value], dtype=torch.float64)
        dist.broadcast(agreed, 0, group=self.control)
        return agreed.item()

    def barrier(self) -> None:
        if self.control is not None:
            self.meet()
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
        return self.presence is None or self.presence.claim("failures")

    def notice(self, error: Exception) -> None:
        """Where an error says that somebody didn't come: keep that for the others to see."""
        if self.presence is not None and is_time_out(error):
            self.presence.notice()

    def without(self, error: Exception, goes_on: Callable[[], str]) -> UserError | None:
        """What an error means that comes of other ranks that didn't come, once: the step, who it was, and which
        checkpoint there is. None for any other error, and for ranks that have ended.

        Args:
            goes_on: tells from which checkpoint the run goes on.
        """
        if self.presence is None or isinstance(error, ToldElsewhereError):
            return None
        late = is_time_out(error)
        if not late:
            if advice(error) != OTHER_RANK:
                return None
            time.sleep(1)  # whom this rank was connected with may have noticed first, and hung up
            return ToldElsewhereError(str(error), 1) if self.presence.has_noticed() else None
        self.presence.notice()
        who = self.presence.absent()
        if (self.rank != 0 and self.presence.has_noticed(0)) or not self.tells():
            return ToldElsewhereError(str(error), 1)
        step = f"step {self.presence.done + 1}"
        seconds = f"{self.presence.timeout:g} seconds (--timeout)"
        return TimedOutError(f"{step}: the ranks didn't come together within {seconds}: {who}; {goes_on()}")

    def _first_failed(self, mine: int) -> int:
        """The lowest rank that has failed. mine: this rank if it has, else the number of ranks."""
        if self.control is None:
            return mine
        self.meet()
        failed = torch.tensor([mine])
        dist.all_reduce(failed, op=dist.ReduceOp.MIN, group=self.control)
        return int(failed.item())


def is_time_out(error: Exception) -> bool:
    return isinstance(error, TimedOutError) or (
        isinstance(error, RuntimeError) and re.search(TIMED_OUT, str(error)) is not None
    )


def told_by_all(text: str, timeout: float) -> list[str]:
    """Each rank's text, before torch.distributed is initialised.

    Raises:
        UserError: if the other ranks don't come.
    """
    here = launchers.place()
    return [text] if here.size == 1 else _gathered(here, text, timeout)[1]


def join(device: str = "auto", timeout: float = WAIT) -> Ranks:
    """Initialise torch.distributed where torchrun or srun started several processes.

    Args:
        device: "auto", "cpu" or "cuda".
        timeout: seconds that ranks wait for one that doesn't come. A group of the caller's keeps its own.

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
    # With a backend for the host's memory the ranks agree on sizes without a wait for the GPU.
    backend = "cpu:gloo,cuda:nccl" if gpu else "gloo"
    if dist.is_initialized():
        control = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=_time_out_of_world()))
        return Ranks(here.rank, here.size, local, dist.group.WORLD, control, False, here.local_size)
    timeout = _possible(timeout)
    store, _ = _gathered(here, "", timeout)
    try:
        wait = timedelta(seconds=timeout + (MARGIN if gpu else 0))
        dist.init_process_group(backend, store=store, rank=here.rank, world_size=here.size, timeout=wait)
        control = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))  # every rank belongs to it
    except (ValueError, RuntimeError) as error:
        raise _cannot_reach(here, error) from error
    presence = Presence(store, here.rank, here.size, timeout)
    control = cast(dist.ProcessGroup, control)
    return Ranks(here.rank, here.size, local, dist.group.WORLD, control, True, here.local_size, presence)


def _possible(timeout: float) -> float:
    """What is no time-out is refused later, by all ranks together."""
    return timeout if 0 < timeout <= 1e6 else WAIT


def _time_out_of_world() -> timedelta | None:
    """Of a group that the caller has initialised."""
    with contextlib.suppress(Exception):
        return cast(Any, dist.group.WORLD)._get_backend(torch.device("cpu")).options._timeout
    return None


def _gathered(here: launchers.Place, text: str, timeout: float) -> tuple[dist.Store, list[str]]:
    """Each rank's text, and the part of the store that belongs to these ranks alone.

    torchrun's agent keeps its store when it starts ranks again, with all that those of before have written: the
    addresses of ranks that have ended, among others. So the first rank calls by a name that never was before, the
    others answer to that, and a call to which others have answered is over.
    """
    timeout = max(_possible(timeout), START)
    until = time.monotonic() + timeout
    mine = json.dumps([here.rank, secrets.token_hex(8), text])
    call = f"fastjem-call-{next(numbers)}"
    answered: list[int] = []
    try:
        store = _store(here, timeout)
        if here.rank == 0:
            name = f"fastjem-{secrets.token_hex(8)}"
            own = dist.PrefixStore(name, store)
            own.set("0", mine)
            store.set(call, name)
            while len(answered) < here.size and time.monotonic() < until:
                answered = [rank for rank in range(here.size) if own.check([str(rank)])]
                time.sleep(POLL)
            if len(answered) == here.size:
                told = [found.decode() for found in own.multi_get([str(rank) for rank in range(here.size)])]
                own.set("all", json.dumps(told))
                return own, [json.loads(one)[2] for one in told]
        while time.monotonic() < until and here.rank:
            if store.check([call]):
                own = dist.PrefixStore(store.get(call).decode(), store)
                own.set(str(here.rank), mine)
                if own.check(["all"]) and mine in (told := json.loads(own.get("all"))):
                    return own, [json.loads(one)[2] for one in told]
            time.sleep(POLL)
    except (ValueError, RuntimeError) as error:  # torch's errors of a store are RuntimeErrors
        raise _cannot_reach(here, error) from error
    absent = ", ".join(str(rank) for rank in range(here.size) if rank not in answered) if here.rank == 0 else "0"
    raise TimedOutError(
        f"rank {here.rank} of {here.size} waited {timeout:g} seconds for rank {absent}, in vain: start "
        "with torchrun, or with srun for all tasks"
    )


def _cannot_reach(here: launchers.Place, error: Exception) -> UserError:
    reason = (str(error).splitlines() or [""])[0]
    way = "start with torchrun, or with srun for all tasks"
    return UserError(f"rank {here.rank} of {here.size} can't reach the others ({reason}); {way}")


def _store(here: launchers.Place, timeout: float) -> dist.Store:
    wait = timedelta(seconds=timeout)
    key = here.address or ("environment", 0)
    if key not in stores:
        if here.address is None:
            stores[key] = next(iter(dist.rendezvous("env://", timeout=wait)))[0]
        else:
            host, port = here.address
            stores[key] = dist.TCPStore(host, port, here.size, is_master=here.rank == 0, timeout=wait)
    stores[key].set_timeout(wait)
    return stores[key]


def leave(ranks: Ranks) -> None:
    """End what `join` began."""
    if ranks.presence is not None:
        ranks.presence.end()
    if not dist.is_initialized():
        return
    if ranks.initialised:
        # What DDP holds goes first. If its reducer were the last to hold the group, torch would wait with the
        # interpreter's lock held for gloo's threads, which may be waiting for that lock.
        gc.collect()
        dist.destroy_process_group()
    elif ranks.control is not None:
        with contextlib.suppress(Exception):  # the caller's group may be gone with another rank
            dist.destroy_process_group(cast(Any, ranks.control))


__all__ = ["Ranks", "join", "leave"]
