"""Updates of weights outside the optimiser."""

from collections.abc import Iterable

import torch
from torch import Tensor

from fastjem.functional import checks
from fastjem.functional.checks import PLAIN
from fastjem.functional.memory import check_inference_mode, check_update
from fastjem.functional.shards import local, one_layout
from fastjem.kernels import guard, plain
from fastjem.kernels.arithmetic import widest, widest_dtype
from fastjem.ops import transforms
from fastjem.ops.autograd import ops
from fastjem.ops.direct import nothing_watches

WIDE = (torch.float32, torch.float64)


def ema_update_(teacher: Iterable[Tensor], student: Iterable[Tensor], momentum: float | Tensor) -> None:
    """`teacher = momentum * teacher + (1 - momentum) * student`, in place, for all pairs of tensors in one launch.

    All of it is checked before anything is written, and autograd notices, as of `teacher.lerp_(...)`: backward of what
    was computed with the old values raises.

    Args:
        teacher: float32 (or float64) tensors, for example `teacher.parameters()`. Half-precision teachers are refused:
            a relative change of 1 - momentum is below their resolution, so that every update would round to nothing.
            Each has memory of its own. DTensors (FSDP2) are updated shard by shard.
        student: as many tensors of the same shapes, float64, float32, bfloat16 or float16. A pair may be one tensor.
        momentum: in [0, 1], a number or a 0-dim tensor on the teacher's device (a schedule that never leaves the
            device). On the CPU a tensor is checked as a number is; on a GPU, where looking would wait for it, a tensor
            outside [0, 1] extrapolates.

    Raises:
        ValueError: for other lengths, shapes, dtypes, devices, placements or numbers, for teachers that share memory
            with each other or with another's student, and for inference tensors outside of inference mode.
    """
    op = "ema_update_"
    teacher = list(teacher)
    student = list(student)
    if len(teacher) != len(student):
        checks.fail(op, "teacher and student must be as many tensors", f"{len(teacher)} and {len(student)}")
    if not teacher:
        return
    transforms.refuse(op, (*teacher, *student), "by what writes in place")
    seen = None if torch.compiler.is_compiling() else plain.facts(teacher, student)
    if seen is not None and type(momentum) is float and 0 <= momentum <= 1 and nothing_watches():
        check_update(op, teacher, student, _check_dtypes, seen)
        _note(op, teacher)
        if plain.ema_update(seen, momentum, torch.get_num_threads()):
            return
    _update(op, teacher, student, momentum, seen)


@torch.no_grad()
def _update(
    op: str, teacher: list[Tensor], student: list[Tensor], momentum: float | Tensor, seen: bytes | None
) -> None:
    written = teacher
    compiling = torch.compiler.is_compiling()
    if seen is None and not compiling and not PLAIN.issuperset(map(type, [*teacher, *student])):
        teacher, student = _local(op, teacher, student)
    check_update(op, teacher, student, _check_dtypes, seen)
    weight = _momentum(op, momentum, teacher[0])
    if compiling:  # the compiler sees from the operator's schema what is written
        ops.ema_update_(teacher, student, weight)
        return
    _note(op, written)
    if seen is not None and nothing_watches() and plain.ema_update(seen, weight.item(), torch.get_num_threads()):
        return
    with guard.checked_already():
        ops.ema_update_(teacher, student, weight)


def _note(op: str, written: list[Tensor]) -> None:
    """Tell autograd which tensors are about to change."""
    try:
        torch.autograd.graph.increment_version(written)
    except RuntimeError:  # torch's own refusal of an inference tensor that is where another one was
        check_inference_mode(op)
        raise


def _check_dtypes(op: str, teacher: torch.dtype, student: torch.dtype, i: int) -> None:
    if teacher not in WIDE or not student.is_floating_point:
        contract = "teacher must be float32 or float64 (half precision rounds updates away), student floating-point"
        checks.fail(op, contract, f"{teacher} and {student} at {i}")


def _momentum(op: str, momentum: float | Tensor, like: Tensor) -> Tensor:
    """0-dim, in float64 where there is one: 1 - 0.9999 in float32 is off by 3e-4 of itself."""
    momentum = checks.number(op, "momentum", momentum, like, low=0, high=1, inclusive=True)
    if not isinstance(momentum, Tensor):
        return torch.full((), momentum, dtype=widest_dtype(like.device), device=like.device)
    if momentum.device.type == "cpu" and not torch.compiler.is_compiling() and not 0 <= momentum.item() <= 1:
        checks.fail(op, "momentum must be in [0, 1]", momentum.item())
    return widest(momentum)


def _local(op: str, teacher: list[Tensor], student: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """DTensors as this rank's shards of them, where both sides are sharded alike; others as they are."""
    for i, pair in enumerate(zip(teacher, student, strict=True)):
        one_layout(op, "teacher and student must be sharded alike", pair, f" at {i}")
    return [local(x) for x in teacher], [local(x) for x in student]
