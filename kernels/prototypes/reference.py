"""The specification of Sinkhorn and of the losses on prototypes; conventions are in kernels/__init__.py."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..arithmetic import compute_dtype, no_gradient, widen, widest, widest_dtype
from .pairing import count, is_pair


def sinkhorn_step(
    scores: Tensor,  # [B, K], or [P, B, K]: P problems, each for itself, as in all of Sinkhorn's operators
    bias: Tensor | None,  # [K] or [P, K], float64; None: samples are not normalised before
    epsilon: float,
    rows: Tensor | None = None,  # 0-dim int64: so many of the first rows count, and those that fill up don't
    log_floors: Tensor | None = None,  # [B] float64: logs of what is added to samples' sums, which divide them (CAPI)
) -> Tensor:
    """[K] float64: `logsumexp_i(s_ik + g_i)` with `g_i = -log(sum_k exp(s_ik + f_k) + floor_i)`, s = scores / epsilon,
    f = bias.

    In the log domain, samples are normalised, and then each prototype is summed. The next bias f is the negative of the
    result; over several ranks, of the logsumexp of their results. It may be thousands and nearly cancels with what it
    is added to: hence float64.
    """
    scores = widen(scores) / epsilon
    if bias is not None:
        of_samples = (scores + bias.unsqueeze(-2)).logsumexp(-1, keepdim=True)
        if log_floors is not None:
            of_samples = torch.logaddexp(of_samples, log_floors[..., None].to(of_samples.dtype))
        scores = scores - of_samples
    if rows is not None:
        beyond = torch.arange(scores.shape[-2], device=scores.device) >= rows  # [B]
        scores = scores.masked_fill(beyond[:, None], -math.inf)
    return widest(scores.logsumexp(-2))


def sinkhorn_rows(
    scores: Tensor,  # [B, K]
    bias: Tensor,  # [K] float64
    epsilon: float,
) -> Tensor:
    """[B] float64: `logsumexp_k(s_ik + f_k)`, what a sample's code is normalised by."""
    return widest((widen(scores) / epsilon + bias.unsqueeze(-2)).logsumexp(-1))


def sinkhorn_bias(
    scores: list[Tensor],  # [B, K] each, whose B may differ: one batch in several tensors
    epsilon: float,
    iterations: int,
    normalize_samples_first: bool,
    rows: Tensor | None = None,  # see `sinkhorn_step`; for one tensor
) -> Tensor:
    """[K]: f, with which `softmax(scores / epsilon + f, 1)` are the Sinkhorn codes (see `sinkhorn`)."""
    bias = potentials(sinkhorn_step, scores, epsilon, iterations, normalize_samples_first, rows)
    return bias.to(compute_dtype(*(x.dtype for x in scores)))


def potentials(
    step: Callable[..., Tensor],  # `sinkhorn_step`, or an implementation of it
    scores: list[Tensor],
    epsilon: float,
    iterations: int,
    normalize_samples_first: bool,
    rows: Tensor | None = None,
) -> Tensor:
    """The prototypes' potentials f, [K] float64."""
    x = scores[0]
    wide = widest_dtype(x.device)
    bias = x.new_zeros((*x.shape[:-2], x.shape[-1]), dtype=wide) if normalize_samples_first else None
    for _ in range(iterations):
        sums = [step(of, bias, epsilon, rows) for of in scores]
        bias = -(sums[0] if len(sums) == 1 else torch.stack(sums).logsumexp(0))
    assert bias is not None  # iterations >= 1
    return bias


def sinkhorn(
    scores: Tensor,  # [B, K]
    epsilon: float,
    iterations: int,
    normalize_samples_first: bool,
    dtype: torch.dtype,
) -> Tensor:
    """[B, K]: Q = exp(scores / epsilon), then `iterations` times: prototypes divided by their sums, samples by theirs.

    SwAV, arXiv 2006.09882, section 3.1. Each row of the result sums to 1.
    """
    bias = potentials(sinkhorn_step, [scores], epsilon, iterations, normalize_samples_first)
    return sinkhorn_codes(scores, bias, epsilon, dtype)


def sinkhorn_codes(
    scores: Tensor,  # [B, K]
    bias: Tensor,  # [K] float64
    epsilon: float,
    dtype: torch.dtype,
) -> Tensor:
    """[B, K]: `softmax(scores / epsilon + bias, 1)`"""
    return (widen(scores) / epsilon + bias.unsqueeze(-2)).softmax(-1).to(dtype)


def prototype_cross_entropy(
    student: list[Tensor],  # S x [B, K]
    teacher: list[Tensor],  # T x [B, K]
    student_temperature: float,
    teacher_temperature: float,
    teacher_bias: Tensor | None,  # [K] or [T, K]
    pairs: str,  # "different" | "same" | "all"
    weights: Tensor | None,  # [B]
    statistics: bool,
    wanted: list[bool],  # one per student view
) -> tuple[Tensor, list[Tensor], Tensor, list[Tensor]]:
    """The mean over pairs of views and rows of `-<softmax(t / tau_t + bias), log_softmax(s / tau_s)>`, s and t logits.

    The mean over rows is weighted if there are weights. SwAV (pairs "different", bias from Sinkhorn), DINO
    ("different", bias -centre / tau_t), iBOT ("same"), MSN ("all"). A prototype whose target is 0 adds 0 to the loss,
    even where the student rules it out (a logit of -inf); 0 is also what a target below the smallest normal number
    counts as. A view of the student that is paired with none adds nothing.
    With `statistics`, of the teacher: mean logits [K], mean probabilities [K] and the mean entropy of a row, 0-dim.
    """
    s = widen(torch.stack(student)) / student_temperature  # [S, B, K]
    teacher_logits = widen(torch.stack(teacher))  # [T, B, K]
    t = teacher_logits / teacher_temperature
    if teacher_bias is not None:
        t = t + (teacher_bias[None, None] if teacher_bias.dim() == 1 else teacher_bias[:, None])
    q = t.log_softmax(2).exp()
    q = q.masked_fill(q < torch.finfo(q.dtype).tiny, 0)
    w = s.new_ones(s.shape[1]) if weights is None else weights.to(s.dtype)
    scale = 1 / (w.sum() * count(len(s), len(t), pairs) * student_temperature)
    rows = s.new_zeros(s.shape[1])  # [B], the loss of an image, not weighted
    gradients = torch.zeros_like(s)  # [S, B, K]
    for i, log_p in enumerate(s.log_softmax(2)):
        targets = [q[j] for j in range(len(t)) if is_pair(i, j, pairs)]
        if not targets:
            continue
        y = torch.stack(targets).sum(0)
        rows = rows - (y * log_p).masked_fill((y == 0) & log_p.isneginf(), 0).sum(1)
        gradients[i] = (len(targets) * log_p.exp() - y) * w[:, None]
    loss = rows.dot(w) * scale * student_temperature
    # copies, as the tensors that an operator returns may not share memory
    parts = zip(gradients, student, wanted, strict=True)
    of_teacher = (
        [teacher_logits.mean((0, 1)), q.mean((0, 1)), -torch.special.xlogy(q, q).sum(2).mean()] if statistics else []
    )
    return loss, [g.to(x.dtype, copy=True) if k else no_gradient(x) for g, x, k in parts], scale, of_teacher


def prototype_head_cross_entropy(
    inputs: list[Tensor],  # S x [B, D] student features, then [K, D] student prototypes
    teacher: list[Tensor],  # T x [B, D] features
    teacher_prototypes: Tensor,  # [K, D]
    student_temperature: float,
    teacher_temperature: float,
    teacher_bias: Tensor | None,  # [K] or [T, K]
    pairs: str,
    weights: Tensor | None,  # [B]
    wanted: list[bool],  # one per student view, and one for the prototypes
) -> tuple[Tensor, list[Tensor], Tensor]:
    """`prototype_cross_entropy` of the logits `features @ prototypes.T`."""
    *student, prototypes = inputs
    features = [widen(x) for x in student]
    logits = [x @ widen(prototypes).T for x in features]
    teacher_logits = [widen(x) @ widen(teacher_prototypes).T for x in teacher]
    loss, gradients, scale, _ = prototype_cross_entropy(
        logits,
        teacher_logits,
        student_temperature,
        teacher_temperature,
        teacher_bias,
        pairs,
        weights,
        False,
        [True] * len(student),
    )
    of_features = [
        (g @ widen(prototypes)).to(x.dtype) if k else no_gradient(x)
        for g, x, k in zip(gradients, student, wanted[:-1], strict=True)
    ]
    of_prototypes = torch.cat(gradients).T @ torch.cat(features) if wanted[-1] else no_gradient(prototypes)
    return loss, [*of_features, of_prototypes.to(prototypes.dtype)], scale


def prototype_head_usage(
    inputs: list[Tensor],  # S x [B, D] student features, then [K, D] student prototypes
    teacher: list[Tensor],  # T x [B, D] features
    teacher_prototypes: Tensor,  # [K, D]
    student_temperature: float,
    teacher_temperature: float,
    teacher_bias: Tensor | None,  # [K] or [T, K]
    pairs: str,
) -> tuple[Tensor, Tensor]:
    """The loss of `prototype_head_cross_entropy`, and [K]: the sum of all rows' softmax of student logits / tau_s.

    That is in the widest dtype, as rows of other ranks are added to it.
    """
    options = student_temperature, teacher_temperature, teacher_bias, pairs, None
    loss = prototype_head_cross_entropy(inputs, teacher, teacher_prototypes, *options, [False] * len(inputs))[0]
    *student, prototypes = inputs
    logits = torch.cat([widen(x) for x in student]) @ widen(prototypes).T  # [S B, K]
    return loss, widest((logits / student_temperature).softmax(1)).sum(0)


def prototype_head_usage_backward(
    inputs: list[Tensor],
    teacher: list[Tensor],
    teacher_prototypes: Tensor,
    student_temperature: float,
    teacher_temperature: float,
    teacher_bias: Tensor | None,
    pairs: str,
    upstream: Tensor,  # 0-dim: the derivative by the loss
    slope: Tensor | None,  # [K]: the derivatives by the sums
    wanted: list[bool],  # one per student view, and one for the prototypes
) -> list[Tensor]:
    """The gradients of both for the inputs, of `slope + constant` those of `slope`, as a row's softmax sums to 1."""
    *student, prototypes = inputs
    features = [widen(x) for x in student]
    w = widen(prototypes)
    logits = [x @ w.T for x in features]
    options = student_temperature, teacher_temperature, teacher_bias, pairs, None, False
    teacher_logits = [widen(x) @ widen(teacher_prototypes).T for x in teacher]
    _, gradients, scale, _ = prototype_cross_entropy(logits, teacher_logits, *options, [True] * len(student))
    of_logits = torch.stack(gradients) * (upstream * scale).to(w.dtype)  # [S, B, K]
    if slope is not None:
        p = (torch.stack(logits) / student_temperature).softmax(2)
        slope = (slope / student_temperature).to(w.dtype)
        of_logits = of_logits + p * (slope - (p * slope).sum(2, keepdim=True))
    of_features = [
        (g @ w).to(x.dtype) if k else no_gradient(x) for g, x, k in zip(of_logits, student, wanted[:-1], strict=True)
    ]
    of_prototypes = of_logits.flatten(0, 1).T @ torch.cat(features) if wanted[-1] else no_gradient(prototypes)
    return [*of_features, of_prototypes.to(prototypes.dtype)]


def mean_entropy(
    scores: list[Tensor],  # V x [B, K]
    temperature: float,
    total: Tensor | None,  # [K]: the sum of the probabilities of `rows` rows of all ranks; None: these rows are all
    rows: Tensor | None,  # 0-dim
    wanted: list[bool],
) -> tuple[Tensor, list[Tensor], Tensor]:
    """`sum_k p_k log p_k + log K`, p the mean over views and rows of `softmax(scores / temperature)`.

    MSN's mean entropy maximisation, arXiv 2204.07141, equation 2, with the constant that makes it a divergence: it is 0
    where prototypes are used alike.
    """
    log_p = (widen(torch.stack(scores)) / temperature).log_softmax(2)  # [V, B, K]
    p = log_p.exp()
    mean = p.mean((0, 1)) if total is None or rows is None else total / rows  # [K]
    loss = torch.special.xlogy(mean, mean).sum() + math.log(len(mean))
    slope = mean.clamp_min(torch.finfo(mean.dtype).tiny).log()  # [K]; the 1 of (m log m)' = log m + 1 cancels below
    gradients = p * (slope - (p * slope).sum(2, keepdim=True))  # [V, B, K]
    n = p.shape[0] * p.shape[1] if rows is None else rows
    scale = 1 / (torch.ones_like(loss) * n * temperature)
    parts = zip(gradients, scores, wanted, strict=True)
    return loss, [g.to(x.dtype, copy=True) if k else no_gradient(x) for g, x, k in parts], scale
