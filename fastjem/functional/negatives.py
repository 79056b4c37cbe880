"""InfoNCE of rows as they come, which a temperature that is a tensor is a part of."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastjem.kernels.arithmetic import widest
from fastjem.ops import transforms
from fastjem.ops.autograd import known, needs_gradient, ops, refuse_second_order


def info_nce_of_rows(rows: Sequence[Tensor], offset: int) -> Tensor:
    """Of queries [N, D], positives [N, D] and negatives [K, D] at temperature 1, not normalised; 0-dim float64."""
    return _info_nce_at_once(rows, offset) if transforms.active() else _InfoNCE.apply(*rows, offset)


class _InfoNCE(torch.autograd.Function):
    """Of rows as they come, at temperature 1: a temperature that is a tensor is in the rows. NT-Xent's operators do it.

    One view has no positives: what they sum and differentiate are the negatives alone.
    """

    @staticmethod
    def forward(ctx, query: Tensor, positive: Tensor, negatives: Tensor, offset: int) -> Tensor:
        logits, lse = _logits_and_lse(query, positive, negatives, offset)
        ctx.save_for_backward(query, positive, negatives, lse, logits)
        ctx.offset = offset
        return (lse - logits).mean()

    @staticmethod
    def backward(ctx, upstream: Tensor):
        refuse_second_order("info_nce")
        query, positive, negatives, lse, logits = ctx.saved_tensors
        learned = ctx.needs_input_grad[2]
        gradients = _info_nce_gradients(query, positive, negatives, lse, logits, ctx.offset, learned)
        scale = (upstream / lse.numel()).to(query.dtype)
        return *(None if gradient is None else gradient * scale for gradient in gradients), None


def _logits_and_lse(query: Tensor, positive: Tensor, negatives: Tensor, offset: int) -> tuple[Tensor, Tensor]:
    """The positives' logits, and the log-sum-exps of all logits, both [N] float64."""
    logits = widest((query * positive).sum(1))
    _, lse = ops.nt_xent(query[None], negatives[None], offset, 1.0, False, False)
    return logits, torch.logaddexp(lse[0], logits)


def _info_nce_gradients(
    query: Tensor, positive: Tensor, negatives: Tensor, lse: Tensor, logits: Tensor, offset: int, learned: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Of the sum over rows; for the negatives where they are `learned`."""
    # An infinite log-sum-exp has no probabilities: a candidate is no row here.
    none = torch.full_like(negatives[:, 0], torch.inf, dtype=lse.dtype)[None]
    rows = query[None]
    candidates = negatives[None]
    options = (1.0, False, False)
    pull = (logits - lse).expm1().to(query.dtype)[:, None]  # the positive's probability - 1
    of_query = ops.nt_xent_backward(rows, candidates, lse[None], none, None, offset, *options)[0] + pull * positive
    if not learned:
        return of_query, pull * query, None
    of_negatives = ops.nt_xent_backward(candidates, rows, none, lse[None], None, -offset, *options)[0]
    return of_query, pull * query, of_negatives


def _info_nce_at_once(inputs: Sequence[Tensor], offset: int) -> Tensor:
    """`_InfoNCE` within a transform of torch.func: the gradients with the loss."""
    query, positive, negatives = (x.detach() for x in inputs)
    logits, lse = _logits_and_lse(query, positive, negatives, offset)
    loss = (lse - logits).mean()
    learned = needs_gradient(inputs[2])
    gradients = _info_nce_gradients(query, positive, negatives, lse, logits, offset, learned)
    of_all = [negatives if gradient is None else gradient for gradient in gradients]
    return known("info_nce", loss, inputs, of_all, [1 / lse.numel()] * 3)
