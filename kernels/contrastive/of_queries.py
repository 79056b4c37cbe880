"""The specification of InfoNCE as one loss, of queries, a positive for each, and negatives that all of them share.

The two operators are the whole loss, the mean, the unit length, the upstream gradient and that for the temperature among
them: see of_views.py.
"""

import math

import torch
from torch import Tensor

from ..arithmetic import no_gradient, through_unit_rows, unit_rows, widen, widest, widest_dtype
from .of_views import dtype_of_products, state_rows


def attends(wanted: list[bool]) -> bool:
    """Whether the gradients wanted take the negatives' mean under the softmax: those for queries and temperature do."""
    return wanted[0] or wanted[3]


def info_nce(
    query: Tensor,  # [N, D]
    positive: Tensor,  # [N, D]
    negatives: Tensor,  # [K, D]
    learned: Tensor | None,  # 0-dim: the temperature, instead of the number
    offset: int,  # row offset + i of the negatives is query i's positive, not a negative; -N: none is
    temperature: float,
    wanted: list[bool],  # for query, positive, negatives and the temperature
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`cross_entropy(cat([<q, p>, q @ negatives.T], 1) / temperature, 0)` of normalised rows, and what its gradient takes.

    MoCo, arXiv 1911.05722, equation 1. Beside the loss:

    * the rows of query and positive at unit length, [2, N, D];
    * of each query, [5, N]: what both were divided by, the log-sum-exp of its logits, its cosine with its positive, and
      with the next;
    * the sum of the negatives at unit length times their probabilities, [N, D], where `attends` says so;
    * the negatives at unit length [K, D] and what they were divided by [K], where their gradient is wanted: of
      constants nothing is kept;
    * a state that only a GPU's kernels fill, [2, >= N] float32; 1 / temperature, 0-dim.

    What isn't wanted is empty. Numbers of single rows are float64.
    """
    q, q_norm = unit_rows(widen(query))
    p, p_norm = unit_rows(widen(positive))
    k, k_norm = unit_rows(widen(negatives))
    n = q.shape[0]
    divided_by = temperature if learned is None else widest(learned)
    itself = torch.arange(k.shape[0], device=k.device) == torch.arange(n, device=k.device)[:, None] + offset
    cosines = torch.cat([(q * p).sum(1, keepdim=True), (q @ k.T).masked_fill(itself, -math.inf)], 1)  # [N, 1 + K]
    logits = widest(cosines) / divided_by
    log_p = logits.log_softmax(1)
    lse = logits.logsumexp(1)
    attended = no_gradient(q)
    along = torch.zeros_like(lse)
    if attends(wanted):
        attended = log_p[:, 1:].exp().masked_fill(itself, 0).to(q.dtype) @ k
        along = widest(attended * q).sum(1)
    of_rows = torch.stack([widest(q_norm[:, 0]), widest(p_norm[:, 0]), lse, widest(cosines[:, 0]), along])
    dtype = dtype_of_products(query)
    others = k.to(dtype, copy=True) if wanted[2] else k.new_empty(0, dtype=dtype)
    divisors = widest(k_norm[:, 0]).clone() if wanted[2] else no_gradient(lse)
    state = torch.zeros(2, state_rows(n), dtype=torch.float32, device=q.device)
    factor = torch.ones((), dtype=widest_dtype(q.device), device=q.device) / divided_by
    loss = -log_p[:, 0].mean()
    return loss.to(q.dtype), torch.stack([q, p]).to(dtype), of_rows, attended, others, divisors, state, factor


def info_nce_backward(
    upstream: Tensor,  # 0-dim
    unit: Tensor,  # [2, N, D]; these: see `info_nce`
    of_rows: Tensor,  # [5, N]
    attended: Tensor,  # [N, D]
    negatives: Tensor,  # [K, D]
    divisors: Tensor,  # [K]
    state: Tensor,
    factor: Tensor,
    learned: Tensor | None,
    offset: int,
    temperature: float,
    dtype: torch.dtype,  # of the rows as they came
    wanted: list[bool],
) -> list[Tensor]:
    """The gradients for query, positive, negatives and a learned temperature; empty where none is wanted.

    A temperature divides logits: its gradient is the sum of their products with theirs, over the temperature and
    negative.
    """
    q, p = widen(unit)
    q_norm, p_norm, lse, cosine, along = of_rows
    n = q.shape[0]
    scale = widest(upstream) * factor / n
    weight = (cosine * factor - lse).expm1()  # the positive's probability - 1
    pull = weight.to(q.dtype)[:, None]
    gradients = [unit.new_empty(0, dtype=dtype) for _ in range(3)]
    if wanted[0]:
        gradients[0] = through_unit_rows(pull * p + attended, q, q_norm[:, None].to(q.dtype)) * scale.to(q.dtype)
    if wanted[1]:
        gradients[1] = through_unit_rows(pull * q, p, p_norm[:, None].to(q.dtype)) * scale.to(q.dtype)
    if wanted[2]:
        k = widen(negatives)
        itself = torch.arange(k.shape[0], device=k.device) == torch.arange(n, device=k.device)[:, None] + offset
        logits = widest(q @ k.T) * factor
        probabilities = (logits - lse[:, None]).exp().masked_fill(itself, 0).to(q.dtype)
        gradients[2] = through_unit_rows(probabilities.T @ q, k, divisors[:, None].to(k.dtype)) * scale.to(k.dtype)
    gradients = [gradient.to(dtype) for gradient in gradients]
    of_temperature = no_gradient(lse)
    if learned is not None and wanted[3]:
        of_temperature = (-(along + weight * cosine).sum() * scale * factor).to(learned.dtype)
    return [*gradients, of_temperature]
