"""CLIP's and SigLIP's losses of the pairs of one rank, which one operator computes whole and another differentiates.

A scale or a bias that is a tensor is learned; otherwise it is a number of the operators.
"""

import torch
from torch import Tensor

from fastjem.ops import direct
from fastjem.ops.autograd import Upstream, distinct, learned_or_number, needs_gradient, refuse_second_order
from fastjem.ops.forward_mode import refuse_forward_mode


class _ClipOfPairs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, number: float, x: Tensor, y: Tensor, learned: Tensor | None) -> Tensor:
        loss, *saved = direct.call("clip_loss_of_pairs", x, y, learned, number)
        ctx.save_for_backward(x, y, learned, *saved)
        ctx.number = number
        return loss

    @staticmethod
    def backward(ctx, upstream: Tensor):
        refuse_second_order("clip_loss")
        x, y, learned, *saved = ctx.saved_tensors
        of = Upstream(upstream, saved[0])
        wanted = list(ctx.needs_input_grad[1:])
        arguments = (of.given, x, y, learned, ctx.number, *saved, wanted)
        gradients, of_scale = direct.call("clip_loss_of_pairs_backward", *arguments)
        return None, *of.of((*gradients, of_scale), wanted)


def clip_loss(
    x: Tensor,  # [N, D]
    y: Tensor,  # [N, D]
    scale: Tensor | float,  # 0-dim
) -> Tensor:
    refuse_forward_mode("clip_loss", (x, y, scale))
    learned, number = learned_or_number(scale)
    if not any(z is not None and needs_gradient(z) for z in (x, y, learned)):
        return direct.call("clip_loss_of_pairs", x, y, learned, number)[0]
    x, y = distinct((x, y))
    return _ClipOfPairs.apply(number, x, y, learned)  # pyright: ignore[reportReturnType]


class _SiglipOfPairs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        numbers: tuple[float, float],  # the scale and the bias, where they aren't learned
        wanted: list[bool],  # for x and y
        x: Tensor,
        y: Tensor,
        learned_scale: Tensor | None,
        learned_bias: Tensor | None,
    ) -> Tensor:
        learned = (learned_scale, learned_bias)
        loss, sums, derivatives = direct.call("siglip_loss_of_pairs", x, y, *learned, *numbers, wanted)
        ctx.save_for_backward(*sums, derivatives, *learned)
        ctx.scale = numbers[0]
        ctx.dtype = x.dtype
        return loss

    @staticmethod
    def backward(ctx, upstream: Tensor):
        refuse_second_order("siglip_loss")
        of_x, of_y, derivatives, *learned = ctx.saved_tensors
        of = Upstream(upstream, derivatives)
        wanted = list(ctx.needs_input_grad[2:])
        arguments = (of.given, [of_x, of_y], derivatives, *learned, ctx.scale, ctx.dtype, wanted)
        gradients, of_scale, of_bias = direct.call("siglip_loss_of_pairs_backward", *arguments)
        return None, None, *of.of((*gradients, of_scale, of_bias), wanted)


def siglip_loss(
    x: Tensor,  # [N, D]
    y: Tensor,  # [N, D]
    scale: Tensor | float,  # 0-dim
    bias: Tensor | float,  # 0-dim
) -> Tensor:
    refuse_forward_mode("siglip_loss", (x, y, scale, bias))
    (learned_scale, scale_number), (learned_bias, bias_number) = map(learned_or_number, (scale, bias))
    learned, numbers = (learned_scale, learned_bias), (scale_number, bias_number)
    wanted = [needs_gradient(z) for z in (x, y)]
    if not any(wanted) and not any(z is not None and needs_gradient(z) for z in learned):
        return direct.call("siglip_loss_of_pairs", x, y, *learned, *numbers, wanted)[0]
    inputs = (x, y, *learned)
    present = iter(distinct([z for z in inputs if z is not None]))
    apart = [None if z is None else next(present) for z in inputs]
    return _SiglipOfPairs.apply(numbers, wanted, *apart)  # pyright: ignore[reportReturnType]
