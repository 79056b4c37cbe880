"""The specification: every operator in a few lines of plain torch.

Each function is the fallback where no faster implementation exists, the fake kernel that torch.compile traces, the
oracle of the tests (run in float64) and the baseline of the benchmarks. It is written to be read, not to be fast.

Conventions
-----------
* Arithmetic is in float32, or in float64 where the inputs are float64; losses come out 0-dim in that dtype, gradients
  in the dtype of their input.
* A loss whose gradient can be had in the same pass returns `(loss, gradients, scale)`: one gradient per differentiable
  input, empty where `wanted` says no. Gradients are *unscaled*: the gradient of the loss is `scale * gradient`. The
  scale (1/N, 1/tau) is applied in backward in float32, because float16 gradients that carry it vanish.
* A loss that needs a second pass is two operators, `name` and `name_backward`.
* Shapes are checked by `fastjem.functional`, before an operator is called.

Letters: V views, S student views, T teacher views, N rows, B batch, D width, K prototypes or classes, M = V N.
"""

import math

import torch
from torch import Tensor


def widen(x: Tensor) -> Tensor:
    """The dtype to compute in: float64 stays, everything else becomes float32."""
    return x if x.dtype == torch.float64 else x.float()


def _empty(x: Tensor) -> Tensor:
    return x.new_empty(0)


def _scale(x: Tensor, value: float) -> Tensor:
    return torch.full((), value, dtype=widen(_empty(x)).dtype, device=x.device)


def _normalize(x: Tensor, eps: float = 1e-12) -> tuple[Tensor, Tensor]:
    """Rows of unit length and what they were divided by, max(||x||, eps)."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(eps)
    return x / norm, norm


def _normalize_backward(gradient: Tensor, unit: Tensor, norm: Tensor, eps: float = 1e-12) -> Tensor:
    """Through x -> x / max(||x||, eps): drop the radial part, except where eps is the divisor."""
    radial = (gradient * unit).sum(-1, keepdim=True) * unit
    return (gradient - radial * (norm > eps)) / norm


# Helpers of every loss and of the training step ------------------------------------------------------


def rescale_(gradient: Tensor, factor: Tensor) -> None:
    """`gradient *= factor` in float32, rounded once (torch rounds a 0-dim CUDA factor to float16 first)."""
    gradient.copy_(widen(gradient) * factor)


def ema_update_(teacher: list[Tensor], student: list[Tensor], momentum: Tensor) -> None:
    """`teacher = momentum * teacher + (1 - momentum) * student`, in place, for each pair of tensors."""
    for t, s in zip(teacher, student, strict=True):
        t.lerp_(s.to(t.dtype), (1 - momentum.double()).to(t.dtype))


def cross_entropy(
    logits: Tensor,  # [N, K]
    labels: Tensor,  # [N] int64
    ignore_index: int,
    wanted: list[bool],
) -> tuple[Tensor, list[Tensor], Tensor]:
    """`torch.nn.functional.cross_entropy(logits, labels, ignore_index=ignore_index)`; NaN for labels out of range."""
    counted = (labels != ignore_index)[:, None]  # [N, 1]
    valid = ((labels >= 0) & (labels < logits.shape[1]))[:, None]
    index = labels[:, None].where(valid, 0)
    log_p = widen(logits).log_softmax(1)
    rows = -log_p.gather(1, index).where(valid, math.nan).where(counted, 0)
    scale = 1 / counted.sum().to(log_p.dtype)
    loss = rows.sum() * scale
    if not wanted[0]:
        return loss, [_empty(logits)], scale
    gradient = log_p.exp().scatter_add(1, index, -torch.ones_like(rows))
    return loss, [gradient.where(valid, math.nan).where(counted, 0).to(logits.dtype)], scale


def negative_cosine(
    p: Tensor,  # [N, D]
    z: Tensor,  # [N, D]
    eps: float,
    wanted: list[bool],
) -> tuple[Tensor, list[Tensor], Tensor]:
    """`-torch.nn.functional.cosine_similarity(p, z, dim=1, eps=eps).mean()`"""
    (p_unit, p_norm), (z_unit, z_norm) = _normalize(widen(p), eps), _normalize(widen(z), eps)
    loss = -(p_unit * z_unit).sum(1).mean()
    p_gradient = _normalize_backward(-z_unit, p_unit, p_norm, eps).to(p.dtype) if wanted[0] else _empty(p)
    z_gradient = _normalize_backward(-p_unit, z_unit, z_norm, eps).to(z.dtype) if wanted[1] else _empty(z)
    return loss, [p_gradient, z_gradient], _scale(p, 1 / len(p))


def regression(
    prediction: Tensor,  # [N, D]
    target: Tensor,  # [N, D]
    beta: float,
    normalize: bool,
    eps: float,
    wanted: list[bool],
) -> tuple[Tensor, list[Tensor], Tensor]:
    """`smooth_l1_loss(prediction, layer_norm(target, [D], eps=eps), beta=beta)`; beta = 0: `mse_loss`."""
    error = widen(target)
    if normalize:
        error = torch.nn.functional.layer_norm(error, error.shape[1:], eps=eps)
    error = widen(prediction) - error
    if beta == 0:
        losses, gradient = error.square(), 2 * error
    else:
        size = error.abs()
        losses = torch.where(size < beta, error.square() / (2 * beta), size - beta / 2)
        gradient = torch.where(size >= beta, error.sign(), error / beta)
    gradient = gradient.to(prediction.dtype) if wanted[0] else _empty(prediction)
    return losses.mean(), [gradient], _scale(prediction, 1 / error.numel())


# Covariance losses -----------------------------------------------------------------------------------


def barlow_twins(
    z0: Tensor,  # [N, D]
    z1: Tensor,  # [N, D]
    lambda_param: float,
    statistics: int,
    wanted: list[bool],
) -> tuple[Tensor, list[Tensor], Tensor, list[Tensor]]:
    """`sum_i (C_ii - 1)^2 + lambda sum_{i != j} C_ij^2`, C = a^T b / N of batch-normalised a, b. arXiv 2103.03230,
    equation 1.

    Batch norm without affine part: biased variance, eps = 1e-5. The `statistics` (from 1 on) are [2, D + 1]: the
    columns' standard deviations (with eps) of each view, then the participation ratio of C, `(sum_i C_ii)^2 / ||C||^2`;
    from 2 on followed by the squares that it is computed from: a a^T and b b^T for N < D, else a^T b.
    """
    n, d = z0.shape

    def batch_norm(x: Tensor) -> tuple[Tensor, Tensor]:
        std = (x.var(0, correction=0) + 1e-5).sqrt()
        return (x - x.mean(0)) / std, std

    def through_batch_norm(gradient: Tensor, normalised: Tensor, std: Tensor) -> Tensor:
        return (gradient - gradient.mean(0) - normalised * (gradient * normalised).mean(0)) / std

    (a, a_std), (b, b_std) = batch_norm(widen(z0)), batch_norm(widen(z1))
    identity = torch.eye(d, dtype=a.dtype, device=a.device)
    difference = a.T @ b / n - identity
    weighted = difference * (identity + lambda_param * (1 - identity))
    gradients = [
        through_batch_norm(b @ weighted.T, a, a_std).to(z0.dtype) if wanted[0] else _empty(z0),
        through_batch_norm(a @ weighted, b, b_std).to(z1.dtype) if wanted[1] else _empty(z1),
    ]
    correlation = difference + identity
    rank = correlation.trace().square() / correlation.square().sum()
    health = [torch.cat([torch.stack([a_std, b_std]), rank.expand(2, 1)], 1)] if statistics else []
    if statistics > 1:
        health += [a @ a.T, b @ b.T] if n < d else [a.T @ b]
    return (difference * weighted).sum(), gradients, _scale(z0, 2 / n), health


def vicreg(
    z0: Tensor,  # [N, D]
    z1: Tensor,  # [N, D]
    lambda_param: float,
    mu_param: float,
    nu_param: float,
    eps: float,
    statistics: int,
    wanted: list[bool],
) -> tuple[Tensor, list[Tensor], Tensor, list[Tensor]]:
    """`lambda mse(z0, z1) + mu (v(z0) + v(z1)) / 2 + nu (c(z0) + c(z1))`. arXiv 2105.04906, with the official code's
    factor 1/2 on v.

    v = mean_d relu(1 - sqrt(var + eps)), c = sum_{i != j} cov_ij^2 / D, both with N - 1 in the denominator.
    The `statistics` (from 1 on) are [2, D + 1]: the columns' standard deviations (with eps) of each view, then the
    participation ratio of its covariance's spectrum, `(sum_i cov_ii)^2 / ||cov||^2`; from 2 on followed by each view's
    smaller square, c c^T for N < D, else c^T c (c: centred).
    Gradients carry 1 / D, without which a covariance of thousands of columns overflows float16.
    """
    n, d = z0.shape
    a, b = widen(z0), widen(z1)
    squares = []

    def regularise(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        centred = x - x.mean(0)
        if statistics > 1:
            squares.append(centred @ centred.T if n < d else centred.T @ centred)
        std = (x.var(0) + eps).sqrt()  # [D]
        covariance = centred.T @ centred / (n - 1)
        rank = covariance.trace().square() / covariance.square().sum()
        covariance = covariance - covariance.diag().diag()
        loss = mu_param * (1 - std).relu().mean() / 2 + nu_param * covariance.square().sum() / d
        variance_part = (std < 1) / std * (-mu_param / 2) * centred
        return loss, (variance_part + 4 * nu_param * centred @ covariance) * (n / (n - 1)), torch.cat([std, rank[None]])

    (a_loss, a_gradient, a_health), (b_loss, b_gradient, b_health) = regularise(a), regularise(b)
    health = [torch.stack([a_health, b_health])] if statistics else []
    difference = 2 * lambda_param * (a - b)
    loss = lambda_param * (a - b).square().mean() + a_loss + b_loss
    gradients = [
        ((a_gradient + difference) / d).to(z0.dtype) if wanted[0] else _empty(z0),
        ((b_gradient - difference) / d).to(z1.dtype) if wanted[1] else _empty(z1),
    ]
    return loss, gradients, _scale(z0, 1 / n), health + squares


from fastjem.kernels.reference_augment import augment, crop_resize  # noqa: E402, F401
from fastjem.kernels.reference_contrastive import (  # noqa: E402, F401 (it needs the helpers above)
    clip_loss,
    clip_loss_backward,
    info_nce,
    nearest_neighbors,
    nt_xent,
    nt_xent_backward,
    siglip_loss,
)
from fastjem.kernels.reference_gaussian import characteristic, characteristic_backward  # noqa: E402, F401
from fastjem.kernels.reference_prototypes import (  # noqa: E402, F401
    koleo,
    mean_entropy,
    prototype_cross_entropy,
    prototype_head_cross_entropy,
    sinkhorn,
    sinkhorn_bias,
    sinkhorn_codes,
    sinkhorn_step,
)
