"""Contrastive losses that look at how near positives are: on the hypersphere, and MACL."""

import torch
from torch import Tensor

from fastjem.functional import checks
from fastjem.functional.candidates import negatives_of
from fastjem.functional.contrastive import nt_xent
from fastjem.functional.options import dots_of_rows
from fastjem.functional.precision import loss_dtype, without_autocast
from fastjem.functional.seen import Side, View
from fastjem.functional.unit import unit_rows
from fastjem.ops.forward_mode import refuse_forward_mode

LEAST_SHARE = 0.01  # of MACL's temperature, however unlike positives are


def hypersphere(
    z0: Tensor,
    z1: Tensor,
    *,
    t: float | Tensor = 1.0,
    lam: float | Tensor = 1.0,
    alpha: float | Tensor = 2.0,
) -> Tensor:
    """`(x - y).norm(dim=1).pow(alpha).mean() + lam * (uniformity(x) + uniformity(y)) / 2` of rows at unit length.

    Wang and Isola 2020, arXiv 2005.10242: `uniformity(x)` is `pdist(x).pow(2).mul(-t).exp().mean()
    .log()`, here a log-sum-exp over cosines that are never in memory.

    Args:
        z0, z1: [N, D] each, two views of N >= 2 images. Normalised inside; none may be zero.
        t: how fast pairs' potential falls with their squared distance.
        lam: the weight of uniformity.
        alpha: the power of positives' distances.
        (All three numbers or 0-dim tensors that get their gradient.)

    Returns:
        0-dim float32 (float64 for float64 inputs).

    Raises:
        ValueError: for other shapes or dtypes, a single image, or a t or alpha that isn't positive.
    """
    op = "hypersphere"
    contract = "z0 and z1 must be [N, D] both, with N >= 2"
    checks.matrices(op, contract, z0, z1)
    if z0.shape[0] < 2:
        checks.fail(op, contract, tuple(z0.shape))
    t = checks.positive(op, "t", t, z0)
    alpha = checks.positive(op, "alpha", alpha, z0)
    lam = checks.number(op, "lam", lam, z0)
    refuse_forward_mode(op, (z0, z1, t, lam, alpha))
    n = z0.shape[0]
    view = View(op, 0, False, False, z0.dtype, [n], None)
    with without_autocast(z0):
        unit = unit_rows(torch.stack(checks.common(z0, z1)))  # [2, N, D]
        # |x - y|^2 = 2 - 2 <x, y>: each row's log-sum-exp over its cosines times 2 t, then over the rows.
        scaled = (unit * (2 * t) ** 0.5).to(unit.dtype).unbind()
        lse = torch.cat([negatives_of(Side(x[None]), None, None, view, 0.0)[0].lse for x in scaled])  # [2, N]
        highest = lse.detach().amax(1, keepdim=True)
        # The mean over N rows, and over the N - 1 others: divided by N in a tensor, as by a number an exported loss
        # would be of this batch's size alone.
        means = (lse - highest).exp().mean(1).log() + highest[:, 0] - lse.new_ones(()).mul_(n - 1).log()
        apart = unit[0] - unit[1]
        if not isinstance(alpha, Tensor) and alpha == 2:
            alignment = apart.square().sum(1).mean()
        else:
            alignment = torch.linalg.vector_norm(apart, dim=1).pow(alpha).mean()
        return (alignment + lam * (means.mean() - 2 * t)).to(loss_dtype(z0))


def macl(
    z0: Tensor,
    z1: Tensor,
    *,
    temperature: float = 0.1,
    alpha: float = 0.5,
    initial_alignment: float = 0.0,
    eps: float = 1e-8,
) -> Tensor:
    """NT-Xent at a temperature that follows the alignment of positives, its rows reweighted (Huang et al. 2023).

    "Model-Aware Contrastive Learning: Towards Escaping the Dilemmas", arXiv 2207.07874:
    `mean(l / (1 - exp(-l)))`, where the divisor is a constant and l are the rows' losses of `nt_xent` at
    `temperature * (1 + alpha * (mean cosine of positives - initial_alignment))`, another constant.

    Args:
        z0, z1: [N, D] each, two views of N images, normalised inside.
        temperature: where the alignment is `initial_alignment`.
        alpha: in [0, 1], how much the temperature follows.
        initial_alignment: in [0, 1].
        eps: beside the divisor.

    Returns:
        0-dim float32 (float64 for float64 inputs). The temperature doesn't fall below a hundredth of what is given.

    Raises:
        ValueError: for other shapes, dtypes or numbers.
    """
    op = "macl"
    checks.matrices(op, "z0 and z1 must be [N, D] both", z0, z1)
    temperature = checks.host_number(op, "temperature", temperature, low=0)
    alpha = checks.host_number(op, "alpha", alpha, low=0, high=1, inclusive=True)
    initial_alignment = checks.host_number(op, "initial_alignment", initial_alignment, low=0, high=1, inclusive=True)
    eps = checks.host_number(op, "eps", eps, low=0, inclusive=True)
    with torch.no_grad():
        cosines = dots_of_rows(unit_rows(z0), unit_rows(z1))
        share = (alpha * cosines.mean() + (1 - alpha * initial_alignment)).clamp_min(LEAST_SHARE)
    losses = nt_xent(z0, z1, temperature=temperature * share, reduction="none")
    # 1 - exp(-l), without the digits that 1 - P loses where P is small
    return (losses / (eps - torch.expm1(-losses.detach()))).mean()
