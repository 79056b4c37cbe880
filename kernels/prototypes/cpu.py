"""The prototype operators on the CPU, in C++."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import _C, tiling
from ..arithmetic import compute_dtype, dense_rows, no_gradient
from ..native import CODES, address, gradient_for, in_huge_pages, loss_like, scale_within
from . import head_usage, reference
from .pairing import PAIRS, count


def _dense(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else x.to(dtype).contiguous()


# Sinkhorn ------------------------------------------------------------------------------------------------------------


def _layout(scores: Tensor) -> tuple[int, ...]:
    """Problems, rows, width, and the strides between problems and between rows."""
    x = scores if scores.dim() == 3 else scores[None]
    return (*x.shape, x.stride(0), x.stride(1))


def _arguments(scores: Tensor, epsilon: float) -> tuple:
    """What C++ takes of scores with dense rows."""
    return CODES[scores.dtype], address(scores), *_layout(scores), 1 / epsilon


def _of_prototypes(scores: Tensor) -> Tensor:
    """Memory for [K] or [P, K] float64.

    A potential may be thousands, and nearly cancels with what it is added to: within an operator it stays float64.
    """
    return torch.empty((*scores.shape[:-2], scores.shape[-1]), dtype=torch.float64)


def _bias(arguments: tuple, scores: Tensor, iterations: int, normalize_samples_first: bool) -> Tensor:
    """`reference.sinkhorn_bias` in float64. A step reads one potential and writes another, which take turns."""
    threads = torch.get_num_threads()
    bias = _of_prototypes(scores).zero_() if normalize_samples_first else None
    other = None
    for _ in range(iterations):
        sums = _of_prototypes(scores) if other is None else other
        _C.sinkhorn_step(*arguments, address(bias), 0, address(sums), threads)
        other = bias
        bias = sums.neg_()
    assert bias is not None  # iterations >= 1
    return bias


def _codes(arguments: tuple, scores: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """`reference.sinkhorn_codes` of dense rows and a float64 bias."""
    codes = torch.empty(scores.shape, dtype=dtype)
    _C.sinkhorn_codes(*arguments, address(bias), CODES[dtype], codes.nbytes, address(codes), torch.get_num_threads())
    return codes


def _first(scores: Tensor, rows: Tensor | None) -> Tensor:
    """The rows that count, with dense rows."""
    return dense_rows(scores if rows is None else scores[..., : int(rows), :])


def sinkhorn_step(
    scores: Tensor,
    bias: Tensor | None,
    epsilon: float,
    rows: Tensor | None = None,
    log_floors: Tensor | None = None,
) -> Tensor:
    if scores.dtype not in CODES:
        return reference.sinkhorn_step(scores, bias, epsilon, rows, log_floors)
    if log_floors is not None:
        floors = log_floors if rows is None else log_floors[..., : int(rows)]
        log_floors = _dense(floors, torch.float64)
    scores = _first(scores, rows)
    bias = _dense(bias, torch.float64)
    sums = _of_prototypes(scores)
    arguments = (*_arguments(scores, epsilon), address(bias), address(log_floors))
    _C.sinkhorn_step(*arguments, address(sums), torch.get_num_threads())
    return sums


def sinkhorn_rows(scores: Tensor, bias: Tensor, epsilon: float) -> Tensor:
    if scores.dtype not in CODES:
        return reference.sinkhorn_rows(scores, bias, epsilon)
    scores = dense_rows(scores)
    bias = bias.to(torch.float64).contiguous()
    out = torch.empty(scores.shape[:-1], dtype=torch.float64)
    _C.sinkhorn_rows(*_arguments(scores, epsilon), address(bias), address(out), torch.get_num_threads())
    return out


def sinkhorn_bias(
    scores: list[Tensor], epsilon: float, iterations: int, normalize_samples_first: bool, rows: Tensor | None = None
) -> Tensor:
    if len(scores) > 1:
        bias = reference.potentials(sinkhorn_step, scores, epsilon, iterations, normalize_samples_first)
        return bias.to(compute_dtype(*(x.dtype for x in scores)))
    if scores[0].dtype not in CODES:
        return reference.sinkhorn_bias(scores, epsilon, iterations, normalize_samples_first, rows)
    first = _first(scores[0], rows)
    return _bias(_arguments(first, epsilon), first, iterations, normalize_samples_first).to(compute_dtype(first.dtype))


def sinkhorn_codes(scores: Tensor, bias: Tensor, epsilon: float, dtype: torch.dtype) -> Tensor:
    if scores.dtype not in CODES or dtype not in CODES:
        return reference.sinkhorn_codes(scores, bias, epsilon, dtype)
    scores = dense_rows(scores)
    bias = bias.to(torch.float64).contiguous()
    return _codes(_arguments(scores, epsilon), scores, bias, dtype)


def sinkhorn(
    scores: Tensor, epsilon: float, iterations: int, normalize_samples_first: bool, dtype: torch.dtype
) -> Tensor:
    if scores.dtype not in CODES or dtype not in CODES:
        return reference.sinkhorn(scores, epsilon, iterations, normalize_samples_first, dtype)
    scores = dense_rows(scores)
    arguments = _arguments(scores, epsilon)
    bias = _bias(arguments, scores, iterations, normalize_samples_first)
    return _codes(arguments, scores, bias, dtype)


# Cross-entropy -------------------------------------------------------------------------------------------------------


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
    dtype = compute_dtype(student[0].dtype)
    rows, width = student[0].shape
    if student[0].dtype not in CODES or teacher[0].dtype not in CODES or compute_dtype(teacher[0].dtype) != dtype:
        arguments = (student_temperature, teacher_temperature, teacher_bias, pairs, weights, statistics, wanted)
        return reference.prototype_cross_entropy(student, teacher, *arguments)
    student = [dense_rows(x) for x in student]
    teacher = [dense_rows(x) for x in teacher]
    bias = _dense(teacher_bias, dtype)
    weights = _dense(weights, torch.float64)
    gradients = [gradient_for(x, k) for x, k in zip(student, wanted, strict=True)]
    sums = torch.empty(2, width, dtype=torch.float64) if statistics else None  # the teacher's logits, probabilities
    pairs_of_rows = (rows if weights is None else weights.sum().item()) * count(len(student), len(teacher), pairs)
    scale = _inverse(pairs_of_rows * student_temperature)
    factor = scale_within(scale, student[0].dtype)  # infinite weights give a scale of 0
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
        address(sums),
        torch.get_num_threads(),
    )
    loss = torch.full((), total * _inverse(pairs_of_rows), dtype=dtype)
    of_teacher = []
    if sums is not None:
        teacher_rows = rows * len(teacher)
        mean_logits, mean_probabilities = sums.div_(teacher_rows)
        mean_entropy = torch.full((), entropy / teacher_rows, dtype=dtype)
        of_teacher = [mean_logits.to(dtype, copy=True), mean_probabilities.to(dtype, copy=True), mean_entropy]
    return loss, gradients, torch.full((), scale / factor, dtype=dtype), of_teacher


def _rows(x: Tensor, temperature: float) -> tuple:
    """What C++ takes of scores [N, K] with dense rows."""
    return CODES[x.dtype], address(x), *x.shape, x.stride(0), 1 / temperature


def _add_softmax(x: Tensor, temperature: float, sums: Tensor) -> None:
    """sums [K] float64 += the softmax of the rows."""
    _C.softmax_sums(*_rows(x, temperature), address(sums), torch.get_num_threads())


def _softmax_slope(x: Tensor, temperature: float, slope: Tensor, factor: float, gradient: Tensor) -> None:
    """gradient, which may be x itself: `factor * p * (slope - <p, slope>)`, p the softmax of a row."""
    threads = torch.get_num_threads()
    _C.softmax_slope(*_rows(x, temperature), address(slope), factor, address(gradient), threads)


def mean_entropy(
    scores: list[Tensor], temperature: float, total: Tensor | None, rows: Tensor | None, wanted: list[bool]
) -> tuple[Tensor, list[Tensor], Tensor]:
    dtype = compute_dtype(scores[0].dtype)
    if scores[0].dtype not in CODES:
        return reference.mean_entropy(scores, temperature, total, rows, wanted)
    scores = [dense_rows(x) for x in scores]
    prototypes = scores[0].shape[1]
    if total is None or rows is None:
        n = sum(map(len, scores))
        sums = torch.zeros(prototypes, dtype=torch.float64)
        for x in scores:
            _add_softmax(x, temperature, sums)
    else:
        n = rows.item()
        sums = total.to(torch.float64).contiguous()
    slope = torch.empty(prototypes, dtype=dtype)
    negative_entropy = _C.entropy_slope(CODES[dtype], address(sums), prototypes, n, address(slope))
    scale = 1 / (n * temperature)
    factor = scale if scores[0].dtype == dtype else 1.0  # half precision can't hold the scaled gradient
    gradients = [gradient_for(x, k) for x, k in zip(scores, wanted, strict=True)]
    for x, gradient in zip(scores, gradients, strict=True):
        if gradient.numel():
            _softmax_slope(x, temperature, slope, factor, gradient)
    loss = loss_like(scores[0], negative_entropy + math.log(prototypes))
    return loss, gradients, torch.full((), scale / factor, dtype=dtype)


# Cross-entropy fused with the head -----------------------------------------------------------------------------------


@dataclass
class _HeadTiles:
    """Logits of all rows with some prototypes at a time: a walk over tiles of the prototypes.

    The next tile overwrites the logits of the one before, and kernels write gradients in their place.
    """

    student: Tensor  # [S B, D]
    teacher: Tensor  # [T B, D]
    prototypes: Tensor  # [K, D]
    teacher_prototypes: Tensor  # [K, D]

    def __post_init__(self) -> None:
        rows = len(self.student) + len(self.teacher)
        at_once = tiling.CPU_HEAD_BYTES // (self.student.element_size() * rows) // 64 * 64
        self.width = min(len(self.prototypes), max(64, at_once))
        self.memory = torch.empty(rows * self.width, dtype=self.student.dtype)

    def __iter__(self) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        """(which prototypes, their student logits [S B, n], their teacher logits [T B, n], themselves [n, D])."""
        dtype = self.student.dtype
        for first in range(0, len(self.prototypes), self.width):
            tile = slice(first, min(first + self.width, len(self.prototypes)))
            prototypes = self.prototypes[tile].to(dtype)
            teacher_prototypes = self.teacher_prototypes[tile].to(dtype)
            n = len(prototypes)
            split = len(self.student) * n
            student_logits = self.memory[:split].view(len(self.student), n)
            teacher_logits = self.memory[split : split + len(self.teacher) * n].view(len(self.teacher), n)
            torch.mm(self.student, prototypes.T, out=student_logits)
            torch.mm(self.teacher, teacher_prototypes.T, out=teacher_logits)
            yield tile, student_logits, teacher_logits, prototypes


def _head_logsumexps(
    tiles: _HeadTiles, images: int, student_temperature: float, teacher_temperature: float, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Of the student's rows [S B] and the teacher's [T B], float64."""
    student_lse = torch.full((len(tiles.student),), -math.inf, dtype=torch.float64)
    teacher_lse = torch.full((len(tiles.teacher),), -math.inf, dtype=torch.float64)

    def add(logits: Tensor, temperature: float, view_bias: Tensor | None, lse: Tensor) -> None:
        _C.head_logsumexp(
            CODES[logits.dtype],
            address(logits),
            *logits.shape,
            1 / temperature,
            address(view_bias),
            address(lse),
            torch.get_num_threads(),
        )

    for tile, student_logits, teacher_logits, _ in tiles:
        add(student_logits, student_temperature, None, student_lse)
        views = zip(teacher_logits.split(images), teacher_lse.split(images), strict=True)
        for i, (view_logits, view_lse) in enumerate(views):
            view_bias = bias if bias is None or bias.dim() == 1 else bias[i]
            add(view_logits, teacher_temperature, None if view_bias is None else view_bias[tile], view_lse)
    return student_lse, teacher_lse


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
    """Two walks over the prototypes: logits for the logsumexps; the logits again, for loss and gradients."""
    *student, prototypes = inputs
    dtype = compute_dtype(student[0].dtype)
    views, teachers, images = len(student), len(teacher), len(student[0])
    x = torch.cat([v.to(dtype) for v in student])  # [S B, D]
    z = torch.cat([v.to(dtype) for v in teacher])  # [T B, D]
    bias = _dense(teacher_bias, dtype)
    weights = _dense(weights, torch.float64)
    tiles = _HeadTiles(x, z, prototypes, teacher_prototypes)
    student_lse, teacher_lse = _head_logsumexps(tiles, images, student_temperature, teacher_temperature, bias)
    losses = torch.zeros(images, dtype=torch.float64)
    x_gradient = torch.zeros_like(x) if any(wanted[:-1]) else None
    w_gradient = torch.empty(prototypes.shape, dtype=dtype) if wanted[-1] else None
    for tile, student_logits, teacher_logits, w in tiles:
        _C.head_gradient(
            CODES[dtype],
            address(student_logits),
            address(teacher_logits),
            views,
            teachers,
            images,
            len(w),
            1 / student_temperature,
            1 / teacher_temperature,
            0 if bias is None else address(bias[..., tile.start :]),
            0 if bias is None or bias.dim() == 1 else len(prototypes),
            address(student_lse),
            address(teacher_lse),
            address(weights),
            PAIRS[pairs],
            address(losses),
            torch.get_num_threads(),
        )
        logits_gradient = student_logits  # in whose place it is now
        if x_gradient is not None:
            x_gradient.addmm_(logits_gradient, w)
        if w_gradient is not None:
            torch.mm(logits_gradient.T, x, out=w_gradient[tile])

    pairs_of_rows = (images if weights is None else weights.sum().item()) * count(views, teachers, pairs)
    scale = torch.full((), _inverse(pairs_of_rows * student_temperature), dtype=dtype)
    loss = torch.full((), losses.sum().item() * _inverse(pairs_of_rows), dtype=dtype)
    gradients = [no_gradient(v) for v in inputs]
    for i, view in enumerate(student):
        if wanted[i]:
            gradients[i] = x_gradient[i * images : (i + 1) * images].to(view.dtype, copy=True)
    if w_gradient is not None:
        gradients[-1] = w_gradient.to(prototypes.dtype)
    return loss, gradients, scale


# And how much prototypes are used ------------------------------------------------------------------------------------

_KERNELS = head_usage.Kernels(
    cross_entropy=prototype_cross_entropy,
    add_softmax=_add_softmax,
    softmax_slope=lambda scores, temperature, slope: _softmax_slope(scores, temperature, slope, 1.0, scores),
    memory=lambda features, numbers: in_huge_pages(features.new_empty(numbers)),
)


def prototype_head_usage(*sides) -> tuple[Tensor, Tensor]:
    return head_usage.forward(head_usage.Sides(*sides), _KERNELS)


def prototype_head_usage_backward(*arguments) -> list[Tensor]:
    *sides, upstream, slope, wanted = arguments
    return head_usage.backward(head_usage.Sides(*sides), upstream, slope, wanted, _KERNELS)
