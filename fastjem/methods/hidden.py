"""Patches that blocks hide, of which each image may have another number: as rows, without boolean indexing."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import fastjem.functional as F
from fastjem.data.batch import Batch
from fastjem.data.masking import MaskSpec, most_masked
from fastjem.data.views import Views


@dataclass(frozen=True)
class HiddenRows:
    """The hidden patches of V views of B images, as rows of their tokens [V B, L, D]."""

    rows: Tensor  # [M] int64, the flat indices of the patches
    weights: Tensor  # [M], 1 / (hidden patches of its image); 0 of those that fill up, which come again
    images: int  # V B
    filled: bool  # whether there may be rows that fill up: the last ones

    @property
    def count(self) -> Tensor:
        """0-dim, how many of the first rows are hidden patches: the others, of weight 0, fill up."""
        return (self.weights > 0).sum()

    @property
    def counted(self) -> Tensor | None:
        """`count` for what has to be told which rows count; None where all do."""
        return self.count if self.filled else None

    def of(self, tokens: Tensor) -> Tensor:
        """Tokens [V B, L, D] -> [M, D]."""
        return tokens.flatten(0, 1)[self.rows]

    def through(self, head: nn.Module, pooled: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings [N, D] and the hidden patches of tokens [V B, L, D] through one head, in one call."""
        both = head(torch.cat([pooled, self.of(tokens)]))
        return both[: pooled.shape[0]], both[pooled.shape[0] :]

    def mean_over_images(self, loss_of: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """A loss over the rows x [M, D] as a mean over each image's patches, then over all images.

        loss_of: of weights [M], a mean over rows by these. It isn't called where there are no rows: the loss is 0 then.
        """
        if not x.shape[0]:
            return x.sum()
        total = self.weights.sum()
        # Of no hidden patch the mean would be no number, though it counts 0 times.
        weights = torch.where(total > 0, self.weights, 1.0)
        return loss_of(weights) * (total / self.images)


def hidden_rows(batch: Batch, views: Views, padded: bool | None = None) -> HiddenRows:
    """The patches that the batch's masks hide in its large views.

    padded: whether there are as many rows whatever the mask; None: on a GPU.

    On a GPU, where looking how many there are would wait, there are always as many rows: the first ones come again at
    the end, with weight 0. Losses, centres and Sinkhorn don't count them. (A batch norm in a head does: heads of
    patches have none unless `norm=batch` says so.)
    """
    hidden = torch.cat([mask.hidden for _, mask in sorted(batch.masks.items())])  # [V B, h, w]
    count = None
    filled = bool(padded or (padded is None and not hidden.is_cpu))
    if filled:
        grid = (hidden.shape[1], hidden.shape[2])
        spec = MaskSpec(0, grid, views.mask, views.masking, views.drops, views.least_mask, views.masked_images)
        count = most_masked(spec, hidden.shape[0])
    rows, weights = F.masked_rows(hidden, count)
    return HiddenRows(_repeated(rows, weights), weights, hidden.shape[0], filled)


def _repeated(rows: Tensor, weights: Tensor) -> Tensor:
    """Rows [M] of weight 0, which are the last ones and not hidden, replaced by the first ones again."""
    hidden = (weights > 0).sum().clamp(min=1)
    return rows[torch.arange(rows.shape[0], device=rows.device) % hidden]
