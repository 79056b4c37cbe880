"""Batches from a loader's worker to the main process."""

from collections.abc import Iterable

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
