"""What users call: arguments are checked, and operators become losses that autograd can differentiate."""

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any, NoReturn

import torch
from torch import Tensor

from .arithmetic import widest_dtype
from .operators import ops

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def nt_xent(z0: Tensor, z1: Tensor, *, temperature: float = 0.5) -> Tensor:
    """Normalised-temperature cross-entropy, SimCLR's loss (Chen et al. 2020, arXiv 2002.05709, equation 1).

    The mean over all 2 N rows of `cross_entropy(cosines with all other rows / temperature, the other view)`, in
    O(N D) memory on a GPU.

    Args:
        z0, z1: [N, D], two views of N images; normalised inside. Both get their gradient.
        temperature: what the cosines are divided by.

    Returns:
        0-dim float32 (float64 for float64 inputs).

    Raises:
        ValueError: for other shapes, dtypes or temperatures.
    """
    _check_matrices("nt_xent", "z0 and z1 must be [N, D], floating-point, not empty", [z0, z1])
    _check_positive("nt_xent", "temperature", temperature)
    return _NTXent.apply(float(temperature), torch.stack([z0, z1]))


class _NTXent(torch.autograd.Function):
    """The loss in one pass over the tiles of similarities, its gradient in a second."""

    @staticmethod
    def forward(ctx: Any, temperature: float, z: Tensor) -> Tensor:
        rows = z.detach()
        positives, lse = ops.nt_xent(rows, rows, 0, temperature, False, True)
        ctx.save_for_backward(rows, lse)
        ctx.temperature = temperature
        return (lse - positives).mean().to(_loss_dtype(z))

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[None, Tensor]:
        rows, lse = ctx.saved_tensors
        gradient = ops.nt_xent_backward(rows, rows, lse, lse, None, 0, ctx.temperature, False, True)
        return None, _scaled(gradient, upstream / (lse.numel() * ctx.temperature))


def sinkhorn(
    scores: Tensor,
    *,
    epsilon: float = 0.05,
    iterations: int = 3,
    normalize_samples_first: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Sinkhorn-Knopp codes of SwAV (Caron et al. 2020, arXiv 2006.09882, section 3.1), DINOv2 and MSN.

    Q = exp(scores / epsilon), then `iterations` times: each prototype divided by its sum over samples, each sample by
    its sum over prototypes. In the log domain, so that no finite score overflows or underflows. Not differentiable.

    Args:
        scores: [B, K], samples by prototypes.
        epsilon: what the scores are divided by.
        iterations: at least 1.
        normalize_samples_first: divide samples by their sums before the first iteration too, as MSN does.
        dtype: of the codes; None: float32 (float64 for float64 scores).

    Returns:
        [B, K] whose rows sum to 1.

    Raises:
        ValueError: for other shapes, dtypes or options.
    """
    _check_matrices("sinkhorn", "scores must be [B, K], floating-point, not empty", [scores])
    _check_positive("sinkhorn", "epsilon", epsilon)
    if not isinstance(iterations, int) or iterations < 1:
        _fail("sinkhorn", "iterations must be a whole number from 1", iterations)
    if dtype not in (None, *FLOATS):
        _fail("sinkhorn", "dtype must be float32, float64, bfloat16 or float16", dtype)
    options = float(epsilon), iterations, bool(normalize_samples_first), dtype or _loss_dtype(scores)
    return ops.sinkhorn(scores.detach(), *options)


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
    """`-sum_k softmax(teacher_t / tau_t + bias)_k log_softmax(student_s / tau_s)_k`, the mean over pairs and rows.

    Each pair (s, t) is of a student view and a teacher view. It is DINO's loss with `teacher_bias=-centre / tau_t`
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
    op = "prototype_cross_entropy"
    contract = "student and teacher must be [S, B, K] and [T, B, K], or lists of [B, K], floating-point, not empty"
    students = list(student)
    teachers = [view.detach() for view in teacher]
    if not students or not teachers:
        _fail(op, contract, f"{len(students)} and {len(teachers)} views")
    _check_matrices(op, contract, [*students, *teachers])
    rows, prototypes = students[0].shape
    _check_positive(op, "student_temperature", student_temperature)
    _check_positive(op, "teacher_temperature", teacher_temperature)
    if pairs not in ("different", "same", "all"):
        _fail(op, 'pairs must be "different", "same" or "all"', repr(pairs))
    if pairs == "different" and len(students) == 1 == len(teachers):
        _fail(op, "pairs of different views need a second view", "1 and 1")
    if teacher_bias is not None and tuple(teacher_bias.shape) not in ((prototypes,), (len(teachers), prototypes)):
        _fail(op, f"teacher_bias must be [{prototypes}] or [{len(teachers)}, {prototypes}]", tuple(teacher_bias.shape))
    if weights is not None and tuple(weights.shape) != (rows,):
        _fail(op, f"weights must be [{rows}]", tuple(weights.shape))
    constants = [None if x is None else x.detach() for x in (teacher_bias, weights)]
    wanted = [torch.is_grad_enabled() and view.requires_grad for view in students]
    options = float(student_temperature), float(teacher_temperature), constants[0], pairs, constants[1], False, wanted
    return _PrototypeCrossEntropy.apply(teachers, options, *students)


class _PrototypeCrossEntropy(torch.autograd.Function):
    """The gradients are computed along with the loss and wait, unscaled, for the upstream gradient."""

    @staticmethod
    def forward(ctx: Any, teacher: list[Tensor], options: tuple, *student: Tensor) -> Tensor:
        views = [view.detach() for view in student]
        loss, gradients, scale, _ = ops.prototype_cross_entropy(views, teacher, *options)
        ctx.save_for_backward(scale, *gradients)
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple:
        scale, *gradients = ctx.saved_tensors
        wanted = ctx.needs_input_grad[2:]
        factor = upstream * scale
        return None, None, *[_scaled(g, factor) if want else None for g, want in zip(gradients, wanted, strict=True)]


def _scaled(gradient: Tensor, factor: Tensor) -> Tensor:
    """`gradient * factor` in float32 or wider, so that a factor below float16's range doesn't vanish, then rounded."""
    wide = torch.float64 if gradient.dtype == torch.float64 else torch.float32
    return (gradient.to(wide) * factor.to(wide)).to(gradient.dtype)


def _loss_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 == widest_dtype(x.device) else torch.float32


def _fail(op: str, contract: str, came: object) -> NoReturn:
    raise ValueError(f"{op}: {contract}, got {came}")


def _check_positive(op: str, name: str, value: float) -> None:
    if not isinstance(value, Real) or not 0 < value < math.inf:
        came = "a tensor" if isinstance(value, Tensor) else repr(value)
        _fail(op, f"{name} must be a positive number", came)


def _check_matrices(op: str, contract: str, tensors: Sequence[Tensor]) -> None:
    """Not empty, of one shape, dtype and device: kernels are given addresses."""
    for x in tensors:
        if not isinstance(x, Tensor) or x.dim() != 2 or x.dtype not in FLOATS or not x.numel():
            _fail(op, contract, f"{tuple(x.shape)} {x.dtype}" if isinstance(x, Tensor) else type(x).__name__)
    kinds = {(tuple(x.shape), x.dtype, x.device) for x in tensors}
    if len(kinds) > 1:
        _fail(op, f"{contract}, of one shape, dtype and device", " and ".join(sorted(map(str, kinds))))
