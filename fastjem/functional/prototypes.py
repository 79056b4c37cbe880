"""The cross-entropy between two temperature-scaled softmaxes over prototypes: SwAV, DINO, iBOT, MSN."""

from collections.abc import Sequence
from typing import Literal, NamedTuple, overload

import torch
import torch.distributed as dist
from torch import Tensor

from fastjem.collectives import Agreement, mean_loss_of_ranks
from fastjem.functional import checks
from fastjem.functional.compiled import over_ranks
from fastjem.functional.precision import loss_dtype
from fastjem.functional.temperature import over
from fastjem.ops.autograd import one_pass, one_pass_with_statistics

PAIRS = ("different", "same", "all")


class TeacherStatistics(NamedTuple):
    """What the loss's pass over the teacher also gives: constants, for the centre and for watching a collapse."""

    mean: Tensor  # [K]: of the logits over views and rows, DINO's batch centre
    usage: Tensor  # [K]: of the probabilities; 1 / K everywhere where prototypes are used alike
    entropy: Tensor  # 0-dim: of a row's probabilities, the mean; 0 is a hard choice, log K no choice at all


@overload
def prototype_cross_entropy(
    student: Tensor | Sequence[Tensor],
    teacher: Tensor | Sequence[Tensor],
    *,
    student_temperature: float | Tensor,
    teacher_temperature: float | Tensor,
    teacher_bias: Tensor | None = None,
    pairs: str = "different",
    weights: Tensor | None = None,
    statistics: Literal[False] = False,
    group: dist.ProcessGroup | None = None,
) -> Tensor: ...
@overload
def prototype_cross_entropy(
    student: Tensor | Sequence[Tensor],
    teacher: Tensor | Sequence[Tensor],
    *,
    student_temperature: float | Tensor,
    teacher_temperature: float | Tensor,
    teacher_bias: Tensor | None = None,
    pairs: str = "different",
    weights: Tensor | None = None,
    statistics: Literal[True],
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, TeacherStatistics]: ...
@over_ranks(
    lambda student, teacher, *, statistics=False, **_: [(), *[(student[0].shape[-1],)] * 2, ()] if statistics else [()],
    packed=lambda results: (results[0], TeacherStatistics(*results[1:])) if len(results) > 1 else results[0],
)
def prototype_cross_entropy(
    student: Tensor | Sequence[Tensor],
    teacher: Tensor | Sequence[Tensor],
    *,
    student_temperature: float | Tensor,
    teacher_temperature: float | Tensor,
    teacher_bias: Tensor | None = None,
    pairs: str = "different",
    weights: Tensor | None = None,
    statistics: bool = False,
    group: dist.ProcessGroup | None = None,
) -> Tensor | tuple[Tensor, TeacherStatistics]:
    """`-sum_k softmax(teacher_t / tau_t + bias)_k log_softmax(student_s / tau_s)_k`, the mean over pairs and rows.

    Each pair (s, t) is of a student view and a teacher view; k counts prototypes. It is SwAV's loss with
    `teacher_bias=sinkhorn_bias(...)`, DINO's with `teacher_bias=-centre / tau_t` (Caron et al. 2021, arXiv 2104.14294,
    equation 1), iBOT's patch loss with pairs "same", MSN's with "all".

    Args:
        student: [S, B, K], or a sequence of S tensors [B, K].
        teacher: [T, B, K], or a sequence of T tensors [B, K]; gets no gradient.
        student_temperature, teacher_temperature: what the logits are divided by: numbers or 0-dim tensors. The
            student's gets its gradient; the teacher's, like the teacher, none.
        teacher_bias: [K] or, one per teacher view, [T, K]; added to teacher / teacher_temperature.
        pairs: "different" (s != t, the same index being the same view), "same" (s = t) or "all".
        weights: [B]: the mean over rows becomes sum(weights * rows) / sum(weights).
        statistics: also return the teacher's, from the same pass; of this rank's rows (NaN of none), and with `weights`
            unweighted.
        group: the process group over whose global batch the mean is taken (batches may be uneven, a rank may have no
            rows).

    Returns:
        0-dim float32 (float64 for float64 inputs), the same on every rank of the group; with `statistics`, a
        `TeacherStatistics` beside it.

    Raises:
        ValueError: for other shapes, dtypes or options, and where no pair of views is left.
    """
    op = "prototype_cross_entropy"
    contract = "student and teacher must be [S, B, K] and [T, B, K], or lists of [B, K]"
    with Agreement(op, group) as ranks:
        student = list_of_views(op, contract, student)
        teacher = list_of_views(op, contract, teacher)
        checks.matrices(op, contract, *student, *teacher, may_be_empty=None if group is None else 0)
        batch, prototypes = student[0].shape
        options = _options(op, student, teacher, prototypes, teacher_bias, pairs, weights, group)
        of_student = checks.positive(op, "student_temperature", student_temperature, student[0])
        of_teacher = checks.positive(op, "teacher_temperature", teacher_temperature, student[0])
        if isinstance(of_teacher, Tensor):
            of_teacher = of_teacher.detach()
        constants = _constants(teacher, student)
        inputs = checks.common(*student)
        ranks.rows_of(inputs[0])
    inputs, of_student = _over_temperature(inputs, of_student)
    constants, of_constants = _over_temperature(constants, of_teacher)
    if group is not None and not batch:
        loss = sum_of_elements(inputs)
        of_nothing = loss.detach().new_full((prototypes,), torch.nan)
        seen = [of_nothing, of_nothing.clone(), of_nothing[0].clone()]
    else:
        arguments = (constants, of_student, of_constants, *options, statistics)
        loss, *seen = one_pass_with_statistics(op, inputs, *arguments, listed=True)
    loss = _mean_of_ranks(loss, batch, weights, group)
    if not statistics:
        return loss
    mean, usage, entropy = seen
    if isinstance(of_teacher, Tensor):  # the operator saw logits over the temperature
        mean = mean * of_teacher.to(mean.dtype)
    return loss, TeacherStatistics(mean, usage, entropy)


@over_ranks()
def prototype_head_cross_entropy(
    student: Tensor | Sequence[Tensor],
    teacher: Tensor | Sequence[Tensor],
    student_prototypes: Tensor,
    teacher_prototypes: Tensor,
    *,
    student_temperature: float | Tensor,
    teacher_temperature: float | Tensor,
    teacher_bias: Tensor | None = None,
    pairs: str = "different",
    weights: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """`prototype_cross_entropy` of `features @ prototypes.T`, without logits in memory.

    They live in tiles, forward and backward. For weight-normalised prototypes pass the weight itself, `g v / |v|`
    [K, D], as `DINOProjectionHead.prototypes()` gives it: autograd takes its gradient on to g and v.

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
    with Agreement(op, group) as ranks:
        student = list_of_views(op, contract, student)
        teacher = list_of_views(op, contract, teacher)
        checks.matrices(op, contract, *student, *teacher, may_be_empty=None if group is None else 0)
        checks.matrices(op, contract, student_prototypes, teacher_prototypes)
        if student_prototypes.shape[1] != student[0].shape[1]:
            checks.fail(op, contract, f"{tuple(student[0].shape)} and {tuple(student_prototypes.shape)}")
        checks.one_device(op, [student[0], student_prototypes])
        options = _options(op, student, teacher, student_prototypes.shape[0], teacher_bias, pairs, weights, group)
        of_student = checks.positive(op, "student_temperature", student_temperature, student[0])
        of_teacher = checks.positive(op, "teacher_temperature", teacher_temperature, student[0])
        if isinstance(of_teacher, Tensor):
            of_teacher = of_teacher.detach()
        inputs = checks.common(*student, student_prototypes)
        *constants, prototypes = _constants([*teacher, teacher_prototypes], inputs)
        ranks.rows_of(inputs[0])
    features, of_student = _over_temperature(inputs[:-1], of_student)
    constants, of_teacher = _over_temperature(constants, of_teacher)
    # Features over a temperature that is a tensor are float32 at least, and prototypes are in the dtype of features.
    inputs = checks.common(*features, inputs[-1])
    prototypes = prototypes.to(constants[0].dtype)
    if group is not None and not student[0].shape[0]:
        loss = sum_of_elements(inputs[:-1]) + 0 * inputs[-1].sum()
    else:
        loss = one_pass(op, inputs, constants, prototypes, of_student, of_teacher, *options, listed=True)
    return _mean_of_ranks(loss, student[0].shape[0], weights, group)


def list_of_views(op: str, contract: str, views: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """V tensors [B, K], from those or from one [V, B, K]."""
    if isinstance(views, Tensor) and views.dim() == 3:
        return list(views.unbind())
    if not isinstance(views, (list, tuple)) or not views:
        checks.fail(op, contract, checks.shape(views))
    return list(views)


def sum_of_elements(views: Sequence[Tensor]) -> Tensor:
    """0-dim, in the dtype of a loss: 0 for views without rows, which so still take part in backward."""
    return torch.stack([x.sum(dtype=loss_dtype(x)) for x in views]).sum()


def _constants(teacher: Sequence[Tensor], student: Sequence[Tensor]) -> list[Tensor]:
    """The teacher's tensors in one dtype, float64 where the student's is (and only there)."""
    teacher = [x.detach() for x in checks.common(*teacher)]
    dtype = checks.common(*student)[0].dtype
    if (teacher[0].dtype == torch.float64) != (dtype == torch.float64):
        teacher = [x.to(torch.float64 if dtype == torch.float64 else torch.float32) for x in teacher]
    return teacher


def _options(
    op: str,
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    prototypes: int,
    teacher_bias: Tensor | None,
    pairs: str,
    weights: Tensor | None,
    group: dist.ProcessGroup | None,
) -> tuple[Tensor | None, str, Tensor | None]:
    """The options, checked, as both operators take them: bias, pairs, weights; the tensors constants."""
    if pairs not in PAIRS:
        checks.fail(op, f"pairs must be one of {', '.join(PAIRS)}", repr(pairs))
    if pairs == "different" and len(student) == len(teacher) == 1:
        checks.fail(op, 'pairs="different" needs at least two views on one side', "one student and one teacher view")
    if teacher_bias is not None:
        if teacher_bias.shape != (prototypes,) and teacher_bias.shape != (len(teacher), prototypes):
            contract = f"teacher_bias must be [{prototypes}] or [{len(teacher)}, {prototypes}]"
            checks.fail(op, contract, tuple(teacher_bias.shape))
        checks.one_device(op, [teacher_bias, student[0]])
        teacher_bias = teacher_bias.detach().to(loss_dtype(student[0]))
    if weights is not None:
        if weights.shape != (student[0].shape[0],):
            checks.fail(op, f"weights must be [{student[0].shape[0]}]", tuple(weights.shape))
        checks.one_device(op, [weights, student[0]])
        weights = weights.detach()
        if group is not None:  # a rank whose rows have no weight adds 0 to the others' mean, and not 0 / 0
            weights = torch.where(weights.sum() == 0, 1.0, weights)
    return teacher_bias, pairs, weights


def _over_temperature(scores: list[Tensor], temperature: float | Tensor) -> tuple[list[Tensor], float]:
    """Scores, and their temperature as an operator takes it; one that is a tensor goes into the scores."""
    if not isinstance(temperature, Tensor):
        return scores, temperature
    return [over(x, temperature) for x in scores], 1.0


def _mean_of_ranks(loss: Tensor, rows: int, weights: Tensor | None, group: dist.ProcessGroup | None) -> Tensor:
    """The loss is the mean over this rank's rows, or over their weights."""
    if group is None:
        return loss
    return mean_loss_of_ranks(loss, rows if weights is None else weights.sum(), group)
