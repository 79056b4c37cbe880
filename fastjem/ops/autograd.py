"""From operators to differentiable losses: two autograd Functions serve every loss."""

from collections.abc import Sequence

import torch
from torch import Tensor

ops = torch.ops.fastjem


def refuse_second_order(name: str) -> None:
    # autograd's once_differentiable would let a constant pass where the upstream gradient requires none
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(f"{name}: differentiable once only, got create_graph=True")


def _rescaled(gradient: Tensor, factor: Tensor) -> Tensor:
    """`gradient * factor`, in place where autograd needs the unscaled gradient no more."""
    if torch.compiler.is_compiling() or torch._C._autograd._get_current_graph_task_keep_graph():
        gradient = gradient.clone()
    ops.rescale_(gradient, factor)
    return gradient


class _OnePass(torch.autograd.Function):
    """The gradients are computed along with the loss and wait, unscaled, for the upstream gradient."""

    @staticmethod
    def forward(ctx, name: str, wanted: tuple[bool, ...], listed: bool, arguments: tuple, *inputs: Tensor):
        loss, gradients, scale, *statistics = _call(name, wanted, listed, arguments, inputs)
        ctx.save_for_backward(scale, *gradients)
        ctx.name, ctx.wanted = name, wanted
        if not statistics:
            return (loss,)
        ctx.mark_non_differentiable(*statistics[0])
        return loss, *statistics[0]

    @staticmethod
    def backward(ctx, upstream: Tensor, *_):
        refuse_second_order(ctx.name)
        scale, *gradients = ctx.saved_tensors
        factor = upstream * scale
        scaled = (_rescaled(g, factor) if wanted else None for g, wanted in zip(gradients, ctx.wanted, strict=True))
        return None, None, None, None, *scaled


class _TwoPasses(torch.autograd.Function):
    """The loss is there already; its gradient, for the one tensor `x`, is computed in backward by a second operator.

    `places` says which of the tensors (x first, each of them once) is which argument of that operator.
    """

    @staticmethod
    def forward(
        ctx, name: str, places: list[int], arguments: tuple, scale: float, loss: Tensor, *tensors: Tensor
    ) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.name, ctx.places, ctx.arguments, ctx.scale = name, places, arguments, scale
        return loss.clone()

    @staticmethod
    def backward(ctx, upstream: Tensor):
        refuse_second_order(ctx.name)
        tensors = ctx.saved_tensors
        gradient = getattr(ops, ctx.name)(*(tensors[place] for place in ctx.places), *ctx.arguments)
        ops.rescale_(gradient, upstream * ctx.scale)
        return None, None, None, None, None, gradient, *[None] * (len(tensors) - 1)


class _Known(torch.autograd.Function):
    """Loss and gradients are there; each gradient is still to be multiplied by a factor of its own."""

    @staticmethod
    def forward(ctx, name: str, loss: Tensor, factors: Sequence, gradients: Sequence, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients)
        ctx.name, ctx.factors, ctx.like = name, factors, [(x.dtype, x.shape) for x in inputs]
        return loss.clone()

    @staticmethod
    def backward(ctx, upstream: Tensor):
        refuse_second_order(ctx.name)
        scaled = []
        for i, (g, factor, (dtype, shape)) in enumerate(zip(ctx.saved_tensors, ctx.factors, ctx.like, strict=True)):
            wanted = ctx.needs_input_grad[4 + i]
            scaled.append(_rescaled(g, upstream * factor).to(dtype).reshape(shape) if wanted else None)
        return None, None, None, None, *scaled


def _call(name, wanted, listed, arguments, inputs) -> tuple:
    """(loss, gradients, scale), and for some operators a list of statistics."""
    op = getattr(ops, name)
    return op([*inputs], *arguments, wanted) if listed else op(*inputs, *arguments, wanted)


def one_pass(name: str, inputs: Sequence[Tensor], *arguments, listed: bool = False) -> Tensor:
    """The loss `name(*inputs, *arguments)`, differentiable for `inputs`.

    An operator may take its inputs `listed`, as Tensor[]. Gradients are asked for only where grad mode is on and the
    input requires one.
    """
    return one_pass_with_statistics(name, inputs, *arguments, listed=listed)[0]


def one_pass_with_statistics(
    name: str, inputs: Sequence[Tensor], *arguments, listed: bool = False
) -> tuple[Tensor, ...]:
    """The loss of `one_pass`, and behind it what statistics the operator was asked for: constants."""
    wanted = tuple(torch.is_grad_enabled() and x.requires_grad for x in inputs)
    if any(wanted):
        return _OnePass.apply(name, wanted, listed, arguments, *inputs)
    loss, _, _, *statistics = _call(name, wanted, listed, arguments, inputs)
    return (loss, *statistics[0]) if statistics else (loss,)


def known(name: str, loss: Tensor, inputs: Sequence[Tensor], gradients: Sequence[Tensor], factors: Sequence) -> Tensor:
    """`loss`, with the gradient for `inputs[i]` being `factors[i] * gradients[i]` (anything where none is required)."""
    if not (torch.is_grad_enabled() and any(x.requires_grad for x in inputs)):
        return loss
    return _Known.apply(name, loss, tuple(factors), tuple(gradients), *inputs)


def two_passes(name: str, loss: Tensor, x: Tensor, saved: Sequence[Tensor | None], *arguments, scale: float) -> Tensor:
    """`loss`, with the gradient for `x` being `scale * name(x, *saved, *arguments)`."""
    if not (torch.is_grad_enabled() and x.requires_grad):
        return loss
    tensors, places = _each_once([x, *saved])
    return _TwoPasses.apply(name, places, arguments, scale, loss, *tensors)


def _each_once(given: Sequence[Tensor | None]) -> tuple[list[Tensor | None], list[int]]:
    """The tensors without repetitions, and the place of each given one among them.

    torch.compile (2.15) refuses an autograd Function that is given the same tensor twice.
    """
    tensors: list[Tensor | None] = []
    places = []
    for tensor in given:
        place = next((i for i, known in enumerate(tensors) if tensor is known), len(tensors))
        if place == len(tensors):
            tensors.append(tensor)
        places.append(place)
    return tensors, places
