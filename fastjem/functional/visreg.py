"""VISReg: a batch's mean, deviations and shape are held to a standard normal distribution's."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from fastjem.collectives import Agreement, gather_rows, gradient_factor, sum_of_ranks
from fastjem.functional import checks
from fastjem.functional.compiled import over_ranks
from fastjem.functional.gaussian import no_views
from fastjem.functional.precision import in_float32, loss_dtype, without_autocast
from fastjem.ops.autograd import known, needs_gradient

ELEMENTS_AT_ONCE = 1 << 20  # of [V, N, slices]: a few such tensors stay in cache


@over_ranks()
def visreg(
    local_proj: Tensor,
    global_proj: Tensor,
    directions: Tensor,
    *,
    lambda_param: float | Tensor = 0.9,
    scale: float | Tensor = 1.0,
    shape: float | Tensor = 1.0,
    center: float | Tensor = 1.0,
    eps: float = 1e-4,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """`lambda regulariser + (1 - lambda) mean (all views - mean of the global views)^2`: VISReg.

    The regulariser is `scale mean (1 - std)^2 + shape mean (sorted projections - normal quantiles)^2 + center mean
    mean^2`, deviations and means over the batch; projections are of rows that are centred and divided by their
    (constant) deviations + eps, quantiles those of i / (N + 1) (Wu et al. 2026, arXiv 2606.02572, algorithm 1).

    Args:
        local_proj, global_proj: [V_local, N, D] and [V_global, N, D]; there may be no local views.
        directions: [D, S], see `random_directions`.
        lambda_param: weight of the regulariser in [0, 1]: a number, or a 0-dim tensor, which gets its gradient.
        scale, shape, center: weights within it, constants. Of a weight that is the number 0, nothing is computed.
        eps: added to deviations.
        group: the process group over whose global batch everything is taken (batches may be uneven, even empty).

    Returns:
        0-dim float32 (float64 for float64 inputs); the same on every rank of the group.

    Raises:
        ValueError: for other shapes, dtypes or options, and for a batch of one row.
    """
    op = "visreg"
    with Agreement(op, group) as ranks:
        contract = "local_proj and global_proj must be [V_local, N, D] and [V_global, N, D]"
        may_be_empty = None if group is None else 1
        given = [global_proj] if no_views(local_proj) else [local_proj, global_proj]
        checks.matrices("visreg", contract, *given, dims=3, same=False, may_be_empty=may_be_empty)
        if local_proj.shape[1:] != global_proj.shape[1:]:
            checks.fail(op, contract, f"{tuple(local_proj.shape)} and {tuple(global_proj.shape)}")
        if directions.dim() != 2 or directions.shape[0] != global_proj.shape[-1] or not directions.shape[1]:
            checks.fail(op, f"directions must be [{global_proj.shape[-1]}, S]", tuple(directions.shape))
        eps = checks.host_number(op, "eps", eps, low=0)
        weight = checks.number(op, "lambda_param", lambda_param, global_proj)
        of_terms = [
            checks.number(op, name, value, global_proj)
            for name, value in (("scale", scale), ("shape", shape), ("center", center))
        ]
        with without_autocast(global_proj):
            views = torch.cat(checks.common(global_proj, local_proj))  # [V, N, D]
        ranks.rows_of(views, dim=1)
        regularised = isinstance(weight, Tensor) or weight != 0
        ranks.alike(directions.shape[1], "regularised" if regularised else "not regularised")
    rows = views.shape[1] if group is None else sum(ranks.sizes)
    if rows < 2:
        checks.fail(op, "a batch must have at least two rows, as their deviation is needed", f"N = {rows}")
    z = in_float32(views)
    regulariser = 0.0
    if regularised:
        wanted = needs_gradient(views)
        with torch.no_grad(), without_autocast(views):
            everything, first = (z, 0) if group is None else gather_rows(z, group, ranks.sizes, dim=1)
            weights = [x.detach() if isinstance(x, Tensor) else x for x in of_terms]
            loss, gradient = _regulariser(everything.detach(), directions.to(z.dtype), weights, eps, wanted)
            gradient = gradient[:, first : first + views.shape[1]].to(views.dtype)
        regulariser = known(op, loss, (views,), [gradient], [gradient_factor(group)])
    squares = (z - z[: global_proj.shape[0]].mean(0)).square().sum()
    invariance = sum_of_ranks(squares, group) / (z.shape[0] * rows * z.shape[2])
    return (weight * regulariser + (1 - weight) * invariance).to(loss_dtype(views))


def _regulariser(
    z: Tensor,  # [V, N, D]
    directions: Tensor,  # [D, S]
    weights: Sequence[float | Tensor],  # of scale, shape and center
    eps: float,
    wanted: bool,
) -> tuple[Tensor, Tensor]:
    """The regulariser, 0-dim, and its gradient for z; only if wanted, else an empty one [V, 0, D]."""
    scale, shape, center = weights
    views, rows, width = z.shape
    mean = z.mean(1, keepdim=True)  # [V, 1, D]
    centred = z - mean
    std = centred.square().mean(1, keepdim=True).sqrt()
    normal = centred / (std + eps)
    total, of_normal = normal.new_zeros(()), normal * 0
    if isinstance(shape, Tensor) or shape:
        total, of_normal = _sliced_wasserstein(normal, directions, wanted)
    loss = scale * (1 - std).square().mean() + shape * total + center * mean.square().mean()
    if not wanted:
        return loss, z[:, :0]
    # A deviation of 0 has no derivative: it counts as 0, as nothing tells which way rows should part.
    of_std = torch.where(std > 0, (std - 1) / std, 0) * (2 * scale / (views * width * rows))
    of_mean = mean * (2 * center / (views * width * rows))
    of_normal = of_normal * shape
    of_shape = (of_normal - of_normal.mean(1, keepdim=True)) / (std + eps)
    return loss, of_shape + of_std * centred + of_mean


def _sliced_wasserstein(x: Tensor, directions: Tensor, wanted: bool) -> tuple[Tensor, Tensor]:
    """`mean (sort(x @ directions) - quantiles)^2`, 0-dim, and its gradient for x [V, N, D] if wanted.

    A few directions at a time, so that nothing of size [V, N, S] exists.
    """
    views, rows, _ = x.shape
    count = directions.shape[1]
    places = torch.arange(1, rows + 1, device=x.device, dtype=x.dtype) / (rows + 1)
    quantiles = torch.special.ndtri(places)[None, :, None]  # [1, N, 1]
    squares = []
    gradient = torch.zeros_like(x) if wanted else x[:, :0]
    for some in directions.split(max(ELEMENTS_AT_ONCE // (views * rows), 1), dim=1):
        projections = x @ some  # [V, N, s]
        order = projections.argsort(1)
        # What each projection should be: the quantile of its place among the others.
        wanted_values = torch.empty_like(projections).scatter_(1, order, quantiles.expand_as(projections))
        apart = projections.sub_(wanted_values)
        squares.append(apart.square().sum())
        if wanted:
            gradient += apart @ some.T
    divisor = views * rows * count
    return torch.stack(squares).sum() / divisor, gradient * (2 / divisor)
