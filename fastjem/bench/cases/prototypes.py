"""Sinkhorn, the cross-entropy between prototype scores (SwAV, DINO), and what keeps both apart (KoLeo, MSN)."""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, normalize, pairwise_distance, softmax

import fastjem.functional as F
from fastjem.bench.case import SMALL, Case, Draw, at_least_float32

EPSILON, ITERATIONS = 0.05, 3  # SwAV's; its scores are cosines, so small
SWAV_TEMPERATURE, DINO_TEMPERATURE, TEACHER_TEMPERATURE, CENTER_MOMENTUM = 0.1, 0.1, 0.04, 0.9
SCORE_STD = 0.1


@torch.no_grad()
def sinkhorn(scores: Tensor) -> Tensor:
    """SwAV's own code."""
    q = torch.exp(at_least_float32(scores) / EPSILON).T
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


def positions_case(positions: int, b: int, k: int, **options) -> Case:
    """CAPI's: a Sinkhorn for each position, over the images. The eager code does all of them at once, too."""

    @torch.no_grad()
    def eager(scores: Tensor) -> Tensor:
        codes = (scores.transpose(0, 1) / EPSILON).exp()
        for _ in range(ITERATIONS):
            codes = codes / codes.sum(1, keepdim=True)
            codes = codes / codes.sum(2, keepdim=True)
        return codes

    return Case(
        "sinkhorn", f"{b} x {positions} x {k}", lambda draw: (draw.normal(b, positions, k, scale=SCORE_STD),), eager,
        lambda scores: F.sinkhorn(scores.transpose(0, 1), epsilon=EPSILON, iterations=ITERATIONS),
        bytes=b * positions * k * 4 * (ITERATIONS + 2), **options,
    )  # fmt: skip


def potentials(codes: Tensor, scores: Tensor) -> Tensor:
    """The prototypes' potentials [K], by the codes' first row; less their mean, a constant that codes don't tell."""
    f = codes[0].log() - at_least_float32(scores[0]) / EPSILON
    return f - f.mean()


def our_potentials(scores: Tensor) -> Tensor:
    f = F.sinkhorn_bias(scores, epsilon=EPSILON, iterations=ITERATIONS)
    return f - f.mean()


def lightly_potentials():
    theirs = lightly_sinkhorn()
    return lambda scores: potentials(theirs(scores), scores)


def sinkhorn_bias_case(b: int, k: int, dtype: torch.dtype = torch.float32, **options) -> Case:
    """Sinkhorn where the codes needn't exist: the matrix is read once per iteration. Others have codes only."""
    return Case(
        "sinkhorn_bias", f"{b} x {k}", lambda draw: (draw.normal(b, k, scale=SCORE_STD),),
        lambda scores: potentials(sinkhorn(scores), scores), our_potentials, dtype=dtype,
        peers={"lightly": lightly_potentials} if dtype == torch.float32 else {},
        bytes=b * k * ITERATIONS * dtype.itemsize, **options,
    )  # fmt: skip


def swav(high: list[Tensor], low: list[Tensor]) -> Tensor:
    loss: Any = 0.0
    crops = [*high, *low]
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
        crops = [draw.normal(b, k, scale=SCORE_STD, gradient=True) for _ in range(high + low)]
        return crops[:high], crops[high:]

    return Case(
        "prototype_cross_entropy", f"SwAV {high} + {low}, {b} x {k}", inputs, swav, our_swav, dtype=dtype,
        uses=("sinkhorn_bias",), peers={"lightly": lightly_swav},
        bytes=b * k * dtype.itemsize * (2 * (high + low) + ITERATIONS * high), **options,
    )  # fmt: skip


def update_center(teacher: list[Tensor], center: Tensor) -> None:
    with torch.no_grad():
        mean = torch.stack([at_least_float32(x).mean(0) for x in teacher]).mean(0)
        center.lerp_(mean, 1 - CENTER_MOMENTUM)


def dino_loss(student: list[Tensor], teacher: list[Tensor], center: Tensor) -> Tensor:
    loss: Any = 0.0
    pairs = 0
    targets = [softmax((t - center) / TEACHER_TEMPERATURE, 1) for t in teacher]
    predictions = [log_softmax(s / DINO_TEMPERATURE, 1) for s in student]
    for i, target in enumerate(targets):
        for j, prediction in enumerate(predictions):
            if i != j:
                loss = loss - (target * prediction).sum(1).mean()
                pairs += 1
    return loss / pairs


def dino(student: list[Tensor], teacher: list[Tensor], center: Tensor) -> Tensor:
    loss = dino_loss(student, teacher, center)
    update_center(teacher, center)
    return loss


def compiled_dino():
    """Inductor (torch 2.11) computes the targets again in backward, with the centre as it is after the update if it
    sees that: silently wrong."""
    loss = torch.compile(dino_loss, dynamic=False)

    def run(student: list[Tensor], teacher: list[Tensor], center: Tensor) -> Tensor:
        result = loss(student, teacher, center.clone())
        update_center(teacher, center)
        return result

    return run


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

        loss: Any = DINOLoss(k, student_temp=DINO_TEMPERATURE, center_momentum=CENTER_MOMENTUM)

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
        dtype=dtype, peers={"lightly": lightly_dino(k)}, compiled=compiled_dino,
        bytes=b * k * dtype.itemsize * (2 * students + teachers), **options,
    )  # fmt: skip


HEAD: dict[str, Any] = {"student_temperature": DINO_TEMPERATURE, "teacher_temperature": TEACHER_TEMPERATURE}


def head(logits_and_loss, student: list[Tensor], w: Tensor, teacher: list[Tensor], v: Tensor) -> Tensor:
    return logits_and_loss([x @ w.T for x in student], [x @ v.T for x in teacher])


def eager_head(*inputs) -> Tensor:
    return head(lambda s, t: dino_loss(s, t, torch.zeros((), device=s[0].device)), *inputs)


def plain_head(*inputs) -> Tensor:
    return head(partial(F.prototype_cross_entropy, **HEAD), *inputs)


def our_head(student: list[Tensor], w: Tensor, teacher: list[Tensor], v: Tensor) -> Tensor:
    return F.prototype_head_cross_entropy(student, teacher, w, v, **HEAD)


def head_case(teachers: int, students: int, b: int, k: int, d: int, dtype=torch.float32, **options) -> Case:
    """DINO from the features that the last layer takes; beside it our own loss of logits that exist. FLOPs without
    logits in memory: the student's twice, its features' and its prototypes' gradients; the teacher's twice."""

    def inputs(draw: Draw) -> tuple[list[Tensor], Tensor, list[Tensor], Tensor]:
        def features(n: int, gradient: bool) -> list[Tensor]:
            return [normalize(draw.normal(b, d), dim=1).requires_grad_(gradient) for _ in range(n)]

        w, v = (normalize(draw.normal(k, d), dim=1) for _ in range(2))
        return features(students, True), w.requires_grad_(), features(teachers, False), v

    return Case(
        "prototype_head_cross_entropy", f"DINO {teachers} + {students - teachers}, {b} x {k} x {d}", inputs,
        eager_head, our_head, dtype=dtype, peers={"our plain form": lambda: plain_head},
        bytes=dtype.itemsize * d * (3 * k + b * (2 * students + teachers)),
        flops=2 * k * d * b * (4 * students + 2 * teachers), **options,
    )  # fmt: skip


def koleo(x: Tensor) -> Tensor:
    x = normalize(x, dim=1, eps=1e-8)
    with torch.no_grad():
        nearest = (x @ x.T).fill_diagonal_(-1).argmax(1)
    return -(pairwise_distance(x, x[nearest], 2, 1e-8) + 1e-8).log().mean()


def lightly_koleo():
    from lightly.loss import KoLeoLoss

    return KoLeoLoss()


def koleo_case(n: int, d: int, **options) -> Case:
    return Case(
        "koleo", f"{n} x {d}", lambda draw: (draw.normal(n, d, gradient=True),), koleo, F.koleo,
        peers={"lightly": lightly_koleo}, bytes=2 * n * d * 4, flops=2 * n * n * d, **options,
    )  # fmt: skip


def mean_entropy(*scores: Tensor) -> Tensor:
    p = softmax(torch.cat(scores) / DINO_TEMPERATURE, 1).mean(0)
    return (p * p.log()).sum() + math.log(len(p))


def mean_entropy_case(views: int, b: int, k: int, **options) -> Case:
    """The gradient needs the mean over all rows: scores are read twice, their gradients written."""
    return Case(
        "mean_entropy", f"{views} x {b} x {k}",
        lambda draw: tuple(draw.normal(b, k, scale=SCORE_STD, gradient=True) for _ in range(views)),
        mean_entropy, lambda *scores: F.mean_entropy(scores, temperature=DINO_TEMPERATURE),
        bytes=views * b * k * 4 * 3, **options,
    )  # fmt: skip


CASES = [
    sinkhorn_case(4096, 3000),
    sinkhorn_bias_case(4096, 3000, full_only=("cuda",)),
    sinkhorn_case(16384, 3000, torch.bfloat16, devices=("cuda",)),
    sinkhorn_case(2048, 65536, torch.bfloat16, devices=("cuda",)),
    swav_case(2, 6, 256, 3000, full_only=("cuda",)),
    swav_case(2, 6, 256, 3000, torch.bfloat16, devices=("cuda",)),
    dino_case(2, 10, 64, 65536, full_only=("cuda",)),
    dino_case(2, 10, 64, 65536, torch.bfloat16, devices=("cuda",)),
    dino_case(2, 10, 1024, 65536, torch.bfloat16, devices=("cuda",), full_only=("cuda",)),
    head_case(2, 10, 16, 65536, 256, full_only=("cpu", "cuda")),
    head_case(2, 10, 1024, 65536, 256, torch.bfloat16, devices=("cuda",), full_only=("cuda",)),
    koleo_case(1024, 384, full_only=("cpu", "cuda")),
    mean_entropy_case(2, 256, 1024, full_only=("cpu", "cuda")),
    # small runs
    sinkhorn_case(128, 512, **SMALL),
    positions_case(49, 64, 512, **SMALL),
    sinkhorn_case(256, 3000, torch.bfloat16, **SMALL),
    sinkhorn_bias_case(256, 3000, **SMALL),
    sinkhorn_bias_case(256, 3000, torch.bfloat16, **SMALL),
    swav_case(2, 6, 64, 512, **SMALL),
    swav_case(2, 6, 64, 3000, torch.bfloat16, **SMALL),
    dino_case(2, 10, 64, 4096, **SMALL),
    dino_case(2, 10, 64, 4096, torch.bfloat16, **SMALL),
    head_case(2, 10, 64, 4096, 256, **SMALL),
    head_case(2, 10, 64, 4096, 256, torch.bfloat16, **SMALL),
    mean_entropy_case(2, 64, 512, **SMALL),
]
