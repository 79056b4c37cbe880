"""Sinkhorn, and the cross-entropy between prototype scores: SwAV, DINO."""

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, softmax

import fastjem.functional as F
from fastjem.bench.case import Case, Draw

EPSILON, ITERATIONS = 0.05, 3  # SwAV's; its scores are cosines, so small
SWAV_TEMPERATURE, DINO_TEMPERATURE, TEACHER_TEMPERATURE, CENTER_MOMENTUM = 0.1, 0.1, 0.04, 0.9
SCORE_STD = 0.1


@torch.no_grad()
def sinkhorn(scores: Tensor) -> Tensor:
    """SwAV's own code."""
    q = torch.exp(scores.float() / EPSILON).T
    k, b = q.shape
    q = q / q.sum()
    for _ in range(ITERATIONS):
        q = q / q.sum(1, keepdim=True) / k
        q = q / q.sum(0, keepdim=True) / b
    return (q * b).T


def lightly_sinkhorn():
    from lightly.loss.swav_loss import sinkhorn

    return lambda scores: sinkhorn(scores, iterations=ITERATIONS, epsilon=EPSILON)


def sinkhorn_case(b: int, k: int, dtype: torch.dtype = torch.float32, **options) -> Case:
    """Each iteration's prototype sums depend on all of the matrix: it is read once per iteration and once for the codes
    (which are written once, in float32)."""
    return Case(
        "sinkhorn", f"{b} x {k}", lambda draw: (draw.normal(b, k, scale=SCORE_STD),), sinkhorn,
        lambda scores: F.sinkhorn(scores, epsilon=EPSILON, iterations=ITERATIONS), dtype=dtype,
        peers={"lightly": lightly_sinkhorn} if dtype == torch.float32 else {},  # in half precision theirs overflows
        bytes=b * k * ((ITERATIONS + 1) * dtype.itemsize + 4), **options,
    )  # fmt: skip


def swav(high: list[Tensor], low: list[Tensor]) -> Tensor:
    loss, crops = 0.0, [*high, *low]
    for i, crop in enumerate(high):
        codes = sinkhorn(crop.detach())
        for v, scores in enumerate(crops):
            if v != i:
                loss = loss - (codes * log_softmax(scores / SWAV_TEMPERATURE, 1)).sum(1).mean()
    return loss / (len(high) * (len(crops) - 1))


def our_swav(high: list[Tensor], low: list[Tensor]) -> Tensor:
    return F.prototype_cross_entropy(
        [*high, *low],
        high,
        student_temperature=SWAV_TEMPERATURE,
        teacher_temperature=EPSILON,
        teacher_bias=torch.stack([F.sinkhorn_bias(x, epsilon=EPSILON, iterations=ITERATIONS) for x in high]),
    )


def lightly_swav():
    from lightly.loss import SwaVLoss

    return SwaVLoss(temperature=SWAV_TEMPERATURE, sinkhorn_iterations=ITERATIONS, sinkhorn_epsilon=EPSILON)


def swav_case(high: int, low: int, b: int, k: int, dtype: torch.dtype = torch.float32, **options) -> Case:
    """All crops are read once for the loss and their gradients are written; before that, Sinkhorn reads the
    high-resolution ones once per iteration."""

    def inputs(draw: Draw) -> tuple[list[Tensor], list[Tensor]]:
        return tuple([draw.normal(b, k, scale=SCORE_STD, gradient=True) for _ in range(n)] for n in (high, low))

    return Case(
        "prototype_cross_entropy", f"SwAV {high} + {low}, {b} x {k}", inputs, swav, our_swav, dtype=dtype,
        uses=("sinkhorn_bias",), peers={"lightly": lightly_swav},
        bytes=b * k * dtype.itemsize * (2 * (high + low) + ITERATIONS * high), **options,
    )  # fmt: skip


def update_center(teacher: list[Tensor], center: Tensor) -> None:
    with torch.no_grad():
        center.lerp_(sum(x.float().mean(0) for x in teacher) / len(teacher), 1 - CENTER_MOMENTUM)


def dino(student: list[Tensor], teacher: list[Tensor], center: Tensor) -> Tensor:
    loss, pairs = 0.0, 0
    targets = [softmax((t - center) / TEACHER_TEMPERATURE, 1) for t in teacher]
    predictions = [log_softmax(s / DINO_TEMPERATURE, 1) for s in student]
    for i, target in enumerate(targets):
        for j, prediction in enumerate(predictions):
            if i != j:
                loss, pairs = loss - (target * prediction).sum(1).mean(), pairs + 1
    update_center(teacher, center)
    return loss / pairs


def our_dino(student: list[Tensor], teacher: list[Tensor], center: Tensor) -> Tensor:
    loss = F.prototype_cross_entropy(
        student,
        teacher,
        student_temperature=DINO_TEMPERATURE,
        teacher_temperature=TEACHER_TEMPERATURE,
        teacher_bias=-center / TEACHER_TEMPERATURE,
    )
    update_center(teacher, center)
    return loss


def lightly_dino(k: int):
    def load():
        from lightly.loss import DINOLoss

        loss = DINOLoss(k, student_temp=DINO_TEMPERATURE, center_momentum=CENTER_MOMENTUM)

        def run(student: list[Tensor], teacher: list[Tensor], center: Tensor) -> Tensor:
            loss.center = center.view(1, 1, -1)
            return loss(teacher, student, teacher_temp=TEACHER_TEMPERATURE)

        return run

    return load


def dino_case(teachers: int, students: int, b: int, k: int, dtype: torch.dtype = torch.float32, **options) -> Case:
    """Both sides' logits are read once (for the centre's update too), the students' gradients are written."""

    def inputs(draw: Draw) -> tuple[list[Tensor], list[Tensor], Tensor]:
        student = [draw.normal(b, k, gradient=True) for _ in range(students)]
        return student, [draw.normal(b, k) for _ in range(teachers)], draw.normal(k, scale=0.1, dtype=torch.float32)

    return Case(
        "prototype_cross_entropy", f"DINO {teachers} + {students - teachers}, {b} x {k}", inputs, dino, our_dino,
        dtype=dtype, peers={"lightly": lightly_dino(k)},
        bytes=b * k * dtype.itemsize * (2 * students + teachers), **options,
    )  # fmt: skip


CASES = [
    sinkhorn_case(4096, 3000),
    sinkhorn_case(16384, 3000, torch.bfloat16, devices=("cuda",)),
    sinkhorn_case(2048, 65536, torch.bfloat16, devices=("cuda",)),
    swav_case(2, 6, 256, 3000, full_only=("cuda",)),
    swav_case(2, 6, 256, 3000, torch.bfloat16, devices=("cuda",)),
    dino_case(2, 10, 64, 65536, full_only=("cuda",)),
    dino_case(2, 10, 64, 65536, torch.bfloat16, devices=("cuda",)),
    dino_case(2, 10, 1024, 65536, torch.bfloat16, devices=("cuda",), full_only=("cuda",)),
]
