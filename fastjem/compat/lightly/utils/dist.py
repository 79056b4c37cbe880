"""`lightly.utils.dist`: ranks, and what they gather. Without a process group there is one rank."""

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fastjem.compat.lightly.lookup import absent

P = ParamSpec("P")
R = TypeVar("R")


def rank() -> int:
    """This process's number among the ranks."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """How many ranks there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather(input: Tensor) -> tuple[Tensor, ...]:
    """Every rank's tensor, all of one shape; the gradient is the sum of what all ranks have for this rank's."""
    if world_size() == 1:
        return (input,)
    from torch.distributed.nn.functional import all_gather

    return tuple(all_gather(input.contiguous()))


def eye_rank(n: int, device: torch.device | None = None) -> Tensor:
    """[n, n ranks] bool: which of all ranks' rows each of this rank's n is."""
    columns = torch.arange(n * world_size(), device=device)
    return columns == (torch.arange(n, device=device) + rank() * n)[:, None]


def rank_zero_only(fn: Callable[P, R]) -> Callable[P, R | None]:
    """A function that does nothing, and returns None, on all ranks but the first."""

    @wraps(fn)
    def on_first(*args: P.args, **kwargs: P.kwargs) -> R | None:
        return fn(*args, **kwargs) if rank() == 0 else None

    return on_first


@rank_zero_only
def print_rank_zero(*args: Any, **kwargs: Any) -> None:
    """`print`, on the first rank alone."""
    print(*args, **kwargs)


def __getattr__(name: str) -> Any:
    raise absent(__name__, name)
