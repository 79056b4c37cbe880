"""Batches from a loader's worker to the main process."""

import multiprocessing
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info


def share(tensors: Iterable[Tensor]) -> None:
    """In a worker of a DataLoader, move the tensors to shared memory; elsewhere nothing.

    The worker's queue would do that by itself, in a thread that prints an error and drops what doesn't fit: the main
    process would wait for the batch for ever. Raised here, the error reaches it.
    """
    if get_worker_info() is None:
        return
    for tensor in tensors:
        tensor.share_memory_()


def shared_like(row: np.ndarray, rows: int) -> Tensor:
    """Memory for `rows` of these, [rows, ...]: in a worker of a DataLoader it is shared, and isn't copied again."""
    out = torch.from_numpy(np.empty_like(row, shape=0))
    shape = (rows, *row.shape)
    if get_worker_info() is None:
        return out.new_empty(shape)
    storage = torch.UntypedStorage._new_shared(rows * row.nbytes)  # as torch's collate function does
    return out.set_(storage, 0, shape)  # type: ignore[call-overload]


def check_semaphores(workers: int) -> None:
    """OSError where the queues to so many workers can't be made, as /dev/shm is full, missing or read-only.

    A DataLoader that finds that out by itself is left half made, and prints a trace when Python throws it away.
    """
    held = [multiprocessing.Lock() for _ in range(4 * min(workers, 1000) + 8 if workers else 0)]
    held.clear()
