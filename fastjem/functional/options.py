"""What contrastive losses can be asked for beside their formula: options, and the loss of a row that has them.

Every option is a matter of a row's negatives (which it sees: `seen.py`) or of a few numbers of each row: log-sum-exp,
sum and number of its negatives, and the logits of its positives. The latter are here, in plain torch, O(N) of it.
"""

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import softplus

from fastjem import in_graph
from fastjem.collectives import Agreement, global_loss, sum_over_ranks
from fastjem.functional import checks
from fastjem.functional.precision import loss_dtype
from fastjem.host_groups import numbers_of_ranks
from fastjem.kernels.arithmetic import widest_dtype

SURE = 50.0  # log(1 + exp(x)) is x from here on, in float64 too


class Options(NamedTuple):
    """Of one call. Each loss's documentation says which shapes it takes."""

    reduction: str = "mean"
    weights: Tensor | None = None
    label_smoothing: float | Tensor = 0.0
    ids: Tensor | None = None
    exclude: Tensor | None = None
    false_negative_margin: float | Tensor | None = None
    hard_negatives: Tensor | None = None
    prior: float | Tensor = 0.0
    hardness: float = 0.0

    def any(self) -> bool:
        """Whether there is one that isn't as it is by default."""
        return (
            self.reduction != "mean"
            or self.weights is not None
            or self.ids is not None
            or self.exclude is not None
            or self.false_negative_margin is not None
            or self.hard_negatives is not None
            or is_given(self.label_smoothing)
            or is_given(self.prior)
            or is_given(self.hardness)
        )

    def facts(self) -> list[object]:
        """What ranks have to have alike, as it decides what they send one another."""
        margin = "without" if self.false_negative_margin is None else "with"
        exclude = "no exclude" if self.exclude is None else f"exclude of {self.exclude.dim()} dimensions"
        ids = "without ids" if self.ids is None else "with ids"
        totals = "with" if self.needs_totals() else "without"
        return [
            f"reduction={self.reduction}", ids, exclude, f"{margin} false_negative_margin",
            f"{totals} label_smoothing, prior or hardness", "hardness", self.hardness,
        ]  # fmt: skip

    def needs_totals(self) -> bool:
        return any(is_given(x) for x in (self.label_smoothing, self.prior, self.hardness))

    def checked(self, op: str, z: Tensor, rows: int, row_shapes: list[tuple]) -> "Options":
        """The options as numbers and constants, or ValueError.

        Args:
            z: what other tensors must be on the device of.
            rows: the number of images or pairs.
            row_shapes: what `weights` may be shaped like.
        """
        if self.reduction not in ("mean", "sum", "none"):
            checks.fail(op, "reduction must be one of mean, sum, none", repr(self.reduction))
        weights = self.weights
        if weights is not None:
            _tensor(op, "weights", weights, row_shapes, z)
            weights = weights.detach()
        if self.ids is not None:
            _integers(op, "ids", self.ids, (rows,), z)
        if self.exclude is not None and not isinstance(self.exclude, Tensor):
            checks.fail(op, "exclude must be a bool tensor", checks.shape(self.exclude))
        hard = self.hard_negatives
        if hard is not None:
            is_right = isinstance(hard, Tensor) and hard.dim() == 3 and hard.is_floating_point()
            if not is_right or hard.shape[0] != rows or hard.shape[2] != z.shape[-1] or not hard.shape[1]:
                contract = f"hard_negatives must be [{rows}, H, {z.shape[-1]}] with H >= 1, floating-point"
                checks.fail(op, contract, checks.shape(hard))
            checks.memory(op, hard)
            checks.one_device(op, (z, hard))
        margin = self.false_negative_margin
        if margin is not None:
            margin = checks.number(op, "false_negative_margin", margin, z)
        prior = self.prior
        if isinstance(prior, Tensor) and prior.numel() != 1:
            _tensor(op, "prior", prior, [(rows,)], z)
            prior = prior.detach()
        elif is_given(prior):
            prior = checks.number(op, "prior", prior, z, low=0.0, high=1.0)
        smoothing = checks.number(op, "label_smoothing", self.label_smoothing, z, low=0.0, high=1.0, inclusive=True)
        hardness = checks.host_number(op, "hardness", self.hardness, low=0.0, inclusive=True)
        return Options(
            self.reduction, weights, smoothing, self.ids, self.exclude, margin, hard, prior, hardness
        )  # fmt: skip


def is_given(number: float | Tensor) -> bool:
    """Whether a number whose default is 0 is another one; a tensor is, as nobody looks at its value.

    So is what is no number: `Options.checked` refuses it, on all ranks at once. (An array compared here would raise
    before the ranks agree.)
    """
    return not isinstance(number, (int, float)) or number != 0


def _tensor(op: str, name: str, x: Tensor, shapes: list[tuple], like: Tensor) -> None:
    if not isinstance(x, Tensor) or x.shape not in shapes:
        checks.fail(op, f"{name} must be {' or '.join(str(list(shape)) for shape in shapes)}", checks.shape(x))
    checks.memory(op, x)
    checks.one_device(op, (like, x))


def _integers(op: str, name: str, ids: Tensor, shape: tuple, like: Tensor) -> None:
    _tensor(op, name, ids, [shape], like)
    if ids.dtype != torch.int64:
        checks.fail(op, f"{name} must be int64", ids.dtype)


def check_ids(op: str, name: str, ids: Tensor | None, shape: tuple, like: Tensor) -> None:
    """Ids that one loss alone has."""
    if ids is not None:
        _integers(op, name, ids, shape, like)


def check_mask(op: str, name: str, mask: Tensor | None, shapes: list[tuple], like: Tensor) -> None:
    if mask is not None:
        _tensor(op, name, mask, shapes, like)
        if mask.dtype != torch.bool:
            checks.fail(op, f"{name} must be bool", mask.dtype)


def check_masks_of_ranks(
    op: str,
    masks: dict[str, Tensor | None],
    x: Tensor,
    dim: int,  # where the rows of x are
    shapes: list[tuple],  # that masks may have, too
    sizes: list[int],
    group: dist.ProcessGroup | None,
) -> None:
    """Of masks [N, all ranks' N], whose width is known behind the first exchange; ranks agree on which there are."""
    if all(mask is None for mask in masks.values()):
        return
    with Agreement(op, group) as again:
        for name, mask in masks.items():
            check_mask(op, name, mask, [(x.shape[dim], sum(sizes)), *shapes], x)
        again.rows_of(x, dim)


def is_of_rows(op: str, name: str, temperature: object, group: dist.ProcessGroup | None) -> bool:
    """Whether a temperature (or scale, or bias) is one for each row, and not one number for all.

    A tensor of one element is a number, unless other ranks, which have more rows, have more of them.
    """
    if not isinstance(temperature, Tensor) or not temperature.dim():
        return False
    if group is None or in_graph.active():
        return temperature.numel() != 1
    with Agreement(op, group) as ranks:
        ranks.alike(f"{name} of {temperature.dim()} dimensions")
    return any(several for (several,) in numbers_of_ranks([int(temperature.numel() != 1)], group))


def temperature_of_rows(op: str, name: str, value: Tensor, like: Tensor, shapes: list[tuple]) -> Tensor:
    """One for each row; of a floating-point dtype."""
    if all(value.shape != shape for shape in shapes):
        of_rows = " or ".join(f"{list(shape)}" for shape in shapes)
        checks.fail(op, f"{name} must be a number or a 0-dim tensor, or {of_rows}", tuple(value.shape))
    _tensor(op, name, value, shapes, like)
    if value.dtype == torch.bool or value.is_complex():
        checks.fail(op, f"{name} must be real numbers", value.dtype)
    return value if value.is_floating_point() else value.to(torch.float32)


class Negatives(NamedTuple):
    """Of each row, in the widest dtype: what it sees beside its positives. Any shape, one for all."""

    lse: Tensor  # -inf of none
    total: Tensor | None = None  # the sum of their logits
    count: Tensor | None = None
    harder: tuple[Tensor, Tensor] | None = None  # log-sum-exps of (1 + hardness) and of hardness times the logits


def with_hard(negatives: Negatives, logits: Tensor, hardness: float) -> Negatives:
    """And a row's own hard negatives, whose logits [..., H] are in the widest dtype."""
    harder = negatives.harder
    if harder is not None:
        of_hard = ((1 + hardness) * logits).logsumexp(-1), (hardness * logits).logsumexp(-1)
        harder = torch.logaddexp(harder[0], of_hard[0]), torch.logaddexp(harder[1], of_hard[1])
    return Negatives(
        torch.logaddexp(negatives.lse, logits.logsumexp(-1)),
        None if negatives.total is None else negatives.total + logits.sum(-1),
        None if negatives.count is None else negatives.count + logits.shape[-1],
        harder,
    )


def losses_of_rows(
    positives: Tensor,  # [..., P], in the widest dtype: the logits of each row's positives
    negatives: Negatives,
    options: Options,
    inverse_temperature: float | Tensor,  # of each row, as `negatives.lse`; or one
    prior: float | Tensor,  # the same
    decoupled: bool = False,  # the positives aren't in the denominator
    pull: Tensor | None = None,  # what the positives' mean is multiplied by
) -> Tensor:
    """The loss of each row: `log(sum of exp(candidates)) - mean of positives`, and what the options make of it."""
    one = positives.shape[-1] == 1  # of two views and of pairs: it is its own mean and log-sum-exp, without a launch
    mean = positives.squeeze(-1) if one else positives.mean(-1)
    of_positives = mean if one else positives.logsumexp(-1)
    pulled = mean if pull is None else mean * pull
    lse = negatives.lse
    count = negatives.count
    if negatives.harder is not None:
        lse = harder_lse(negatives)
    if is_given(prior) and count is not None:
        of_one = of_positives if one else of_positives - math.log(positives.shape[-1])
        lse = _debiased(lse, count, of_one, inverse_temperature, prior)
    if decoupled:
        losses = lse - pulled
    elif one and pull is None:  # the same as below, in four launches, and NaN of an infinite positive as that is
        above = torch.add(lse - mean, mean.detach().clamp(min=0), alpha=0)
        losses = softplus(above, threshold=SURE)
    else:
        losses = torch.logaddexp(lse, of_positives) - pulled
    smoothing = options.label_smoothing
    if not is_given(smoothing) or negatives.total is None or count is None:
        return losses
    total = negatives.total + (mean if one else positives.sum(-1))
    return losses + smoothing * (pulled - total / (count + positives.shape[-1]))


def harder_lse(negatives: Negatives) -> Tensor:
    """The log-sum-exp of negatives that count by exp(hardness * logit), with a mean of 1 (Robinson et al. 2021)."""
    count = negatives.count
    if negatives.harder is None or count is None:
        return negatives.lse
    return torch.where(count > 0, count.log() + negatives.harder[0] - negatives.harder[1], negatives.lse)


def _debiased(
    lse: Tensor,
    count: Tensor,
    of_positives: Tensor,  # log(mean(exp(positives)))
    inverse_temperature: float | Tensor,
    prior: float | Tensor,
) -> Tensor:
    """The negatives' log-sum-exp without what positives among them are expected to add (Chuang et al. 2020, eq. 8).

    `log(max((sum(exp(negatives)) - count * prior * mean(exp(positives))) / (1 - prior), count * exp(-1 / t)))`, t the
    temperature.
    """
    none = count == 0
    log_count = count.clamp_min(1).log()
    expected = log_count + of_positives
    floor = log_count - inverse_temperature
    pivot = torch.maximum(torch.maximum(lse, expected), floor).detach()
    rest = ((lse - pivot).exp() - prior * (expected - pivot).exp()) / (1 - prior)
    kept = torch.maximum(rest, (floor - pivot).exp())
    return torch.where(none, lse, pivot + kept.masked_fill(none, 1).log())


def dots_of_rows(a: Tensor, b: Tensor) -> Tensor:
    """[...] of rows [..., D]: sums in the widest dtype."""
    return (a * b).sum(-1, dtype=widest_dtype(a.device))


def reduced(
    losses: Tensor,  # of each row
    options: Options,
    like: Tensor,
    group: dist.ProcessGroup | None,
    local: bool = False,  # the value is that of this rank's rows
) -> Tensor:
    """As `reduction` says. Over ranks the mean and the sum are of all rows, and "none" is of this rank's."""
    dtype = loss_dtype(like)
    weights = options.weights
    if weights is not None:
        losses = _weighted(losses, weights)
    if options.reduction == "none":
        return losses.to(dtype)
    if group is None and weights is None and options.reduction == "mean":
        return losses.mean().to(dtype)
    total = losses.sum()
    of_weights = None if weights is None else weights.to(losses.dtype).expand(losses.shape)
    if group is None:
        return (total if options.reduction == "sum" or of_weights is None else total / of_weights.sum()).to(dtype)
    one = torch.ones((), dtype=total.dtype, device=total.device)
    own_count = one if options.reduction == "sum" else one * losses.numel() if of_weights is None else of_weights.sum()
    count = one if options.reduction == "sum" else sum_over_ranks(own_count, group)
    value = total / own_count if local else sum_over_ranks(total, group) / count
    if local:
        value = torch.where(own_count == 0, 0, value)
    return global_loss((total / count).to(dtype), value.to(dtype), group)


def _weighted(losses: Tensor, weights: Tensor) -> Tensor:
    """A row that doesn't count may be padding, whose loss is anything."""
    return losses.masked_fill(weights == 0, 0) * weights.to(losses.dtype)
