"""Contrastive losses of pairs from two encoders, with a learned scale: CLIP and SigLIP."""

from collections.abc import Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from fastjem.collectives import Agreement
from fastjem.functional import candidates, checks, one_rank, quick, rings
from fastjem.functional.compiled import over_ranks
from fastjem.functional.options import Options, check_masks_of_ranks, is_of_rows, reduced, temperature_of_rows
from fastjem.functional.pairs import Pairs, loss_at_once, losses_of_rows
from fastjem.functional.precision import in_float32
from fastjem.functional.prefixes import sum_over_prefixes
from fastjem.kernels.arithmetic import widest, widest_dtype
from fastjem.ops import transforms


def _scalar(op: str, name: str, value: Tensor | float, like: Tensor) -> Tensor:
    """0-dim. A Python number stays what it is: the default dtype, which may be bfloat16, has no part in it."""
    value = checks.number(op, name, value, like)
    if isinstance(value, Tensor):
        return value
    return torch.full((), value, dtype=widest_dtype(like.device), device=like.device)


def _of_rows_or_scalar(op: str, name: str, value: Tensor | float, like: Tensor, of_rows: bool) -> Tensor:
    """0-dim or [N], as ranks have agreed on."""
    if of_rows and isinstance(value, Tensor):
        return temperature_of_rows(op, name, value, like, [like.shape[:1]])
    return _scalar(op, name, value, like)


def _checked(op: str, x: Tensor, y: Tensor, group: dist.ProcessGroup | None) -> list[Tensor]:
    checks.matrices(op, "x and y must be [N, D] both", x, y, may_be_empty=None if group is None else 0)
    return checks.common(x, y)


@over_ranks()
def clip_loss(
    x: Tensor,
    y: Tensor,
    logit_scale: Tensor | float,
    *,
    reduction: str = "mean",
    weights: Tensor | None = None,
    label_smoothing: float | Tensor = 0.0,
    ids: Tensor | None = None,
    exclude: Tensor | None = None,
    false_negative_margin: float | Tensor | None = None,
    hard_negatives: Tensor | None = None,
    prior: float | Tensor = 0.0,
    hardness: float = 0.0,
    dims: Sequence[int] | None = None,
    dim_weights: Sequence[float] | None = None,
    group: dist.ProcessGroup | None = None,
    local_loss: bool = False,
    gather_with_grad: bool = True,
) -> Tensor:
    """CLIP's loss (Radford et al. 2021, arXiv 2103.00020, figure 3).

    `(cross_entropy(logits, arange(N)) + cross_entropy(logits.T, arange(N))) / 2` with `logits = logit_scale * x @ y.T`.

    Args:
        x, y: [N, D] each, pair by pair, as given: open_clip's convention is that they are normalised already.
        logit_scale: what similarities are multiplied by (the exponential of CLIP's parameter): a number, or a tensor
            that gets its gradient, 0-dim or [N], of each pair's rows.
        ids: [N] int64: pairs of equal ids aren't negatives of one another (one image with several captions).
        exclude: bool, [N, N], which rows of y aren't negatives of which of x, and the other way round; or [N], which
            pairs aren't of any. With a group [N, all ranks' N], or [N] of this rank.
        hard_negatives: [N, H, D], as given: further rows of y, for row i of x alone.
        reduction, weights, label_smoothing, false_negative_margin, prior, hardness: as for `nt_xent`, of both
            directions; a pair's loss is their mean.
        dims, dim_weights: as for `nt_xent`; prefixes, those of hard negatives too, are normalised inside.
        group: as for `nt_xent`.
        local_loss: with a group, the mean over this rank's rows (and, for `logits.T`, its columns) alone, each against
            all ranks' candidates (0 for a rank without rows); the gradient is still that of the global loss, exact
            after averaging over ranks.
        gather_with_grad: False makes the candidates of a local loss constants, this rank's own among them: the
            gradient is that of this rank's rows alone, as open_clip's, and not the global loss's. Without `local_loss`
            it changes nothing.

    Returns:
        0-dim float32 (float64 for float64 inputs), the same on every rank of the group, unless `local_loss`; [N]
        without a reduction.
    """
    options = Options(
        reduction, weights, label_smoothing, ids, exclude, false_negative_margin, hard_negatives, prior, hardness
    )  # fmt: skip
    if dims is not None or dim_weights is not None:
        of_prefix = partial(
            clip_loss, logit_scale=logit_scale, group=group, local_loss=local_loss, gather_with_grad=gather_with_grad
        )
        return sum_over_prefixes("clip_loss", of_prefix, (x, y), options, dims, dim_weights, group, unit=True)
    of_rows = is_of_rows("clip_loss", "logit_scale", logit_scale, group)
    if of_rows or options.any():
        return _clip_with_options(x, y, logit_scale, of_rows, options, group, local_loss, gather_with_grad)
    if group is None and (loss := quick.clip_loss(x, y, logit_scale)) is not None:
        return loss
    if group is None and not transforms.active():
        x, y = _checked("clip_loss", x, y, group)
        return one_rank.clip_loss(x, y, checks.number("clip_loss", "logit_scale", logit_scale, x))
    constant_candidates = group is not None and local_loss and not gather_with_grad
    with Agreement("clip_loss", group) as ranks:
        x, y = _checked("clip_loss", x, y, group)
        scale = _scalar("clip_loss", "logit_scale", logit_scale, x)
        ranks.rows_of(x)
        ranks.backward_of(x, y, scale)
        if constant_candidates:
            ranks.alike("constant candidates")
    if group is not None and constant_candidates:
        return rings.clip_loss_of_constant_candidates(x, y, scale, ranks.sizes, group)
    return rings.clip_loss(x, y, scale, ranks.sizes, group, local_loss and group is not None)


def _clip_with_options(
    x: Tensor,
    y: Tensor,
    logit_scale: Tensor | float,
    of_rows: bool,
    options: Options,
    group: dist.ProcessGroup | None,
    local_loss: bool,
    gather_with_grad: bool,
) -> Tensor:
    op = "clip_loss"
    with Agreement(op, group) as ranks:
        checks.matrices(op, "x and y must be [N, D] both", x, y, may_be_empty=None if group is None else 0)
        x, y = checks.common(x, y)
        scale = _of_rows_or_scalar(op, "logit_scale", logit_scale, x, of_rows)
        options = options.checked(op, x, x.shape[0], [x.shape[:1]])
        if group is not None and local_loss and not gather_with_grad:
            checks.fail(op, "with options, gather_with_grad must be True", gather_with_grad)
        ranks.rows_of(x)
        ranks.backward_of(x, y, scale)
        if group is not None and of_rows and options.exclude is not None and options.exclude.dim() == 2:
            checks.fail(op, "with a group and a scale of each row, exclude must be [N]", tuple(options.exclude.shape))
        ranks.alike(*options.facts(), f"local_loss={local_loss}")
    check_masks_of_ranks(op, {"exclude": options.exclude}, x, 0, [x.shape[:1]], ranks.sizes, group)
    return candidates.clip_loss(x, y, scale, options, ranks.sizes, group, local_loss and group is not None)


@over_ranks()
def siglip_loss(
    x: Tensor,
    y: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    *,
    group: dist.ProcessGroup | None = None,
    ids: Tensor | None = None,
    positives: Tensor | None = None,
    exclude: Tensor | None = None,
    weights: Tensor | None = None,
    reduction: str = "mean",
    label_smoothing: float | Tensor = 0.0,
) -> Tensor:
    """SigLIP's loss (Zhai et al. 2023, arXiv 2303.15343): every pair is a binary decision of its own.

    `-logsigmoid(labels * (logit_scale * x @ y.T + logit_bias)).sum() / N`, labels 1 on the diagonal and -1 elsewhere.
    Options may be combined.

    Args:
        x, y, group: as for `clip_loss`.
        logit_scale, logit_bias: 0-dim, or [N], one of each row of x, with their gradients.
        ids: [N] int64: pairs of images and texts of equal ids belong together, beside each image's own pair.
        positives: [N, N] bool, which pairs belong together, instead of the diagonal: an image may have several texts,
            or none. Over ranks [N, all ranks' N]. Not with ids.
        exclude: [N, N] bool, which pairs don't count, of whatever label; over ranks [N, all ranks' N].
        weights: [N], of the losses of x's rows, constants; the mean becomes sum(weights * losses) / sum(weights).
        reduction: "mean" over x's rows, "sum", or "none" for the loss of each row, [N]; see `nt_xent`.
        label_smoothing: the targets are so much nearer to 1/2: `1 - label_smoothing / 2` of pairs that belong together.

    Returns:
        0-dim float32 (float64 for float64 inputs); the same on every rank of the group. [N] without a reduction.

    Raises:
        ValueError: for other shapes, dtypes or options.
    """
    options = Options(reduction, weights, label_smoothing, ids, exclude)
    numbers = {"logit_scale": logit_scale, "logit_bias": logit_bias}
    of_rows = [is_of_rows("siglip_loss", name, number, group) for name, number in numbers.items()]
    if any(of_rows) or positives is not None or options.any():
        return _siglip_with_options(x, y, numbers, of_rows, positives, options, group)
    if group is None and (loss := quick.siglip_loss(x, y, logit_scale, logit_bias)) is not None:
        return loss
    if group is None and not transforms.active():
        x, y = _checked("siglip_loss", x, y, group)
        scale = checks.number("siglip_loss", "logit_scale", logit_scale, x)
        return one_rank.siglip_loss(x, y, scale, checks.number("siglip_loss", "logit_bias", logit_bias, x))
    with Agreement("siglip_loss", group) as ranks:
        x, y = _checked("siglip_loss", x, y, group)
        scale = _scalar("siglip_loss", "logit_scale", logit_scale, x)
        bias = _scalar("siglip_loss", "logit_bias", logit_bias, x)
        ranks.rows_of(x)
    return rings.siglip_loss(x, y, scale, bias, ranks.sizes, group)


def _siglip_with_options(
    x: Tensor,
    y: Tensor,
    numbers: dict[str, Tensor | float],  # the scale and the bias
    of_rows: list[bool],  # whether each of them is one of each row
    positives: Tensor | None,
    options: Options,
    group: dist.ProcessGroup | None,
) -> Tensor:
    op = "siglip_loss"
    with Agreement(op, group) as ranks:
        checks.matrices(op, "x and y must be [N, D] both", x, y, may_be_empty=None if group is None else 0)
        x, y = checks.common(x, y)
        scale, bias = (
            _of_rows_or_scalar(op, name, number, x, rows)
            for (name, number), rows in zip(numbers.items(), of_rows, strict=True)
        )
        options = options.checked(op, x, x.shape[0], [x.shape[:1]])
        if positives is not None and options.ids is not None:
            checks.fail(op, "ids or positives must be given, not both", "both")
        ranks.rows_of(x)
        ranks.backward_of(x, y, scale, bias)
        has_masks = (positives is not None, options.exclude is not None)
        ranks.alike(*options.facts(), f"masks {has_masks}", f"{scale.dim()} and {bias.dim()} dimensions")
    masks = {"exclude": options.exclude, "positives": positives}
    check_masks_of_ranks(op, masks, x, 0, [], ranks.sizes, group)
    rows, columns, scale, bias = _in_rows(x, y, scale, bias)
    smoothing = _scalar(op, "label_smoothing", options.label_smoothing, x).detach()
    pairs = Pairs(options.ids, positives, options.exclude, smoothing)
    if group is None and options.reduction != "none" and not transforms.active():
        weights = options.weights
        of_all = x.shape[0] if weights is None else widest(weights).sum()
        return loss_at_once(rows, columns, scale, bias, pairs, weights, of_all if options.reduction == "mean" else 1.0)
    return reduced(losses_of_rows(rows, columns, scale, bias, pairs, ranks.sizes, group), options, x, group)


def _in_rows(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows, columns, scale and bias, the latter numbers: those of each row become a part of it."""
    if bias.dim():
        wide = in_float32(y)
        y = torch.cat([wide, wide.new_ones(y.shape[0], 1)], 1)
    if scale.dim() or bias.dim():
        wide = in_float32(x)
        x = wide * scale.to(wide.dtype)[:, None] if scale.dim() else wide * scale.to(wide.dtype)
        if bias.dim():
            x = torch.cat([x, bias.to(wide.dtype)[:, None]], 1)
        scale = scale.detach().new_ones(())
    x, y = checks.common(x, y)
    return x, y, scale, bias.detach().new_zeros(()) if bias.dim() else bias
