"""A memory with a place for each image of the data: banks by sample, and what clustering between epochs reads."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import normalize

from fastjem.collectives import gather_rows
from fastjem.ops.transforms import refuse_vmap


class SampleMemory(nn.Module):
    """A row of each image of the data, by the image's number: what the last pass over it left there, on all ranks.

    Rows begin as random directions; `written` tells those that an image left.

    Rows that come together with one number (where an image stands in for one that can't be read) leave any one of them.

    Args:
        images: in the data. One row more holds what goes nowhere.
        width: D.
        held: rows of a step at most, on one rank, that wait for its end (see `fastjem.nn.parts`).
    """

    rows: Tensor  # [images + 1, D]
    written: Tensor  # [images + 1] bool
    held_rows: Tensor
    held_index: Tensor  # [held] int64: `images` where nothing is held
    count: Tensor

    def __init__(self, images: int, width: int, held: int):
        super().__init__()
        self.images = images
        self.register_buffer("rows", torch.empty(images + 1, width))
        self.register_buffer("written", torch.zeros(images + 1, dtype=torch.bool))
        self.register_buffer("held_rows", torch.zeros(held, width), persistent=False)
        self.register_buffer("held_index", torch.full((held,), images), persistent=False)
        self.register_buffer("count", torch.zeros((), dtype=torch.long), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.rows.copy_(normalize(torch.randn_like(self.rows), dim=1))
        self.written.zero_()
        self._hold_nothing()

    def _hold_nothing(self) -> None:
        self.held_index.fill_(self.images)
        self.count.zero_()

    def _load_from_state_dict(self, *args: Any) -> None:
        self._hold_nothing()  # a state is saved where nothing is held
        super()._load_from_state_dict(*args)

    def of(self, index: Tensor) -> Tensor:
        """[B] int64 -> [B, D]: what was left of these images."""
        return self.rows[index]

    @torch.no_grad()
    def seen(self) -> Tensor:
        """[n] int64: the images that have left a row. Not for a step, as how many there are waits for the device."""
        return self.written[:-1].nonzero()[:, 0]

    @torch.no_grad()
    def hold(self, index: Tensor, rows: Tensor) -> None:
        """Rows [B, D] of the images [B] int64 of this rank's micro-batch, for `step_ends`."""
        refuse_vmap("SampleMemory", self.held_rows, rows)
        places = (self.count + torch.arange(rows.shape[0], device=rows.device)) % self.held_rows.shape[0]
        self.held_rows.index_copy_(0, places, rows.detach().to(self.held_rows.dtype))
        self.held_index.index_copy_(0, places, index)
        self.count.add_(rows.shape[0])

    @torch.no_grad()
    def step_ends(self, group: dist.ProcessGroup | None) -> None:
        """Write what all ranks held since the last call; once per optimiser step."""
        index, rows = self.held_index, self.held_rows
        if group is not None:
            sizes = [index.shape[0]] * group.size()
            rows, _ = gather_rows(rows, group, sizes)
            index, _ = gather_rows(index, group, sizes)
        self.rows.index_copy_(0, index, rows.to(self.rows.dtype))
        self.written.index_fill_(0, index, True)
        self._hold_nothing()
