"""Capturing CUDA graphs, and going on behind a capture that CUDA has made invalid."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

OTHERS = "thread_local"  # in a capture other threads may allocate: a loader's, which pins batches

_broken: list[torch.cuda.CUDAGraph] = []  # never freed, as torch's allocators may still ask them


class BrokenError(RuntimeError):
    """A capture has failed, and torch can't go on behind it. The cause is what made it fail."""


@contextlib.contextmanager
def capturing(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream, pool: Any, **options: Any) -> Iterator[None]:
    """`torch.cuda.graph`, which nothing is left of where CUDA refuses something within it.

    Args:
        pool: the graph's memory: a handle of `torch.cuda.graph_pool_handle`, or another graph's pool.
        options: as of `torch.cuda.graph`.

    Raises:
        RuntimeError: what CUDA says of a work that can't be captured.
        BrokenError: (one of them) where torch couldn't be put right behind that.
    """
    outside = torch.cuda.current_stream(stream.device)
    try:
        with torch.cuda.graph(graph, pool=pool, stream=stream, **options):
            yield
    except RuntimeError as error:
        torch.cuda.set_stream(outside)
        if not _has_ended(graph):
            try:
                _put_right(graph, stream, pool)
            except RuntimeError as other:
                raise BrokenError(str(other)[:200]) from error
        raise


def _put_right(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream, pool: Any) -> None:
    """Behind a capture that CUDA has made invalid.

    torch 2.11 then neither leaves its stream nor ends what it began: freed memory that another stream has used is never
    used again, and every random number is refused ("Offset increment outside graph capture"), until another capture
    ends well.
    """
    _broken.append(graph)
    with contextlib.suppress(RuntimeError):  # it was ended
        torch._C._cuda_endAllocateToPool(stream.device_index, pool)
    torch._C._cuda_releasePool(stream.device_index, pool)
    number = torch.zeros((), device=stream.device)
    small = torch.cuda.CUDAGraph()
    another = torch.cuda.Stream(stream.device)
    with torch.cuda.graph(small, stream=another, capture_error_mode=OTHERS):
        number.add_(1)


def _has_ended(graph: torch.cuda.CUDAGraph) -> bool:
    """Whether a capture has come to its end, whatever was raised within it."""
    try:
        graph.pool()
    except RuntimeError:
        return False
    return True


def first_line(error: BaseException) -> str:
    """Of what went wrong first: CUDA's error at the end of a capture says only that something did."""
    while isinstance(earlier := error.__context__, RuntimeError):
        error = earlier
    return (str(error).splitlines() or [type(error).__name__])[0]
