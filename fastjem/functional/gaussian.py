"""SIGReg and LeJEPA: embeddings whose every projection is a standard normal variable.

A slice is one direction and all projections on it. Slices go through a few at a time, so that nothing of size
[V, N, S], let alone [V, N, S, knots], exists.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from fastjem.collectives import Agreement, from_first_rank, gradient_factor, sum_of_ranks, sum_over_ranks
from fastjem.functional import checks
from fastjem.functional.compiled import over_ranks
from fastjem.functional.precision import in_float32, loss_dtype, without_autocast
from fastjem.ops.autograd import known, needs_gradient, ops

ELEMENTS_AT_ONCE = 1 << 19  # of [V, N, slices]: a few such tensors stay in cache


def _statistic(
    z: Tensor,  # [V, N, D]
    directions: Tensor,  # [D, S]
    knots: int,
    t_max: float,
    sizes: list[int],  # rows of each rank
    group: dist.ProcessGroup | None,
    wanted: bool,
) -> tuple[Tensor, Tensor]:
    """The sum over views and slices, and its gradient for this rank's rows [V, N, D].

    A rank without rows has the others' sums and none of its own.
    """
    n = sum(sizes)
    rows = z.shape[1]
    dt = t_max / (knots - 1)
    t = torch.arange(1, knots, dtype=z.dtype, device=z.device)[:, None, None] * dt  # [K, 1, 1]; at 0 there is no error
    phi = (-0.5 * t.square()).exp()
    weight = 2 * dt * phi
    weight[-1] /= 2
    at_once = max(1, ELEMENTS_AT_ONCE // (z.shape[0] * max(sizes)))  # on every rank the same: each makes a collective
    statistic = z.new_zeros(())
    gradient = torch.zeros_like(z) if wanted else z.new_empty(0)
    for some in directions.split(at_once, 1):
        theta = (z @ some).mul_(dt)
        own = ops.characteristic(theta, knots - 1) if rows else z.new_zeros(2, knots - 1, z.shape[0], some.shape[1])
        errors = sum_over_ranks(own, group) / n  # [2, K, V, slices]
        errors[0] -= phi
        statistic += (weight * errors.square()).sum()
        if wanted and rows:
            gradient += ops.characteristic_backward(theta, errors * (2 * t * weight)) @ some.T
    return statistic * n, gradient


@over_ranks(lambda width, count, like, **_: [(width, count)], differentiable=False)
def random_directions(width: int, count: int, like: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """[D, S] random unit columns, on every rank of the group the same."""
    with Agreement("random_directions", group) as ranks:
        directions = torch.randn(width, count, device=like.device, dtype=loss_dtype(like))
        ranks.alike(width, count, directions.dtype)
    directions = from_first_rank(directions, group)
    return directions / directions.norm(dim=0)


@over_ranks()
def sigreg(
    z: Tensor,
    directions: Tensor,
    *,
    knots: int = 17,
    t_max: float = 3.0,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """`N int w(t) (mean_n cos(t x) - e^(-t^2/2))^2 + (mean_n sin(t x))^2 dt`, x = z @ directions: LeJEPA's SIGReg.

    The Epps-Pulley statistic of each slice, w = e^(-t^2/2), by the trapezoidal rule on [-t_max, t_max]; the mean
    over slices and views (Balestriero and LeCun 2025, arXiv 2511.08544).

    Args:
        z: [N, D] or [V, N, D].
        directions: [D, S], see `random_directions`.
        knots: how many frequencies in [0, t_max].
        t_max: the largest frequency.
        group: the process group over whose global batch the means are taken (batches may be uneven, even empty).

    Returns:
        0-dim float32 (float64 for float64 inputs); the same on every rank of the group.

    Raises:
        ValueError: for other shapes, dtypes or options.
    """
    with Agreement("sigreg", group) as ranks:
        dims = 3 if getattr(z, "ndim", 2) == 3 else 2
        may_be_empty = None if group is None else dims - 2
        checks.matrices("sigreg", "z must be [N, D] or [V, N, D]", z, dims=dims, may_be_empty=may_be_empty)
        knots, t_max = _options("sigreg", z, directions, knots, t_max)
        z = z if z.dim() == 3 else z[None]
        ranks.rows_of(z, dim=1)
        ranks.alike(directions.shape[1], knots)
    return _sigreg("sigreg", z, directions, knots, t_max, ranks.sizes, group)


def _options(op: str, z: Tensor, directions: Tensor, knots: int, t_max: float) -> tuple[int, float]:
    """Knots and t_max, checked like the rest."""
    if directions.dim() != 2 or directions.shape[0] != z.shape[-1]:
        checks.fail(op, f"directions must be [{z.shape[-1]}, S]", tuple(directions.shape))
    return checks.integer(op, "knots", knots, 2), checks.host_number(op, "t_max", t_max, low=0)


def _sigreg(
    op: str,
    z: Tensor,  # [V, N, D]
    directions: Tensor,  # [D, S]
    knots: int,
    t_max: float,
    sizes: list[int],
    group: dist.ProcessGroup | None,
) -> Tensor:
    wanted = needs_gradient(z)
    with torch.no_grad(), without_autocast(z):
        wide = in_float32(z)
        total, gradient = _statistic(wide, directions.to(wide.dtype), knots, t_max, sizes, group, wanted)
        gradient = gradient.to(z.dtype)
    count = z.shape[0] * directions.shape[1]
    return known(op, total / count, (z,), [gradient], [gradient_factor(group) / count])


def no_views(local_proj: Tensor) -> bool:
    """Whether there are no local views: [0, N, D], as small images have none."""
    return isinstance(local_proj, Tensor) and local_proj.dim() == 3 and local_proj.shape[0] == 0


@over_ranks()
def lejepa(
    local_proj: Tensor,
    global_proj: Tensor,
    directions: Tensor,
    *,
    lambda_param: float | Tensor = 0.05,
    knots: int = 17,
    t_max: float = 3.0,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """`lambda sigreg(all views) + (1 - lambda) mean (all views - mean of the global views)^2` (arXiv 2511.08544).

    Args:
        local_proj, global_proj: [V_local, N, D] and [V_global, N, D]; there may be no local views.
        directions: [D, S], see `random_directions`.
        lambda_param: weight of SIGReg in [0, 1]: a number, or a 0-dim tensor, which gets its gradient.
        knots, t_max, group: see `sigreg`.

    Returns:
        0-dim float32 (float64 for float64 inputs); the same on every rank of the group.

    Raises:
        ValueError: for other shapes, dtypes or options.
    """
    with Agreement("lejepa", group) as ranks:
        contract = "local_proj and global_proj must be [V_local, N, D] and [V_global, N, D]"
        may_be_empty = None if group is None else 1
        given = [global_proj] if no_views(local_proj) else [local_proj, global_proj]
        checks.matrices("lejepa", contract, *given, dims=3, same=False, may_be_empty=may_be_empty)
        if local_proj.shape[1:] != global_proj.shape[1:]:
            checks.fail("lejepa", contract, f"{tuple(local_proj.shape)} and {tuple(global_proj.shape)}")
        knots, t_max = _options("lejepa", global_proj, directions, knots, t_max)
        weight = checks.number("lejepa", "lambda_param", lambda_param, global_proj)
        with without_autocast(global_proj):
            views = torch.cat(checks.common(global_proj, local_proj))  # [V, N, D]
        ranks.rows_of(views, dim=1)
        regularised = isinstance(weight, Tensor) or weight != 0
        ranks.alike(directions.shape[1], knots, "regularised" if regularised else "not regularised")
    regulariser = 0.0
    if regularised:
        regulariser = _sigreg("lejepa", views, directions, knots, t_max, ranks.sizes, group)
    z = in_float32(views)
    squares = (z - z[: global_proj.shape[0]].mean(0)).square().sum()
    invariance = sum_of_ranks(squares, group) / (z.shape[0] * sum(ranks.sizes) * z.shape[2])
    return (weight * regulariser + (1 - weight) * invariance).to(loss_dtype(views))
