"""The specification of InfoNCE as one loss, of queries, a positive for each, and negatives that all of them share.

The two operators are the whole loss, the mean, the unit length, the upstream gradient and that for the temperature
among them: see of_views.py. Negatives are most often constants, a queue that changes before backward: what comes of a
walk over them is computed with the loss, and nothing of them is kept.
"""

import math

import torch
from torch import Tensor

from ..arithmetic import no_gradient, through_unit_rows, unit_rows, widen, widest, widest_dtype
from .of_views import divisor_of, dtype_of_products, state_rows


def info_nce(
    query: Tensor,  # [N, D]
    positive: Tensor,  # [N, D]
    negatives: Tensor,  # [K, D]
    learned: Tensor | None,  # 0-dim: the temperature, instead of the number
    offset: int,  # row offset + i of the negatives is query i's positive, not a negative; -N: none is
    temperature: float,
    wanted: list[bool],  # for query, positive, negatives and the temperature
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`cross_entropy(cat([<q, p>, q @ negatives.T], 1) / temperature, 0)` of normalised rows, and what backward takes.

    MoCo, arXiv 1911.05722, equation 1. Beside the loss, where it is wanted and empty elsewhere:

    * the gradients of the sum over queries, times the temperature, for query and positive, [N, D];
    * each query's sum of its logits' gradients times cosines, [N] float64: of them the temperature's gradient is made;
    * for the gradient of the negatives: queries at unit length [N, D]; what these were divided by, and the log-sum-exps
      of their logits, [2, N] float64; negatives at unit length [K, D] and what they were divided by [K] float64; a
      state that only a GPU's kernels fill, [2, >= N] float32;
    * 1 / temperature, 0-dim float64, always.
    """
    q, q_norm = unit_rows(widen(query))
    p, p_norm = unit_rows(widen(positive))
    k, k_norm = unit_rows(widen(negatives))
    n = q.shape[0]
    divided_by = divisor_of(temperature, learned)
    itself = torch.arange(k.shape[0], device=k.device) == torch.arange(n, device=k.device)[:, None] + offset
    cosines = torch.cat([(q * p).sum(1, keepdim=True), (q @ k.T).masked_fill(itself, -math.inf)], 1)  # [N, 1 + K]
    logits = widest(cosines) / divided_by
    log_p = logits.log_softmax(1)
    pull = log_p[:, :1].expm1()  # the positive's probability - 1
    of_query = of_positive = no_gradient(q)
    slopes = no_gradient(logits)
    if wanted[0] or wanted[3]:
        attended = log_p[:, 1:].exp().masked_fill(itself, 0).to(q.dtype) @ k
        of_unit = pull.to(q.dtype) * p + attended
        if wanted[0]:
            of_query = through_unit_rows(of_unit, q, q_norm)
        if wanted[3]:
            slopes = widest(attended * q).sum(1) + pull[:, 0] * widest(cosines[:, 0])
    if wanted[1]:
        of_positive = through_unit_rows(pull.to(q.dtype) * q, p, p_norm)
    dtype = dtype_of_products(query)
    factor = torch.ones((), dtype=widest_dtype(q.device), device=q.device) / divided_by
    unit, of_rows, others, divisors, state = (x.new_empty(0) for x in (q.to(dtype), factor, q.to(dtype), factor, q))
    if wanted[2]:
        unit = q.to(dtype, copy=True)
        of_rows = torch.stack([widest(q_norm[:, 0]), logits.logsumexp(1)])
        others = k.to(dtype, copy=True)
        divisors = widest(k_norm[:, 0]).clone()
        state = torch.zeros(2, state_rows(n), dtype=torch.float32, device=q.device)
    loss = -log_p[:, 0].mean()
    return loss.to(q.dtype), of_query, of_positive, slopes, unit, of_rows, others, divisors, state.float(), factor


def info_nce_backward(
    upstream: Tensor,  # 0-dim
    of_query: Tensor,  # these: see `info_nce`
    of_positive: Tensor,
    slopes: Tensor,
    unit: Tensor,
    of_rows: Tensor,
    others: Tensor,
    divisors: Tensor,
    state: Tensor,
    factor: Tensor,
    learned: Tensor | None,
    offset: int,
    temperature: float,
    count: int,  # N
    dtype: torch.dtype,  # of the rows as they came
    wanted: list[bool],
) -> list[Tensor]:
    """The gradients for query, positive, negatives and a learned temperature; empty where none is wanted.

    A temperature divides logits: its gradient is the sum of their products with theirs, over the temperature and
    negative.
    """
    scale = widest(upstream) * factor / count
    gradients = [(x * scale.to(x.dtype)).to(dtype) for x in (of_query, of_positive)]
    of_negatives = others.new_empty(0, dtype=dtype)
    if wanted[2]:
        q, k = widen(unit), widen(others)
        itself = torch.arange(k.shape[0], device=k.device) == torch.arange(count, device=k.device)[:, None] + offset
        logits = widest(q @ k.T) * factor
        probabilities = (logits - of_rows[1][:, None]).exp().masked_fill(itself, 0).to(q.dtype)
        of_unit = probabilities.T @ q
        of_negatives = through_unit_rows(of_unit, k, divisors[:, None].to(k.dtype)) * scale.to(k.dtype)
    of_temperature = no_gradient(factor)
    if learned is not None and wanted[3]:
        of_temperature = (-slopes.sum() * scale * factor).to(learned.dtype)
    return [*gradients, of_negatives.to(dtype), of_temperature]
