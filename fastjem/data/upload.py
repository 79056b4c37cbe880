"""From the host's memory to a GPU's without anyone waiting: pinned, and on a stream beside the one that trains.

**Unseen**: written for a GPU and tested on the CPU with stand-ins; `make gpu-check` runs it on one.
"""

from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor, wait

import torch
from torch import Tensor

from fastjem.data.batch import Crops


def to_device(x: Tensor, device: torch.device | str) -> Tensor:
    """On the device; on a GPU by way of pinned memory, so that the host goes on at once."""
    target = torch.device(device)
    if target.type == "cuda" and x.device.type == "cpu" and not x.is_pinned():
        x = x.pin_memory()  # of torch's cache, which gives memory out again when the copy is done
    return x.to(target, non_blocking=True)


def pinned(batches: Iterator[Crops], device: torch.device) -> Iterator[Crops]:
    """The same batches in pinned memory, for a loader that hands out views of pageable memory; on the CPU they are
    handed on as they are.

    A thread asks for a batch and pins it while the one before is used: copying 77 MB within the host's memory takes the
    time of a small encoder's step, and so would a copy to the GPU out of pageable memory, which the driver stages.
    """
    return batches if device.type != "cuda" else _pinned(batches, device)


def _pinned(batches: Iterator[Crops], device: torch.device) -> Iterator[Crops]:
    def following() -> Crops | None:
        crops = next(batches, None)
        return None if crops is None else crops._replace(views=[x.pin_memory() for x in crops.views])

    # The thread's own device: else its memory were pinned by way of the first GPU, whose rank is another.
    with ThreadPoolExecutor(1, "fastjem-pin", initializer=torch.cuda.set_device, initargs=(device,)) as thread:
        coming = thread.submit(following)
        try:
            while (crops := coming.result()) is not None:
                coming = thread.submit(following)
                yield crops
        finally:
            coming.cancel()
            wait([coming])  # who is within `batches` may not be interrupted
            if isinstance(batches, Generator):
                batches.close()


def uploaded(batches: Iterator[Crops], device: torch.device) -> Iterator[Crops]:
    """The same batches on the device; on the CPU they are handed on as they are.

    A batch is copied on a stream of its own while the GPU still computes the step before: the host is ahead of it, and
    the stream that trains waits for the copy and for nothing else.
    """
    return batches if device.type != "cuda" else _uploaded(batches, device)


def _uploaded(batches: Iterator[Crops], device: torch.device) -> Iterator[Crops]:
    stream = torch.cuda.Stream(device)
    try:
        for crops in batches:
            with torch.cuda.stream(stream):
                there = _moved(crops, device)
            current = torch.cuda.current_stream(device)
            current.wait_stream(stream)
            for x in (*there.views, *there.tables, there.index, there.labels, there.keys):
                if x is not None:
                    x.record_stream(current)  # else its memory is `stream`'s again as soon as nobody holds it
            yield there
    finally:
        if isinstance(batches, Generator):  # whose workers end with it
            batches.close()


def _moved(crops: Crops, device: torch.device) -> Crops:
    def moved(x: Tensor | None) -> Tensor | None:
        return None if x is None else to_device(x, device)

    return crops._replace(
        views=[to_device(x, device) for x in crops.views],
        tables=[to_device(x, device) for x in crops.tables],
        index=to_device(crops.index, device),
        labels=moved(crops.labels),
        keys=moved(crops.keys),
    )
