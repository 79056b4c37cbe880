"""The contrastive operators, composed of what an engine computes on tiles of similarities.

There are two engines, `cpu_engine` and `gpu_engine`: modules with the functions of the protocol `Engine`.

A row's own image is never part of a tile's sums. The few logits of its views are computed once, in float64, so that
what is added to a log-sum-exp and subtracted as a positive has the same bits. At temperature 0.01 nothing else keeps a
small loss exact.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class OwnImage:
    """Which columns show a row's own image: they are left out of the row's sums, and it of theirs.

    Views of the same images are stacked, so images repeat with a period. Row i shows image `i % row_period`, and the
    columns j with `j % column_period == i % row_period + offset` show the same one. For V views of n images among V
    views of N, the periods are n and N; where row i has one partner, column i + offset, they are the numbers of rows
    and columns.
    """

    row_period: int = 1
    offset: int = 0
    column_period: int = 0  # 0: no column shows a row's image


def own_row(n: int, offset: int, columns: int) -> OwnImage:
    """Of rows that have one partner each, column i + offset, which may not be there."""
    return OwnImage(n, offset, columns) if -n < offset < columns else OwnImage()


Scaling = TypeVar("Scaling")  # how similarities become logits, and their exponentials stay finite: an engine's own


class Engine(Protocol[Scaling]):
    """Similarities are dot products of rows a [N, D] and b [M, D]; logits are similarities times a factor."""

    def unit_rows(self, x: Tensor, normalize: bool, /) -> tuple[Tensor, Tensor | None]:
        """Rows of unit length in the dtype of the engine's products, and what they were divided by.

        Without `normalize` the rows are as they come, and there are no divisors.
        """
        ...

    def through_unit_rows(
        self, gradient: Tensor, unit: Tensor, divisors: Tensor | None, dtype: torch.dtype, /
    ) -> Tensor:
        """The gradient for x, in its dtype, given that for `unit_rows(x)`. `gradient` may be overwritten."""
        ...

    def sum_dtype(self, x: Tensor, /) -> torch.dtype:
        """Of sums of products of the rows x."""
        ...

    def dots(self, a: Tensor, b: Tensor, /) -> Tensor:
        """[N] float64: of each row of a [N, D] with that row of b [N, D]."""
        ...

    def scaling_of(self, factor: float | Tensor, bound: float | None, a: Tensor, b: Tensor, /) -> Scaling:
        """For logits `factor * a @ b.T`. A number is positive; a tensor may have either sign.

        `bound`, if given, is how large a similarity can be.
        """
        ...

    def row_log_sum_exps(
        self,
        a: Tensor,
        b: Tensor,
        scaling: Scaling,
        own_image: OwnImage,
        /,
        *,
        symmetric: bool = False,  # b is a: half of the tiles are enough
    ) -> Tensor:
        """Of every row's logits, [N] float64."""
        ...

    def both_log_sum_exps(
        self, a: Tensor, b: Tensor, scaling: Scaling, own_image: OwnImage, /
    ) -> tuple[Tensor, Tensor]:
        """Of every row's logits [N] and of every column's [M], float64, in one pass."""
        ...

    def add_weighted(
        self,
        a: Tensor,
        b: Tensor,
        scaling: Scaling,
        own_image: OwnImage,
        a_lse: Tensor,  # [N] float64
        b_lse: Tensor | None,  # [M] float64; None: without the second term of G
        a_sum: Tensor | None,  # [N, D]
        b_sum: Tensor | None,  # [M, D]
        /,
        *,
        symmetric: bool = False,  # b is a, and b_sum is a_sum
    ) -> Tensor | None:
        """`a_sum += G @ b` and `b_sum += G.T @ a`, where G = exp(logits - a_lse) + exp(logits - b_lse).

        Returns `G * similarities`, summed in parts that are still to be added, float64 of one dimension, where both
        log-sum-exps are given and not `symmetric`; otherwise None.
        """
        ...


class Views(NamedTuple):
    """What NT-Xent's operators begin with."""

    symmetric: bool  # the candidates are the rows
    rows: Tensor  # [V n, D], of unit length if they are normalised
    divisors: Tensor | None
    candidates: Tensor  # [V N, D]
    own_image: OwnImage
    has_positives: bool  # whether the rows' images are among the candidates: they all are, or none is


def same_memory(x: Tensor, y: Tensor) -> bool:
    return x.data_ptr() == y.data_ptr() and x.shape == y.shape and x.stride() == y.stride() and x.dtype == y.dtype


def _flat_views(engine: Engine, rows: Tensor, candidates: Tensor, offset: int, normalize: bool) -> Views:
    views, n, width = rows.shape
    total = candidates.shape[1]
    symmetric = offset == 0 and same_memory(rows, candidates)
    a, divisors = engine.unit_rows(rows.reshape(views * n, width), normalize)
    b = a if symmetric else engine.unit_rows(candidates.reshape(views * total, width), normalize)[0]
    has_positives = views > 1 and 0 <= offset <= total - n
    return Views(symmetric, a, divisors, b, OwnImage(n, offset, total), has_positives)


def _logits_within_images(engine: Engine, unit: Tensor, temperature: float) -> Tensor:
    """[V, V, n] float64 for [V, n, D]: logits of every two views of an image; 0 on the diagonal."""
    views, n, _ = unit.shape
    logits = torch.zeros(views, views, n, dtype=torch.float64, device=unit.device)
    for i in range(views):
        for j in range(i + 1, views):
            logits[i, j] = logits[j, i] = engine.dots(unit[i], unit[j]) / temperature
    return logits


def nt_xent(
    engine: Engine,
    rows: Tensor,  # [V, n, D]
    candidates: Tensor,  # [V, N, D]
    offset: int,
    temperature: float,
    decoupled: bool,
    normalize: bool,
) -> tuple[Tensor, Tensor]:
    views, n, width = rows.shape
    flat = _flat_views(engine, rows, candidates, offset, normalize)
    scaling = engine.scaling_of(1 / temperature, 1.0 if normalize else None, flat.rows, flat.candidates)
    return positives_and_lse(engine, flat, (views, n, width), scaling, temperature, decoupled)


def positives_and_lse(
    engine: Engine[Scaling],
    flat: Views,
    shape: tuple[int, int, int],
    scaling: Scaling,
    temperature: float,
    decoupled: bool,
) -> tuple[Tensor, Tensor]:
    views, n, width = shape
    a = flat.rows
    lse = engine.row_log_sum_exps(a, flat.candidates, scaling, flat.own_image, symmetric=flat.symmetric).view(views, n)
    if not flat.has_positives:
        return torch.zeros_like(lse), lse
    logits = _logits_within_images(engine, a.view(views, n, width), temperature)
    positives = logits.sum(1) / (views - 1)
    if not decoupled:
        # The unused place of a row with itself takes the log-sum-exp over other images.
        torch.diagonal(logits).copy_(lse.T)
        lse = logits.logsumexp(1)
    return positives, lse


def nt_xent_backward(
    engine: Engine,
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
    views, n, width = rows.shape
    flat = _flat_views(engine, rows, candidates, offset, normalize)
    scaling = engine.scaling_of(1 / temperature, 1.0 if normalize else None, flat.rows, flat.candidates)
    if weights is not None:
        weights = weights[:, offset : offset + n].double()
    of_unit = gradient_of_unit_rows(
        engine, flat, (views, n, width), scaling, rows_lse, candidates_lse, weights, temperature, decoupled
    )
    return engine.through_unit_rows(of_unit, flat.rows, flat.divisors, rows.dtype).view(views, n, width)


def gradient_of_unit_rows(
    engine: Engine[Scaling],
    flat: Views,
    shape: tuple[int, int, int],
    scaling: Scaling,
    rows_lse: Tensor,  # [V, n]
    candidates_lse: Tensor,  # [V, N]
    weights: Tensor | None,  # [V, n] float64, of the rows' positives
    temperature: float,
    decoupled: bool,
) -> Tensor:
    """[V n, D], for the rows as they are multiplied."""
    views, n, width = shape
    a = flat.rows
    gradient = torch.zeros(a.shape, dtype=engine.sum_dtype(a), device=a.device)
    a_lse = rows_lse.reshape(-1)
    b_lse = candidates_lse.reshape(-1)
    b_sum = gradient if flat.symmetric else None
    candidates = flat.candidates
    engine.add_weighted(a, candidates, scaling, flat.own_image, a_lse, b_lse, gradient, b_sum, symmetric=flat.symmetric)
    if flat.has_positives:
        unit = a.view(views, n, width)
        logits = None if decoupled else _logits_within_images(engine, unit, temperature)
        _pull_views_together(unit, gradient.view(views, n, width), rows_lse, weights, logits)
    return gradient


def _pull_views_together(
    unit: Tensor,  # [V, n, D]
    gradient: Tensor,  # [V, n, D], of which the terms between views of one image are still missing
    lse: Tensor,  # [V, n]
    weights: Tensor | None,  # [V, n] float64
    logits: Tensor | None,  # [V, V, n] between views of an image, where those are part of the log-sum-exp
) -> None:
    views = len(unit)
    w = torch.ones_like(lse) if weights is None else weights
    pull = (w[:, None] + w) / (views - 1)  # [V, V, n]
    if logits is not None:
        pull = pull - (logits - lse[:, None]).exp() - (logits - lse).exp()
    pull = pull.to(gradient.dtype)
    for i in range(views):
        for j in range(views):
            if i != j:
                gradient[i].addcmul_(pull[i, j, :, None], unit[j].to(gradient.dtype), value=-1)


class _Pairs(NamedTuple):
    """What CLIP's two operators begin with."""

    a: Tensor  # [n, D]
    b: Tensor  # [m, D]
    rows: slice  # of a, whose partners are among b
    columns: slice  # these partners
    pair_similarities: Tensor  # float64, of each of these rows with its partner
    own_image: OwnImage


def _pairs(engine: Engine, x: Tensor, y: Tensor, offset: int) -> _Pairs:
    a, _ = engine.unit_rows(x, False)
    b, _ = engine.unit_rows(y, False)
    first = max(0, -offset)
    stop = max(first, min(len(x), len(y) - offset))
    rows = slice(first, stop)
    columns = slice(first + offset, stop + offset)
    return _Pairs(a, b, rows, columns, engine.dots(a[rows], b[columns]), OwnImage(len(x), offset, len(y)))


def clip_loss(
    engine: Engine,
    x: Tensor,  # [n, D]
    y: Tensor,  # [m, D]
    logit_scale: Tensor,  # 0-dim
    offset: int,
) -> tuple[Tensor, Tensor, Tensor]:
    pairs = _pairs(engine, x, y, offset)
    rows = pairs.rows
    columns = pairs.columns
    scaling = engine.scaling_of(logit_scale, None, pairs.a, pairs.b)
    x_lse, y_lse = engine.both_log_sum_exps(pairs.a, pairs.b, scaling, pairs.own_image)
    positives = torch.zeros_like(x_lse)
    positives[rows] = pairs.pair_similarities * logit_scale.double()
    x_lse[rows] = torch.logaddexp(x_lse[rows], positives[rows])
    y_lse[columns] = torch.logaddexp(y_lse[columns], positives[rows])
    return positives, x_lse, y_lse


def clip_loss_backward(
    engine: Engine,
    x: Tensor,  # [n, D]
    y: Tensor,  # [m, D]
    logit_scale: Tensor,  # 0-dim
    x_lse: Tensor,  # [n]
    y_lse: Tensor,  # [m]
    offset: int,
    wanted: list[bool],
) -> tuple[list[Tensor], Tensor]:
    pairs = _pairs(engine, x, y, offset)
    a = pairs.a
    b = pairs.b
    rows = pairs.rows
    columns = pairs.columns
    dtype = engine.sum_dtype(a)
    a_sum = torch.zeros(a.shape, dtype=dtype, device=a.device) if wanted[0] else None
    b_sum = torch.zeros(b.shape, dtype=dtype, device=b.device) if wanted[1] else None
    scaling = engine.scaling_of(logit_scale, None, a, b)
    dots = engine.add_weighted(a, b, scaling, pairs.own_image, x_lse, y_lse, a_sum, b_sum)
    logits = pairs.pair_similarities * logit_scale.double()
    g = (logits - x_lse[rows]).expm1() + (logits - y_lse[columns]).expm1()
    weight = g.to(dtype)[:, None]
    if a_sum is not None:
        a_sum[rows].addcmul_(weight, b[columns].to(dtype))
    if b_sum is not None:
        b_sum[columns].addcmul_(weight, a[rows].to(dtype))
    gradients = [
        x.new_empty(0) if a_sum is None else a_sum.to(x.dtype),
        y.new_empty(0) if b_sum is None else b_sum.to(y.dtype),
    ]
    return gradients, dots.sum() + (g * pairs.pair_similarities).sum()
