"""From operators to differentiable losses: four autograd Functions serve every loss.

`one_pass`: an operator that returns the gradients along with the loss. `two_passes`: the gradient is that of another
operator, which runs in backward. `known`: loss and gradients are there already; `found`: the same in the fewest steps,
for calls that nobody watches (`direct.py`). Conventions: kernels/__init__.py.
Within torch.func's transforms the first three are `transforms.known`.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import compress

import torch
from torch import Tensor

from fastjem.ops import direct, reference, transforms
from fastjem.ops.forward_mode import refuse_forward_mode

ops = torch.ops.fastjem


def refuse_second_order(name: str) -> None:
    # autograd's once_differentiable would let a constant pass where the upstream gradient requires none
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(f"{name}: differentiable once only, got create_graph=True")


def _rescaled(gradient: Tensor, factor: Tensor) -> Tensor:
    """`gradient * factor`, in place where autograd needs the unscaled gradient no more."""
    if torch.compiler.is_compiling() or direct.keeps_graph():
        gradient = gradient.clone()
    return rescaled_in_place(gradient, factor)


def rescaled_in_place(gradient: Tensor, factor: Tensor) -> Tensor:
    """`gradient * factor`, in the memory of `gradient`, unless gradients are batched, with a factor each."""
    if transforms.batched(factor):
        return transforms.scaled(gradient, factor)
    ops.rescale_(gradient, factor)
    return gradient


def _all_rescaled(gradients: list[Tensor], upstream: Tensor, scale: Tensor) -> list[Tensor]:
    """`_rescaled(gradient, upstream * scale)` for each, by one operator, which multiplies the factors as well."""
    if transforms.batched(upstream):
        return [_rescaled(gradient, upstream * scale) for gradient in gradients]
    if torch.compiler.is_compiling() or direct.keeps_graph():
        gradients = [gradient.clone() for gradient in gradients]
    ops.rescale_all_(gradients, upstream, scale)
    return gradients


def learned_or_number(value: Tensor | float) -> tuple[Tensor | None, float]:
    """What an operator takes: a tensor, which leaves the number beside it unread, or none and the number."""
    return (value, 1.0) if isinstance(value, Tensor) else (None, value)


class Upstream:
    """The upstream gradient. Of batched ones an operator is given 1, and its results are multiplied by them."""

    def __init__(self, upstream: Tensor, like: Tensor) -> None:
        self.batched = transforms.batched(upstream)
        self.given = like.new_ones((), dtype=upstream.dtype) if self.batched else upstream
        self.upstream = upstream

    def of(self, gradients: Iterable[Tensor], wanted: Iterable[bool]) -> list[Tensor | None]:
        return [
            (transforms.scaled(of, self.upstream) if self.batched else of) if want else None
            for of, want in zip(gradients, wanted, strict=True)
        ]


def needs_gradient(x: Tensor) -> bool:
    """Whether a loss must have its gradient for x, of a transform of torch.func too."""
    if transforms.active():
        return torch.is_grad_enabled() and transforms.differentiated(x)
    return torch.is_grad_enabled() and x.requires_grad


class _OnePass(torch.autograd.Function):
    """The gradients are computed along with the loss and wait, unscaled, for the upstream gradient."""

    @staticmethod
    def forward(ctx, name: str, wanted: tuple[bool, ...], listed: bool, arguments: tuple, *inputs: Tensor):
        loss, gradients, scale, statistics = _call(name, wanted, listed, arguments, inputs)
        ctx.save_for_backward(scale, *gradients)
        ctx.name = name
        ctx.wanted = wanted
        ctx.mark_non_differentiable(*statistics)
        return loss, *statistics

    @staticmethod
    def backward(ctx, upstream: Tensor, *_):
        refuse_second_order(ctx.name)
        scale, *gradients = ctx.saved_tensors
        if direct.rescale_(gradients, upstream, scale):
            return None, None, None, None, *[g if want else None for g, want in zip(gradients, ctx.wanted, strict=True)]
        scaled = iter(_all_rescaled(list(compress(gradients, ctx.wanted)), upstream, scale))
        return None, None, None, None, *[next(scaled) if want else None for want in ctx.wanted]


class _TwoPasses(torch.autograd.Function):
    """The loss is there already; its gradient, for the one tensor `x`, is computed in backward by a second operator.

    `places` says which of the tensors (x first, each of them once) is which argument of that operator.
    """

    @staticmethod
    def forward(
        ctx, name: str, places: list[int], arguments: tuple, scale: float, loss: Tensor, *tensors: Tensor
    ) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.name = name
        ctx.places = places
        ctx.arguments = arguments
        ctx.scale = scale
        return loss.clone()

    @staticmethod
    def backward(ctx, upstream: Tensor):
        refuse_second_order(ctx.name)
        tensors = ctx.saved_tensors
        gradient = direct.call(ctx.name, *[tensors[place] for place in ctx.places], *ctx.arguments)
        if not direct.rescale_([gradient], upstream, [ctx.scale]):
            gradient = rescaled_in_place(gradient, upstream * ctx.scale)
        return None, None, None, None, None, gradient, *[None] * (len(tensors) - 1)


def _is_same_factor(a: float | Tensor, b: float | Tensor) -> bool:
    """A tensor is the same as itself alone: nobody looks at its value."""
    return a is b if isinstance(a, Tensor) or isinstance(b, Tensor) else a == b


def _by_factor(gradients: list[Tensor], upstream: Tensor, factor: float | Tensor) -> list[Tensor]:
    """Gradients times `upstream * factor`; several of them by one operator."""
    if len(gradients) == 1:
        is_one = not isinstance(factor, Tensor) and factor == 1
        return [_rescaled(gradients[0], upstream if is_one else upstream * factor)]
    scale = factor if isinstance(factor, Tensor) else upstream.new_full((), factor)
    return _all_rescaled(gradients, upstream, scale)


def _each_by_factor(
    gradients: Sequence[Tensor | None], upstream: Tensor, factors: Sequence[float | Tensor]
) -> list[Tensor | None]:
    """`gradient * upstream * factor` for each that is there; those of one factor together."""
    scaled: list[Tensor | None] = [None] * len(gradients)
    for i, gradient in enumerate(gradients):
        if gradient is None or scaled[i] is not None:
            continue
        alike = [i]
        given = [gradient]
        for j in range(i + 1, len(gradients)):
            other = gradients[j]
            if other is not None and _is_same_factor(factors[i], factors[j]):
                alike.append(j)
                given.append(other)
        for j, of in zip(alike, _by_factor(given, upstream, factors[i]), strict=True):
            scaled[j] = of
    return scaled


class _Known(torch.autograd.Function):
    """Loss and gradients are there; each gradient is still to be multiplied by a factor of its own."""

    @staticmethod
    def forward(ctx, name: str, loss: tuple[Tensor], factors: Sequence, gradients: Sequence, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients)
        ctx.name = name
        ctx.factors = factors
        ctx.inputs = [(x.dtype, x.shape) for x in inputs]
        return loss[0].clone() if torch.compiler.is_compiling() else loss[0]

    @staticmethod
    def backward(ctx, upstream: Tensor):
        refuse_second_order(ctx.name)
        wanted = ctx.needs_input_grad[4:]
        gradients = [x if want else None for x, want in zip(ctx.saved_tensors, wanted, strict=True)]
        scaled = _each_by_factor(gradients, upstream, ctx.factors)
        shaped = [
            None if of is None else of.to(dtype).reshape(shape)
            for of, (dtype, shape) in zip(scaled, ctx.inputs, strict=True)
        ]
        return None, None, None, None, *shaped


def _call(
    name: str, wanted: tuple[bool, ...], listed: bool, arguments: tuple, inputs: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor], Tensor, list[Tensor]]:
    """(loss, gradients, scale, statistics); an operator without statistics has none of them."""
    given = ([*inputs],) if listed else inputs
    result = direct.call(name, *given, *arguments, wanted)
    return result if len(result) == 4 else (*result, [])


def one_pass(name: str, inputs: Sequence[Tensor], *arguments, listed: bool = False) -> Tensor:
    """The loss `name(*inputs, *arguments)`, differentiable for `inputs`; `listed`: the operator takes them as Tensor[].

    Gradients are asked for only where grad mode is on and the input requires one.
    """
    return one_pass_with_statistics(name, inputs, *arguments, listed=listed)[0]


def one_pass_with_statistics(
    name: str, inputs: Sequence[Tensor], *arguments, listed: bool = False
) -> tuple[Tensor, ...]:
    """The loss of `one_pass`, and behind it what statistics the operator was asked for: constants."""
    refuse_forward_mode(name, inputs)
    if transforms.active():
        wanted = tuple(needs_gradient(x) for x in inputs)
        constants = [x.detach() for x in inputs]
        loss, gradients, scale, statistics = _call(name, wanted, listed, arguments, constants)
        twice = (reference(name), scale, *arguments) if name in transforms.TWICE else None
        return transforms.known(name, loss, inputs, gradients, [scale] * len(inputs), twice), *statistics
    wanted = tuple(torch.is_grad_enabled() and x.requires_grad for x in inputs)
    if not any(wanted):
        loss, _, _, statistics = _call(name, wanted, listed, arguments, inputs)
        return loss, *statistics
    return _OnePass.apply(name, wanted, listed, arguments, *distinct(inputs))


def known(name: str, loss: Tensor, inputs: Sequence[Tensor], gradients: Sequence[Tensor], factors: Sequence) -> Tensor:
    """`loss`, with the gradient for `inputs[i]` being `factors[i] * gradients[i]` (anything where none is required)."""
    refuse_forward_mode(name, inputs)
    if transforms.active():
        return transforms.known(name, loss, inputs, gradients, factors)
    if not (torch.is_grad_enabled() and any(x.requires_grad for x in inputs)):
        return loss
    return _Known.apply(name, (loss,), tuple(factors), tuple(gradients), *distinct(inputs))


class _Found(torch.autograd.Function):
    """Loss and gradients are there, and will be asked for eagerly: what `_Known` is, in as few steps as can be."""

    @staticmethod
    def forward(ctx, name: str, loss: tuple[Tensor], gradients: Sequence, factors: Sequence[float], *_: Tensor):
        ctx.name = name
        ctx.factors = factors
        ctx.save_for_backward(*gradients)
        return loss[0]

    @staticmethod
    def backward(ctx, upstream: Tensor):
        refuse_second_order(ctx.name)
        gradients = ctx.saved_tensors
        if not direct.rescale_(gradients, upstream, ctx.factors):
            gradients = _each_by_factor(gradients, upstream, ctx.factors)
        return None, None, None, None, *gradients


# Without what `Function.apply` does for torch.func's transforms before it comes to this: 2 of 7 us.
_apply_found = super(torch.autograd.Function, _Found).apply  # pyright: ignore[reportAttributeAccessIssue]


def found(
    name: str, loss: Tensor, inputs: Sequence[Tensor], gradients: Sequence[Tensor | None], factors: Sequence[float]
) -> Tensor:
    """`loss`, with the gradient for `inputs[i]` being `factors[i] * gradients[i]`, in its shape and dtype; None: none.

    Only where `direct.nothing_watches`.
    """
    if not any(gradient is not None for gradient in gradients):
        return loss
    return _apply_found(name, (loss,), gradients, factors, *inputs)


class _FoundAgain(torch.autograd.Function):
    """As `_Found`; where backward is to be differentiated, the gradients are those of a formula of plain torch."""

    @staticmethod
    def forward(
        ctx, name: str, loss: tuple[Tensor], gradients: Sequence, factors: Sequence[float], formula, *inputs: Tensor
    ):
        ctx.name = name
        ctx.factors = factors
        ctx.formula = formula
        ctx.count = len(gradients)
        ctx.save_for_backward(*gradients, *inputs)
        return loss[0]

    @staticmethod
    def backward(ctx, upstream: Tensor):
        saved = ctx.saved_tensors
        gradients, inputs = saved[: ctx.count], saved[ctx.count :]
        if torch.is_grad_enabled():
            wanted = [x for x, gradient in zip(inputs, gradients, strict=True) if gradient is not None]
            again = iter(torch.autograd.grad(ctx.formula(*inputs), wanted, upstream, create_graph=True))
            gradients = [None if gradient is None else next(again) for gradient in gradients]
        elif not direct.rescale_(gradients, upstream, ctx.factors):
            gradients = _each_by_factor(gradients, upstream, ctx.factors)
        return None, None, None, None, None, *gradients


def found_again(
    name: str,
    loss: Tensor,
    gradients: Sequence[Tensor | None],
    factors: Sequence[float],
    inputs: Sequence[Tensor],
    formula: Callable[..., Tensor],
) -> Tensor:
    """As `found`, of a loss `formula(*inputs)` that is differentiable again."""
    if not any(gradient is not None for gradient in gradients):
        return loss
    return _FoundAgain.apply(name, (loss,), gradients, factors, formula, *inputs)


def two_passes(name: str, loss: Tensor, x: Tensor, saved: Sequence[Tensor | None], *arguments, scale: float) -> Tensor:
    """`loss`, with the gradient for `x` being `scale * name(x, *saved, *arguments)`."""
    refuse_forward_mode(name.removesuffix("_backward"), (x,))
    if transforms.active():
        if not needs_gradient(x):
            return loss
        gradient = getattr(ops, name)(x.detach(), *saved, *arguments)
        return transforms.known(name.removesuffix("_backward"), loss, (x,), (gradient,), (scale,))
    if not (torch.is_grad_enabled() and x.requires_grad):
        return loss
    tensors: list[Tensor | None] = [x, *saved]
    places = list(range(len(tensors)))
    if torch.compiler.is_compiling():
        tensors, places = _each_once(tensors)
    return _TwoPasses.apply(name, places, arguments, scale, loss, *tensors)


def distinct(inputs: Sequence[Tensor]) -> Sequence[Tensor]:
    """The tensors, where torch.compile traces a Function, as different objects.

    Of a tensor that a Function is given twice it takes one of the two gradients (torch 2.11), or refuses it (2.15).
    """
    if not torch.compiler.is_compiling():
        return inputs
    seen: list[Tensor] = []
    for x in inputs:
        seen.append(x.view_as(x) if any(x is other for other in seen) else x)
    return seen


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
