"""InfoNCE on the CPU, with the engine: see of_queries.py."""

import torch
from torch import Tensor

from . import composed, cpu_engine
from .cpu_views import number_of
from .of_views import state_rows


def info_nce(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor,
    learned: Tensor | None,
    offset: int,
    temperature: float,
    wanted: list[bool],
) -> tuple[Tensor, ...]:
    n = len(query)
    number = number_of(temperature, learned)
    q, q_divisors = cpu_engine.unit_rows(query, True)
    p, p_divisors = cpu_engine.unit_rows(positive, True)
    own_image = composed.own_row(n, offset, len(negatives))
    cosine = cpu_engine.dots(q, p)
    logits = cosine / number
    # one pass over the negatives: their log-sum-exp, and softmax(logits) @ negatives
    negative_lse, attended = cpu_engine.attend(q, negatives, number, own_image, wanted[0] or wanted[3])
    lse = torch.logaddexp(negative_lse, logits)
    weight = (logits - lse).expm1()  # the positive's probability - 1
    pull = weight.to(q.dtype)[:, None]
    of_query = of_positive = q.new_empty(0)
    slopes = lse.new_empty(0)
    if attended is not None:
        attended.mul_((negative_lse - lse).exp().to(q.dtype)[:, None])
        if wanted[3]:
            slopes = cpu_engine.dots(attended, q) + weight * cosine
        if wanted[0]:
            of_query = cpu_engine.through_unit_rows(attended.addcmul_(pull, p), q, q_divisors, q.dtype)
    if wanted[1]:
        of_positive = cpu_engine.through_unit_rows(pull * q, p, p_divisors, q.dtype)
    unit, of_rows, others, divisors, state = (x.new_empty(0) for x in (q, lse, q, lse, lse.float()))
    if wanted[2]:
        assert q_divisors is not None
        unit = q
        of_rows = torch.stack([q_divisors, lse])
        others, divisors = cpu_engine.unit_rows(negatives, True)
        assert divisors is not None
        state = torch.zeros(2, state_rows(n))
    factor = torch.full((), 1 / number, dtype=torch.float64)
    loss = (lse - logits).mean().to(q.dtype)
    return loss, of_query, of_positive, slopes, unit, of_rows, others, divisors, state, factor


def info_nce_backward(
    upstream: Tensor,
    of_query: Tensor,
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
    count: int,
    dtype: torch.dtype,
    wanted: list[bool],
) -> list[Tensor]:
    number = number_of(temperature, learned)
    scale = upstream.item() / (count * number)
    gradients = [(x * scale).to(dtype) for x in (of_query, of_positive)]
    of_negatives = others.new_empty(0, dtype=dtype)
    if wanted[2]:
        of_unit = torch.zeros_like(others)
        scaling = cpu_engine.scaling_of(1 / number, 1.0, unit, others)
        own_image = composed.own_row(count, offset, len(others))
        cpu_engine.add_weighted(unit, others, scaling, own_image, of_rows[1], None, None, of_unit)
        of_negatives = cpu_engine.through_unit_rows(of_unit, others, divisors, dtype, scale)
    of_temperature = factor.new_empty(0)
    if learned is not None and wanted[3]:
        of_temperature = (-slopes.sum() * (scale / number)).to(learned.dtype)
    return [*gradients, of_negatives, of_temperature]
