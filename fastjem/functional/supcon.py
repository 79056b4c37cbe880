"""The supervised contrastive loss: its positives are the rows of an anchor's class."""

import torch
import torch.distributed as dist
from torch import Tensor

from fastjem.collectives import Agreement, global_loss, sum_over_ranks
from fastjem.functional import checks, one_tile, quick, rings
from fastjem.functional.candidates import hard_logits, negatives_of
from fastjem.functional.classes import loss_of_classes
from fastjem.functional.compiled import over_ranks
from fastjem.functional.contrastive import rows_of_views, temperature_or_rows, with_host_temperature
from fastjem.functional.options import (
    Negatives,
    Options,
    check_mask,
    dots_of_rows,
    harder_lse,
    is_given,
    is_of_rows,
    reduced,
    with_hard,
)
from fastjem.functional.precision import in_float32, loss_dtype, without_autocast
from fastjem.functional.seen import Side, View
from fastjem.kernels.arithmetic import widest
from fastjem.ops.autograd import ops, refuse_second_order, two_passes
from fastjem.ops.forward_mode import refuse_forward_mode


@over_ranks()
def supcon(
    z: Tensor,
    labels: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    temperature: float | Tensor = 0.07,
    anchors: str = "all",
    normalize: bool = True,
    reduction: str = "mean",
    weights: Tensor | None = None,
    exclude: Tensor | None = None,
    hard_negatives: Tensor | None = None,
    hardness: float = 0.0,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Supervised contrastive loss (Khosla et al. 2020, arXiv 2004.11362, equation 2, L_out).

    The mean over anchors of `logsumexp(s_i.) - mean(s_ij over positives j)`, with s = cosines / temperature and, as
    candidates, all rows but the anchor. Positives are the rows of the same class; an anchor without any counts as 0.

    Args:
        z: [V, N, D]; V may be 1.
        labels: [N] of any integer or floating dtype; None: each image is a class of its own.
        mask: [N, N] instead of labels, how much image j is a positive of image i.
        anchors: "all" views, or "one": the first alone.
        temperature: a number, or a tensor that gets its gradient, 0-dim or of each row, [N] or [V, N].
        normalize: False takes rows as they come (the authors' convention: they are of unit length already).
        reduction: "mean", "sum", or "none" for the loss of each anchor, [V, N] or [1, N]; see `nt_xent`.
        weights: of the anchors' losses, [N] or their shape, constants; see `nt_xent`.
        exclude: bool, [N], which images aren't candidates of any other image, neither as positives nor as negatives
            (padding); or [N, N], which (columns) aren't of which. With a group [N] of this rank.
        hard_negatives: [N, H, D], as `z`: further negatives of each image alone.
        hardness: as for `nt_xent`, of the rows of other classes. Not with a mask.
        group: as for `nt_xent`; positives are of the same class on any rank. Not with a mask.

    Returns:
        0-dim float32 (float64 for float64 inputs), the same on every rank of the group; or the anchors' losses.

    Raises:
        ValueError: for other shapes, dtypes or options.
    """
    options = Options(reduction, weights, exclude=exclude, hard_negatives=hard_negatives, hardness=hardness)
    of_rows = is_of_rows("supcon", "temperature", temperature, group)
    if of_rows or options.any():
        return _with_options(z, labels, mask, temperature, of_rows, anchors, normalize, options, group)
    if group is None and mask is None and anchors in ("all", "one"):
        one_anchor = anchors == "one"
        loss = quick.of_views("supcon", z, None, temperature, labels=labels, normalize=normalize, one_anchor=one_anchor)
        if loss is not None:
            return loss
    with Agreement("supcon", group) as ranks:
        _check_supcon(z, labels, mask, anchors, group)
        temperature = checks.positive("supcon", "temperature", temperature, z)
        rows_of_views(ranks, z, temperature)
        ranks.alike(anchors, "without labels" if labels is None else labels.dtype)
    if group is None and mask is None:
        ids = None if labels is None else _as_ids(labels)
        return loss_of_classes(z, ids, temperature, anchors == "one", normalize)
    v, n, _ = z.shape
    images = sum(ranks.sizes)
    number = (v if anchors == "all" else 1) * images  # of anchors

    # The sum over positives of s_ij is one product of row i with a sum of rows: never N x N.
    rows = widest(z)
    if normalize:
        rows = torch.nn.functional.normalize(rows, dim=2)
    by_image = rows.sum(0)  # [N, D]
    sums, counts, of_itself = _over_positives(by_image, labels, mask)
    counts = v * counts
    elsewhere = None
    if group is not None and labels is not None:
        of_images = [torch.full_like(counts, v), by_image] + ([rows[0]] if anchors == "one" else [])
        elsewhere = rings.sums_of_own_classes(of_images, labels, ranks.sizes, group)
        counts = counts + elsewhere[0]
        sums = sums + elsewhere[1]
    dots = (rows * sums).sum(2) - of_itself * rows.square().sum(2)  # [V, N]
    counts = counts - of_itself
    has_positives = counts.abs() >= 1e-6
    # 1 for none before it is divided by, or the temperature's gradient would be infinity times 0
    weight = (1 / (temperature * counts.where(has_positives, 1))).where(has_positives, 0)  # [N]
    counted = has_positives.expand(v, n)
    if anchors == "one":
        counted = counted & (torch.arange(v, device=z.device) == 0)[:, None]
    positives = (dots * weight).where(counted, 0).sum() / number

    given, options = with_host_temperature(z, temperature, False, normalize)
    if group is None:
        spread = _spread(given, counted, number, options)
    else:
        of_rows = rings.nt_xent(given, torch.zeros_like(dots), options, ranks.sizes, group, counted)
        spread = of_rows * (v * images / number)
        value = sum_over_ranks(positives, group)
        if elsewhere is not None:  # this rank's rows are positives of other ranks' anchors, too
            positives = positives + ((rows * elsewhere[-1]).sum(2) * weight).sum() / number
        positives = global_loss(positives, value, group)
    return (spread - positives).to(loss_dtype(z))


def _with_options(
    z: Tensor,
    labels: Tensor | None,
    mask: Tensor | None,
    temperature: float | Tensor,
    of_rows: bool,  # whether it is one of each row
    anchors: str,
    normalize: bool,
    options: Options,
    group: dist.ProcessGroup | None,
) -> Tensor:
    with Agreement("supcon", group) as ranks:
        _check_supcon(z, labels, mask, anchors, group)
        v, n, _ = z.shape
        temperature = temperature_or_rows("supcon", temperature, z, of_rows, [(n,), (v, n)])
        count = v if anchors == "all" else 1
        options = options.checked("supcon", z, n, [(n,), (count, n)])
        shapes = [(n,)] if group is not None else [(n,), (n, n)]
        check_mask("supcon", "exclude", options.exclude, shapes, z)
        if mask is not None and is_given(options.hardness):
            checks.fail("supcon", "with hardness, classes must be given as labels", "mask")
        rows_of_views(ranks, z, temperature)
        ranks.alike(anchors, "without labels" if labels is None else labels.dtype, *options.facts())
    refuse_forward_mode("supcon", (z, temperature, *options))
    with without_autocast(z):
        if group is None and mask is None:
            images = torch.arange(n, device=z.device) if labels is None else _as_ids(labels)
            losses = one_tile.supcon(z, images, temperature, count, normalize, options)
            if losses is not None:
                return reduced(losses, options, z, None)
        rows = in_float32(z)
        if normalize:
            rows = torch.nn.functional.normalize(rows, dim=2)
        hard = options.hard_negatives
        if hard is not None and normalize:
            hard = torch.nn.functional.normalize(in_float32(hard), dim=2)
        options = options._replace(hard_negatives=hard)
        view = View("supcon", 0, False, is_given(options.hardness), z.dtype, ranks.sizes, group)
        losses = _anchor_losses(_over(rows[:count], temperature), rows, labels, mask, options, view)
        return reduced(losses, options, z, group)


def _over(rows: Tensor, temperature: float | Tensor) -> Tensor:
    """The first views' rows [A, N, D] over one temperature, or over those of rows [N] or [V, N]."""
    if not isinstance(temperature, Tensor):
        return rows / temperature
    inverse = (1 / widest(temperature)).to(rows.dtype)
    of_views = inverse[: rows.shape[0]] if inverse.dim() == 2 else inverse
    return rows * (of_views.unsqueeze(-1) if inverse.dim() else inverse)


def _anchor_losses(
    anchors: Tensor,  # [A, N, D], the first A views' rows over the temperature
    rows: Tensor,  # [V, N, D]
    labels: Tensor | None,
    mask: Tensor | None,
    options: Options,
    view: View,
) -> Tensor:
    """[A, N] in the widest dtype: log-sum-exps over what an anchor sees, less the mean of its positives."""
    views = rows.shape[0]
    with_itself = torch.stack([dots_of_rows(anchors, rows.roll(-i, 0)[: anchors.shape[0]]) for i in range(views)], -1)
    sums, counts, of_itself = _all_positives(rows, labels, mask, options.exclude, view)
    counts = views * counts - of_itself
    pulled = (widest(anchors) * sums).sum(2) - of_itself * with_itself[..., 0]
    has_positives = counts.abs() >= 1e-6
    mean = torch.where(has_positives, pulled / torch.where(has_positives, counts, 1), 0)

    everything, _ = negatives_of(Side(anchors), Side(rows), options.exclude, view._replace(totals=False), 0.0)
    lse = everything.lse
    hard = options.hard_negatives
    of_hard = None if hard is None else hard_logits(anchors, hard)
    if of_hard is not None:
        lse = torch.logaddexp(lse, of_hard.logsumexp(-1))
    if views > 1:
        lse = torch.logaddexp(lse, with_itself[..., 1:].logsumexp(-1))
    if is_given(options.hardness):
        ids = None if labels is None else _as_ids(labels)
        first, second = (
            Side(x, None if ids is None else ids.expand(x.shape[:2]).contiguous()) for x in (anchors, rows)
        )
        negatives, _ = negatives_of(first, second, options.exclude, view, options.hardness)
        if of_hard is not None:
            negatives = with_hard(negatives, of_hard, options.hardness)
        lse = _with_harder(lse, negatives)
    return torch.where(has_positives, lse - mean, 0)


def _with_harder(lse: Tensor, negatives: Negatives) -> Tensor:
    """The log-sum-exp over all candidates, with the negatives' part as hardness has it.

    That is never less than their part in `lse`, so no digits are lost by taking the one for the other.
    """
    harder = harder_lse(negatives)
    pivot = torch.maximum(lse, harder).detach()
    total = (lse - pivot).exp() + ((harder - pivot).exp() - (negatives.lse - pivot).exp())
    return total.log() + pivot


def _as_ids(labels: Tensor) -> Tensor:
    """Labels as int64, equal where they are equal."""
    if not labels.is_floating_point():
        return labels.long()
    bits = widest(labels) + 0.0  # -0.0 becomes 0.0
    return bits.view(torch.int64 if bits.dtype == torch.float64 else torch.int32).long()


def _all_positives(
    rows: Tensor,  # [V, N, D]
    labels: Tensor | None,
    mask: Tensor | None,
    exclude: Tensor | None,
    view: View,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `_over_positives` of what isn't excluded, with those of other ranks; differentiable for rows."""
    by_image = widest(rows).sum(0)
    n = by_image.shape[0]
    if mask is not None or (exclude is not None and exclude.dim() == 2):
        itself = torch.eye(n, dtype=torch.bool, device=rows.device)
        classes = itself if labels is None else labels[:, None] == labels
        weights = (classes if mask is None else mask).to(by_image)
        if exclude is not None:
            weights = weights.masked_fill(exclude & ~itself, 0)
        return _over_positives(by_image, None, weights)
    ones = by_image.new_ones(n)
    if labels is None:
        return by_image, ones, ones
    numbered = torch.cat([by_image, ones[:, None]], 1)
    left_out = None if exclude is None else exclude[:, None]
    given = numbered if left_out is None else numbered.masked_fill(left_out, 0)
    alone = view.group is None
    sums = _sums_of_classes(given, labels) if alone else _SumsOfClasses.apply(given, labels, view.sizes, view.group)
    if left_out is not None:  # its own image's views are positives of every row
        sums = sums + numbered.masked_fill(~left_out, 0)
    return sums[:, :-1], sums[:, -1].detach(), ones


class _SumsOfClasses(torch.autograd.Function):
    """[N, C]: for each image the sum over all ranks' images of its class. It is its own gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, labels: Tensor, sizes: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.save_for_backward(labels)
        ctx.ranks = (sizes, group)
        return _sums_of_classes(x, labels) + rings.sums_of_own_classes([x], labels, sizes, group)[0]

    @staticmethod
    def backward(ctx, upstream: Tensor):
        (labels,) = ctx.saved_tensors
        refuse_second_order("supcon")
        found = _sums_of_classes(upstream, labels)
        return found + rings.sums_of_own_classes([upstream], labels, *ctx.ranks)[0], None, None, None


def _check_supcon(
    z: Tensor,
    labels: Tensor | None,
    mask: Tensor | None,
    anchors: str,
    group: dist.ProcessGroup | None,
) -> None:
    checks.matrices("supcon", "z must be [V, N, D]", z, dims=3, may_be_empty=None if group is None else 1)
    n = z.shape[1]
    if anchors not in ("all", "one"):
        checks.fail("supcon", "anchors must be one of all, one", repr(anchors))
    if labels is not None and mask is not None:
        checks.fail("supcon", "labels or mask must be given, not both", "both")
    if mask is not None and group is not None:
        checks.fail("supcon", "with a group, classes must be given as labels", "mask")
    if labels is not None and labels.shape != (n,):
        checks.fail("supcon", f"labels must be [{n}]", tuple(labels.shape))
    if mask is not None and mask.shape != (n, n):
        checks.fail("supcon", f"mask must be [{n}, {n}]", tuple(mask.shape))
    checks.one_device("supcon", [x for x in (z, labels, mask) if x is not None])


def _over_positives(
    by_image: Tensor,  # [N, D] in the widest dtype, the sum of an image's views
    labels: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Over each image's positives, itself among them: the sum of `by_image` [N, D], their number [N]; and how much it
    is a positive of itself [N]."""
    if mask is not None:
        weight = mask.to(by_image)
        return weight @ by_image, weight.sum(1), weight.diagonal()
    ones = torch.ones(by_image.shape[0], dtype=by_image.dtype, device=by_image.device)
    if labels is None:
        return by_image, ones, ones
    return _sums_of_classes(by_image, labels), _sums_of_classes(ones, labels), ones


def _sums_of_classes(x: Tensor, labels: Tensor) -> Tensor:
    """[N, ...]: for each image the sum over those of its class."""
    # A class's number is where it begins among the sorted labels. In float64 index_put adds in one order everywhere.
    number = torch.searchsorted(labels.sort().values, labels)
    return torch.zeros_like(x).index_put((number,), x, accumulate=True)[number]


def _spread(
    z: Tensor,  # [V, N, D]
    counted: Tensor,  # [V, N] bool
    number: int,
    options: tuple,
) -> Tensor:
    """The sum of the anchors' log-sum-exps over their number."""
    constant = z.detach()
    _, lse = ops.nt_xent(constant, constant, 0, *options)
    spread = lse.where(counted, 0).sum() / number
    lse = lse.where(counted, float("inf"))  # a row that is no anchor has no probabilities
    saved = (constant, lse, lse, torch.zeros_like(lse))
    temperature = options[0]
    return two_passes("nt_xent_backward", spread, z, saved, 0, *options, scale=1 / (number * temperature))
