"""Contrastive losses as modules, with the names, arguments and defaults of where people know them from.

That is lightly for NT-Xent and DCL, open_clip for image-text pairs, the authors' code for SupCon.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

import fastjem.functional as F
from fastjem.collectives import Agreement, check_distributed, default_group, sum_of_ranks
from fastjem.functional import checks
from fastjem.functional.options import Options
from fastjem.functional.precision import loss_dtype
from fastjem.nn.hooks import Hooks, is_overridden
from fastjem.nn.memory_bank import MemoryBankModule
from fastjem.ops.autograd import needs_gradient


def _given(**options: Tensor | None) -> dict[str, Tensor]:
    """Those that are given, and no others."""
    return {name: value for name, value in options.items() if value is not None}


class NTXentLoss(nn.Module):
    """SimCLR's loss, or with a memory bank MoCo's: `fastjem.functional.nt_xent` and `info_nce`.

    Args:
        temperature: what cosines are divided by; a number, or a tensor (a Parameter is learned).
        memory_bank_size: (number of negatives, dimension); 0: the negatives are in the batch.
        gather_distributed: the negatives of all ranks count; with a memory bank, all ranks' rows are enqueued.
        rows_per_step: see `MemoryBankModule`; with more than 0 call `step_ends` once per optimiser step.
        reduction, label_smoothing, false_negative_margin, prior, hardness: see `fastjem.functional.nt_xent`.

    Another `cross_entropy` may be assigned, as with lightly's: `nn.CrossEntropyLoss(reduction="none")`, say. It is
    given the logits, which then are made, of this rank alone. A rank may come without rows: with a memory bank, where
    the loss is each rank's own, its loss is 0.
    """

    def __init__(
        self,
        temperature: float = 0.5,
        memory_bank_size: int | Sequence[int] = 0,
        gather_distributed: bool = False,
        rows_per_step: int = 0,
        *,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        false_negative_margin: float | None = None,
        prior: float = 0.0,
        hardness: float = 0.0,
    ):
        super().__init__()
        check_distributed("NTXentLoss", gather_distributed)
        self.options: dict[str, Any] = {
            "reduction": reduction,
            "label_smoothing": label_smoothing,
            "false_negative_margin": false_negative_margin,
            "prior": prior,
            "hardness": hardness,
        }
        if abs(temperature) < 1e-8:
            raise ValueError(f"Illegal temperature: abs({temperature}) < 1e-8")
        self.temperature = temperature
        self.gather_distributed = gather_distributed
        self.cross_entropy: nn.Module = nn.CrossEntropyLoss()
        self.memory_bank = MemoryBankModule(
            memory_bank_size, gather_distributed=gather_distributed, rows_per_step=rows_per_step
        )

    def forward(
        self,
        out0: Tensor,
        out1: Tensor,
        *,
        weights: Tensor | None = None,
        ids: Tensor | None = None,
        exclude: Tensor | None = None,
        hard_negatives: Tensor | None = None,
    ) -> Tensor:
        """[N, D] and [N, D] -> 0-dim. The memory bank takes up `out1`, normalised, if `out0` requires a gradient.

        weights, ids, exclude, hard_negatives: see `fastjem.functional.nt_xent`. With a memory bank `exclude` is of its
        rows, [K] or [N, K], and there are no `ids`, as the bank has none. Without a reduction the loss is [2, N], and
        with a memory bank [N].
        """
        group = default_group(self.gather_distributed)
        given = _given(weights=weights, ids=ids, exclude=exclude, hard_negatives=hard_negatives)
        options: dict[str, Any] = {**self.options, **given}
        if not is_mean_cross_entropy(self.cross_entropy) and Options(**options).any():
            contract = "with options, cross_entropy must be nn.CrossEntropyLoss()"
            checks.fail("NTXentLoss", contract, self.cross_entropy)
        if self.memory_bank.size[0] == 0:
            if not is_mean_cross_entropy(self.cross_entropy):
                if group is not None:
                    contract = "with gather_distributed, cross_entropy must be the mean, nn.CrossEntropyLoss()"
                    checks.fail("NTXentLoss", contract, self.cross_entropy)
                return self._of_logits(out0, out1, None)
            return F.nt_xent(out0, out1, temperature=self.temperature, group=group, **options)
        # The bank of all ranks is pushed to together: what fails before, fails on all of them.
        with Agreement("NTXentLoss", group) as ranks:
            if ids is not None:
                checks.fail("NTXentLoss", "with a memory bank, which has no ids, there must be none", tuple(ids.shape))
            loss = self._with_bank(out0, out1, options, is_empty=group is not None and not out0.shape[0])
            ranks.rows_of(out1)
            training = needs_gradient(out0)
            ranks.alike("enqueued" if training else "not enqueued")
        if training:
            self.memory_bank.enqueue(nn.functional.normalize(out1.detach(), dim=1), ranks.sizes)
        return loss

    def _with_bank(self, out0: Tensor, out1: Tensor, options: dict[str, Any], is_empty: bool) -> Tensor:
        bank = self.memory_bank.bank.to(out0.device)
        if is_empty:
            nothing = (out0.sum(1) + out1.sum(1)).to(loss_dtype(out0))
            return nothing if self.options["reduction"] == "none" else nothing.sum()
        if not is_mean_cross_entropy(self.cross_entropy):
            return self._of_logits(out0, out1, bank)
        return F.info_nce(out0, out1, bank, temperature=self.temperature, **options)

    def _of_logits(self, out0: Tensor, out1: Tensor, bank: Tensor | None) -> Tensor:
        """`cross_entropy` of lightly's logits: positives first beside a bank, else pairs by their number."""
        checks.matrices("NTXentLoss", "out0 and out1 must be [N, D] both", out0, out1)
        x, y = (nn.functional.normalize(z, dim=1) for z in (out0, out1))
        if bank is not None:
            logits = torch.cat(
                [(x * y).sum(1, keepdim=True), x @ bank.T.to(x.dtype, copy=True)], 1
            )  # the bank moves before backward
            return self.cross_entropy(logits / self.temperature, logits.new_zeros(x.shape[0], dtype=torch.long))
        n = x.shape[0]
        others = ~torch.eye(n, dtype=torch.bool, device=x.device)  # a row isn't its own negative

        def logits_of(a: Tensor, b: Tensor) -> Tensor:
            """[N, 2 N - 1]: a's rows against b's, among which are their pairs, and against the other rows of a."""
            return torch.cat([a @ b.T, (a @ a.T)[others].view(n, n - 1)], 1) / self.temperature

        labels = torch.arange(n, device=x.device).repeat(2)
        return self.cross_entropy(torch.cat([logits_of(x, y), logits_of(y, x)]), labels)

    def step_ends(self) -> None:
        """With `rows_per_step`: enqueue the rows of all batches since the last call."""
        self.memory_bank.step_ends()


def is_mean_cross_entropy(module: nn.Module) -> bool:
    """Whether it is `nn.CrossEntropyLoss()` as it comes, which the fused losses compute."""
    return (
        type(module) is nn.CrossEntropyLoss
        and (module.reduction, module.label_smoothing, module.weight) == ("mean", 0.0, None)
        and not any(hooks for hooks in (module._forward_hooks, module._forward_pre_hooks))
    )


def negative_mises_fisher_weights(out0: Tensor, out1: Tensor, sigma: float = 0.5) -> Tensor:
    """`2 - N softmax(<out0, out1> / sigma)` of normalised rows: DCLW's weights, float32 for half-precision rows."""
    wide = loss_dtype(out0)
    similarity = (out0.detach().to(wide) * out1.detach().to(wide)).sum(1) / sigma
    return 2 - out0.shape[0] * similarity.softmax(0)


class DCLLoss(Hooks):
    """Decoupled contrastive learning: `fastjem.functional.dcl`.

    Args:
        temperature: what cosines are divided by.
        weight_fn: from two normalised [N, D] to weights [N] of the first one's positives; differentiated if it can be.
        gather_distributed: the negatives of all ranks count. A rank may have no rows.
        reduction, false_negative_margin, prior, hardness: see `fastjem.functional.nt_xent`; a reduction other than the
            mean not with a `weight_fn` that is differentiated.
    """

    never_called: ClassVar[dict[str, str]] = {"_loss": "give a weight_fn, or override forward"}

    def __init__(
        self,
        temperature: float = 0.1,
        weight_fn: Callable[[Tensor, Tensor], Tensor] | None = None,
        gather_distributed: bool = False,
        *,
        reduction: str = "mean",
        false_negative_margin: float | None = None,
        prior: float = 0.0,
        hardness: float = 0.0,
    ):
        super().__init__()
        self.options: dict[str, Any] = {
            "reduction": reduction,
            "false_negative_margin": false_negative_margin,
            "prior": prior,
            "hardness": hardness,
        }
        check_distributed(type(self).__name__, gather_distributed)
        self.temperature = temperature
        self.weight_fn = weight_fn
        self.gather_distributed = gather_distributed

    def forward(
        self,
        out0: Tensor,
        out1: Tensor,
        *,
        ids: Tensor | None = None,
        exclude: Tensor | None = None,
        hard_negatives: Tensor | None = None,
    ) -> Tensor:
        """[N, D] and [N, D] -> 0-dim. ids, exclude, hard_negatives: see `fastjem.functional.nt_xent`."""
        group = default_group(self.gather_distributed)
        given = _given(ids=ids, exclude=exclude, hard_negatives=hard_negatives)
        options: dict[str, Any] = {"temperature": self.temperature, "group": group, **given, **self.options}
        if self.weight_fn is None:
            return F.dcl(out0, out1, **options)
        with Agreement(type(self).__name__, group) as ranks:
            may_be_empty = None if group is None else 0
            checks.matrices(ranks.who, "out0 and out1 must be [N, D] both", out0, out1, may_be_empty=may_be_empty)
            wide = [x.to(loss_dtype(x)) for x in (out0, out1)]  # half precision has no digits to give away
            unit = [nn.functional.normalize(x, dim=1) for x in wide]
            weights = torch.stack([self.weight_fn(*unit), self.weight_fn(*reversed(unit))])
            ranks.rows_of(out0)
            ranks.alike("learned weights" if weights.requires_grad else "constant weights")
        if not weights.requires_grad:
            return F.dcl(out0, out1, weights=weights, **options)
        if self.options["reduction"] != "mean":
            checks.fail(
                ranks.who, "with a weight_fn to differentiate, reduction must be mean", self.options["reduction"]
            )
        spread = F.dcl(out0, out1, weights=torch.zeros_like(weights), **options)
        positives = (unit[0] * unit[1]).sum(1) / self.temperature * weights.sum(0)
        return spread - sum_of_ranks(positives.sum() / (2 * sum(ranks.sizes)), group)


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
        return (loss * (temperature / self.base_temperature)).to(loss.dtype)


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
        reduction, label_smoothing, false_negative_margin, prior, hardness: see `fastjem.functional.clip_loss`.

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
    ):
        super().__init__()
        self.options: dict[str, Any] = {
            "reduction": reduction,
            "label_smoothing": label_smoothing,
            "false_negative_margin": false_negative_margin,
            "prior": prior,
            "hardness": hardness,
        }
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
        given = _given(weights=weights, ids=ids, exclude=exclude, hard_negatives=hard_negatives)
        options: dict[str, Any] = {**self.options, **given}
        if self._has_own_hooks(ClipLoss, group):
            if Options(**options).any():
                contract = "with options, get_logits and get_ground_truth must be those of ClipLoss"
                checks.fail("ClipLoss", contract, f"those of {type(self).__name__}")
            of_images, of_texts = self.get_logits(image_features, text_features, logit_scale, logit_bias)
            labels = self.get_ground_truth(image_features.device, of_images.shape[0])
            cross_entropy = nn.functional.cross_entropy
            loss = (cross_entropy(of_images, labels) + cross_entropy(of_texts, labels)) / 2
            return {"contrastive_loss": loss} if output_dict else loss
        options |= {"local_loss": self.local_loss, "gather_with_grad": self.gather_with_grad}
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
