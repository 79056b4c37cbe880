"""The supervised contrastive loss: its positives are the rows of an anchor's class."""

import torch
import torch.distributed as dist
from torch import Tensor

from fastjem.collectives import Agreement, global_loss, sum_over_ranks
from fastjem.functional import checks, quick, rings
from fastjem.functional.compiled import over_ranks
from fastjem.functional.contrastive import rows_of_views, with_host_temperature
from fastjem.functional.precision import loss_dtype
from fastjem.kernels.arithmetic import widest
from fastjem.ops.autograd import ops, two_passes


@over_ranks()
def supcon(
    z: Tensor,
    labels: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    temperature: float | Tensor = 0.07,
    anchors: str = "all",
    normalize: bool = True,
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
        normalize: False takes rows as they come (the authors' convention: they are of unit length already).
        group: as for `nt_xent`; positives are of the same class on any rank. Not with a mask.
    """
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
    weight = (1 / (temperature * counts)).where(has_positives, 0)  # [N]
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
    n = by_image.shape[0]
    ones = torch.ones(n, dtype=by_image.dtype, device=by_image.device)
    classes = torch.arange(n, device=by_image.device) if labels is None else labels
    # A class's number is where it begins among the sorted labels. In float64 index_put adds in one order everywhere.
    number = torch.searchsorted(classes.sort().values, classes)
    sums = torch.zeros_like(by_image).index_put((number,), by_image, accumulate=True)
    counts = torch.zeros_like(ones).index_put((number,), ones, accumulate=True)
    return sums[number], counts[number], ones


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
