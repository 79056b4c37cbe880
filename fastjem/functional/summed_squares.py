"""Barlow Twins and VICReg of all ranks' rows, where D x D squares are fewer bytes than the rows.

Sums of columns and squares are added over ranks; each rank computes the gradient of its own rows alone, not yet times
the ranks. In plain torch: next to the products, which are the vendor's library's, everything else costs little.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from fastjem.collectives import sum_and_count_of_ranks, sum_over_ranks
from fastjem.functional.precision import in_float32, loss_dtype
from fastjem.kernels.arithmetic import exact_products, widest, widest_dtype
from fastjem.ops import LIBRARY, plain
from fastjem.ops.autograd import ops

Result = tuple[Tensor, list[Tensor], float, list[Tensor]]  # loss, unscaled gradients, their scale, statistics


def fewer_bytes(squares: int, n: int, z: Tensor) -> bool:
    """Whether an all-reduce of so many D x D squares moves fewer bytes than an all-gather of two views' n rows."""
    d = z.shape[1]
    bytes_of_squares = squares * d * d * loss_dtype(z).itemsize
    bytes_of_rows = 2 * n * d * z.element_size()
    return 2 * bytes_of_squares < bytes_of_rows  # a ring's all-reduce sends everything twice


LIBRARY.define("float32_product(Tensor a, Tensor b) -> Tensor")


def _float32_product(a: Tensor, b: Tensor) -> Tensor:
    """No TF32: the off-diagonal is what total and diagonal leave of each other."""
    with exact_products():
        return a @ b


# An operator, as a graph can't hold a setting.
LIBRARY.impl("float32_product", plain(_float32_product, "float32_product"), "CompositeExplicitAutograd")
torch.library.register_fake("fastjem::float32_product", torch.matmul, lib=LIBRARY)


def _squared_norm(x: Tensor) -> Tensor:
    """In the widest dtype, without a copy of x in it."""
    return torch.stack([widest(rows).square().sum() for rows in x.split(64)]).sum()


def _centred(views: Tensor, n: int, group: dist.ProcessGroup, number: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
    """[2, N_r, D] less the mean over all ranks' rows, in two parts: it may be far larger than what is left.

    And the sum over ranks of a number, for which there is room in the same collective.
    """
    sums, total = sum_and_count_of_ranks(views.sum(1, keepdim=True, dtype=widest_dtype(views.device)), number, group)
    mean = sums / n
    high = mean.to(views.dtype)
    return (views - high).sub_((mean - high).to(views.dtype)), total


def _column_squares(centred: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[2, D]"""
    return sum_over_ranks(centred.square().sum(1, dtype=widest_dtype(centred.device)), group)


def barlow_twins(
    z0: Tensor, z1: Tensor, lambda_param: float, statistics: int, n: int, group: dist.ProcessGroup
) -> Result:
    """As the operator, of the n rows of all ranks."""
    views, _ = _centred(_wide(z0, z1), n, group)
    std = (_column_squares(views, group) / n + 1e-5).sqrt()  # [2, D]
    views /= std[:, None]
    cross = sum_over_ranks(ops.float32_product(views[0].T, views[1]), group)
    products = torch.stack([ops.float32_product(views[1], cross.T), ops.float32_product(views[0], cross)])
    diagonal = widest(cross.diagonal()) / n
    total = _squared_norm(cross)
    loss = (diagonal - 1).square().sum() + lambda_param * (total / n**2 - diagonal.square().sum())

    weights = ((1 - lambda_param) * diagonal - 1).to(views.dtype)
    g = products.mul_(lambda_param / n).addcmul_(views.flip(0), weights)  # for the normalised views
    through_mean, through_std = sum_over_ranks(torch.stack([g.sum(1), (g * views).sum(1)]), group) / n  # [2, D] each
    g = (g - through_mean[:, None] - views * through_std[:, None]) / std[:, None].to(g.dtype)
    rank = ((diagonal.sum() * n).square() / total).expand(2, 1)
    health = [torch.cat([std, rank], 1).to(views.dtype)] if statistics else []
    return loss.to(views.dtype), list(g), 2 / n, health + ([cross] if statistics > 1 else [])


def vicreg(
    z0: Tensor,
    z1: Tensor,
    lambda_param: float,
    mu_param: float,
    nu_param: float,
    eps: float,
    statistics: int,
    n: int,
    group: dist.ProcessGroup,
) -> Result:
    """As the operator, of the n rows of all ranks."""
    d = z0.shape[1]
    wide = _wide(z0, z1)
    difference = wide[0] - wide[1]
    wide_dtype = widest_dtype(wide.device)
    own_distance = difference.square().sum(1).sum(dtype=wide_dtype)
    views, distance = _centred(wide, n, group, own_distance)
    std = (_column_squares(views, group) / (n - 1) + eps).sqrt()  # [2, D]
    squares = sum_over_ranks(ops.float32_product(views.mT, views), group)  # [2, D, D]
    diagonal = squares.diagonal(dim1=1, dim2=2).to(wide_dtype, copy=True)
    totals = torch.stack([_squared_norm(square) for square in squares])
    squares.diagonal(dim1=1, dim2=2).zero_()
    products = ops.float32_product(views, squares)
    squares.diagonal(dim1=1, dim2=2).copy_(diagonal)
    off_diagonal = (totals - diagonal.square().sum(1)).sum()
    loss = lambda_param * distance / (n * d) + mu_param / 2 * (1 - std).relu().mean(1).sum()
    loss = loss + nu_param / (n - 1) ** 2 / d * off_diagonal

    weights = ((std < 1) / std * (-mu_param / 2 * n / (n - 1) / d)).to(views.dtype)
    g = products.mul_(4 * nu_param * n / (n - 1) ** 2 / d).addcmul_(views, weights[:, None])
    pull = difference.mul_(2 * lambda_param / d)
    g[0] += pull
    g[1] -= pull
    rank = diagonal.sum(1).square() / totals
    health = [torch.cat([std, rank[:, None]], 1).to(views.dtype)] if statistics else []
    return loss.to(views.dtype), list(g), 1 / n, health + (list(squares) if statistics > 1 else [])


def _wide(*views: Tensor) -> Tensor:
    """[2, N_r, D], float32 at least."""
    return torch.stack([in_float32(x.detach()) for x in views])
