"""The cross-entropy between two temperature-scaled softmaxes over prototypes: SwAV, DINO, iBOT, MSN."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastjem.functional import _checks as check
from fastjem.functional._collectives import world_size
from fastjem.ops.autograd import one_pass

PAIRS = ("different", "same", "all")


class TeacherStatistics(NamedTuple):
    """What the loss's pass over the teacher also gives: constants, for the centre and for watching a collapse."""

    mean: Tensor  # [K]: of the logits over views and rows, DINO's batch centre
    usage: Tensor  # [K]: of the probabilities; 1 / K everywhere where prototypes are used alike
    entropy: Tensor  # 0-dim: of a row's probabilities, the mean; 0 is a hard choice, log K no choice at all


def prototype_cross_entropy(
    student: Tensor | Sequence[Tensor],
    teacher: Tensor | Sequence[Tensor],
    *,
    student_temperature: float,
    teacher_temperature: float,
    teacher_bias: Tensor | None = None,
    pairs: str = "different",
    weights: Tensor | None = None,
    statistics: bool = False,
    group: dist.ProcessGroup | None = None,
) -> Tensor | tuple[Tensor, TeacherStatistics]:
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
        statistics: also return the teacher's, from the same pass; of this rank's rows, and with `weights` unweighted.
        group: the process group over whose global batch the mean is taken (batches may be uneven).

    Returns:
        0-dim float32 (float64 for float64 inputs), the same on every rank of the group; with `statistics`, a
        `TeacherStatistics` beside it.

    Raises:
        ValueError: for other shapes, dtypes or options, and where no pair of views is left.
    """
    op, contract = "prototype_cross_entropy", "student and teacher must be [S, B, K] and [T, B, K], or lists of [B, K]"
    student, teacher = _views(op, contract, student), _views(op, contract, teacher)
    check.matrices(op, contract, *student, *teacher)
    batch, prototypes = student[0].shape
    bias, weights = _check_options(
        op, student, teacher, prototypes, student_temperature, teacher_temperature, teacher_bias, pairs, weights
    )
    loss = one_pass(
        op,
        check.common(*student),
        _constants(teacher, student),
        float(student_temperature),
        float(teacher_temperature),
        bias,
        pairs,
        weights,
        statistics,
        listed=True,
    )
    loss, *of_teacher = loss if statistics else (loss,)
    loss = _mean_over_ranks(loss, batch if weights is None else weights.sum(), group)
    return (loss, TeacherStatistics(*of_teacher)) if statistics else loss


def prototype_head_cross_entropy(
    student: Tensor | Sequence[Tensor],
    teacher: Tensor | Sequence[Tensor],
    student_prototypes: Tensor,
    teacher_prototypes: Tensor,
    *,
    student_temperature: float,
    teacher_temperature: float,
    teacher_bias: Tensor | None = None,
    pairs: str = "different",
    weights: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """`prototype_cross_entropy` of `features @ prototypes.T`, without logits in memory: they live in tiles, forward
    and backward.

    For weight-normalised prototypes pass the weight itself, `g v / |v|` of width [K, D], as
    `DINOProjectionHead.prototypes()`
    gives it: autograd takes its gradient on to g and v.

    Args:
        student: [S, B, D], or a sequence of S tensors [B, D]: features as the last layer takes them.
        teacher: [T, B, D], or a sequence of T tensors [B, D]; gets no gradient.
        student_prototypes: [K, D], the weight of the last layer.
        teacher_prototypes: [K, D]; gets no gradient.
        student_temperature, teacher_temperature, teacher_bias, pairs, weights, group: as for `prototype_cross_entropy`.

    Returns:
        0-dim float32 (float64 for float64 inputs).

    Raises:
        ValueError: for other shapes, dtypes or options, and where no pair of views is left.
    """
    op = "prototype_head_cross_entropy"
    contract = "student and teacher must be [S, B, D] and [T, B, D], or lists of [B, D], both prototypes [K, D]"
    student, teacher = _views(op, contract, student), _views(op, contract, teacher)
    check.matrices(op, contract, *student, *teacher)
    check.matrices(op, contract, student_prototypes, teacher_prototypes)
    if student_prototypes.shape[1] != student[0].shape[1]:
        check.fail(op, contract, f"{tuple(student[0].shape)} and {tuple(student_prototypes.shape)}")
    check.one_device(op, [student[0], student_prototypes])
    bias, weights = _check_options(
        op,
        student,
        teacher,
        len(student_prototypes),
        student_temperature,
        teacher_temperature,
        teacher_bias,
        pairs,
        weights,
    )
    inputs = check.common(*student, student_prototypes)
    *constants, prototypes = _constants([*teacher, teacher_prototypes], inputs)
    loss = one_pass(
        op,
        inputs,
        constants,
        prototypes,
        float(student_temperature),
        float(teacher_temperature),
        bias,
        pairs,
        weights,
        listed=True,
    )
    return _mean_over_ranks(loss, len(student[0]) if weights is None else weights.sum(), group)


def _views(op: str, contract: str, views: Tensor | Sequence[Tensor]) -> list[Tensor]:
    if isinstance(views, Tensor) and views.dim() == 3:
        return list(views.unbind())
    if not isinstance(views, (list, tuple)) or not views:
        check.fail(op, contract, check.shape(views))
    return list(views)


def _constants(teacher: Sequence[Tensor], student: Sequence[Tensor]) -> list[Tensor]:
    """The teacher's tensors in one dtype, float64 where the student's is (and only there)."""
    teacher = [x.detach() for x in check.common(*teacher)]
    dtype = check.common(*student)[0].dtype
    if (teacher[0].dtype == torch.float64) != (dtype == torch.float64):
        teacher = [x.to(torch.float64 if dtype == torch.float64 else torch.float32) for x in teacher]
    return teacher


def _check_options(
    op: str,
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    prototypes: int,
    student_temperature: float,
    teacher_temperature: float,
    teacher_bias: Tensor | None,
    pairs: str,
    weights: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """The bias and the weights as the operators want them: constants."""
    check.positive(op, student_temperature=student_temperature, teacher_temperature=teacher_temperature)
    if pairs not in PAIRS:
        check.fail(op, f"pairs must be one of {', '.join(PAIRS)}", repr(pairs))
    if pairs == "different" and len(student) == len(teacher) == 1:
        check.fail(op, 'pairs="different" needs at least two views on one side', "one student and one teacher view")
    if teacher_bias is not None:
        if teacher_bias.shape not in {(prototypes,), (len(teacher), prototypes)}:
            check.fail(
                op, f"teacher_bias must be [{prototypes}] or [{len(teacher)}, {prototypes}]", tuple(teacher_bias.shape)
            )
        check.one_device(op, [teacher_bias, student[0]])
        teacher_bias = teacher_bias.detach().to(torch.float64 if student[0].dtype == torch.float64 else torch.float32)
    if weights is not None:
        if weights.shape != (len(student[0]),):
            check.fail(op, f"weights must be [{len(student[0])}]", tuple(weights.shape))
        check.one_device(op, [weights, student[0]])
        weights = weights.detach()
    return teacher_bias, weights


class _MeanOverRanks(torch.autograd.Function):
    """The weighted mean of all ranks' losses; the gradient, times the ranks (which DDP divides by), is this rank's
    part."""

    @staticmethod
    def forward(ctx, loss: Tensor, weight: Tensor, group: dist.ProcessGroup) -> Tensor:
        packed = torch.stack([loss.double() * weight, weight])
        dist.all_reduce(packed, group=group)
        ctx.save_for_backward((weight / packed[1] * world_size(group)).to(loss.dtype))
        return (packed[0] / packed[1]).to(loss.dtype)

    @staticmethod
    def backward(ctx, upstream: Tensor):
        return upstream * ctx.saved_tensors[0], None, None


def _mean_over_ranks(loss: Tensor, weight: float | Tensor, group: dist.ProcessGroup | None) -> Tensor:
    if group is None:
        return loss
    weight = (
        weight.double()
        if isinstance(weight, Tensor)
        else torch.full((), weight, dtype=torch.float64, device=loss.device)
    )
    return _MeanOverRanks.apply(loss, weight, group)
