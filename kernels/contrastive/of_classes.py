"""The specification of the supervised contrastive loss as one loss, of a batch that is on one rank.

The two operators are the whole loss, the classes, the mean, the unit length, the upstream gradient and that for the
temperature among them: see of_views.py. Rows are numbered r = v N + n; row r shows image n and has its class.
"""

import math

import torch
from torch import Tensor

from ..arithmetic import compute_dtype, no_gradient, through_unit_rows, unit_rows, widen, widest, widest_dtype
from .of_views import divisor_of, dtype_of_products, state_rows


def class_table(first: Tensor, count: Tensor, views: int, anchor_views: int) -> Tensor:
    """[2, >= V N] int32: the number of each row's class, -1 behind the last row; and how many positives an anchor has,
    0 where it has none, where a row is no anchor, and behind the last.

    A class's number is that of its first image, `first` [N]; `count` [N] is how many images it has.
    """
    n = first.shape[0]
    rows = views * n
    table = torch.zeros(2, state_rows(rows), dtype=torch.int32, device=first.device)
    table[0, :rows] = first.repeat(views)
    table[0, rows:] = -1
    table[1, : anchor_views * n] = (views * count - 1).repeat(anchor_views)
    return table


def _classes(ids: Tensor | None, n: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The first image of each image's class and how many it has, [N] each; without ids each image is a class."""
    image = torch.arange(n, device=device)
    ids = image if ids is None else ids
    same = ids[:, None] == ids
    return same.int().argmax(1), same.sum(1)


def _share(table: Tensor, rows: int, like: Tensor) -> Tensor:
    """[V N]: 1 / a row's number of positives, 0 where the table has none."""
    count = table[1, :rows]
    return torch.where(count > 0, 1 / count.clamp_min(1).to(like.dtype), 0)


def _logits(rows: Tensor, factor: float | Tensor) -> tuple[Tensor, Tensor]:
    """[V N, V N], and where a row meets itself."""
    return widest(rows @ rows.T) * factor, torch.eye(rows.shape[0], dtype=torch.bool, device=rows.device)


def supcon(
    z: Tensor,  # [V, N, D]
    ids: Tensor | None,  # [N] int64: images of equal ids are of one class; None: each image is a class of its own
    learned: Tensor | None,  # 0-dim: the temperature, instead of the number
    temperature: float,
    one_anchor: bool,  # whether the first view's rows alone are anchors
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The mean over anchors of `logsumexp(s_i.) - mean(s_ij over positives j)`, and what its gradient is made of.

    s are cosines / temperature, or dot products if not `normalize`, with all rows but the anchor; an anchor without
    positives counts as 0 (SupCon, arXiv 2004.11362, equation 2). Beside the loss:

    * the rows as they are multiplied [V, N, D], and what they were divided by [V, N] float64, empty if they weren't;
    * log-sum-exps [V, N] float64, infinite where a row isn't an anchor with positives, so that it has no probabilities;
    * `class_table`; a state that only a GPU's kernels fill [3, >= V N] float32; 1 / temperature, 0-dim float64.
    """
    v, n, d = z.shape
    rows, norm = unit_rows(widen(z)) if normalize else (widen(z), None)
    flat = rows.reshape(v * n, d)
    factor = torch.ones((), dtype=widest_dtype(z.device), device=z.device) / divisor_of(temperature, learned)
    anchors = n if one_anchor else v * n
    table = class_table(*_classes(ids, n, z.device), v, 1 if one_anchor else v)
    logits, itself = _logits(flat, factor)
    number = table[0, : v * n]
    positive = (number[:, None] == number) & ~itself
    share = _share(table, v * n, logits)
    lse = logits.masked_fill(itself, -math.inf).logsumexp(1)
    losses = lse - logits.masked_fill(~positive, 0).sum(1) * share
    loss = losses.where(share > 0, 0).sum() / anchors
    lse = lse.where(share > 0, math.inf).view(v, n)
    divisors = lse.new_empty(0) if norm is None else widest(norm[..., 0]).clone()
    state = torch.zeros(3, state_rows(v * n), dtype=torch.float32, device=z.device)
    unit = rows.to(dtype_of_products(z), copy=True)
    return loss.to(compute_dtype(z.dtype)), unit.contiguous(), divisors, lse, table, state, factor


def supcon_backward(
    upstream: Tensor,  # 0-dim
    unit: Tensor,  # these: see `supcon`
    divisors: Tensor,
    lse: Tensor,
    table: Tensor,
    state: Tensor,
    factor: Tensor,
    learned: Tensor | None,
    temperature: float,
    one_anchor: bool,
    normalize: bool,
    dtype: torch.dtype,  # of the rows as they came
    wanted: list[bool],  # for the rows and the temperature
) -> tuple[Tensor, Tensor]:
    """The gradient for the rows [V, N, D], and that for a learned temperature, 0-dim; empty where there is none.

    Logits are quadratic in the rows: their products with their gradient are twice the logits' with theirs, and the
    temperature divides logits.
    """
    v, n, d = unit.shape
    rows = widen(unit)
    flat = rows.view(v * n, d)
    logits, itself = _logits(flat, factor)
    number = table[0, : v * n]
    share = _share(table, v * n, logits)
    pull = torch.where(number[:, None] == number, share[:, None], 0)
    weights = ((logits - lse.view(-1, 1)).exp() - pull).masked_fill(itself, 0)
    of_unit = ((weights + weights.T).to(rows.dtype) @ flat).view(v, n, d)
    scale = widest(upstream) * factor / (n if one_anchor else v * n)
    through = through_unit_rows(of_unit, rows, divisors[..., None].to(rows.dtype)) if normalize else of_unit
    gradient = (through * scale.to(rows.dtype)).to(dtype)
    if learned is None or not wanted[1]:
        return gradient, no_gradient(lse)
    along = widest(of_unit * rows).sum()
    return gradient, (-along / 2 * scale * factor).to(learned.dtype)
