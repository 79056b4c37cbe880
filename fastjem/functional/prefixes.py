"""Matryoshka prefixes (Kusupati et al. 2022, arXiv 2205.13147, equation 1): a loss of the first d elements of each row.

Rows that are trained so can be cut off at each of these lengths. Each prefix has similarities of its own, as it is
normalised by its own length; so it is a loss of its own, and what is here is their sum.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from fastjem.collectives import Agreement
from fastjem.functional import checks
from fastjem.functional.options import Options
from fastjem.functional.unit import unit_rows


def sum_over_prefixes(
    op: str,
    loss_of: Callable[..., Tensor],
    rows: Sequence[Tensor],
    options: Options,
    dims: Sequence[int] | None,
    weights: Sequence[float] | None,
    group: dist.ProcessGroup | None,
    unit: bool = False,
) -> Tensor:
    """`sum(weight * loss_of(*[x[..., :d] for x in rows], **options) for d, weight in zip(dims, weights))`.

    Args:
        op: the function that the user called.
        rows: [..., D] each.
        options: those of the loss; hard negatives are cut off as rows are.
        dims: lengths of prefixes, ascending, at most D.
        weights: a number of each prefix; None: ones.
        unit: prefixes are normalised here, as the loss takes rows as given.

    Raises:
        ValueError: for other dims or weights.
    """
    hard = options.hard_negatives
    with Agreement(op, group) as ranks:
        lengths = _checked(op, dims, [*rows, *([] if hard is None else [hard])])
        factors = _weights(op, weights, len(lengths), rows[0])
        ranks.alike(f"dims={lengths}")
    losses = []
    for length, weight in zip(lengths, factors, strict=True):
        parts = [_prefix(x, length, unit) for x in rows]
        of_prefix = options if hard is None else options._replace(hard_negatives=_prefix(hard, length, unit))
        loss = loss_of(*parts, **of_prefix._asdict())
        losses.append((loss * weight).to(loss.dtype))
    return torch.stack(losses).sum(0)


def _prefix(x: Tensor, length: int, unit: bool) -> Tensor:
    part = x[..., :length]
    return unit_rows(part).to(x.dtype) if unit else part


def _checked(op: str, dims: Sequence[int] | None, rows: Sequence[Tensor]) -> tuple[int, ...]:
    if dims is None:
        checks.fail(op, "dim_weights must come with dims", "dim_weights alone")
    for x in rows:
        if not isinstance(x, Tensor) or not x.dim() or x.shape[-1] != rows[0].shape[-1]:
            came = " and ".join(str(checks.shape(y)) for y in rows)
            checks.fail(op, "with dims, all rows must be of one length D", came)
    if not isinstance(dims, (list, tuple)) or not dims:
        checks.fail(op, "dims must be lengths of prefixes, ascending and at most D", repr(dims))
    lengths = tuple(checks.integer(op, "dims", length, least=1) for length in dims)
    if any(low >= high for low, high in pairwise(lengths)) or lengths[-1] > rows[0].shape[-1]:
        contract = f"dims must be ascending and at most D = {rows[0].shape[-1]}"
        checks.fail(op, contract, lengths)
    return lengths


def _weights(op: str, weights: Sequence[float] | None, count: int, like: Tensor) -> list[float | Tensor]:
    if weights is None:
        return [1.0] * count
    if not isinstance(weights, (list, tuple)) or len(weights) != count:
        checks.fail(op, f"dim_weights must be {count} numbers, one of each of dims", repr(weights))
    return [checks.number(op, "dim_weights", weight, like) for weight in weights]
