"""Losses and operators within torch.func's transforms: grad, vjp, jacrev, vmap, and what is composed of them.

A transform wraps tensors, level by level, and takes apart only functions that it knows. Two things are told to it here:

* **A loss**: the loss and its gradients for the inputs are computed at once, of constants, and `_Known` hands them to
  whatever differentiates. It has a `setup_context`, which transforms ask for; the Functions of `autograd.py`, which are
  what a training step takes, have none, as PyTorch binds a Function's arguments by its signature where there is one,
  anew at each call.
* **An operator within vmap**: one call for each element of the batch. The kernels have no further dimension, and a loss
  of a batch of losses isn't one of them; so vmap saves Python's loops, not time.

A second derivative is refused, in words, where it is used. negative_cosine, regression and cross_entropy have one: that
of their specification's gradient, in plain torch.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import compress
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from fastjem.kernels.arithmetic import widen

_functorch = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
active = torch._C._are_functorch_transforms_active

# Operators whose gradient is differentiable: it costs no more than the gradient, and no matrix of pairs.
TWICE = ("negative_cosine", "regression", "cross_entropy")


def takes_apart() -> bool:
    """Whether torch compiles or differentiates the operators that it sees: torch.compile, torch.func, forward mode."""
    return active() or torch.compiler.is_compiling() or forward_ad._current_level >= 0


def differentiated(x: Tensor) -> bool:
    """Whether a transform at any level, or autograd around all of them, differentiates with respect to x.

    A tensor of vmap says no of itself, though it may be around one that is differentiated.
    """
    while not x.requires_grad:
        if not _functorch.is_functorch_wrapped_tensor(x):
            return False
        x = _functorch.get_unwrapped(x)
    return True


def batched(x: Tensor) -> bool:
    """Whether x is one of vmap's, or of `is_grads_batched`, which PyTorch does with another vmap."""
    if torch.compiler.is_compiling():
        return False
    return _functorch.is_legacy_batchedtensor(x) or (active() and _of_vmap(x))


def _of_vmap(x: Tensor) -> bool:
    while _functorch.is_functorch_wrapped_tensor(x):
        if _functorch.is_batchedtensor(x):
            return True
        x = _functorch.get_unwrapped(x)
    return False


def refuse(name: str, tensors: Iterable[Tensor], why: str) -> None:
    """Raise where a tensor is a transform's."""
    if active() and any(_functorch.is_functorch_wrapped_tensor(x) for x in tensors):
        raise NotImplementedError(f"{name}: transforms of torch.func are not supported {why}")


def refuse_vmap(name: str, state: Tensor, *news: Tensor) -> None:
    """Raise where a module's state is one, and what comes to it many, of vmap."""
    if active() and not _of_vmap(state) and any(_of_vmap(x) for x in news):
        contract = "within vmap, the module's state must have the batch too (torch.func.stack_module_state)"
        raise NotImplementedError(f"{name}: {contract}, got one state for all of the batch")


def scaled(gradient: Tensor, factor: Tensor | float) -> Tensor:
    """`gradient * factor`, in its dtype; a tensor of its own."""
    return (widen(gradient) * factor).to(gradient.dtype)


class _Known(torch.autograd.Function):
    """The loss, whose gradient for input i is `factors[i] * gradients[i]`.

    `tensors` are so many gradients, factors and inputs, and then the constants of `pattern`: the operator's
    specification and arguments beside its inputs, where it can be differentiated twice, None elsewhere.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(name: str, pattern: tuple | None, count: int, loss: Tensor, *tensors: Tensor) -> Tensor:
        return loss.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.name, ctx.pattern, ctx.count, _, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, upstream: Tensor):
        gradients, factors, inputs, constants = _in_parts(ctx.saved_tensors, *[ctx.count] * 3)
        found: list[Tensor | None] = []
        for place, (gradient, factor, x) in enumerate(zip(gradients, factors, inputs, strict=True)):
            if not ctx.needs_input_grad[4 + 2 * ctx.count + place]:
                found.append(None)
                continue
            once = _Gradient.apply(ctx.name, ctx.pattern, place, ctx.count, gradient, *inputs, *constants)
            found.append(scaled(once, upstream * factor).to(x.dtype).reshape(x.shape))
        return None, None, None, None, *[None] * (2 * ctx.count), *found, *[None] * len(constants)


class _Gradient(torch.autograd.Function):
    """The gradient as it is, tied to the inputs it is a function of: differentiated, or refused where that is asked."""

    generate_vmap_rule = True

    @staticmethod
    def forward(name: str, pattern: tuple | None, place: int, count: int, gradient: Tensor, *tensors: Tensor) -> Tensor:
        return gradient.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.name, ctx.pattern, ctx.place, ctx.count, _, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, upstream: Tensor):
        if ctx.pattern is None:
            raise RuntimeError(f"{ctx.name}: differentiable once only, got a second derivative")
        inputs, constants = _in_parts(ctx.saved_tensors, ctx.count)
        rest = iter(constants)
        given: list[Any] = [next(rest) if x is _TENSOR else x for x in ctx.pattern]
        specification, scale, *arguments = given

        def gradient_of(*x: Tensor) -> Tensor:
            _, gradients, whole = specification(*x, *arguments, [i == ctx.place for i in range(ctx.count)])
            return scaled(gradients[ctx.place], whole / scale)  # a kernel's may have a part of the scale in it

        pullback = torch.func.vjp(gradient_of, *inputs)[1]
        return None, None, None, None, None, *pullback(upstream), *[None] * len(constants)


_TENSOR = "a tensor"  # stands for one in a pattern


def once(name: str, gradient: Tensor, *inputs: Tensor) -> Tensor:
    """The gradient, of which a second derivative by a transform is refused."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return gradient
    return _Gradient.apply(name, None, 0, len(inputs), gradient, *inputs)


def refuse_batched_gradients(name: str, upstream: Tensor) -> None:
    """Raise where a gradient is a kernel's of the upstream gradients of rows, and these are batched."""
    if not torch.compiler.is_compiling() and _functorch.is_legacy_batchedtensor(upstream):
        contract = "with options, gradients must be asked for one by one"
        raise NotImplementedError(f"{name}: {contract}, got is_grads_batched=True")


def _in_parts(tensors: Sequence[Tensor], *sizes: int) -> list[Sequence[Tensor]]:
    """So many of them each, and what is left."""
    parts = []
    for size in sizes:
        parts.append(tensors[:size])
        tensors = tensors[size:]
    return [*parts, tensors]


def known(
    name: str,
    loss: Tensor,
    inputs: Sequence[Tensor],
    gradients: Sequence[Tensor],
    factors: Sequence,
    twice: tuple | None = None,
) -> Tensor:
    """As `autograd.known`, within a transform.

    Args:
        twice: the operator's specification, the scale of `gradients`, and its arguments beside inputs, where it is
            differentiable twice.
    """
    if twice is None:  # only what is differentiated: the rest, a queue say, may be changed before backward
        live = [differentiated(x) for x in inputs]
        inputs, gradients, factors = (list(compress(x, live)) for x in (inputs, gradients, factors))
    if not (torch.is_grad_enabled() and any(differentiated(x) for x in inputs)):
        return loss
    as_tensors = [x if isinstance(x, Tensor) else loss.new_tensor(x) for x in factors]
    pattern = None
    constants = []
    if twice is not None:
        pattern = tuple(_TENSOR if isinstance(x, Tensor) else x for x in twice)
        constants = [x for x in twice if isinstance(x, Tensor)]
    return _Known.apply(name, pattern, len(inputs), loss, *gradients, *as_tensors, *inputs, *constants)


def loop(operator: torch._ops.OpOverload) -> Callable:
    """The vmap rule of an operator: a call for each element of the batch, whose results are stacked."""
    arguments = operator._schema.arguments
    written = [i for i, x in enumerate(arguments) if x.alias_info is not None and x.alias_info.is_write]

    def rule(info, in_dims: tuple, *given: Any) -> tuple[Any, Any]:
        for place in written:
            dims = in_dims[place] if isinstance(in_dims[place], list) else [in_dims[place]]
            if None in dims:
                name = operator.name().split("::")[1].split(".")[0]
                raise ValueError(f"{name}: within vmap, what is written must have the batch, got a tensor without it")
        of_each = [
            operator(*[_element(x, dim, i) for x, dim in zip(given, in_dims, strict=True)])
            for i in range(info.batch_size)
        ]
        if not operator._schema.returns:
            return None, None
        leaves = zip(*map(pytree.tree_leaves, of_each), strict=True)
        stacked: Any = pytree.tree_unflatten([torch.stack(x) for x in leaves], pytree.tree_structure(of_each[0]))
        return stacked, pytree.tree_map(lambda _: 0, stacked)

    return rule


def _element(x: Any, dim: Any, i: int) -> Any:
    """Of an argument, or of a list of them, with its batch dimension, None where it has none."""
    if isinstance(dim, (list, tuple)):
        return [_element(y, d, i) for y, d in zip(x, dim, strict=True)]
    return x if dim is None else x.select(dim, i)
