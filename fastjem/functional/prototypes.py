"""Sinkhorn codes and the cross-entropy between two temperature-scaled softmaxes: SwAV, DINO, iBOT, MSN."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from fastjem.functional import _checks as check
from fastjem.functional._collectives import gather_rows
from fastjem.ops.autograd import one_pass, ops


def sinkhorn(
    scores: Tensor,
    *,
    epsilon: float = 0.05,
    iterations: int = 3,
    normalize_samples_first: bool = False,
    dtype: torch.dtype | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Sinkhorn-Knopp codes of SwAV (Caron et al. 2020, arXiv 2006.09882, section 3.1), DINOv2 and MSN.

    Q = exp(scores / epsilon), then `iterations` times: each prototype divided by its sum over samples, each sample by
    its sum over prototypes. In the log domain, so that no finite score overflows or underflows. Not differentiable.

    Args:
        scores: [B, K], samples by prototypes.
        epsilon: temperature of the scores.
        iterations: how often both are normalised, at least 1. Few iterations do not converge, and their order matters.
        normalize_samples_first: divide each sample by its sum once before (MSN normalises probabilities).
        dtype: of the codes; None: float32 (float64 for float64 scores).
        group: the process group whose ranks hold the rest of the batch; prototypes are then normalised over all of it.

    Returns:
        [B, K] codes; every row sums to 1.

    Raises:
        ValueError: for other shapes, dtypes or options.
    """
    _check_sinkhorn("sinkhorn", scores, epsilon, iterations)
    if dtype is None:
        dtype = torch.float64 if scores.dtype == torch.float64 else torch.float32
    if group is None:
        return ops.sinkhorn(scores.detach(), epsilon, iterations, normalize_samples_first, dtype)
    bias = _distributed_bias(scores.detach(), epsilon, iterations, normalize_samples_first, group)
    return (scores.detach().to(bias.dtype) / epsilon + bias).softmax(1).to(dtype)


def sinkhorn_bias(
    scores: Tensor,
    *,
    epsilon: float = 0.05,
    iterations: int = 3,
    normalize_samples_first: bool = False,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """The prototypes' log-potentials f [K] of `sinkhorn`: its codes are `softmax(scores / epsilon + f, 1)`.

    Given as `teacher_bias` to `prototype_cross_entropy`, the codes never need to exist in memory. Arguments as for
    `sinkhorn`; float32 (float64 for float64 scores).
    """
    _check_sinkhorn("sinkhorn_bias", scores, epsilon, iterations)
    if group is None:
        return ops.sinkhorn_bias(scores.detach(), epsilon, iterations, normalize_samples_first)
    return _distributed_bias(scores.detach(), epsilon, iterations, normalize_samples_first, group)


def _check_sinkhorn(op: str, scores: Tensor, epsilon: float, iterations: int) -> None:
    check.matrices(op, "scores must be [B, K]", scores)
    check.positive(op, epsilon=epsilon)
    if iterations < 1:
        check.fail(op, "iterations must be at least 1", iterations)


def _distributed_bias(scores, epsilon, iterations, normalize_samples_first, group) -> Tensor:
    """One gathering of [K] numbers per iteration: the prototypes' sums over all ranks."""
    bias = scores.new_zeros(scores.shape[1]) if normalize_samples_first else None
    for _ in range(iterations):
        sums = ops.sinkhorn_step(scores, bias, epsilon)
        bias = -gather_rows(sums[None], group)[0].logsumexp(0)
    return bias


PAIRS = ("different", "same", "all")


def prototype_cross_entropy(
    student: Tensor | Sequence[Tensor],
    teacher: Tensor | Sequence[Tensor],
    *,
    student_temperature: float,
    teacher_temperature: float,
    teacher_bias: Tensor | None = None,
    pairs: str = "different",
    weights: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of student views against teacher views, each a softmax over prototypes with its own temperature.

    The mean over pairs (s, t) and rows of `-sum_k softmax(teacher_t / tau_t + bias)_k log_softmax(student_s /
    tau_s)_k`. It is SwAV's loss with `teacher_bias=sinkhorn_bias(...)`, DINO's with `teacher_bias=-centre / tau_t`
    (Caron et al. 2021, arXiv 2104.14294, equation 1), iBOT's patch loss with pairs "same", MSN's with "all".

    Args:
        student: [S, B, K], or a sequence of S tensors [B, K].
        teacher: [T, B, K], or a sequence of T tensors [B, K]; gets no gradient.
        student_temperature, teacher_temperature: what the logits are divided by.
        teacher_bias: [K] or, one per teacher view, [T, K]; added to teacher / teacher_temperature.
        pairs: "different" (s != t, the same index being the same view), "same" (s = t) or "all".
        weights: [B]: the mean over rows becomes sum(weights * rows) / sum(weights).

    Returns:
        0-dim float32 (float64 for float64 inputs).

    Raises:
        ValueError: for other shapes, dtypes or options, and where no pair of views is left.
    """
    op, contract = "prototype_cross_entropy", "student and teacher must be [S, B, K] and [T, B, K], or lists of [B, K]"
    student, teacher = (list(x.unbind()) if isinstance(x, Tensor) and x.dim() == 3 else x for x in (student, teacher))
    for views in (student, teacher):
        if not isinstance(views, (list, tuple)) or not views:
            check.fail(op, contract, check.shape(views))
    check.matrices(op, contract, *student, *teacher)
    check.positive(op, student_temperature=student_temperature, teacher_temperature=teacher_temperature)
    batch, prototypes = student[0].shape
    if pairs not in PAIRS:
        check.fail(op, f"pairs must be one of {', '.join(PAIRS)}", repr(pairs))
    if pairs == "different" and len(student) == len(teacher) == 1:
        check.fail(op, 'pairs="different" needs at least two views on one side', "one student and one teacher view")
    if teacher_bias is not None:
        if teacher_bias.shape not in {(prototypes,), (len(teacher), prototypes)}:
            check.fail(
                op, f"teacher_bias must be [{prototypes}] or [{len(teacher)}, {prototypes}]", tuple(teacher_bias.shape)
            )
        teacher_bias = teacher_bias.detach()
    if weights is not None:
        if weights.shape != (batch,):
            check.fail(op, f"weights must be [{batch}]", tuple(weights.shape))
        weights = weights.detach()
    return one_pass(
        op,
        check.common(*student),
        [x.detach() for x in check.common(*teacher)],
        float(student_temperature),
        float(teacher_temperature),
        teacher_bias,
        pairs,
        weights,
        listed=True,
    )
