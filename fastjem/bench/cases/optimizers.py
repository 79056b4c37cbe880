"""A step of an optimiser, and of the momentum encoder behind it: LARS and AdamW with the teacher."""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastjem import optim
from fastjem.bench.case import Case, Draw
from fastjem.bench.cases.weights import MOMENTUM, resnet50, vit_large

Lists = list[Tensor]
OPTIONS = {
    "adamw_": {"lr": 1e-3, "betas": (0.9, 0.999), "weight_decay": 0.05},
    "lars_": {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-6},
}


def with_objects(
    make: Callable[[list[dict], Lists, Lists], Callable[[], object]], options: dict, new_gradients: bool = False
) -> Callable:
    """`make(groups, teachers, parameters)` returns the step; it is called once for the same tensors.

    Single vectors don't decay.

    Args:
        new_gradients: at each step they are other tensors than at the one before, as `zero_grad` has it in training.
    """
    steps: dict[int, Callable[[], object]] = {}

    def run(weights: tuple[Lists, Lists], gradients: Lists) -> None:
        values, teachers = weights
        key = values[0].data_ptr()
        if key not in steps:
            if values[0].is_cpu:
                steps.clear()  # the first call's, on a copy of the inputs
            parameters: Lists = [nn.Parameter(x) for x in values]
            for p, g in zip(parameters, gradients, strict=True):
                p.grad = g
            groups = [
                {**options, "params": [p for p in parameters if p.dim() > 1]},
                {**options, "params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
            ]
            step = make([group for group in groups if group["params"]], teachers, parameters)
            steps[key] = exchanging(step, parameters) if new_gradients else step
        steps[key]()

    return run


def exchanging(step: Callable[[], object], parameters: Lists) -> Callable[[], object]:
    """The step, with its gradients and copies of them in turns."""
    gradients = [p.grad for p in parameters]
    others = [g if g is None else g.clone() for g in gradients]
    sets = itertools.cycle((gradients, others))

    def run() -> None:
        for p, g in zip(parameters, next(sets), strict=True):
            p.grad = g
        step()

    return run


def behind(optimizer: torch.optim.Optimizer, teachers: Lists, parameters: Lists) -> Callable[[], object]:
    """A step, and the fastest average that torch has."""

    @torch.no_grad()
    def step() -> None:
        optimizer.step()
        torch._foreach_lerp_(teachers, parameters, 1 - MOMENTUM)

    return step


def torch_adamw(groups: list[dict], teachers: Lists, parameters: Lists) -> Callable[[], object]:
    kind = {"fused": True, "capturable": parameters[0].is_cuda}
    return behind(torch.optim.AdamW(groups, **kind), teachers, parameters)  # pyright: ignore[reportArgumentType]


def torch_foreach(groups: list[dict], teachers: Lists, parameters: Lists) -> Callable[[], object]:
    kind = {"foreach": True, "capturable": parameters[0].is_cuda}
    return behind(torch.optim.AdamW(groups, **kind), teachers, parameters)  # pyright: ignore[reportArgumentType]


class PlainLARS(torch.optim.Optimizer):
    """As published code has it (Barlow Twins', SimCLR's): a loop over parameters."""

    @torch.no_grad()
    def step(self, closure=None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            for p in group["params"]:
                step = p.grad
                if group["weight_decay"]:
                    w, g = p.norm(), step.norm()
                    ratio = 0.001 * w / (g + group["weight_decay"] * w + 1e-8)
                    step = step.add(p, alpha=group["weight_decay"]).mul_(torch.where((w > 0) & (g > 0), ratio, 1.0))
                state = self.state[p]
                if "buffer" not in state:
                    state["buffer"] = torch.zeros_like(p)
                state["buffer"].mul_(group["momentum"]).add_(step)
                p.add_(state["buffer"], alpha=-group["lr"])


def plain_lars(groups: list[dict], teachers: Lists, parameters: Lists) -> Callable[[], object]:
    return behind(PlainLARS(groups, {}), teachers, parameters)


def timm_lars(groups: list[dict], teachers: Lists, parameters: Lists) -> Callable[[], object]:
    from timm.optim import Lars

    return behind(Lars(groups), teachers, parameters)


def ours(kind: type[optim.AdamW] | type[optim.LARS]) -> Callable[[list[dict], Lists, Lists], Callable[[], object]]:
    def make(groups: list[dict], teachers: Lists, parameters: Lists) -> Callable[[], object]:
        optimizer = kind(groups)
        optimizer.attach_teacher(teachers, parameters, MOMENTUM)
        return lambda: optimizer.step()

    return make


def case(op: str, shape: str, shapes: list[tuple[int, ...]], **options) -> Case:
    """Read: a parameter, its gradient, its averages (two of AdamW, one of LARS) and its teacher; written: all but the
    gradient. LARS reads parameter and gradient twice, as its rate depends on all of them. The host's time is that of
    steps with new gradients.
    """

    def inputs(draw: Draw) -> tuple[tuple[Lists, Lists], Lists]:
        weights, teachers, gradients = ([draw.normal(*s, scale=x) for s in shapes] for x in (0.05, 0.05, 1e-3))
        return (weights, teachers), gradients

    count = sum(torch.Size(s).numel() for s in shapes)
    eager = {"adamw_": torch_adamw, "lars_": plain_lars}[op]
    kind = {"adamw_": optim.AdamW, "lars_": optim.LARS}[op]
    peer, of_peer = {"adamw_": ("foreach", torch_foreach), "lars_": ("timm", timm_lars)}[op]
    moves = options.get("clock") == "host"
    variants = [with_objects(make, OPTIONS[op], moves) for make in (eager, ours(kind), of_peer)]
    return Case(
        op, shape, inputs, variants[0], variants[1],
        bytes=count * 36, peers={peer: lambda: variants[2]}, compiles=False, **options,
    )  # fmt: skip


SIZES = {
    "ResNet-50 and teacher": resnet50(),
    "ViT-S and teacher": vit_large(384, 12),
    "a small network and teacher": [
        (32, 3, 3, 3), (32,), (64, 32, 3, 3), (64,), (128, 64, 3, 3), (128,), (128, 128), (128,),
    ],
}  # fmt: skip
CASES = [
    *(case(op, shape, shapes) for op in OPTIONS for shape, shapes in SIZES.items()),
    *(case(op, "159 tensors of 16", [(16,)] * 53 + [(4, 4)] * 106, clock="host") for op in OPTIONS),
]
