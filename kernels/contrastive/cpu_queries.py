"""InfoNCE on the CPU, with the engine: see of_queries.py."""

import torch
from torch import Tensor

from ..arithmetic import compute_dtype
from . import composed, cpu_engine
from .composed import OwnImage
from .of_queries import attends
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
    n, d = query.shape
    number = temperature if learned is None else learned.item()
    unit = torch.empty(2, n, d, dtype=compute_dtype(query.dtype))
    of_rows = torch.zeros(5, n, dtype=torch.float64)
    for side, x in enumerate((query, positive)):
        _, divisors = cpu_engine.unit_rows(x, True, out=unit[side])
        of_rows[side] = divisors
    q = unit[0]
    own_image = composed.own_row(n, offset, len(negatives))
    cosine = cpu_engine.dots(q, unit[1])
    logits = cosine / number
    # one pass over the negatives: their log-sum-exp, and softmax(logits) @ negatives
    negative_lse, attended = cpu_engine.attend(q, negatives, number, own_image, attends(wanted))
    lse = torch.logaddexp(negative_lse, logits)
    of_rows[2] = lse
    of_rows[3] = cosine
    if attended is None:
        attended = q.new_empty(0)
    else:
        attended.mul_((negative_lse - lse).exp().to(q.dtype)[:, None])
        of_rows[4] = cpu_engine.dots(attended, q)
    others, divisors = cpu_engine.unit_rows(negatives, True) if wanted[2] else (q.new_empty(0), lse.new_empty(0))
    assert divisors is not None
    factor = torch.full((), 1 / number, dtype=torch.float64)
    loss = (lse - logits).mean().to(q.dtype)
    return loss, unit, of_rows, attended, others, divisors, torch.zeros(2, state_rows(n)), factor


def info_nce_backward(
    upstream: Tensor,
    unit: Tensor,
    of_rows: Tensor,
    attended: Tensor,
    negatives: Tensor,
    divisors: Tensor,
    state: Tensor,
    factor: Tensor,
    learned: Tensor | None,
    offset: int,
    temperature: float,
    dtype: torch.dtype,
    wanted: list[bool],
) -> list[Tensor]:
    q, p = unit
    n = len(q)
    number = temperature if learned is None else learned.item()
    q_divisors, p_divisors, lse, cosine, along = of_rows
    scale = upstream.item() / (n * number)
    weight = (cosine / number - lse).expm1()  # the positive's probability - 1
    pull = weight.to(q.dtype)[:, None]
    gradients = [unit.new_empty(0, dtype=dtype) for _ in range(3)]
    if wanted[0]:
        of_unit = torch.addcmul(attended, pull, p)
        gradients[0] = cpu_engine.through_unit_rows(of_unit, q, q_divisors, dtype, scale)
    if wanted[1]:
        gradients[1] = cpu_engine.through_unit_rows(pull * q, p, p_divisors, dtype, scale)
    if wanted[2]:
        of_unit = torch.zeros_like(negatives)
        scaling = cpu_engine.scaling_of(1 / number, 1.0, q, negatives)
        own_image = composed.own_row(n, offset, len(negatives))
        cpu_engine.add_weighted(q, negatives, scaling, own_image, lse, None, None, of_unit)
        gradients[2] = cpu_engine.through_unit_rows(of_unit, negatives, divisors, dtype, scale)
    of_temperature = lse.new_empty(0)
    if learned is not None and wanted[3]:
        of_temperature = (-(along + weight * cosine).sum() * (scale / number)).to(learned.dtype)
    return [*gradients, of_temperature]
