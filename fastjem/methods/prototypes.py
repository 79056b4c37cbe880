"""What DINO, SwAV and their kin have in common: the cross-entropy of scores against prototypes."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import linear, normalize

import fastjem.functional as F
from fastjem.functional.held import scores_fit
from fastjem.functional.precision import in_float32
from fastjem.nn.parts import Center, linear_warmup


def features_scores_fit(student: Sequence[Tensor], teacher: Sequence[Tensor], prototypes: int) -> bool:
    """`scores_fit` of features [B, D] a view, of both sides, against K prototypes."""
    student_rows = sum(x.shape[0] for x in student)
    teacher_rows = sum(x.shape[0] for x in teacher)
    return scores_fit(student_rows, teacher_rows, prototypes, student[0].element_size())


def cross_entropy_of_features(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    student_prototypes: Tensor,
    teacher_prototypes: Tensor,
    *,
    student_temperature: float,
    teacher_temperature: float,
    teacher_bias: Tensor,
    pairs: str = "different",
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`fastjem.functional.prototype_cross_entropy` of `features @ prototypes.T`, and the mean of the teacher's scores.

    Where `scores_fit` lets them be held, the scores are computed by one library call a side, else tile by tile inside
    the head-fused operator, which holds none of them.

    Args:
        student: S tensors [B, D]; teacher: T tensors [B, D], constants.
        student_prototypes, teacher_prototypes: [K, D].
        teacher_bias: [K] or [T, K].
        pairs, weights: as for `prototype_cross_entropy`; iBOT's patches are the pairs "same".

    Returns:
        The loss, 0-dim, and the mean [K] over this rank's teacher views and rows; those of weight 0 don't count.
    """
    options = {
        "student_temperature": student_temperature,
        "teacher_temperature": teacher_temperature,
        "teacher_bias": teacher_bias,
        "pairs": pairs,
        "weights": weights,
    }
    if features_scores_fit(student, teacher, len(student_prototypes)):
        student_scores = linear(torch.cat(list(student)), student_prototypes).split([len(x) for x in student])
        with torch.no_grad():
            teacher_scores = linear(torch.cat(list(teacher)), teacher_prototypes).split([len(x) for x in teacher])
        if weights is None:
            loss, statistics = F.prototype_cross_entropy(student_scores, teacher_scores, **options, statistics=True)
            return loss, statistics.mean
        loss = F.prototype_cross_entropy(student_scores, teacher_scores, **options)
    else:
        loss = F.prototype_head_cross_entropy(student, teacher, student_prototypes, teacher_prototypes, **options)
    return loss, _mean_scores(teacher, teacher_prototypes, weights)


def cross_entropy_of_labels(
    features: Tensor, prototypes: Tensor, labels: Tensor, temperature: float, weights: Tensor | None = None
) -> Tensor:
    """`cross_entropy(features @ prototypes.T / temperature, labels)`, the mean over rows or over their weights.

    Where the scores aren't held (`scores_fit`), it is InfoNCE among the prototypes: a row's own is its positive, and
    all but its own are its negatives.

    Args:
        features: [N, D], of length one.
        prototypes: [K, D], of length one. Constants, or they get a gradient.
        labels: [N] int64 in [0, K).
        weights: [N], constants.

    Returns:
        0-dim float32 (float64 for float64 features).
    """
    if scores_fit(len(features), 0, len(prototypes), features.element_size()):
        scores = linear(features, prototypes.to(features.dtype)) / temperature
        return F.cross_entropy(scores, labels, weights=weights)
    ids = torch.arange(len(prototypes), device=labels.device)
    prototypes = prototypes.to(features.dtype)
    return F.info_nce(
        features,
        prototypes[labels],
        prototypes,
        temperature=temperature,
        weights=weights,
        ids=labels,
        negative_ids=ids,
    )


@torch.no_grad()
def _mean_scores(features: Sequence[Tensor], prototypes: Tensor, weights: Tensor | None) -> Tensor:
    """[K]: the mean over views and rows, of which those of weight 0 don't count, is a product with the mean feature."""
    x = in_float32(torch.cat(list(features)))
    if weights is None:
        return linear(x.mean(0), in_float32(prototypes))
    counts = (weights > 0).to(x.dtype).repeat(len(features))
    return linear(counts @ x / counts.sum().clamp(min=1), in_float32(prototypes))


class TeacherCentre(Center):
    """What DINO and its kin do to the teacher's scores: a temperature that may warm up, and a bias that keeps
    prototypes in use, by a running mean or by Sinkhorn.

    The operators take their temperature as a number. The schedule, a tensor, goes into the teacher's features: scaled
    by how much sharper than at the end the softmax is now, they give logits scaled so.

    Args:
        prototypes: K.
        centring: "mean" (a running mean of the teacher's scores is taken from them) or "sinkhorn".
        momentum: of the running mean.
        first, temperature: the teacher's temperature at step 0, and from step `warmup_steps` on.
    """

    def __init__(
        self, prototypes: int, *, centring: str, momentum: float, first: float, temperature: float, warmup_steps: int
    ):
        super().__init__((prototypes,), momentum=momentum)
        self.centring = centring
        self.first = first
        self.temperature = temperature
        self.warmup_steps = warmup_steps

    def now(self, step: Tensor) -> Tensor:
        """0-dim, the temperature of a step."""
        return linear_warmup(step, self.first, self.temperature, self.warmup_steps)

    def sharpened(self, features: Tensor, step: Tensor) -> Tensor:
        """Features [N, D] -> of unit length, times `temperature / now`."""
        return normalize(features, dim=1) * (self.temperature / self.now(step)).to(features.dtype)

    def bias(
        self,
        views: Sequence[Tensor],
        prototypes: Tensor,
        step: Tensor,
        group: dist.ProcessGroup | None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """[K], of sharpened features [B, D] a view; Sinkhorn's of all views together, as DINOv2's code has it.

        rows: 0-dim int64, how many of the first rows of all views count; None: all.
        """
        if self.centring == "mean":
            return -self.value / self.now(step)
        scores = linear(torch.cat(list(views)), prototypes)
        bias = F.sinkhorn_bias(scores, epsilon=self.temperature, rows=rows, group=group)
        if rows is None:
            return bias
        # Where no row counts on any rank, there is a loss of weight 0 all the same, which must be a number.
        return torch.where((bias == torch.inf).all(), 0.0, bias)

    def hold_scores(self, mean: Tensor, rows: int | Tensor, step: Tensor) -> None:
        """The mean [K] of a micro-batch's scores of sharpened features, over so many rows, for `step_ends`."""
        self.hold(mean * (self.now(step) / self.temperature), rows)


def check_centring(who: str, centring: str) -> None:
    if centring not in ("mean", "sinkhorn"):
        raise ValueError(f"{who}: centring must be mean or sinkhorn, got {centring!r}")
