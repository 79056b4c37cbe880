"""Contrastive losses as modules, with the names, arguments and defaults of where people know them from.

That is lightly for NT-Xent and DCL, open_clip for image-text pairs, the authors' code for SupCon.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

import fastjem.functional as F
from fastjem.collectives import check_distributed, default_group, sum_of_ranks, sum_over_ranks
from fastjem.functional import checks
from fastjem.nn.memory_bank import MemoryBankModule


class NTXentLoss(nn.Module):
    """SimCLR's loss, or with a memory bank MoCo's: `fastjem.functional.nt_xent` and `info_nce`.

    Args:
        temperature: what cosines are divided by.
        memory_bank_size: (number of negatives, dimension); 0: the negatives are in the batch.
        gather_distributed: the negatives of all ranks count; with a memory bank, all ranks' rows are enqueued.
        rows_per_step: see `MemoryBankModule`; with more than 0 call `step_ends` once per optimiser step.
    """

    def __init__(
        self,
        temperature: float = 0.5,
        memory_bank_size: int | Sequence[int] = 0,
        gather_distributed: bool = False,
        rows_per_step: int = 0,
    ):
        super().__init__()
        check_distributed("NTXentLoss", gather_distributed)
        if abs(temperature) < 1e-8:
            raise ValueError(f"Illegal temperature: abs({temperature}) < 1e-8")
        self.temperature = temperature
        self.gather_distributed = gather_distributed
        self.memory_bank = MemoryBankModule(
            memory_bank_size, gather_distributed=gather_distributed, rows_per_step=rows_per_step
        )

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        """[N, D] and [N, D] -> 0-dim. The memory bank takes up `out1`, normalised, if `out0` requires a gradient."""
        if self.memory_bank.size[0] == 0:
            return F.nt_xent(out0, out1, temperature=self.temperature, group=default_group(self.gather_distributed))
        loss = F.info_nce(out0, out1, self.memory_bank.bank.to(out0.device), temperature=self.temperature)
        if out0.requires_grad:
            self.memory_bank.enqueue(nn.functional.normalize(out1.detach(), dim=1))
        return loss

    def step_ends(self) -> None:
        """With `rows_per_step`: enqueue the rows of all batches since the last call."""
        self.memory_bank.step_ends()


def negative_mises_fisher_weights(out0: Tensor, out1: Tensor, sigma: float = 0.5) -> Tensor:
    """`2 - N softmax(<out0, out1> / sigma)` of normalised rows: DCLW's weights."""
    similarity = (out0.detach() * out1.detach()).sum(1) / sigma
    return 2 - len(out0) * similarity.softmax(0)


class DCLLoss(nn.Module):
    """Decoupled contrastive learning: `fastjem.functional.dcl`.

    Args:
        temperature: what cosines are divided by.
        weight_fn: from two normalised [N, D] to weights [N] of the first one's positives; differentiated if it can be.
        gather_distributed: the negatives of all ranks count.
    """

    def __init__(
        self,
        temperature: float = 0.1,
        weight_fn: Callable[[Tensor, Tensor], Tensor] | None = None,
        gather_distributed: bool = False,
    ):
        super().__init__()
        check_distributed(type(self).__name__, gather_distributed)
        self.temperature = temperature
        self.weight_fn = weight_fn
        self.gather_distributed = gather_distributed

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        """[N, D] and [N, D] -> 0-dim."""
        options = {"temperature": self.temperature, "group": default_group(self.gather_distributed)}
        if self.weight_fn is None:
            return F.dcl(out0, out1, **options)
        unit = [nn.functional.normalize(x, dim=1) for x in (out0, out1)]
        weights = torch.stack([self.weight_fn(*unit), self.weight_fn(*reversed(unit))])
        if not weights.requires_grad:
            return F.dcl(out0, out1, weights=weights, **options)
        group = options["group"]
        images = sum_over_ranks(torch.tensor(len(out0), device=out0.device), group)
        spread = F.dcl(out0, out1, weights=torch.zeros_like(weights), **options)
        positives = (unit[0] * unit[1]).sum(1) / self.temperature * weights.sum(0)
        return spread - sum_of_ranks(positives.sum() / (2 * images), group)


class DCLWLoss(DCLLoss):
    """DCL with negative von Mises-Fisher weights: `fastjem.functional.dclw`. `sigma` is their temperature."""

    def __init__(self, temperature: float = 0.1, sigma: float = 0.5, gather_distributed: bool = False):
        super().__init__(temperature, partial(negative_mises_fisher_weights, sigma=sigma), gather_distributed)


class SupConLoss(nn.Module):
    """Supervised contrastive loss, with its authors' arguments: `fastjem.functional.supcon` of rows as given.

    Args:
        temperature: what dot products are divided by.
        contrast_mode: "all": every view is an anchor; "one": the first alone.
        base_temperature: the loss is multiplied by temperature / base_temperature.
    """

    def __init__(self, temperature: float = 0.07, contrast_mode: str = "all", base_temperature: float = 0.07):
        super().__init__()
        if contrast_mode not in ("all", "one"):
            raise ValueError(f"SupConLoss: contrast_mode must be one of all, one, got {contrast_mode!r}")
        self.temperature = temperature
        self.contrast_mode = contrast_mode
        self.base_temperature = base_temperature

    def forward(self, features: Tensor, labels: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """features [N, V, ...], normalised by the caller; labels [N] or mask [N, N], or neither (SimCLR) -> 0-dim."""
        if features.dim() < 3:
            raise ValueError(f"SupConLoss: features must be [N, V, ...], got {tuple(features.shape)}")
        z = features.flatten(2).transpose(0, 1)
        labels = None if labels is None else labels.reshape(-1).to(z.device)
        mask = None if mask is None else mask.to(z.device)
        loss = F.supcon(
            z, labels, mask=mask, temperature=self.temperature, anchors=self.contrast_mode, normalize=False
        )  # fmt: skip
        temperature = checks.positive("SupConLoss", "temperature", self.temperature, z)
        return loss * (temperature / self.base_temperature)


class ClipLoss(nn.Module):
    """CLIP's loss with open_clip's arguments: `fastjem.functional.clip_loss`.

    With `world_size` > 1 it is the loss of the global batch on every rank, its gradient exact after
    DistributedDataParallel's averaging, and no rank ever holds all features. So `cache_labels` changes nothing.

    Args:
        local_loss: the loss of this rank's rows against all ranks' candidates.
        gather_with_grad: with `local_loss`, whether candidates get gradients: True makes the gradient the global
            loss's. Without `local_loss` the gradient is the global loss's anyway.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ):
        super().__init__()
        if use_horovod:
            raise ValueError("ClipLoss: use_horovod must be False (torch.distributed is what is supported), got True")
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """Features [N, D], normalised by the caller. `logit_bias` shifts all logits alike: softmax doesn't see it."""
        group = default_group(self.world_size > 1)
        options = {"local_loss": self.local_loss, "gather_with_grad": self.gather_with_grad}
        loss = F.clip_loss(image_features, text_features, logit_scale, group=group, **options)
        if isinstance(logit_bias, Tensor):
            # Its gradient is zero and not missing: DistributedDataParallel waits for a gradient of every parameter.
            loss = loss + 0 * logit_bias.sum().to(loss.dtype)
        return {"contrastive_loss": loss} if output_dict else loss


class SigLipLoss(nn.Module):
    """SigLIP's loss with open_clip's arguments: `fastjem.functional.siglip_loss`.

    With `world_size` > 1 it is the loss of the global batch; how ranks exchange features (`dist_impl`, `bidir`) and
    in which chunks (`chunk_size`) is decided inside.
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        chunk_size: int = 0,
        bidir: bool = True,
        use_horovod: bool = False,
    ):
        super().__init__()
        if use_horovod:
            raise ValueError("SigLipLoss: use_horovod must be False (torch.distributed is what is supported), got True")
        self.cache_labels = cache_labels
        self.dist_impl = dist_impl
        self.chunk_size = chunk_size
        self.bidir = bidir
        self.rank = rank
        self.world_size = world_size

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """Features [N, D], normalised by the caller."""
        bias = 0.0 if logit_bias is None else logit_bias
        loss = F.siglip_loss(image_features, text_features, logit_scale, bias, group=default_group(self.world_size > 1))
        return {"contrastive_loss": loss} if output_dict else loss
