"""The cross-entropy of logits `features @ prototypes.T`, and how much prototypes are used, some images at a time.

A row's softmax takes all of its logits, and a row needs no other row: so the logits of some images, all views of them,
are made by one product, used, and overwritten by the next images'. Where the gradient follows from how much prototypes
are used by all rows, they are made twice, which is one product more than holding them takes.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .. import tiling
from ..arithmetic import compute_dtype, no_gradient, widest, widest_dtype


class Kernels(NamedTuple):
    """What is done with scores, by a device's kernels."""

    cross_entropy: Callable  # `reference.prototype_cross_entropy`
    add_softmax: Callable[[Tensor, float, Tensor], None]  # (scores [N, K], temperature, [K]): adds the rows' softmax
    softmax_slope: Callable[[Tensor, float, Tensor], None]  # (scores, temperature, slope [K]): p * (slope - <p, slope>)
    memory: Callable[[Tensor, int], Tensor]  # (features, numbers): in their dtype


class Sides(NamedTuple):
    """The arguments that both operators begin with."""

    inputs: list[Tensor]  # S x [B, D] student features, then [K, D] student prototypes
    teacher: list[Tensor]  # T x [B, D] features
    teacher_prototypes: Tensor  # [K, D]
    student_temperature: float
    teacher_temperature: float
    teacher_bias: Tensor | None  # [K] or [T, K]
    pairs: str

    @property
    def student(self) -> list[Tensor]:
        return self.inputs[:-1]

    @property
    def prototypes(self) -> Tensor:
        return self.inputs[-1]

    @property
    def options(self) -> tuple:
        """What the cross-entropy of scores takes of them, beside the scores."""
        return self.student_temperature, self.teacher_temperature, self.teacher_bias, self.pairs, None, False


class _Scores(NamedTuple):
    """Of some images."""

    images: slice
    features: Tensor  # [S b, D]
    student: Tensor  # [S b, K]
    teacher: Tensor  # [T b, K]
    share: float  # of all images

    def views(self, count: int) -> list[Tensor]:
        """The student's [b, K] by view."""
        return list(self.student.chunk(count))


def _scores(sides: Sides, kernels: Kernels) -> Iterator[_Scores]:
    """Those of all images, whose memory the next ones overwrite."""
    dtype = compute_dtype(*(x.dtype for x in sides.inputs))
    prototypes = sides.prototypes.to(dtype)
    teacher_prototypes = sides.teacher_prototypes.to(dtype)
    images, width = sides.student[0].shape[0], len(prototypes)
    sizes = len(sides.student), len(sides.teacher)
    at_once = max(1, min(images, tiling.HEAD_USAGE_BYTES // (dtype.itemsize * width * sum(sizes))))
    memory = kernels.memory(prototypes, sum(sizes) * at_once * width)
    for first in range(0, images, at_once):
        some = slice(first, min(first + at_once, images))
        count = some.stop - some.start
        features, targets = (
            torch.cat([view[some].to(dtype) for view in views]) for views in (sides.student, sides.teacher)
        )
        student, teacher = memory[: sum(sizes) * count * width].split([size * count * width for size in sizes])
        student = torch.mm(features, prototypes.T, out=student.view(-1, width))
        teacher = torch.mm(targets, teacher_prototypes.T, out=teacher.view(-1, width))
        yield _Scores(some, features, student, teacher, count / images)


def forward(sides: Sides, kernels: Kernels) -> tuple[Tensor, Tensor]:
    """`reference.prototype_head_usage`"""
    views, teachers = len(sides.student), len(sides.teacher)
    device = sides.prototypes.device
    total = torch.zeros(len(sides.prototypes), dtype=widest_dtype(device), device=device)
    loss = torch.zeros((), dtype=widest_dtype(device), device=device)
    for some in _scores(sides, kernels):
        scores = some.views(views), list(some.teacher.chunk(teachers))
        of_these = kernels.cross_entropy(*scores, *sides.options, [False] * views)[0]
        loss += widest(of_these) * some.share
        kernels.add_softmax(some.student, sides.student_temperature, total)
    return loss.to(compute_dtype(*(x.dtype for x in sides.inputs))), total


def backward(
    sides: Sides, upstream: Tensor, slope: Tensor | None, wanted: list[bool], kernels: Kernels
) -> list[Tensor]:
    """`reference.prototype_head_usage_backward`"""
    views, teachers = len(sides.student), len(sides.teacher)
    dtype = compute_dtype(*(x.dtype for x in sides.inputs))
    prototypes = sides.prototypes.to(dtype)
    of_features = [
        torch.empty_like(x) if want else no_gradient(x) for x, want in zip(sides.student, wanted[:-1], strict=True)
    ]
    of_prototypes = torch.zeros_like(prototypes) if wanted[-1] else None
    if slope is not None:
        slope = (slope / sides.student_temperature).to(dtype)
    for some in _scores(sides, kernels):
        scores = some.views(views)
        options = *sides.options, [True] * views
        _, gradients, scale, _ = kernels.cross_entropy(scores, list(some.teacher.chunk(teachers)), *options)
        factor = (upstream * scale * some.share).to(dtype)
        if slope is not None:
            kernels.softmax_slope(some.student, sides.student_temperature, slope)
        for view, gradient in zip(scores, gradients, strict=True):
            if slope is None:
                torch.mul(gradient, factor, out=view)
            else:
                view.addcmul_(gradient, factor)
        if any(wanted[:-1]):
            for gradient, of_view in zip(of_features, (some.student @ prototypes).chunk(views), strict=True):
                if gradient.numel():
                    gradient[some.images] = of_view
        if of_prototypes is not None:
            of_prototypes.addmm_(some.student.T, some.features)
    last = no_gradient(sides.prototypes) if of_prototypes is None else of_prototypes.to(sides.prototypes.dtype)
    return [*of_features, last]
