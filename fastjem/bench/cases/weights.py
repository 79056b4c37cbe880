"""Updates of weights: the momentum encoder's moving average."""

import torch
from torch import Tensor

import fastjem.functional as F
from fastjem.bench.case import Case, Draw

MOMENTUM = 0.99


def resnet50() -> list[tuple[int, ...]]:
    """Shapes of the 159 parameters of a ResNet-50 without its classifier, 23,508,032 numbers."""

    def convolution(width_in: int, width_out: int, kernel: int) -> list[tuple[int, ...]]:
        return [(width_out, width_in, kernel, kernel), (width_out,), (width_out,)]  # the last two are the batch norm's

    shapes = convolution(3, 64, 7)
    width_in = 64
    for blocks, width in zip((3, 4, 6, 3), (64, 128, 256, 512), strict=True):
        for block in range(blocks):
            shapes += convolution(width_in, width, 1) + convolution(width, width, 3) + convolution(width, 4 * width, 1)
            if block == 0:
                shapes += convolution(width_in, 4 * width, 1)
            width_in = 4 * width
    return shapes


def vit_large(d: int = 1024, depth: int = 24, patch: int = 16, tokens: int = 197) -> list[tuple[int, ...]]:
    """Shapes of the 294 parameters of a ViT-L/16 at 224 pixels without its classifier, 303,301,632 numbers."""
    norm = [(d,), (d,)]
    block = [*norm, (3 * d, d), (3 * d,), (d, d), (d,), *norm, (4 * d, d), (4 * d,), (d, 4 * d), (d,)]
    return [(1, 1, d), (1, tokens, d), (d, 3, patch, patch), (d,), *block * depth, *norm]


def eager(teacher: list[Tensor], student: list[Tensor]) -> None:
    """The fastest that torch has, where the dtypes agree."""
    torch._foreach_lerp_(teacher, [s.to(t.dtype) for t, s in zip(teacher, student, strict=True)], 1 - MOMENTUM)


def ours(teacher: list[Tensor], student: list[Tensor]) -> None:
    F.ema_update_(teacher, student, MOMENTUM)


def lightly():
    """`update_momentum` takes modules; theirs are made once, outside the clock."""
    from lightly.models.utils import update_momentum

    modules = {}

    def module(tensors: list[Tensor]) -> torch.nn.Module:
        return torch.nn.ParameterList(torch.nn.Parameter(x, False) for x in tensors)

    def run(teacher: list[Tensor], student: list[Tensor]) -> None:
        key = teacher[0].data_ptr()
        if key not in modules:
            modules[key] = (module(student), module(teacher))
        live, copy = modules[key]
        update_momentum(live, copy, MOMENTUM)

    return run


def case(shape: str, shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float32, **options) -> Case:
    """A float32 teacher; `dtype` is the student's. The teacher is read and written, the student read."""

    def inputs(draw: Draw) -> tuple[list[Tensor], list[Tensor]]:
        return [draw.normal(*s, dtype=torch.float32) for s in shapes], [draw.normal(*s) for s in shapes]

    count = sum(torch.Size(s).numel() for s in shapes)
    return Case(
        "ema_update_", shape, inputs, eager, ours, dtype=dtype, peers={"lightly": lightly},
        bytes=count * (4 + 4 + dtype.itemsize), **options,
    )  # fmt: skip


CASES = [
    case("ResNet-50, 159 tensors", resnet50()),
    case("ResNet-50, 159 tensors", resnet50(), torch.bfloat16, full_only=("cuda",)),
    case("ViT-L, 303 M", vit_large(), devices=("cuda",)),
    case("ViT-L, 303 M", vit_large(), torch.bfloat16, devices=("cuda",)),
]
