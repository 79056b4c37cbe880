"""The dense structure estimator (DSE): how well patches lie in clusters apart, as a number to raise."""

import torch
from torch import Tensor

from fastjem.functional import checks
from fastjem.functional.precision import in_float32, without_autocast

TINY = 1e-12  # beside what is divided by


def dense_structure(
    x: Tensor,
    *,
    normalize: bool = True,
    local_clusters: int = 3,
    global_clusters: int = 24,
    iterations: int = 20,
    tolerance: float = 1e-4,
) -> Tensor:
    """DSE of patches: `apart / spread + rank - (within groups + within images) / (2 spread)`.

    "Exploring Structural Degradation in Dense Representations for Self-supervised Learning", 2025, arXiv 2510.17299.
    With spread the mean distance of patches from their mean; rank the exponential of the entropy of all patches'
    singular values, over the smaller of their number and D. Patches of an image, and of groups of images that follow
    one another, are clustered by k-means, of random beginnings (torch's generator) and without a gradient. `apart` is
    the mean distance of a patch to the nearest centre of another cluster; `within` the mean, over clusters of at least
    two, of the sum of singular values of a cluster less its mean, over `sqrt(max(its patches - 1, D))`.

    Args:
        x: [B, P, D].
        normalize: patches are taken at unit length.
        local_clusters: of an image.
        global_clusters: of a group of `global_clusters // local_clusters` images.
        iterations: of k-means at most; it ends sooner where the centres together moved by less than `tolerance`.

    Returns:
        0-dim float32 (float64 for float64 inputs). How large a cluster is, the host has to know: it waits, and a graph
        of torch.compile breaks there.

    Raises:
        ValueError: for other shapes, dtypes or numbers.
    """
    op = "dense_structure"
    checks.matrices(op, "x must be [B, P, D]", x, dims=3)
    local_clusters = checks.integer(op, "local_clusters", local_clusters, 1)
    global_clusters = checks.integer(op, "global_clusters", global_clusters, 1)
    iterations = checks.integer(op, "iterations", iterations, 1)
    tolerance = checks.host_number(op, "tolerance", tolerance, low=0)
    with without_autocast(x):
        x = in_float32(x)
        if normalize:
            x = torch.nn.functional.normalize(x, dim=2)
        spread = torch.linalg.vector_norm(x - x.mean((0, 1)), dim=2).mean() + TINY
        _, labels = clusters(x.detach(), local_clusters, iterations, tolerance)
        within_images = _within(x, labels, local_clusters).nanmean().nan_to_num()
        images = max(global_clusters // local_clusters, 1)
        apart: list[Tensor] = []
        within: list[Tensor] = []
        for group in x.split(images):
            patches = group.flatten(0, 1)[None]
            centres, labels = clusters(patches.detach(), global_clusters, iterations, tolerance)
            if centres.shape[1] > 1:
                others = torch.cdist(patches, centres).scatter(2, labels[..., None], torch.inf)
                apart.append(others.amin(2).mean())
            within.append(_of_clusters(patches, labels, global_clusters).flatten())
        between = torch.stack(apart).mean() if apart else x.new_zeros(())
        within_groups = torch.cat(within).nanmean().nan_to_num()
        values = torch.linalg.svdvals(x.flatten(0, 1))
        shares = values / (values.sum() + TINY)
        rank = (-(shares * (shares + TINY).log()).sum()).exp() / min(x.shape[0] * x.shape[1], x.shape[2])
        return between / spread + rank - (within_groups + within_images) / (2 * spread)


def _within(x: Tensor, labels: Tensor, count: int) -> Tensor:
    """[B]: the mean over each image's clusters of at least two patches; NaN without any."""
    return _of_clusters(x, labels, count).nanmean(1)


def _of_clusters(x: Tensor, labels: Tensor, count: int) -> Tensor:
    """[B, clusters]: the sum of a cluster's singular values, less its mean, by its size; NaN of fewer than two.

    A cluster's patches are gathered to as many rows as the largest has, the others zeros: these add no singular value.
    """
    b, _, d = x.shape
    belongs = labels[..., None] == torch.arange(count, device=x.device)  # [B, P, clusters]
    sizes = belongs.sum(1)  # [B, clusters]
    most = int(sizes.max())
    places = belongs.mT.to(torch.uint8).argsort(dim=2, descending=True, stable=True)[..., :most]  # [B, clusters, most]
    rows = x.gather(1, places.flatten(1)[..., None].expand(-1, -1, d)).view(b, count, most, d)
    there = (torch.arange(most, device=x.device) < sizes[..., None])[..., None]
    rows = rows * there
    mean = rows.sum(2, keepdim=True) / sizes[..., None, None].clamp_min(1)
    several = sizes >= 2
    centred = ((rows - mean) * there)[several]
    totals = torch.linalg.svdvals(centred).sum(1)
    totals = totals / (sizes[several] - 1).clamp_min(d).to(totals.dtype).sqrt()
    return torch.full_like(sizes, torch.nan, dtype=x.dtype).masked_scatter(several, totals)


@torch.no_grad()
def clusters(x: Tensor, count: int, iterations: int, tolerance: float) -> tuple[Tensor, Tensor]:
    """k-means of each set of points, begun by k-means++: centres [B, K, D], K at most the points, and labels [B, P].

    An empty cluster goes to a random point. Each set stays where it is once its centres moved by less than the
    tolerance together.

    Args:
        x: [B, P, D], B sets of P points.
    """
    b, points, d = x.shape
    count = min(count, points)
    centres = x.gather(1, torch.randint(points, (b, 1, 1), device=x.device).expand(-1, -1, d))
    for _ in range(count - 1):
        nearest = torch.cdist(x, centres).amin(2).square()
        chances = torch.where(nearest.sum(1, keepdim=True) > 0, nearest, 1)  # all points are centres: any one
        chosen = torch.multinomial(chances, 1)
        centres = torch.cat([centres, x.gather(1, chosen[..., None].expand(-1, -1, d))], 1)
    going = torch.ones(b, 1, 1, dtype=torch.bool, device=x.device)
    for _ in range(iterations):
        labels = torch.cdist(x, centres).argmin(2)
        belongs = torch.nn.functional.one_hot(labels, count).to(x.dtype)  # [B, P, K]
        sizes = belongs.sum(1)[..., None]  # [B, K, 1]
        elsewhere = x.gather(1, torch.randint(points, (b, count, 1), device=x.device).expand(-1, -1, d))
        moved = torch.where(sizes > 0, belongs.mT @ x / sizes.clamp_min(1), elsewhere)
        moved = torch.where(going, moved, centres)
        shift = (moved - centres).square().sum((1, 2), keepdim=True).sqrt()
        centres = moved
        going = going & (shift >= tolerance)
    return centres, torch.cdist(x, centres).argmin(2)
