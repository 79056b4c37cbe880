"""What the contrastive operators are composed of, whoever computes the tiles: an `engine` is cpu_contrastive or
similarity.

An engine has
* `unit(x, normalize)`: rows of unit length (or as they are) in the dtype of its products, and their divisors;
* `through_unit(gradient, unit, divisors, dtype)`: the gradient through that;
* `dots(a, b)`: float64, of each row of a with that row of b;
* `scaling(factor, bound, a, b)`: how similarities become logits;
* `log_sum_exps(a, b, scaling, place, upper=, columns=)`: float64 for every row, and for every column if wanted;
* `add_weighted(a, b, scaling, place, a_lse, b_lse, a_sum, b_sum, upper=)`: `a_sum += G @ b`, `b_sum += G.T @ a`, with
  G = exp(logit - a_lse) + exp(logit - b_lse); returns `sum(G * similarities)` of each row.

A row's own image is never part of a tile's sums: its few logits are computed once, in float64, so that what is added
to a log-sum-exp and subtracted as a positive has the same bits. At temperature 0.01 nothing else keeps a small loss
exact.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Place:
    """Which columns a row doesn't see: those of its image. Rows and columns repeat their images with these periods."""

    rows: int = 1
    offset: int = 0
    columns: int = 0  # 0: a row sees everything


def _same(x: Tensor, y: Tensor) -> bool:
    return x.data_ptr() == y.data_ptr() and x.shape == y.shape and x.stride() == y.stride() and x.dtype == y.dtype


def _among(rows: Tensor, candidates: Tensor, offset: int) -> bool:
    return 0 <= offset <= candidates.shape[1] - rows.shape[1]


def _prepare(engine, rows: Tensor, candidates: Tensor, offset: int, temperature: float, normalize: bool):
    (v, n, d), total = rows.shape, candidates.shape[1]
    local = _same(rows, candidates) and offset == 0
    a, divisors = engine.unit(rows.reshape(v * n, d), normalize)
    b = a if local else engine.unit(candidates.reshape(v * total, d), normalize)[0]
    scaling = engine.scaling(1 / temperature, 1.0 if normalize else None, a, b)
    return local, a, divisors, b, scaling, Place(n, offset, total)


def _view_logits(engine, unit: Tensor, temperature: float) -> Tensor:
    """[V, V, n] float64: logits of views u and v of the same image; 0 on the diagonal."""
    v, n, _ = unit.shape
    logits = torch.zeros(v, v, n, dtype=torch.float64, device=unit.device)
    for i in range(v):
        for j in range(i + 1, v):
            logits[i, j] = logits[j, i] = engine.dots(unit[i], unit[j]) / temperature
    return logits


def nt_xent(
    engine,
    rows: Tensor,  # [V, n, D]
    candidates: Tensor,  # [V, N, D]
    offset: int,
    temperature: float,
    decoupled: bool,
    normalize: bool,
) -> tuple[Tensor, Tensor]:
    v, n, d = rows.shape
    local, a, _, b, scaling, place = _prepare(engine, rows, candidates, offset, temperature, normalize)
    lse = engine.log_sum_exps(a, b, scaling, place, upper=local)[0].view(v, n)
    if v == 1 or not _among(rows, candidates, offset):
        return torch.zeros_like(lse), lse
    logits = _view_logits(engine, a.view(v, n, d), temperature)
    positives = logits.sum(1) / (v - 1)
    if not decoupled:
        torch.diagonal(logits).copy_(lse.T)
        lse = logits.logsumexp(1)
    return positives, lse


def nt_xent_backward(
    engine,
    rows: Tensor,  # [V, n, D]
    candidates: Tensor,  # [V, N, D]
    rows_lse: Tensor,  # [V, n]
    candidates_lse: Tensor,  # [V, N]
    weights: Tensor | None,  # [V, N]
    offset: int,
    temperature: float,
    decoupled: bool,
    normalize: bool,
) -> Tensor:
    v, n, d = rows.shape
    local, a, divisors, b, scaling, place = _prepare(engine, rows, candidates, offset, temperature, normalize)
    gradient = torch.zeros(a.shape, dtype=engine.sum_dtype(a), device=a.device)
    lses = rows_lse.reshape(-1), candidates_lse.reshape(-1)
    engine.add_weighted(a, b, scaling, place, *lses, gradient, gradient if local else None, upper=local)
    if v > 1 and _among(rows, candidates, offset):
        unit, by_view = a.view(v, n, d), gradient.view(v, n, d)
        w = torch.ones_like(rows_lse) if weights is None else weights[:, offset : offset + n].double()
        pull = (w[:, None] + w) / (v - 1)  # [V, V, n]
        if not decoupled:
            logits = _view_logits(engine, unit, temperature)
            pull = pull - (logits - rows_lse[:, None]).exp() - (logits - rows_lse).exp()
        pull = pull.to(gradient.dtype)
        for i in range(v):
            for j in range(v):
                if i != j:
                    by_view[i].addcmul_(pull[i, j, :, None], unit[j].to(gradient.dtype), value=-1)
    return engine.through_unit(gradient, a, divisors, rows.dtype).view(v, n, d)


def info_nce(
    engine, query: Tensor, positive: Tensor, negatives: Tensor, offset: int, temperature: float, wanted: list[bool]
) -> tuple[Tensor, list[Tensor], Tensor]:
    n, k = len(query), len(negatives)
    (q, q_divisors), (p, p_divisors) = engine.unit(query, True), engine.unit(positive, True)
    place = Place(n, offset, k) if -n < offset < k else Place()
    own = engine.dots(q, p) / temperature  # [N]

    # one pass over the negatives: their log-sum-exp, and softmax(logits) @ negatives
    negative_lse, q_gradient = engine.attend(q, negatives, temperature, place, wanted[0])
    lse = torch.logaddexp(negative_lse, own)
    own_weight = (own - lse).expm1().to(engine.sum_dtype(q))[:, None]  # the positive's probability - 1

    gradients = [x.new_empty(0) for x in (query, positive, negatives)]
    if wanted[0]:
        share = (negative_lse - lse).exp().to(q_gradient.dtype)[:, None]
        q_gradient = q_gradient.mul_(share).addcmul_(own_weight, p.to(q_gradient.dtype))
        gradients[0] = engine.through_unit(q_gradient, q, q_divisors, query.dtype)
    if wanted[1]:
        gradients[1] = engine.through_unit(own_weight * q, p, p_divisors, positive.dtype)
    if wanted[2]:
        unit, divisors = engine.unit(negatives, True)
        gradient = torch.zeros(unit.shape, dtype=engine.sum_dtype(unit), device=unit.device)
        engine.add_weighted(q, unit, engine.scaling(1 / temperature, 1.0, q, unit), place, lse, None, None, gradient)
        gradients[2] = engine.through_unit(gradient, unit, divisors, negatives.dtype)
    dtype = engine.sum_dtype(q)
    scale = torch.full((), 1 / (n * temperature), dtype=dtype, device=q.device)
    return (lse - own).mean().to(dtype), gradients, scale


def _pairs(engine, x: Tensor, y: Tensor, offset: int):
    (a, _), (b, _) = engine.unit(x, False), engine.unit(y, False)
    first, last = max(0, -offset), min(len(x), len(y) - offset)  # the rows whose own pair is among y
    own = (slice(first, last), slice(first + offset, last + offset)) if first < last else (slice(0, 0), slice(0, 0))
    return a, b, own, engine.dots(a[own[0]], b[own[1]])


def clip_loss(engine, x: Tensor, y: Tensor, logit_scale: Tensor, offset: int) -> tuple[Tensor, Tensor, Tensor]:
    a, b, (rows, columns), similarities = _pairs(engine, x, y, offset)
    place = Place(len(x), offset, len(y))
    x_lse, y_lse = engine.log_sum_exps(a, b, engine.scaling(logit_scale, None, a, b), place, columns=True)
    positives = torch.zeros_like(x_lse)
    positives[rows] = similarities * logit_scale.double()
    x_lse[rows] = torch.logaddexp(x_lse[rows], positives[rows])
    y_lse[columns] = torch.logaddexp(y_lse[columns], positives[rows])
    return positives, x_lse, y_lse


def clip_loss_backward(
    engine, x: Tensor, y: Tensor, logit_scale: Tensor, x_lse: Tensor, y_lse: Tensor, offset: int, wanted: list[bool]
) -> tuple[list[Tensor], Tensor]:
    a, b, (rows, columns), similarities = _pairs(engine, x, y, offset)
    place, dtype = Place(len(x), offset, len(y)), engine.sum_dtype(a)
    sums = [torch.zeros(z.shape, dtype=dtype, device=z.device) if w else None for z, w in zip((a, b), wanted)]  # noqa: B905
    row_dots = engine.add_weighted(a, b, engine.scaling(logit_scale, None, a, b), place, x_lse, y_lse, *sums)
    logits = similarities * logit_scale.double()
    g = (logits - x_lse[rows]).expm1() + (logits - y_lse[columns]).expm1()
    weight = g.to(dtype)[:, None]
    if wanted[0]:
        sums[0][rows].addcmul_(weight, b[columns].to(dtype))
    if wanted[1]:
        sums[1][columns].addcmul_(weight, a[rows].to(dtype))
    gradients = [z.new_empty(0) if s is None else s.to(z.dtype) for s, z in zip(sums, (x, y), strict=True)]
    return gradients, row_dots.sum() + (g * similarities).sum()
