"""SIGReg and LeJEPA: embeddings whose every projection is a standard normal variable.

The characteristic function at frequency k dt is the k-th power of that at dt: one cosine and one sine an element, and a
rotation for each further frequency. The slices go through in groups, so that nothing of size [V, N, S, knots] exists.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastjem.functional import _checks as check
from fastjem.functional._global_batch import of_global_batch
from fastjem.functional.spectral import in_float32, without_autocast

GROUP = 1 << 19  # elements [L, N, slices] at a time: a few of them stay in cache


def _rotations(theta: Tensor, knots: int):
    """cos(k theta), sin(k theta) for k = 1 .. knots - 1; the two tensors are overwritten by the next."""
    one_cos, one_sin = theta.cos(), theta.sin()
    cos, sin, rotated = one_cos.clone(), one_sin.clone(), torch.empty_like(theta)
    for k in range(1, knots):
        yield k, cos, sin
        torch.mul(cos, one_sin, out=rotated)
        cos.mul_(one_cos).addcmul_(sin, one_sin, value=-1)
        sin.mul_(one_cos).add_(rotated)


class _Sigreg(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z: Tensor, directions: Tensor, knots: int, t_max: float) -> Tensor:  # [L, N, D], [D, S]
        (length, n, _), slices = z.shape, directions.shape[1]
        dt = t_max / (knots - 1)
        step = max(1, GROUP // (length * n))
        statistic = z.new_zeros(())
        wanted = ctx.needs_input_grad[0]
        gradient = torch.zeros_like(z) if wanted else None
        for start in range(0, slices, step):
            some = directions[:, start : start + step]
            theta = (z @ some).mul_(dt)
            errors = []
            for k, cos, sin in _rotations(theta, knots):
                t = k * dt
                phi = (
                    torch.exp(theta.new_tensor(-0.5 * t * t))
                    if theta.is_cpu
                    else theta.new_full((), -0.5 * t * t).exp()
                )
                weight = (dt if k == knots - 1 else 2 * dt) * phi
                cos_error, sin_error = cos.mean(1) - phi, sin.mean(1)  # [L, slices]
                statistic += weight * (cos_error.square().sum() + sin_error.square().sum())
                errors.append((2 * t * weight * cos_error, 2 * t * weight * sin_error))
            if wanted:
                inner = torch.zeros_like(theta)
                for k, cos, sin in _rotations(theta, knots):
                    cos_error, sin_error = errors[k - 1]
                    inner.addcmul_(cos, sin_error[:, None]).addcmul_(sin, cos_error[:, None], value=-1)
                gradient.add_(inner @ some.T)
        if wanted:
            ctx.save_for_backward(gradient)
        ctx.scale = 1 / (length * slices)
        return statistic * (n * ctx.scale)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor):
        (gradient,) = ctx.saved_tensors
        return gradient * (upstream * ctx.scale), None, None, None


def random_directions(width: int, count: int, like: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """[D, S] random unit columns, on every rank of the group the same."""
    directions = torch.randn(width, count, device=like.device, dtype=in_float32(like)[0].dtype)
    if group is not None:
        dist.broadcast(directions, group_src=0, group=group)
    return directions / directions.norm(dim=0)


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
        group: the process group over whose global batch the means are taken (batches may be uneven).

    Returns:
        0-dim float32 (float64 for float64 inputs); the same on every rank of the group.

    Raises:
        ValueError: for other shapes, dtypes or options.
    """
    check.matrices("sigreg", "z must be [N, D] or [V, N, D]", z, dims=3 if getattr(z, "ndim", 2) == 3 else 2)
    if directions.dim() != 2 or directions.shape[0] != z.shape[-1]:
        check.fail("sigreg", f"directions must be [{z.shape[-1]}, S]", tuple(directions.shape))
    if knots < 2:
        check.fail("sigreg", "knots must be at least 2", knots)
    check.positive("sigreg", t_max=t_max)
    z = z if z.dim() == 3 else z[None]

    def statistic(rows: Tensor) -> Tensor:  # [N, V, D]
        (wide,) = in_float32(rows)
        with without_autocast(wide):
            return _Sigreg.apply(wide.movedim(1, 0), directions.detach().to(wide.dtype), knots, float(t_max))

    return of_global_batch(statistic, group, z.movedim(1, 0))


def lejepa(
    local_proj: Tensor,
    global_proj: Tensor,
    directions: Tensor,
    *,
    lambda_param: float = 0.05,
    knots: int = 17,
    t_max: float = 3.0,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """`lambda sigreg(all views) + (1 - lambda) mean (all views - mean of the global views)^2` (arXiv 2511.08544).

    Args:
        local_proj, global_proj: [V_local, N, D] and [V_global, N, D].
        directions: [D, S], see `random_directions`.
        lambda_param: weight of SIGReg in [0, 1].
        knots, t_max, group: see `sigreg`.

    Returns:
        0-dim float32 (float64 for float64 inputs); the same on every rank of the group.

    Raises:
        ValueError: for other shapes, dtypes or options.
    """
    contract = "local_proj and global_proj must be [V_local, N, D] and [V_global, N, D]"
    check.matrices("lejepa", contract, local_proj, global_proj, dims=3, same=False)
    if local_proj.shape[1:] != global_proj.shape[1:]:
        check.fail("lejepa", contract, f"{tuple(local_proj.shape)} and {tuple(global_proj.shape)}")

    def invariance(everything: Tensor) -> Tensor:  # [N, V, D]
        (z,) = in_float32(everything)
        return (z - z[:, : len(global_proj)].mean(1, keepdim=True)).square().mean()

    views = torch.cat([*check.common(global_proj, local_proj)])
    regulariser = sigreg(views, directions, knots=knots, t_max=t_max, group=group)
    return lambda_param * regulariser + (1 - lambda_param) * of_global_batch(invariance, group, views.movedim(1, 0))
