"""The specification of the sums that SIGReg consists of; conventions are in kernels/__init__.py."""

from collections.abc import Iterator

import torch
from torch import Tensor


def _rotations(theta: Tensor, frequencies: int) -> Iterator[tuple[Tensor, Tensor]]:
    """cos(k theta) and sin(k theta) for k = 1 .. frequencies, by rotation; the next pair overwrites the one before."""
    one_cos, one_sin = theta.cos(), theta.sin()
    cos, sin, rotated = one_cos.clone(), one_sin.clone(), torch.empty_like(theta)
    for _ in range(frequencies):
        yield cos, sin
        torch.mul(cos, one_sin, out=rotated)
        cos.mul_(one_cos).addcmul_(sin, one_sin, value=-1)
        sin.mul_(one_cos).add_(rotated)


def characteristic(
    theta: Tensor,  # [V, N, S] float32 or float64
    frequencies: int,
) -> Tensor:
    """`[(k * theta).cos().sum(1), (k * theta).sin().sum(1)]` for k = 1 .. frequencies: [2, frequencies, V, S]"""
    sums = [torch.stack([cos.sum(1), sin.sum(1)]) for cos, sin in _rotations(theta, frequencies)]
    return torch.stack(sums, 1)


def characteristic_backward(
    theta: Tensor,  # [V, N, S]
    weights: Tensor,  # [2, frequencies, V, S]
) -> Tensor:
    """`(weights[1, k] * (k * theta).cos() - weights[0, k] * (k * theta).sin())`, summed over k: [V, N, S]"""
    out = torch.zeros_like(theta)
    for (cos, sin), of_cos, of_sin in zip(_rotations(theta, weights.shape[1]), *weights, strict=True):
        out.addcmul_(cos, of_sin[:, None]).addcmul_(sin, of_cos[:, None], value=-1)
    return out
