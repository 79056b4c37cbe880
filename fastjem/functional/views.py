"""NT-Xent and DCL on the views of one batch, which one operator computes whole and another differentiates."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastjem.ops import direct, transforms
from fastjem.ops.autograd import Upstream, distinct, learned_or_number, needs_gradient, refuse_second_order
from fastjem.ops.forward_mode import refuse_forward_mode


class _OfViews(torch.autograd.Function):
    """`learned` is the temperature if it is a tensor; `options` are the number and whether the loss is decoupled."""

    @staticmethod
    def forward(
        ctx, name: str, options: tuple[float, bool], weights: Tensor | None, learned: Tensor | None, *views: Tensor
    ) -> Tensor:
        loss, *saved = direct.call("nt_xent_of_views", list(views), weights, learned, *options)
        ctx.save_for_backward(*saved, weights, learned)
        ctx.name = name
        ctx.options = options
        ctx.dtype = views[0].dtype
        ctx.count = len(views)
        return loss

    @staticmethod
    def backward(ctx, upstream: Tensor):
        refuse_second_order(ctx.name)
        saved = ctx.saved_tensors
        of = Upstream(upstream, saved[2])
        wanted = [any(ctx.needs_input_grad[4:]), ctx.needs_input_grad[3]]
        arguments = (of.given, *saved, *ctx.options, ctx.dtype, wanted)
        gradient, of_temperature = of.of(direct.call("nt_xent_of_views_backward", *arguments), wanted)
        of_views = [gradient] * ctx.count if ctx.count == 1 or gradient is None else gradient.unbind(-3)
        return None, None, None, of_temperature, *of_views


def loss_of_views(
    name: str,
    views: Sequence[Tensor],  # one [V, N, D], or two [N, D]
    temperature: float | Tensor,
    weights: Tensor | None,  # [V, N] of the positive terms
    decoupled: bool,
) -> Tensor:
    """The mean over rows of the log-sum-exp less the weighted positives; rows are normalised."""
    learned, number = learned_or_number(temperature)
    options = (number, decoupled)
    inputs = [*views] if learned is None else [*views, learned]
    refuse_forward_mode(name, inputs)
    if transforms.active():
        return _at_once(name, views, options, weights, learned)
    if not any(needs_gradient(x) for x in inputs):
        return direct.call("nt_xent_of_views", list(views), weights, learned, *options)[0]
    return _OfViews.apply(name, options, weights, learned, *distinct(views))


def _at_once(
    name: str, views: Sequence[Tensor], options: tuple[float, bool], weights: Tensor | None, learned: Tensor | None
) -> Tensor:
    """Within a transform of torch.func: the gradients with the loss."""
    constants = [x.detach() for x in views]
    number = None if learned is None else learned.detach()
    loss, *saved = direct.call("nt_xent_of_views", constants, weights, number, *options)
    inputs = [*views] if learned is None else [*views, learned]
    if not any(needs_gradient(x) for x in inputs):
        return loss
    wanted = [True, learned is not None]
    arguments = (torch.ones_like(loss), *saved, weights, number, *options, views[0].dtype, wanted)
    gradient, of_temperature = direct.call("nt_xent_of_views_backward", *arguments)
    gradients = [gradient] if len(views) == 1 else [*gradient.unbind(-3)]
    if learned is not None:
        gradients.append(of_temperature)
    return transforms.known(name, loss, inputs, gradients, [1.0] * len(inputs))
