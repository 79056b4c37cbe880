"""The head-fused cross-entropy, and how much the student uses prototypes: what keeps all of them in use is given it.

`fastjem.nn.MSNLoss` is made of both. Neither holds the scores [rows, K]: those of some images are in memory at a time.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastjem.functional import checks
from fastjem.functional.prototypes import sum_of_elements
from fastjem.functional.temperature import over
from fastjem.kernels.arithmetic import widest_dtype
from fastjem.ops import transforms
from fastjem.ops.autograd import distinct, ops, refuse_second_order
from fastjem.ops.forward_mode import refuse_forward_mode


def head_cross_entropy_and_usage(
    op: str,
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    prototypes: Tensor,
    *,
    student_temperature: float | Tensor,
    teacher_temperature: float | Tensor,
    teacher_bias: Tensor | None,
    pairs: str,
) -> tuple[Tensor, Tensor]:
    """`prototype_head_cross_entropy` of this rank's rows, both sides' prototypes the same ones, and [K]: the sum over
    views and rows of `softmax(student @ prototypes.T / student_temperature)`.

    Args:
        op: the function that the user called, which has checked all of it.
        student: S tensors [B, D]; teacher: T tensors [B, D], constants; prototypes: [K, D]. Of one dtype.

    Returns:
        Both are differentiable. The sum is in the widest dtype. Of no rows both are 0.
    """
    refuse_forward_mode(op, (*student, prototypes))
    if not student[0].shape[0]:
        nothing = sum_of_elements(student) + 0 * prototypes.sum()
        return nothing, prototypes.new_zeros(prototypes.shape[0], dtype=widest_dtype(prototypes.device)) + nothing
    if isinstance(student_temperature, Tensor):
        student = [over(x, student_temperature) for x in student]
        student_temperature = 1.0
    teacher = [x.detach() for x in teacher]
    if isinstance(teacher_temperature, Tensor):
        teacher = [over(x, teacher_temperature.detach()) for x in teacher]
        teacher_temperature = 1.0
    inputs = checks.common(*student, prototypes)
    teacher_prototypes = prototypes.detach().to(teacher[0].dtype)
    numbers = (float(student_temperature), float(teacher_temperature), pairs)
    constants = (*teacher, teacher_prototypes)
    return _LossAndUsage.apply(op, len(teacher), numbers, teacher_bias, *constants, *distinct(inputs))


class _LossAndUsage(torch.autograd.Function):
    """Gradients wait for the derivatives by the sums, which what is made of them decides: scores are made again then.

    `tensors` are the teacher's views and prototypes, the student's views and prototypes.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(op: str, teachers: int, numbers: tuple, bias: Tensor | None, *tensors: Tensor):
        return ops.prototype_head_usage(*_arguments(teachers, numbers, bias, tensors))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.op, ctx.teachers, ctx.numbers, bias, *tensors = inputs
        ctx.in_transform = transforms.active()
        ctx.save_for_backward(bias, output[1], *tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, upstream: Tensor | None, slope: Tensor | None):
        if not ctx.in_transform:  # a transform's backward has create_graph=True in any case
            refuse_second_order(ctx.op)
        bias, total, *tensors = ctx.saved_tensors
        first = ctx.teachers + 1
        inputs = tensors[first:]
        wanted = ctx.needs_input_grad[4 + first :]
        nothing = (None,) * (4 + first)
        if upstream is None and slope is None:
            return *nothing, *[None] * len(inputs)
        if upstream is None:
            upstream = total.new_zeros((), dtype=inputs[-1].dtype)
        assert upstream is not None
        transforms.refuse_batched_gradients(ctx.op, upstream)
        if slope is not None:  # a constant changes nothing, and this one leaves small numbers
            slope = slope - (total @ slope) / total.sum()
        arguments = _arguments(ctx.teachers, ctx.numbers, bias, tensors)
        gradients = ops.prototype_head_usage_backward(*arguments, upstream, slope, list(wanted))
        once = (
            transforms.once(ctx.op, gradient, *inputs) if want else None
            for gradient, want in zip(gradients, wanted, strict=True)
        )
        return *nothing, *once


def _arguments(teachers: int, numbers: tuple, bias: Tensor | None, tensors: Sequence[Tensor]) -> tuple:
    """As the operators take them."""
    student_temperature, teacher_temperature, pairs = numbers
    teacher = list(tensors[:teachers])
    inputs = list(tensors[teachers + 1 :])
    return inputs, teacher, tensors[teachers], student_temperature, teacher_temperature, bias, pairs
