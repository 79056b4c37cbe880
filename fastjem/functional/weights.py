"""Updates of weights outside the optimiser."""

from collections.abc import Iterable

import torch
from torch import Tensor

from fastjem.functional import checks
from fastjem.kernels.arithmetic import widest, widest_dtype
from fastjem.ops.autograd import ops


@torch.no_grad()
def ema_update_(teacher: Iterable[Tensor], student: Iterable[Tensor], momentum: float | Tensor) -> None:
    """`teacher = momentum * teacher + (1 - momentum) * student`, in place, for all pairs of tensors in one launch.

    Args:
        teacher: float32 (or float64) tensors, for example `teacher.parameters()`. Half-precision teachers are refused:
            a relative change of 1 - momentum is below their resolution, so that every update would round to nothing.
        student: as many tensors of the same shapes, float64, float32, bfloat16 or float16.
        momentum: in [0, 1], a number or a 0-dim tensor on the teacher's device (a schedule that never leaves the
            device).

    Raises:
        ValueError: for other lengths, shapes, dtypes or devices, or a number outside [0, 1].
    """
    op = "ema_update_"
    teacher = list(teacher)
    student = list(student)
    if len(teacher) != len(student):
        checks.fail(op, "teacher and student must be as many tensors", f"{len(teacher)} and {len(student)}")
    if not teacher:
        return
    checks.one_device(op, [*teacher, *student])
    for i, (t, s) in enumerate(zip(teacher, student, strict=True)):
        if t.shape != s.shape:
            came = f"{tuple(t.shape)} and {tuple(s.shape)} at {i}"
            checks.fail(op, "teacher and student must have the same shapes", came)
        if t.dtype not in (torch.float32, torch.float64) or not s.is_floating_point():
            contract = "teacher must be float32 or float64 (half precision rounds updates away), student floating-point"
            checks.fail(op, contract, f"{t.dtype} and {s.dtype} at {i}")
    momentum = checks.number(op, "momentum", momentum, teacher[0], low=0, high=1, inclusive=True)
    if isinstance(momentum, Tensor):
        momentum = widest(momentum)
    else:
        # In float64 where there is one, because 1 - 0.9999 in float32 is off by 3e-4 of itself.
        device = teacher[0].device
        momentum = torch.full((), momentum, dtype=widest_dtype(device), device=device)
    ops.ema_update_(teacher, student, momentum)
