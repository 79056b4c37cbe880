"""Losses of image-text pairs as modules, with open_clip's names, arguments and defaults: CLIP and SigLIP."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

import fastjem.functional as F
from fastjem.collectives import default_group
from fastjem.functional import checks
from fastjem.functional.options import Options
from fastjem.nn.contrastive import given_in_call
from fastjem.nn.hooks import Hooks, is_overridden


class _ImageText(Hooks):
    """What open_clip's two losses share: subclasses that make logits or labels of their own."""

    def get_logits(self, *inputs: Tensor | None) -> Any:
        raise NotImplementedError

    def get_ground_truth(self, *options: Any) -> Tensor:
        raise NotImplementedError

    def _has_own_hooks(self, base: type, group: dist.ProcessGroup | None) -> bool:
        """Whether the loss is to be computed from the logits and labels of a subclass; of this rank alone."""
        overridden = [name for name in ("get_logits", "get_ground_truth") if is_overridden(self, name, base)]
        if overridden and group is not None:
            came = f"a {' and a '.join(overridden)} of {type(self).__name__}"
            contract = "with world_size > 1, where no rank holds all logits, they can't be overridden"
            checks.fail(base.__name__, contract, came)
        return bool(overridden)


class ClipLoss(_ImageText):
    """CLIP's loss with open_clip's arguments: `fastjem.functional.clip_loss`.

    With `world_size` > 1 it is the loss of the global batch on every rank, its gradient exact after
    DistributedDataParallel's averaging, and no rank ever holds all features. So `cache_labels` changes nothing.

    Args:
        local_loss: the loss of this rank's rows against all ranks' candidates.
        gather_with_grad: with `local_loss`, whether candidates get gradients: True makes the gradient the global
            loss's. Without `local_loss` the gradient is the global loss's anyway.
        reduction, label_smoothing, false_negative_margin, prior, hardness, dims, dim_weights: see
            `fastjem.functional.clip_loss`.

    A subclass may override `get_logits` and `get_ground_truth`, on one rank; the loss then is made of what they return.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        *,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        false_negative_margin: float | None = None,
        prior: float = 0.0,
        hardness: float = 0.0,
        dims: Sequence[int] | None = None,
        dim_weights: Sequence[float] | None = None,
    ):
        super().__init__()
        self.options: dict[str, Any] = {
            "reduction": reduction,
            "label_smoothing": label_smoothing,
            "false_negative_margin": false_negative_margin,
            "prior": prior,
            "hardness": hardness,
        }
        self.prefixes: dict[str, Any] = {"dims": dims, "dim_weights": dim_weights}
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
        *,
        weights: Tensor | None = None,
        ids: Tensor | None = None,
        exclude: Tensor | None = None,
        hard_negatives: Tensor | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """Features [N, D], normalised by the caller. `logit_bias` shifts all logits alike: softmax doesn't see it.

        weights, ids, exclude, hard_negatives: see `fastjem.functional.clip_loss`.
        """
        group = default_group(self.world_size > 1)
        given = given_in_call(weights=weights, ids=ids, exclude=exclude, hard_negatives=hard_negatives)
        options: dict[str, Any] = {**self.options, **given}
        if self._has_own_hooks(ClipLoss, group):
            if Options(**options).any() or any(x is not None for x in self.prefixes.values()):
                contract = "with options, get_logits and get_ground_truth must be those of ClipLoss"
                checks.fail("ClipLoss", contract, f"those of {type(self).__name__}")
            of_images, of_texts = self.get_logits(image_features, text_features, logit_scale, logit_bias)
            labels = self.get_ground_truth(image_features.device, of_images.shape[0])
            cross_entropy = nn.functional.cross_entropy
            loss = (cross_entropy(of_images, labels) + cross_entropy(of_texts, labels)) / 2
            return {"contrastive_loss": loss} if output_dict else loss
        options |= {"local_loss": self.local_loss, "gather_with_grad": self.gather_with_grad, **self.prefixes}
        loss = F.clip_loss(image_features, text_features, logit_scale, group=group, **options)
        if isinstance(logit_bias, Tensor):
            # Its gradient is zero and not missing: DistributedDataParallel waits for a gradient of every parameter.
            loss = loss + 0 * logit_bias.sum().to(loss.dtype)
        return {"contrastive_loss": loss} if output_dict else loss

    def get_logits(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor, logit_bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """[N, N] twice: each image against all texts, each text against all images. For subclasses, see `ClipLoss`."""
        logits = logit_scale * image_features @ text_features.T
        if logit_bias is not None:
            logits = logits + logit_bias
        return logits, logits.T

    def get_ground_truth(self, device: torch.device, num_logits: int) -> Tensor:
        """[N]: row i belongs to column i. For subclasses, see `ClipLoss`."""
        return torch.arange(num_logits, device=device)


class SigLipLoss(_ImageText):
    """SigLIP's loss with open_clip's arguments: `fastjem.functional.siglip_loss`.

    With `world_size` > 1 it is the loss of the global batch; how ranks exchange features (`dist_impl`, `bidir`) and
    in which chunks (`chunk_size`) is decided inside.

    Args:
        reduction, label_smoothing: see `fastjem.functional.siglip_loss`.

    A subclass may override `get_logits` and `get_ground_truth`, on one rank; the loss then is made of what they return.
    """

    never_called: ClassVar[dict[str, str]] = {"_loss": "override get_logits, get_ground_truth or forward"}

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        chunk_size: int = 0,
        bidir: bool = True,
        use_horovod: bool = False,
        *,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ):
        super().__init__()
        self.reduction = reduction
        self.label_smoothing = label_smoothing
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
        *,
        ids: Tensor | None = None,
        positives: Tensor | None = None,
        exclude: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """Features [N, D], normalised by the caller. For options see `fastjem.functional.siglip_loss`."""
        group = default_group(self.world_size > 1)
        options: dict[str, Any] = {"ids": ids, "positives": positives, "exclude": exclude, "weights": weights}
        options |= {"reduction": self.reduction, "label_smoothing": self.label_smoothing}
        if self._has_own_hooks(SigLipLoss, group):
            if any(option is not None for option in (ids, positives, exclude, weights)):
                checks.fail("SigLipLoss", "options can't be combined with own get_logits or get_ground_truth", "both")
            logits = self.get_logits(image_features, text_features, logit_scale, logit_bias)
            labels = self.get_ground_truth(image_features.device, image_features.dtype, image_features.shape[0])
            loss = -nn.functional.logsigmoid(labels * logits).sum() / image_features.shape[0]
        else:
            bias = 0.0 if logit_bias is None else logit_bias
            loss = F.siglip_loss(image_features, text_features, logit_scale, bias, group=group, **options)
        return {"contrastive_loss": loss} if output_dict else loss

    def get_logits(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor, logit_bias: Tensor | None = None
    ) -> Tensor:
        """[N, N]: images against texts. For subclasses, see above."""
        logits = logit_scale * image_features @ text_features.T
        return logits if logit_bias is None else logits + logit_bias

    def get_ground_truth(
        self, device: torch.device, dtype: torch.dtype, num_logits: int, negative_only: bool = False
    ) -> Tensor:
        """[N, N]: 1 for pairs, which there are none of with `negative_only`, and -1 elsewhere. For subclasses."""
        labels = -torch.ones(num_logits, num_logits, device=device, dtype=dtype)
        return labels if negative_only else labels.fill_diagonal_(1)
