"""Contrastive losses as modules, with the names, arguments and defaults of where people know them from.

That is lightly for NT-Xent and DCL, the authors' code for SupCon. Those of image-text pairs are in `image_text.py`.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import fastjem.functional as F
from fastjem.collectives import Agreement, check_distributed, default_group, sum_of_ranks
from fastjem.functional import checks
from fastjem.functional.options import Options
from fastjem.functional.precision import loss_dtype
from fastjem.kernels.arithmetic import without_diagonal
from fastjem.nn.hooks import Hooks
from fastjem.nn.memory_bank import MemoryBankModule
from fastjem.ops.autograd import needs_gradient


def given_in_call(**options: Tensor | None) -> dict[str, Tensor]:
    """Those that are given, and no others."""
    return {name: value for name, value in options.items() if value is not None}


class NTXentLoss(nn.Module):
    """SimCLR's loss, or with a memory bank MoCo's: `fastjem.functional.nt_xent` and `info_nce`.

    Args:
        temperature: what cosines are divided by; a number, or a tensor (a Parameter is learned).
        memory_bank_size: (number of negatives, dimension); 0: the negatives are in the batch.
        gather_distributed: the negatives of all ranks count; with a memory bank, all ranks' rows are enqueued.
        rows_per_step: see `MemoryBankModule`; with more than 0 call `step_ends` once per optimiser step.
        reduction, label_smoothing, false_negative_margin, prior, hardness, dims, dim_weights: see
            `fastjem.functional.nt_xent`.

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
        dims: Sequence[int] | None = None,
        dim_weights: Sequence[float] | None = None,
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
        self.prefixes: dict[str, Any] = {"dims": dims, "dim_weights": dim_weights}
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
        given = given_in_call(weights=weights, ids=ids, exclude=exclude, hard_negatives=hard_negatives)
        options: dict[str, Any] = {**self.options, **given}
        is_optional = Options(**options).any() or any(x is not None for x in self.prefixes.values())
        if is_optional and not is_mean_cross_entropy(self.cross_entropy):
            contract = "with options, cross_entropy must be nn.CrossEntropyLoss()"
            checks.fail("NTXentLoss", contract, self.cross_entropy)
        if self.memory_bank.size[0] == 0:
            if not is_mean_cross_entropy(self.cross_entropy):
                if group is not None:
                    contract = "with gather_distributed, cross_entropy must be the mean, nn.CrossEntropyLoss()"
                    checks.fail("NTXentLoss", contract, self.cross_entropy)
                return self._of_logits(out0, out1, None)
            return F.nt_xent(out0, out1, temperature=self.temperature, group=group, **options, **self.prefixes)
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
        bank = self.memory_bank.bank.to(out0)
        if is_empty:
            nothing = (out0.sum(1) + out1.sum(1)).to(loss_dtype(out0))
            return nothing if self.options["reduction"] == "none" else nothing.sum()
        if not is_mean_cross_entropy(self.cross_entropy):
            return self._of_logits(out0, out1, bank)
        return F.info_nce(out0, out1, bank, temperature=self.temperature, **options, **self.prefixes)

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

        def logits_of(a: Tensor, b: Tensor) -> Tensor:
            """[N, 2 N - 1]: a's rows against b's, among which are their pairs, and against the other rows of a."""
            return torch.cat([a @ b.T, without_diagonal(a @ a.T)], 1) / self.temperature

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
        given = given_in_call(ids=ids, exclude=exclude, hard_negatives=hard_negatives)
        options: dict[str, Any] = {"temperature": self.temperature, "group": group, **given, **self.options}
        if self.weight_fn is None:
            return F.dcl(out0, out1, **options)
        if isinstance(self.weight_fn, partial) and self.weight_fn.func is negative_mises_fisher_weights:
            return F.dclw(out0, out1, **self.weight_fn.keywords, **options)
        with Agreement(type(self).__name__, group) as ranks:
            may_be_empty = None if group is None else 0
            checks.matrices(ranks.who, "out0 and out1 must be [N, D] both", out0, out1, may_be_empty=may_be_empty)
            wide = [x.to(loss_dtype(x)) for x in (out0, out1)]  # half precision has no digits to give away
            unit = [nn.functional.normalize(x, dim=1) for x in wide]
            weights = torch.stack([self.weight_fn(*unit), self.weight_fn(*reversed(unit))])
            ranks.rows_of(out0)
            ranks.alike("learned weights" if weights.requires_grad else "constant weights")
            if weights.requires_grad and self.options["reduction"] != "mean":
                contract = "with a weight_fn to differentiate, reduction must be mean"
                checks.fail(ranks.who, contract, self.options["reduction"])
        if not weights.requires_grad:
            return F.dcl(out0, out1, weights=weights, **options)
        spread = F.dcl(out0, out1, weights=torch.zeros_like(weights), **options)
        positives = (unit[0] * unit[1]).sum(1) / self.temperature * weights.sum(0)
        return spread - sum_of_ranks(positives.sum() / (2 * sum(ranks.sizes)), group)


class DCLWLoss(DCLLoss):
    """DCL with negative von Mises-Fisher weights: `fastjem.functional.dclw`.

    Args:
        sigma: the weights' temperature.
        temperature, gather_distributed: see `DCLLoss`; the weights are over the images of all ranks, too.
    """

    def __init__(self, temperature: float = 0.1, sigma: float = 0.5, gather_distributed: bool = False):
        super().__init__(temperature, partial(negative_mises_fisher_weights, sigma=sigma), gather_distributed)


class SupConLoss(nn.Module):
    """Supervised contrastive loss, with its authors' arguments: `fastjem.functional.supcon` of rows as given.

    Args:
        temperature: what dot products are divided by.
        contrast_mode: "all": every view is an anchor; "one": the first alone.
        base_temperature: the loss is multiplied by temperature / base_temperature.
        reduction, hardness: see `fastjem.functional.supcon`.
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.07,
        contrast_mode: str = "all",
        base_temperature: float = 0.07,
        *,
        reduction: str = "mean",
        hardness: float = 0.0,
    ):
        super().__init__()
        if contrast_mode not in ("all", "one"):
            raise ValueError(f"SupConLoss: contrast_mode must be one of all, one, got {contrast_mode!r}")
        self.temperature = temperature
        self.contrast_mode = contrast_mode
        self.base_temperature = base_temperature
        self.options: dict[str, Any] = {"reduction": reduction, "hardness": hardness}

    def forward(
        self,
        features: Tensor,
        labels: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        weights: Tensor | None = None,
        exclude: Tensor | None = None,
        hard_negatives: Tensor | None = None,
    ) -> Tensor:
        """features [N, V, ...], normalised by the caller; labels [N] or mask [N, N], or neither (SimCLR) -> 0-dim.

        weights, exclude, hard_negatives: see `fastjem.functional.supcon`. Without a reduction the loss is [V, N].
        """
        if features.dim() < 3:
            raise ValueError(f"SupConLoss: features must be [N, V, ...], got {tuple(features.shape)}")
        z = features.flatten(2).transpose(0, 1)
        labels = None if labels is None else labels.reshape(-1).to(z.device)
        mask = None if mask is None else mask.to(z.device)
        given: dict[str, Any] = self.options | given_in_call(
            weights=weights, exclude=exclude, hard_negatives=hard_negatives
        )
        loss = F.supcon(
            z, labels, mask=mask, temperature=self.temperature, anchors=self.contrast_mode, normalize=False,
            **given,
        )  # fmt: skip
        temperature = checks.positive("SupConLoss", "temperature", self.temperature, z)
        base = checks.positive("SupConLoss", "base_temperature", self.base_temperature, z)
        scale = temperature / base
        return loss if isinstance(scale, float) and scale == 1 else (loss * scale).to(loss.dtype)
