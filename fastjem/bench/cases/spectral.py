"""Losses of products and a factorisation of a small matrix, which are torch's here too; and SIGReg."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

import fastjem.functional as F
from fastjem.bench.case import SMALL, Case, at_least_float32

SLICES, KNOTS, T_MAX = 1024, 17, 3.0


def tico(z0: Tensor, z1: Tensor) -> Tensor:
    """The first step, from no covariance."""
    a = normalize(at_least_float32(z0), dim=1)
    b = normalize(at_least_float32(z1), dim=1)
    covariance = 0.1 * (a.T @ a).detach() / len(a)
    return 1 - (a * b).sum(1).mean() + 8 * (a @ covariance * a).sum(1).mean()


def total_coding_rate(z: Tensor) -> Tensor:
    """The authors' code, D x D."""
    n, d = z.shape
    return torch.logdet(torch.eye(d, dtype=z.dtype, device=z.device) + d / (n * 0.2) * z.T @ z) / 2


def simdino(*views: Tensor) -> Tensor:
    """The authors' code: the first two views are the teacher's; similarities of all pairs, D x D factorised."""
    teacher = normalize(torch.stack(views[:2]), dim=2)
    student = normalize(torch.stack(views[2:]), dim=2)
    n, d = student.shape[1:]
    alike = (teacher[:, None] * student[None]).sum(-1).mean(-1)
    alike = alike.masked_fill(torch.eye(*alike.shape, dtype=torch.bool, device=alike.device), 0).sum()
    rate: Any = 0.0
    for view in student[:2]:
        matrix = torch.eye(d, dtype=view.dtype, device=view.device) + d / (n * 0.05) * (view.T @ view)
        rate = rate + torch.linalg.cholesky_ex(matrix)[0].diagonal().log().sum() / 2
    return -alike / (2 * len(student) - 2) - rate * (d + n) / (d * n)


def simdino_case(views: int, n: int, d: int) -> Case:
    """Bytes: all views read, the students' gradients written; FLOPs: two Gram matrices, factors, inverses, products."""
    smaller = min(n, d)

    def inputs(draw) -> tuple[Tensor, ...]:
        teacher = [draw.normal(n, d) for _ in range(2)]
        return *teacher, *(draw.normal(n, d, gradient=True) for _ in range(views))

    return Case(
        "simdino", f"2 + {views - 2} views, {n} x {d}", inputs, simdino, lambda *x: F.simdino(list(x[2:]), list(x[:2])),
        bytes=(2 + 2 * views) * n * d * 4, flops=2 * (4 * n * d * smaller + 2 * smaller**3),
        full_only=("cpu", "cuda"),
    )  # fmt: skip


def mmcr(online: Tensor, momentum: Tensor) -> Tensor:
    z = torch.cat([online, momentum], 1)
    return 5e-3 * torch.linalg.svdvals(z).sum() / len(z) - torch.linalg.svdvals(z.mean(1)).sum()


def frossl(z0: Tensor, z1: Tensor) -> Tensor:
    loss: Any = 0.0
    z = torch.stack([normalize(at_least_float32(z), dim=0) for z in (z0, z1)])
    for x in z:
        gram = x.T @ x if x.shape[1] <= x.shape[0] else x @ x.T
        loss = loss + 2 * (gram / gram.trace().detach()).norm().log()
        loss = loss + 2 * x.shape[1] * torch.nn.functional.mse_loss(x, z.mean(0))
    return loss


def w_mse(z0: Tensor, z1: Tensor) -> Tensor:
    whitened = []
    for z in map(at_least_float32, (z0, z1)):
        z = z - z.mean(0)
        factor = torch.linalg.cholesky(z.T @ z / (len(z) - 1))
        whitened.append(normalize(torch.linalg.solve_triangular(factor, z.T, upper=False).T, dim=1))
    return 2 - 2 * (whitened[0] * whitened[1]).sum(1).mean()


def directions(like: Tensor) -> Tensor:
    torch.manual_seed(0)  # what lightly's draws
    x = torch.randn(like.shape[-1], SLICES, device=like.device)
    return (x / x.norm(dim=0)).to(like.dtype)


def sigreg(z: Tensor) -> Tensor:
    """As published: [V, N, S, knots] three times."""
    t = torch.linspace(0, T_MAX, KNOTS, dtype=z.dtype, device=z.device)
    phi = (-t.square() / 2).exp()  # the normal distribution's characteristic function
    weight = torch.full_like(t, 2 * T_MAX / (KNOTS - 1))  # of the trapezoidal rule
    weight[[0, -1]] /= 2
    angles = (z @ directions(z))[..., None] * t
    error = (angles.cos().mean(1) - phi).square() + angles.sin().mean(1).square()
    return z.shape[1] * (error @ (weight * phi)).mean()


def _loss(name: str, adapt: Callable, **options) -> Callable[[], Callable]:
    """lightly's loss of that name as a peer. adapt: what makes a new loss -> a function of the case's inputs; those
    that keep state from call to call are made at each call."""

    def load() -> Callable:
        import lightly.loss

        return adapt(lambda: getattr(lightly.loss, name)(**options))

    return load


def _seeded(make: Callable) -> Callable:
    """The loss with the same random directions at each call, which `directions` gives to the others."""
    loss = make()

    def run(z: Tensor) -> Tensor:
        torch.manual_seed(0)
        return loss(z)

    return run


def pair(
    op: str, n: int, d: int, eager: Callable, ours: Callable, lightly: Callable, flops: int, dtype=torch.float32
) -> Case:
    """Of two views. lightly's losses take no half precision."""
    return Case(
        op, f"{n} x {d}", lambda draw: draw.pair(n, d), eager, ours, dtype=dtype,
        peers={"lightly": lightly} if dtype == torch.float32 else {},
        bytes=4 * n * d * dtype.itemsize, flops=flops, **SMALL,
    )  # fmt: skip


def tico_case(n: int, d: int, dtype: torch.dtype = torch.float32) -> Case:
    """FLOPs: half of a^T a, and a C, which is the gradient's product as well."""
    lightly = _loss("TiCoLoss", lambda make: lambda a, b: make()(a, b))
    return pair("tico", n, d, tico, lambda a, b: F.tico(a, b)[0], lightly, 3 * n * d**2, dtype)


def frossl_case(n: int, d: int, dtype: torch.dtype = torch.float32) -> Case:
    """FLOPs, for each view: half of the smaller Gram matrix, and its product with the view."""
    lightly = _loss("FroSSLLoss", lambda make: lambda a, b: make()([a, b]))
    return pair("frossl", n, d, frossl, lambda a, b: F.frossl([a, b]), lightly, 6 * min(n, d) * n * d, dtype)


def w_mse_case(n: int, d: int, dtype: torch.dtype = torch.float32) -> Case:
    """FLOPs, for each view: half of the covariance, two triangular solves, and two products of the gradient."""
    lightly = _loss("WMSELoss", lambda make: lambda a, b: make()(torch.cat([a, b])))
    return pair("w_mse", n, d, w_mse, F.w_mse, lightly, 14 * n * d**2, dtype)


def coding_rate_case(n: int, d: int, **options) -> Case:
    """FLOPs: half of the smaller Gram matrix, and its inverse's product with the rows."""
    return Case(
        "total_coding_rate", f"{n} x {d}", lambda draw: (normalize(draw.normal(n, d), dim=1).requires_grad_(),),
        total_coding_rate, F.total_coding_rate, bytes=2 * n * d * 4, flops=3 * min(n, d) * n * d, **options,
    )  # fmt: skip


N, D, BATCH, VIEWS, WIDTH = 256, 2048, 512, 8, 64
CASES = [
    tico_case(2048, 256),
    tico_case(256, 256),
    tico_case(256, 1024, torch.bfloat16),
    frossl_case(N, D),
    frossl_case(256, 128),
    frossl_case(128, 1024, torch.bfloat16),
    w_mse_case(N, 128),
    w_mse_case(512, 64, torch.bfloat16),
    Case(
        "mmcr", "256 x 2 + 2 views x 128", lambda draw: tuple(draw.normal(N, 2, 128, gradient=True) for _ in range(2)),
        mmcr, F.mmcr, peers={"lightly": _loss("MMCRLoss", lambda make: make())},
        bytes=4 * N * 2 * 128 * 4, devices=("cpu",), full_only=("cpu",),
    ),
    coding_rate_case(N, D, devices=("cpu",), full_only=("cpu",)),
    coding_rate_case(256, 128, **SMALL),
    Case(
        "characteristic", f"SIGReg {VIEWS} x {BATCH} x {WIDTH}, {SLICES} slices",
        lambda draw: (draw.normal(VIEWS, BATCH, WIDTH, gradient=True),), sigreg,
        lambda z: F.sigreg(z, directions(z), knots=KNOTS, t_max=T_MAX),
        peers={"lightly": _loss("SIGReg", lambda make: _seeded(make))}, uses=("characteristic_backward",),
        bytes=2 * VIEWS * BATCH * WIDTH * 4, flops=4 * VIEWS * BATCH * WIDTH * SLICES, full_only=("cpu",),
    ),
    simdino_case(10, 64, 256),
    simdino_case(10, 512, 256),
]  # fmt: skip
