"""Barlow Twins and VICReg."""

import torch
from torch import Tensor

import fastjem.functional as F
from fastjem.bench.case import SMALL, Case, at_least_float32


def off_diagonal(x: Tensor) -> Tensor:
    n = len(x)
    return x.flatten()[:-1].view(n - 1, n + 1)[:, 1:].flatten()


def barlow_twins(z0: Tensor, z1: Tensor) -> Tensor:
    """The authors' code."""
    a, b = (torch.nn.functional.batch_norm(at_least_float32(z), None, None, training=True) for z in (z0, z1))
    c = a.T @ b / len(z0)
    return (c.diagonal() - 1).square().sum() + 5e-3 * off_diagonal(c).square().sum()


def vicreg(z0: Tensor, z1: Tensor) -> Tensor:
    """The authors' code."""
    n, d = z0.shape
    regularisers = 0.0
    for z in map(at_least_float32, (z0, z1)):
        centred = z - z.mean(0)
        std = (centred.var(0) + 1e-4).sqrt()
        covariance = centred.T @ centred / (n - 1)
        regularisers = regularisers + 25 * (1 - std).relu().mean() / 2 + off_diagonal(covariance).square().sum() / d
    return 25 * torch.nn.functional.mse_loss(z0, z1) + regularisers


def lightly_barlow_twins():
    from lightly.loss import BarlowTwinsLoss

    return BarlowTwinsLoss()


def lightly_vicreg():
    from lightly.loss import VICRegLoss

    return VICRegLoss()


def case(op: str, n: int, d: int, dtype: torch.dtype = torch.float32, **options) -> Case:
    """FLOPs of the cheaper form, D x D or N x N, symmetric products counted by half. Barlow Twins: a^T b (or a a^T and
    b b^T), then one product per gradient. VICReg: each view's own, then one per gradient. Both come to
    6 N D min(N, D). Bytes: two views read, two gradients written."""
    formulas = {
        "barlow_twins": (barlow_twins, F.barlow_twins, lightly_barlow_twins),
        "vicreg": (vicreg, F.vicreg, lightly_vicreg),
    }
    eager, ours, lightly = formulas[op]
    return Case(
        op, f"{n} x {d}", lambda draw: draw.pair(n, d), eager, ours, dtype=dtype, peers={"lightly": lightly},
        bytes=4 * n * d * dtype.itemsize, flops=6 * n * d * min(n, d), **options,
    )  # fmt: skip


CASES = [
    case("barlow_twins", 2048, 512, full_only=("cuda",)),
    case("barlow_twins", 256, 8192, full_only=("cpu",)),
    case("barlow_twins", 2048, 8192, devices=("cuda",)),
    case("vicreg", 2048, 512, full_only=("cuda",)),
    case("vicreg", 256, 8192, full_only=("cpu",)),
    case("vicreg", 2048, 8192, devices=("cuda",)),
    # small runs
    *(case(op, 256, 2048, **SMALL) for op in ("barlow_twins", "vicreg")),
    *(case(op, 256, 2048, torch.bfloat16, **SMALL) for op in ("barlow_twins", "vicreg")),
    *(case(op, 128, 128, **SMALL) for op in ("barlow_twins", "vicreg")),
    *(case(op, 64, 512, **SMALL) for op in ("barlow_twins", "vicreg")),
]
