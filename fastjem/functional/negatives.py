"""InfoNCE of one rank, which one operator computes whole and another differentiates."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastjem.ops import direct, transforms
from fastjem.ops.autograd import Upstream, distinct, learned_or_number, needs_gradient, refuse_second_order
from fastjem.ops.forward_mode import refuse_forward_mode


class _InfoNCE(torch.autograd.Function):
    """`learned` is the temperature if it is a tensor; `options` are the offset and the number."""

    @staticmethod
    def forward(ctx, options: tuple[int, float], wanted: list[bool], learned: Tensor | None, *rows: Tensor) -> Tensor:
        loss, *saved = direct.call("info_nce", *rows, learned, *options, wanted)
        ctx.save_for_backward(*saved, learned)
        ctx.options = options
        ctx.wanted = wanted
        ctx.of = (rows[0].shape[0], rows[0].dtype)
        return loss

    @staticmethod
    def backward(ctx, upstream: Tensor):
        refuse_second_order("info_nce")
        saved = ctx.saved_tensors
        of = Upstream(upstream, saved[0])
        arguments = (of.given, *saved, *ctx.options, *ctx.of, ctx.wanted)
        *of_rows, of_temperature = of.of(direct.call("info_nce_backward", *arguments), ctx.wanted)
        return None, None, of_temperature, *of_rows


def info_nce_of_rows(
    rows: Sequence[Tensor],  # queries [N, D], positives [N, D], negatives [K, D]
    temperature: float | Tensor,
    offset: int,  # row offset + i of the negatives is query i's positive; -N: none is
) -> Tensor:
    """The mean over queries; rows are normalised."""
    learned, number = learned_or_number(temperature)
    options = (offset, number)
    inputs = [*rows] if learned is None else [*rows, learned]
    refuse_forward_mode("info_nce", inputs)
    wanted = [needs_gradient(x) for x in inputs]
    if learned is None:
        wanted.append(False)
    if transforms.active():
        return _at_once(inputs, options, wanted)
    if not any(wanted):
        return direct.call("info_nce", *rows, learned, *options, wanted)[0]
    return _InfoNCE.apply(options, wanted, learned, *distinct(rows))


def _at_once(inputs: Sequence[Tensor], options: tuple[int, float], wanted: list[bool]) -> Tensor:
    """Within a transform of torch.func: the gradients with the loss."""
    query, positive, negatives, *number = (x.detach() for x in inputs)
    learned = number[0] if number else None
    loss, *saved = direct.call("info_nce", query, positive, negatives, learned, *options, wanted)
    if not any(wanted):
        return loss
    arguments = (torch.ones_like(loss), *saved, learned, *options, query.shape[0], query.dtype, wanted)
    found = direct.call("info_nce_backward", *arguments)
    gradients = [gradient if want else x for gradient, x, want in zip(found, inputs, wanted, strict=False)]
    return transforms.known("info_nce", loss, inputs, gradients, [1.0] * len(inputs))
