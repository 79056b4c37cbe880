"""Queues of embeddings, with lightly's names and arguments."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

import fastjem.functional as F
from fastjem.collectives import Agreement, default_group, gather_rows
from fastjem.functional import checks
from fastjem.nn.hooks import Hooks
from fastjem.nn.parts import HeldRows, push_rows


class MemoryBankModule(Hooks):
    """A queue of the last `size[0]` rows that were enqueued, at first random ones of unit length.

    Unlike lightly's it is in the state_dict (a resumed run goes on with it), loses no rows where it wraps around,
    keeps its pointer on the device, and is copied only by a `forward` that enqueues.

    Args:
        size: (number of rows, dimension), or 0: no memory bank.
        gather_distributed: enqueue the rows of all ranks, so that every rank has the same bank.
        feature_dim_first: `forward` returns the bank as [dimension, number of rows].
        rows_per_step: how many rows (of all ranks, if they are gathered) are enqueued in an optimiser's step at most;
            they are then held, and `step_ends`, which you call once per step, moves them into the bank. So gradient
            accumulation is like one large batch: no batch has its step's rows as negatives. 0: at once.
    """

    bank: Tensor
    bank_ptr: Tensor
    never_called: ClassVar[dict[str, str]] = {
        "_init_memory_bank": "fill bank after __init__",
        "_dequeue_and_enqueue": "override enqueue",
    }

    def __init__(
        self,
        size: int | Sequence[int],
        gather_distributed: bool = False,
        feature_dim_first: bool = True,
        rows_per_step: int = 0,
    ):
        super().__init__()
        self.size: tuple[int, ...] = (size,) if isinstance(size, int) else tuple(size)
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
        self.register_buffer("bank", torch.empty(self.size), persistent=used)
        self.register_buffer("bank_ptr", torch.zeros(1, dtype=torch.long), persistent=used)
        self.held = HeldRows(min(rows_per_step, self.size[0]), self.size[-1]) if used and rows_per_step else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.bank.copy_(nn.functional.normalize(torch.randn_like(self.bank), dim=-1))
        self.bank_ptr.zero_()

    def forward(
        self, output: Tensor, labels: Tensor | None = None, update: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """The output, and the bank as it was before the update: a view, or with `update` a copy. Labels are ignored."""
        if self.size[0] == 0:
            return output, None
        bank = self.bank
        if update:
            bank = bank.clone()
            self.enqueue(output)
        return output, bank.transpose(0, -1) if self.feature_dim_first else bank

    @torch.no_grad()
    def enqueue(self, batch: Tensor, sizes: list[int] | None = None) -> None:
        """Replace the oldest rows (with `rows_per_step`, when the step ends). Nothing waits for the device.

        sizes: each rank's number of rows, where the ranks have told each other already. A rank may have none.
        """
        group = default_group(self.gather_distributed)
        with Agreement("MemoryBankModule", group if sizes is None else None) as ranks:
            if batch.dim() != 2 or batch.shape[1] != self.size[-1]:
                checks.fail("MemoryBankModule", f"rows must be [N, {self.size[-1]}]", tuple(batch.shape))
            ranks.rows_of(batch)
        if group is not None:
            batch, _ = gather_rows(batch, group, ranks.sizes if sizes is None else sizes)
        if self.held is not None:
            self.held.hold(batch)
        else:
            push_rows(self.bank, self.bank_ptr, batch)

    def step_ends(self) -> None:
        """With `rows_per_step`: enqueue the rows held since the last call."""
        if self.held is not None:
            self.held.push_into(self.bank, self.bank_ptr)


class NNMemoryBankModule(MemoryBankModule):
    """The nearest neighbours of its input in a memory bank (NNCLR, Dwibedi et al. 2021, arXiv 2104.14548).

    Args:
        size, rows_per_step: see `MemoryBankModule`.
    """

    def __init__(self, size: int | Sequence[int], rows_per_step: int = 0):
        super().__init__(size, rows_per_step=rows_per_step)

    def forward(self, output: Tensor, update: bool = False) -> Tensor:  # type: ignore[override]
        """For each row the row of the bank of the highest cosine, as it was enqueued; then enqueue, with `update`."""
        if self.size[0] == 0:
            raise ValueError("NNMemoryBankModule: size must be (num_features, dim) with num_features > 0, got 0")
        neighbours = self.bank[F.nearest_neighbors(output, self.bank.to(output))]
        if update:
            self.enqueue(output)
        return neighbours


class NNCLRLoss(nn.Module):
    """NNCLR's loss with its support set: `fastjem.functional.nnclr`.

    What lightly composes of `NNMemoryBankModule` and two `NTXentLoss`, with one pass over the bank, of which nothing
    but the neighbours is copied.

    Args:
        temperature: what cosines are divided by.
        memory_bank_size: (number of rows, dimension).
        rows_per_step: see `MemoryBankModule`; with more than 0 call `step_ends` once per optimiser step.
    """

    def __init__(
        self, temperature: float = 0.1, memory_bank_size: Sequence[int] = (65536, 256), rows_per_step: int = 0
    ):
        super().__init__()
        self.temperature = temperature
        self.memory_bank = NNMemoryBankModule(memory_bank_size, rows_per_step=rows_per_step)

    def forward(self, z0: Tensor, z1: Tensor, p0: Tensor, p1: Tensor) -> Tensor:
        """Projections z and predictions p of two views, [N, D] each -> 0-dim. In training, z1 is enqueued."""
        bank = self.memory_bank.bank.to(z0)
        loss = F.nnclr(z0, z1, p0, p1, bank, temperature=self.temperature)
        if self.training:
            self.memory_bank.enqueue(z1.detach())
        return loss

    def step_ends(self) -> None:
        """With `rows_per_step`: enqueue the rows of all batches since the last call."""
        self.memory_bank.step_ends()
