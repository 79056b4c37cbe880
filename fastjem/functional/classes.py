"""The supervised contrastive loss of one rank, which one operator computes whole and another differentiates."""

import torch
from torch import Tensor

from fastjem.ops import direct, transforms
from fastjem.ops.autograd import Upstream, learned_or_number, needs_gradient, refuse_second_order
from fastjem.ops.forward_mode import refuse_forward_mode


class _OfClasses(torch.autograd.Function):
    """`learned` is the temperature if it is a tensor; `options` are the number, one_anchor and normalize."""

    @staticmethod
    def forward(
        ctx, options: tuple[float, bool, bool], ids: Tensor | None, learned: Tensor | None, z: Tensor
    ) -> Tensor:
        loss, *saved = direct.call("supcon", z, ids, learned, *options)
        ctx.save_for_backward(*saved, learned)
        ctx.options = options
        ctx.dtype = z.dtype
        return loss

    @staticmethod
    def backward(ctx, upstream: Tensor):
        refuse_second_order("supcon")
        saved = ctx.saved_tensors
        of = Upstream(upstream, saved[2])
        wanted = [ctx.needs_input_grad[3], ctx.needs_input_grad[2]]
        arguments = (of.given, *saved, *ctx.options, ctx.dtype, wanted)
        gradient, of_temperature = of.of(direct.call("supcon_backward", *arguments), wanted)
        return None, None, of_temperature, gradient


def loss_of_classes(
    z: Tensor,  # [V, N, D]
    ids: Tensor | None,  # [N] int64; None: each image is a class of its own
    temperature: float | Tensor,
    one_anchor: bool,
    normalize: bool,
) -> Tensor:
    """The mean over anchors: see kernels/contrastive/of_classes.py."""
    learned, number = learned_or_number(temperature)
    options = (number, one_anchor, normalize)
    inputs = [z] if learned is None else [z, learned]
    refuse_forward_mode("supcon", inputs)
    if transforms.active():
        return _at_once(z, ids, learned, options)
    if not any(needs_gradient(x) for x in inputs):
        return direct.call("supcon", z, ids, learned, *options)[0]
    return _OfClasses.apply(options, ids, learned, z)  # pyright: ignore[reportReturnType]


def _at_once(z: Tensor, ids: Tensor | None, learned: Tensor | None, options: tuple[float, bool, bool]) -> Tensor:
    """Within a transform of torch.func: the gradients with the loss."""
    number = None if learned is None else learned.detach()
    loss, *saved = direct.call("supcon", z.detach(), ids, number, *options)
    inputs = [z] if learned is None else [z, learned]
    if not any(needs_gradient(x) for x in inputs):
        return loss
    wanted = [True, learned is not None]
    arguments = (torch.ones_like(loss), *saved, number, *options, z.dtype, wanted)
    gradients = direct.call("supcon_backward", *arguments)
    return transforms.known("supcon", loss, inputs, gradients[: len(inputs)], [1.0] * len(inputs))
