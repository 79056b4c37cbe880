"""Queues of embeddings, with lightly's names and arguments."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastjem import functional as F
from fastjem.functional._collectives import gather_rows


def default_group(gather_distributed: bool) -> dist.ProcessGroup | None:
    """All ranks, where there are several and they are asked for."""
    several = gather_distributed and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return dist.group.WORLD if several else None


class MemoryBankModule(nn.Module):
    """A queue of the last `size[0]` rows that were enqueued, at first random ones of unit length.

    Unlike lightly's it is in the state_dict (a resumed run goes on with it), loses no rows where it wraps around,
    keeps its pointer on the device, and is copied only by a `forward` that enqueues.

    Args:
        size: (number of rows, dimension), or 0: no memory bank.
        gather_distributed: enqueue the rows of all ranks, so that every rank has the same bank.
        feature_dim_first: `forward` returns the bank as [dimension, number of rows].
    """

    bank: Tensor
    bank_ptr: Tensor

    def __init__(self, size: int | Sequence[int], gather_distributed: bool = False, feature_dim_first: bool = True):
        super().__init__()
        self.size = (size,) if isinstance(size, int) else tuple(size)
        if any(x < 0 for x in self.size):
            raise ValueError(f"Illegal memory bank size {size}, all entries must be non-negative.")
        if isinstance(size, int) and size > 0:
            raise ValueError(
                f"Memory bank size 'size={size}' does not specify the feature dimension. Set it with "
                f"'size=({size}, dim)', or pass 'size=0' to disable the memory bank."
            )
        if self.size != (0,) and len(self.size) != 2:
            raise ValueError(
                f"Illegal memory bank size {size}, expected a (num_features, dim) tuple, or 'size=0' "
                "to disable the memory bank."
            )
        self.gather_distributed = gather_distributed
        self.feature_dim_first = feature_dim_first
        used = self.size[0] > 0
        bank = nn.functional.normalize(torch.randn(self.size), dim=-1) if used else torch.empty(self.size)
        self.register_buffer("bank", bank, persistent=used)
        self.register_buffer("bank_ptr", torch.zeros(1, dtype=torch.long), persistent=used)

    def forward(
        self, output: Tensor, labels: Tensor | None = None, update: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """The output, and the bank as it was before the update: a view, or with `update` a copy. `labels` is
        ignored."""
        if self.size[0] == 0:
            return output, None
        bank = self.bank
        if update:
            bank = bank.clone()
            self.enqueue(output)
        return output, bank.transpose(0, -1) if self.feature_dim_first else bank

    @torch.no_grad()
    def enqueue(self, batch: Tensor) -> None:
        """Replace the oldest rows. Nothing waits for the device."""
        group = default_group(self.gather_distributed)
        if group is not None:
            batch, _ = gather_rows(batch, group)
        size = self.size[0]
        skipped = max(len(batch) - size, 0)  # rows that later ones of the same batch would replace
        batch = batch.detach()[skipped:].to(self.bank.dtype)
        at = (self.bank_ptr + skipped + torch.arange(len(batch), device=self.bank.device)) % size
        self.bank.index_copy_(0, at, batch.to(self.bank.device))
        self.bank_ptr.add_(skipped + len(batch)).remainder_(size)


class NNMemoryBankModule(MemoryBankModule):
    """The nearest neighbours of its input in a memory bank (NNCLR, Dwibedi et al. 2021, arXiv 2104.14548)."""

    def __init__(self, size: int | Sequence[int]):
        super().__init__(size)

    def forward(self, output: Tensor, update: bool = False) -> Tensor:  # type: ignore[override]
        """For each row the row of the bank of the highest cosine, as it was enqueued; then enqueue, with `update`."""
        if self.size[0] == 0:
            raise ValueError("NNMemoryBankModule: size must be (num_features, dim) with num_features > 0, got 0")
        neighbours = self.bank[F.nearest_neighbors(output, self.bank.to(output.device))]
        if update:
            self.enqueue(output)
        return neighbours
