"""Contrastive losses of one set of rows: a log-sum-exp over similarities, less the positives."""

from collections.abc import Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from fastjem.collectives import Agreement, gather_rows, sum_of_ranks
from fastjem.functional import candidates, checks, quick, rings
from fastjem.functional.compiled import over_ranks
from fastjem.functional.negatives import info_nce_of_rows
from fastjem.functional.options import (
    Options,
    check_ids,
    check_mask,
    check_masks_of_ranks,
    is_of_rows,
    temperature_of_rows,
)
from fastjem.functional.precision import without_autocast
from fastjem.functional.prefixes import sum_over_prefixes
from fastjem.functional.temperature import unit_rows_over_root
from fastjem.functional.unit import unit_rows
from fastjem.functional.views import loss_of_views
from fastjem.ops.autograd import needs_gradient


def _views(op: str, z0: Tensor, z1: Tensor | None, group: dist.ProcessGroup | None) -> list[Tensor]:
    """Two [N, D] of one dtype, or one [V, N, D]."""
    if z1 is not None:
        checks.matrices(op, "z0 and z1 must be [N, D] both", z0, z1, may_be_empty=None if group is None else 0)
        return checks.common(z0, z1)
    contract = "z must be [V, N, D] with V >= 2, or two [N, D]"
    checks.matrices(op, contract, z0, dims=3, may_be_empty=None if group is None else 1)
    if len(z0) < 2:
        checks.fail(op, contract, tuple(z0.shape))
    return [z0]


def _stacked(views: list[Tensor]) -> Tensor:
    """[V, N, D]"""
    with without_autocast(views[0]):
        return views[0] if len(views) == 1 else torch.stack(views)


def _of_views(
    op: str,
    z: Tensor,  # [V, N, D]
    temperature: float | Tensor,
    weights: Tensor | None,  # [V, N] of the positive terms
    sizes: list[int],  # each rank's N
    group: dist.ProcessGroup | None,
    decoupled: bool = False,
) -> Tensor:
    """The mean over rows of the log-sum-exp less the weighted positives; rows are normalised."""
    if group is None:
        return loss_of_views(op, [z], temperature, weights, decoupled)
    z, options = with_host_temperature(z, temperature, decoupled, True)
    return rings.nt_xent(z, weights, options, sizes, group)


def with_host_temperature(
    z: Tensor, temperature: float | Tensor, decoupled: bool, normalize: bool
) -> tuple[Tensor, tuple[float, bool, bool]]:
    """Rows, and NT-Xent's options (temperature, decoupled, normalize), where the temperature is a number.

    One that is a tensor goes into the rows, so that its gradient comes with theirs.
    """
    if not isinstance(temperature, Tensor):
        return z, (temperature, decoupled, normalize)
    return unit_rows_over_root(z, temperature, normalize), (1.0, decoupled, False)


@over_ranks()
def nt_xent(
    z0: Tensor,
    z1: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.5,
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
) -> Tensor:
    """Normalised-temperature cross-entropy, SimCLR's loss (Chen et al. 2020, arXiv 2002.05709, equation 1).

    The mean, over all V N rows and their V - 1 positives, of `cross_entropy(cosines with all other rows /
    temperature, positive)`. Options may be combined; memory stays O(N D) with all of them.

    Args:
        z0, z1: [N, D] each, two views of N images, or `z0` alone as [V, N, D]. Normalised inside.
        temperature: what the cosines are divided by: a number, or a tensor that gets its gradient, 0-dim or of each
            row, [N] or [V, N]. A tensor isn't read, as that would wait for a GPU: where it isn't positive, the loss is
            NaN or means nothing.
        reduction: "mean", "sum", or "none" for the loss of each row, [V, N]. Over ranks "none" gives this rank's rows,
            and their gradients aren't multiplied by the number of ranks: DistributedDataParallel's mean of a loss made
            of them is that of the ranks' losses.
        weights: [N] or [V, N], of the rows' losses, constants; the mean becomes sum(weights * losses) / sum(weights).
        label_smoothing: torch's: so much of the target is uniform over a row's candidates, positives among them.
        ids: [N] int64: images of equal ids aren't negatives of one another.
        exclude: bool, [N, N], which images (columns) aren't negatives of which; or [N], which aren't of any (padding,
            whose own loss `weights` of 0 leave out). With a group [N, all ranks' N], or [N] of this rank.
        false_negative_margin: a candidate whose cosine is above that of the row's most similar positive plus this
            isn't a negative (Zhang et al. 2025, arXiv 2506.05176, with 0.1).
        hard_negatives: [N, H, D], normalised inside: further negatives of each image alone.
        prior: how probable it is that a negative is a positive, a number or [N]: what those are expected to add is
            taken out (Chuang et al. 2020, arXiv 2007.00224, equation 8).
        hardness: above 0, negatives count by `exp(hardness * cosine / temperature)`, with a mean of 1 (Robinson et
            al. 2021, arXiv 2010.04592: beta).
        dims, dim_weights: lengths of Matryoshka prefixes, ascending, (64, 128, 256) say. The loss is the sum over
            these of that of each row's first elements, normalised by themselves, times a weight each, by default 1
            (Kusupati et al. 2022, arXiv 2205.13147, equation 1).
        group: the process group whose ranks' rows are candidates and rows of one global batch (batches may be uneven,
            a rank may have no rows); None: this rank's alone. Ranks see each other's rows one rank at a time: memory
            stays that of one batch. All of them must call backward.

    Returns:
        0-dim float32 (float64 for float64 inputs), the same on every rank of the group; [V, N] without a reduction.

    Raises:
        ValueError: for other shapes, dtypes or temperatures.
    """
    options = Options(
        reduction, weights, label_smoothing, ids, exclude, false_negative_margin, hard_negatives, prior, hardness
    )  # fmt: skip
    if dims is not None or dim_weights is not None:
        views = (z0,) if z1 is None else (z0, z1)
        of_prefix = partial(nt_xent, temperature=temperature, group=group)
        return sum_over_prefixes("nt_xent", of_prefix, views, options, dims, dim_weights, group)
    plain = group is None and not options.any()
    loss = quick.of_views("nt_xent", z0, z1, temperature) if plain else None
    if loss is not None:
        return loss
    return _nt_xent("nt_xent", z0, z1, temperature, options, None, False, group)


def _nt_xent(
    op: str,
    z0: Tensor,
    z1: Tensor | None,
    temperature: float | Tensor,
    options: Options,
    pull: Tensor | None,  # [N] or [V, N], weights of the positive terms
    decoupled: bool,
    group: dist.ProcessGroup | None,
) -> Tensor:
    of_rows = is_of_rows(op, "temperature", temperature, group)
    has_options = of_rows or options.any()
    if group is None and not has_options:
        views = _views(op, z0, z1, None)
        temperature = checks.positive(op, "temperature", temperature, views[0])
        shape = views[0].shape[:2] if len(views) == 1 else (2, views[0].shape[0])
        return loss_of_views(op, views, temperature, _checked_pull(op, pull, views[0], shape), decoupled)
    with Agreement(op, group) as ranks:
        z = _stacked(_views(op, z0, z1, group))
        temperature = temperature_or_rows(op, temperature, z, of_rows, [z.shape[1:2], z.shape[:2]])
        pull = _checked_pull(op, pull, z, z.shape[:2])
        rows_of_views(ranks, z, temperature)
        if has_options:
            options = options.checked(op, z, z.shape[1], [z.shape[1:2], z.shape[:2]])
            ranks.alike(*options.facts())
    if not has_options:
        return _of_views(op, z, temperature, pull, ranks.sizes, group, decoupled)
    check_masks_of_ranks(op, {"exclude": options.exclude}, z, 1, [z.shape[1:2]], ranks.sizes, group)
    return candidates.loss_of_views(z, temperature, options, ranks.sizes, group, op, decoupled, pull)


def _checked_pull(op: str, pull: Tensor | None, like: Tensor, shape: Sequence[int]) -> Tensor | None:
    """The positives' weights, [V, N] constants, of [V, N] or [N]."""
    if pull is None:
        return None
    if tuple(pull.shape) not in (tuple(shape), tuple(shape[1:])):
        checks.fail(op, f"weights must be {[shape[1]]} or {list(shape)}", tuple(pull.shape))
    checks.one_device(op, (like, pull))
    return pull.detach().expand(tuple(shape))


def temperature_or_rows(op: str, value: object, like: Tensor, of_rows: bool, shapes: list[tuple]) -> float | Tensor:
    """A number, 0-dim, or one of each row."""
    if of_rows and isinstance(value, Tensor):
        return temperature_of_rows(op, "temperature", value, like, shapes)
    return checks.positive(op, "temperature", value, like)


def rows_of_views(ranks: Agreement, z: Tensor, temperature: float | Tensor) -> None:
    """What ranks must know of each other's views [V, N, D]; a learned temperature needs a backward as rows do."""
    ranks.rows_of(z, dim=1)
    ranks.backward_of(z, *([temperature] if isinstance(temperature, Tensor) else []))


@over_ranks()
def dcl(
    z0: Tensor,
    z1: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.1,
    weights: Tensor | None = None,
    reduction: str = "mean",
    ids: Tensor | None = None,
    exclude: Tensor | None = None,
    false_negative_margin: float | Tensor | None = None,
    hard_negatives: Tensor | None = None,
    prior: float | Tensor = 0.0,
    hardness: float = 0.0,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Decoupled contrastive learning (Yeh et al. 2021, arXiv 2110.06848, equation 6): no positive in the denominator.

    The mean over all V N rows of `logsumexp(cosines with other images' rows / temperature) - weight *
    mean(positives' cosines) / temperature`. With one image alone there is no other: -inf, as in lightly.

    Args:
        z0, z1, temperature, group: as for `nt_xent`, and the other options too.
        weights: [N] or [V, N], constants, of the positive terms; None: ones.
    """
    options = Options(
        reduction, None, 0.0, ids, exclude, false_negative_margin, hard_negatives, prior, hardness
    )  # fmt: skip
    plain = group is None and weights is None and not options.any()
    loss = quick.of_views("dcl", z0, z1, temperature, decoupled=True) if plain else None
    if loss is not None:
        return loss
    return _nt_xent("dcl", z0, z1, temperature, options, weights, True, group)


@over_ranks()
def dclw(
    z0: Tensor,
    z1: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    sigma: float | Tensor = 0.5,
    reduction: str = "mean",
    ids: Tensor | None = None,
    exclude: Tensor | None = None,
    false_negative_margin: float | Tensor | None = None,
    hard_negatives: Tensor | None = None,
    prior: float | Tensor = 0.0,
    hardness: float = 0.0,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """`dcl` with the positives' weights `2 - N softmax(cosine(z0, z1) / sigma)`: hard ones count more.

    The softmax is over the N images of the batch, those of all ranks with a group (lightly's: of each rank's batch).

    Args:
        z0, z1, temperature, group: as for `nt_xent`, and the other options too.
        sigma: the weights' temperature; a 0-dim tensor gets its gradient, of the mean.
    """
    options = Options(
        reduction, None, 0.0, ids, exclude, false_negative_margin, hard_negatives, prior, hardness
    )  # fmt: skip
    of_rows = is_of_rows("dclw", "temperature", temperature, group)
    with Agreement("dclw", group) as ranks:
        z = _stacked(_views("dclw", z0, z1, group))
        temperature = temperature_or_rows("dclw", temperature, z, of_rows, [z.shape[1:2], z.shape[:2]])
        sigma = checks.positive("dclw", "sigma", sigma, z)
        learned = isinstance(sigma, Tensor) and needs_gradient(sigma)
        if learned and reduction != "mean":
            checks.fail("dclw", "with a learned sigma, reduction must be mean", repr(reduction))
        rows_of_views(ranks, z, temperature)
        ranks.alike("with a learned sigma" if learned else "with a given sigma")
    with torch.no_grad():
        cosines = (unit_rows(z[0]) * unit_rows(z[1])).sum(1)
        everything, first = (cosines, 0) if group is None else gather_rows(cosines, group, ranks.sizes)
    shares = (everything / sigma).softmax(0)[first : first + cosines.shape[0]]
    weights = (2 - everything.shape[0] * shares).to(cosines.dtype)
    of_views = weights.detach().expand(z.shape[:2])
    if of_rows or options.any():
        loss = _nt_xent("dclw", z, None, temperature, options, of_views, True, group)
    else:
        loss = _of_views("dclw", z, temperature, of_views, ranks.sizes, group, decoupled=True)
    if not weights.requires_grad:
        return loss
    # Weights are constants for the rows, but a learned sigma has its gradient through them.
    constant = temperature.detach() if isinstance(temperature, Tensor) else temperature
    pulls = (cosines * weights / constant).expand(z.shape[:2])
    pulled = sum_of_ranks(pulls.sum() / (z.shape[0] * sum(ranks.sizes)), group)
    return loss - (pulled - pulled.detach()).to(loss.dtype)


def info_nce(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    label_offset: int | None = None,
    reduction: str = "mean",
    weights: Tensor | None = None,
    label_smoothing: float | Tensor = 0.0,
    ids: Tensor | None = None,
    negative_ids: Tensor | None = None,
    exclude: Tensor | None = None,
    false_negative_margin: float | Tensor | None = None,
    hard_negatives: Tensor | None = None,
    prior: float | Tensor = 0.0,
    hardness: float = 0.0,
    dims: Sequence[int] | None = None,
    dim_weights: Sequence[float] | None = None,
) -> Tensor:
    """InfoNCE with given negatives, MoCo's loss (He et al. 2020, arXiv 1911.05722, equation 1).

    `cross_entropy(cat([<q, p>, q @ negatives.T], 1) / temperature, 0)` with every row normalised inside.

    Args:
        query, positive: [N, D] each.
        negatives: [K, D], for example a queue. Constants unless they require a gradient; constants may be changed in
            place before backward, as nothing of them is kept.
        temperature: what the cosines are divided by: a number, or a tensor that gets its gradient, 0-dim or [N], and
            isn't read, as for `nt_xent`.
        label_offset: row `label_offset + i` of `negatives` is query i's own positive and doesn't count twice. So
            candidates gathered from all ranks, or a shard of them, can be given as they are (MoCo v3: rank * N).
        ids, negative_ids: [N] and [K] int64, given both: a row of `negatives` whose id is the query's isn't its
            negative (the same image in a queue).
        exclude: bool, [N, K], or [K] for all queries (a queue that isn't full yet).
        reduction, weights, label_smoothing, false_negative_margin, hard_negatives, prior, hardness: as for `nt_xent`.
        dims, dim_weights: as for `nt_xent`, too.

    Returns:
        0-dim float32 (float64 for float64 inputs); [N] without a reduction.

    Raises:
        ValueError: for other shapes, dtypes or temperatures.
    """
    options = Options(
        reduction, weights, label_smoothing, ids, exclude, false_negative_margin, hard_negatives, prior, hardness
    )  # fmt: skip
    if dims is not None or dim_weights is not None:
        of_prefix = partial(info_nce, temperature=temperature, label_offset=label_offset, negative_ids=negative_ids)
        rows = (query, positive, negatives)
        return sum_over_prefixes("info_nce", of_prefix, rows, options, dims, dim_weights, None)
    has_options = negative_ids is not None or options.any()
    loss = None if has_options else quick.info_nce(query, positive, negatives, temperature, label_offset)
    if loss is not None:
        return loss
    contract = "query and positive must be [N, D] both, negatives [K, D]"
    checks.matrices("info_nce", contract, query, positive)
    checks.matrices("info_nce", contract, negatives)
    if negatives.shape[1] != query.shape[1]:
        checks.fail("info_nce", contract, f"{tuple(query.shape)} and {tuple(negatives.shape)}")
    checks.one_device("info_nce", (query, positive, negatives))
    of_rows = is_of_rows("info_nce", "temperature", temperature, None)
    temperature = temperature_or_rows("info_nce", temperature, query, of_rows, [query.shape[:1]])
    offset = -query.shape[0] if label_offset is None else checks.integer("info_nce", "label_offset", label_offset)
    rows = checks.common(query, positive, negatives)
    if has_options or of_rows:
        options = options.checked("info_nce", query, query.shape[0], [query.shape[:1]])
        if (ids is None) != (negative_ids is None):
            checks.fail("info_nce", "ids and negative_ids must be given both or neither", "one of them")
        check_ids("info_nce", "negative_ids", negative_ids, negatives.shape[:1], query)
        check_mask("info_nce", "exclude", exclude, [(query.shape[0], negatives.shape[0]), negatives.shape[:1]], query)
        own = None if label_offset is None else offset
        return candidates.info_nce(rows[0], rows[1], rows[2], negative_ids, own, temperature, options)
    return info_nce_of_rows(rows, temperature, offset)
