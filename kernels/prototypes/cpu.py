"""The C++ kernels of the prototype operators; part of `cpu`: every check is here, before an address leaves Python."""

import math

import torch
from torch import Tensor

from .. import _C, tiling
from ..arithmetic import compute_dtype, dense_rows
from ..native import CODES, address, gradient_for
from . import reference
from .pairing import PAIRS, count


def _wide(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Dense, in the dtype to compute in."""
    return None if x is None else x.to(dtype).contiguous()


# Sinkhorn --------------------------------------------------------------------------------------------


# A potential may be thousands, and nearly cancels with what it is added to: within an operator it is float64.


def _step(scores: Tensor, bias: Tensor | None, epsilon: float) -> Tensor:
    """[K] float64, from dense rows and float64."""
    sums = torch.empty(scores.shape[1], dtype=torch.float64)
    _C.sinkhorn_step(
        CODES[scores.dtype],
        address(scores),
        *scores.shape,
        scores.stride(0),
        1 / epsilon,
        address(bias),
        address(sums),
        torch.get_num_threads(),
    )
    return sums


def _bias(scores: Tensor, epsilon: float, iterations: int, normalize_samples_first: bool) -> Tensor:
    bias = torch.zeros(scores.shape[1], dtype=torch.float64) if normalize_samples_first else None
    for _ in range(iterations):
        bias = _step(scores, bias, epsilon).neg_()
    return bias


def sinkhorn_step(scores: Tensor, bias: Tensor | None, epsilon: float) -> Tensor:
    if scores.dtype not in CODES:
        return reference.sinkhorn_step(scores, bias, epsilon)
    return _step(dense_rows(scores), _wide(bias, torch.float64), epsilon)


def sinkhorn_bias(scores: Tensor, epsilon: float, iterations: int, normalize_samples_first: bool) -> Tensor:
    if scores.dtype not in CODES:
        return reference.sinkhorn_bias(scores, epsilon, iterations, normalize_samples_first)
    return _bias(dense_rows(scores), epsilon, iterations, normalize_samples_first).to(compute_dtype(scores.dtype))


def sinkhorn_codes(scores: Tensor, bias: Tensor, epsilon: float, dtype: torch.dtype) -> Tensor:
    if scores.dtype not in CODES or dtype not in CODES:
        return reference.sinkhorn_codes(scores, bias, epsilon, dtype)
    scores, bias = dense_rows(scores), _wide(bias, torch.float64)
    codes = torch.empty(scores.shape, dtype=dtype)
    _C.sinkhorn_codes(
        CODES[scores.dtype],
        address(scores),
        *scores.shape,
        scores.stride(0),
        1 / epsilon,
        address(bias),
        CODES[dtype],
        codes.nbytes,
        address(codes),
        torch.get_num_threads(),
    )
    return codes


def sinkhorn(
    scores: Tensor, epsilon: float, iterations: int, normalize_samples_first: bool, dtype: torch.dtype
) -> Tensor:
    if scores.dtype not in CODES or dtype not in CODES:
        return reference.sinkhorn(scores, epsilon, iterations, normalize_samples_first, dtype)
    scores = dense_rows(scores)
    return sinkhorn_codes(scores, _bias(scores, epsilon, iterations, normalize_samples_first), epsilon, dtype)


# Cross-entropy ---------------------------------------------------------------------------------------


def _inverse(x: float) -> float:
    return 1 / x if x else math.inf


def prototype_cross_entropy(
    student: list[Tensor],
    teacher: list[Tensor],
    student_temperature: float,
    teacher_temperature: float,
    teacher_bias: Tensor | None,
    pairs: str,
    weights: Tensor | None,
    statistics: bool,
    wanted: list[bool],
) -> tuple[Tensor, list[Tensor], Tensor, list[Tensor]]:
    dtype, (rows, width) = compute_dtype(student[0].dtype), student[0].shape
    if student[0].dtype not in CODES or teacher[0].dtype not in CODES or compute_dtype(teacher[0].dtype) != dtype:
        arguments = (student_temperature, teacher_temperature, teacher_bias, pairs, weights, statistics, wanted)
        return reference.prototype_cross_entropy(student, teacher, *arguments)
    student, teacher = [dense_rows(x) for x in student], [dense_rows(x) for x in teacher]
    bias, weights = _wide(teacher_bias, dtype), _wide(weights, torch.float64)
    gradients = [gradient_for(x, k) for x, k in zip(student, wanted, strict=True)]
    of_teacher = torch.empty(2, width, dtype=torch.float64) if statistics else None
    pairs_of_rows = (rows if weights is None else weights.sum().item()) * count(len(student), len(teacher), pairs)
    scale = _inverse(pairs_of_rows * student_temperature)
    # Half precision can't hold the scaled gradient; wider gradients needn't be read and written again to be scaled.
    factor = 1.0 if student[0].dtype in (torch.bfloat16, torch.float16) else scale
    total, entropy = _C.prototype_cross_entropy(
        CODES[student[0].dtype],
        [(address(x), x.stride(0)) for x in student],
        CODES[teacher[0].dtype],
        [(address(x), x.stride(0)) for x in teacher],
        rows,
        width,
        1 / student_temperature,
        1 / teacher_temperature,
        address(bias),
        0 if bias is None or bias.dim() == 1 else width,
        address(weights),
        factor,
        PAIRS[pairs],
        [address(g) for g in gradients],
        rows * width * student[0].element_size(),
        address(of_teacher),
        torch.get_num_threads(),
    )
    loss = torch.full((), total * _inverse(pairs_of_rows), dtype=dtype)
    extra = []
    if statistics:
        teacher_rows = rows * len(teacher)
        means = of_teacher.div_(teacher_rows)
        extra = [*(x.to(dtype, copy=True) for x in means), torch.full((), entropy / teacher_rows, dtype=dtype)]
    return loss, gradients, torch.full((), scale / factor, dtype=dtype), extra


def mean_entropy(
    scores: list[Tensor], temperature: float, total: Tensor | None, rows: Tensor | None, wanted: list[bool]
) -> tuple[Tensor, list[Tensor], Tensor]:
    dtype, k = compute_dtype(scores[0].dtype), scores[0].shape[1]
    if scores[0].dtype not in CODES:
        return reference.mean_entropy(scores, temperature, total, rows, wanted)
    scores = [dense_rows(x) for x in scores]
    if total is None:  # a prototype's logsumexp of probabilities is what Sinkhorn's first iteration of samples gives
        count, zeros = sum(map(len, scores)), torch.zeros(k, dtype=torch.float64)
        log_mean = torch.stack([_step(x, zeros, temperature) for x in scores]).logsumexp(0) - math.log(count)
    else:
        count = rows.item()
        log_mean = (total.double() / count).log()
    log_mean = log_mean.clamp_min(-1e4)  # 0 log 0 is 0
    mean = log_mean.exp()
    negative_entropy = mean @ log_mean
    slope = (log_mean - negative_entropy).to(dtype)  # a constant changes nothing, and this one leaves small numbers
    scale = 1 / (count * temperature)
    factor = scale if scores[0].dtype == dtype else 1.0  # half precision can't hold the scaled gradient
    gradients = [gradient_for(x, k) for x, k in zip(scores, wanted, strict=True)]
    for x, gradient in zip(scores, gradients, strict=True):
        if gradient.numel():
            _C.softmax_slope(
                CODES[x.dtype],
                address(x),
                *x.shape,
                x.stride(0),
                1 / temperature,
                address(slope),
                factor,
                address(gradient),
                torch.get_num_threads(),
            )
    loss = (negative_entropy + math.log(k)).to(dtype)
    return loss, gradients, torch.full((), scale / factor, dtype=dtype)


# The head-fused form ---------------------------------------------------------------------------------


def prototype_head_cross_entropy(
    inputs: list[Tensor],
    teacher: list[Tensor],
    teacher_prototypes: Tensor,
    student_temperature: float,
    teacher_temperature: float,
    teacher_bias: Tensor | None,
    pairs: str,
    weights: Tensor | None,
    wanted: list[bool],
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Twice over the prototypes in tiles: logits for the logsumexps; logits again, in whose place the gradient then
    stands."""
    *student, prototypes = inputs
    dtype, threads = compute_dtype(student[0].dtype), torch.get_num_threads()
    views, teachers, images = len(student), len(teacher), len(student[0])
    width = len(prototypes)
    x = torch.cat([v.to(dtype) for v in student])  # [S B, D]
    z = torch.cat([v.to(dtype) for v in teacher])  # [T B, D]
    bias, weights = _wide(teacher_bias, dtype), _wide(weights, torch.float64)
    code = CODES[dtype]
    tile = min(width, max(64, tiling.CPU_HEAD_BYTES // (dtype.itemsize * (len(x) + len(z))) // 64 * 64))
    logits = torch.empty((len(x) + len(z)) * tile, dtype=dtype)
    x_lse, z_lse = (torch.full((len(v),), -math.inf, dtype=torch.float64) for v in (x, z))
    losses = torch.zeros(images, dtype=torch.float64)
    x_gradient = torch.zeros_like(x) if any(wanted[:-1]) else None
    w_gradient = torch.empty(prototypes.shape, dtype=dtype) if wanted[-1] else None

    def products(first: int) -> tuple[Tensor, Tensor, Tensor, int]:
        """The tile's logits of student and teacher, the student's prototypes, and the tile's width."""
        w, v = (p[first : first + tile].to(dtype) for p in (prototypes, teacher_prototypes))
        n = len(w)
        of_student = logits[: len(x) * n].view(len(x), n)
        of_teacher = logits[len(x) * n : (len(x) + len(z)) * n].view(len(z), n)
        return torch.mm(x, w.T, out=of_student), torch.mm(z, v.T, out=of_teacher), w, n

    for first in range(0, width, tile):
        of_student, of_teacher, _, n = products(first)
        _C.head_logsumexp(code, address(of_student), len(x), n, 1 / student_temperature, 0, address(x_lse), threads)
        for t in range(teachers):  # each with its own bias
            own = None if bias is None else (bias if bias.dim() == 1 else bias[t])[first:]
            rows = slice(t * images, (t + 1) * images)
            _C.head_logsumexp(
                code,
                address(of_teacher[rows]),
                images,
                n,
                1 / teacher_temperature,
                address(own),
                address(z_lse[rows]),
                threads,
            )
    for first in range(0, width, tile):
        of_student, of_teacher, w, n = products(first)
        _C.head_gradient(
            code,
            address(of_student),
            address(of_teacher),
            views,
            teachers,
            images,
            n,
            1 / student_temperature,
            1 / teacher_temperature,
            0 if bias is None else address(bias[..., first:]),
            0 if bias is None or bias.dim() == 1 else width,
            address(x_lse),
            address(z_lse),
            address(weights),
            PAIRS[pairs],
            address(losses),
            threads,
        )
        if x_gradient is not None:
            torch.addmm(x_gradient, of_student, w, out=x_gradient)
        if w_gradient is not None:
            torch.mm(of_student.T, x, out=w_gradient[first : first + n])

    pairs_of_rows = (images if weights is None else weights.sum().item()) * count(views, teachers, pairs)
    scale = torch.full((), _inverse(pairs_of_rows * student_temperature), dtype=dtype)
    loss = torch.full((), losses.sum().item() * _inverse(pairs_of_rows), dtype=dtype)
    parts = [None] * views if x_gradient is None else x_gradient.split(images)
    gradients = [
        g.to(v.dtype, copy=True) if k else v.new_empty(0) for g, v, k in zip(parts, student, wanted[:-1], strict=True)
    ]
    of_prototypes = prototypes.new_empty(0) if w_gradient is None else w_gradient.to(prototypes.dtype)
    return loss, [*gradients, of_prototypes], scale
