"""Log-sum-exps over what each row sees, and their gradient: what every option of a contrastive loss is made of.

`similarity_logsumexp` of rows a [N, D] and columns b [M, D] looks at the logits `a @ b.T`; a temperature is in the rows
already. Some pairs are no candidates of one another, and `Visible` says which. A loss is made of the results and of
vectors of length N alone (`fastjem/functional/candidates.py`), so its options (weights of samples, label smoothing, a
prior) reach `similarity_logsumexp_backward` as numbers of a row: the weight of its log-sum-exp and that of its sum.
"""

from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from .composed import OwnImage, same_memory


class Visible(NamedTuple):
    """Which columns a row sees, and which rows a column sees.

    Neither sees the other: a row and the columns of its own image; a row and a column of equal ids; pairs that
    `exclude` names. A row sees no column whose logit is above its `row_limit`, and a column no row whose logit is above
    its `column_limit`, each for itself. NaN is above nothing.
    """

    own_image: OwnImage
    row_ids: Tensor | None  # [N] int64
    column_ids: Tensor | None  # [M] int64
    exclude: Tensor | None  # [n, m] bool: row i and column j have its element [i % n, j % m]; n divides N, m divides M
    row_limit: Tensor | None  # [N], floating-point
    column_limit: Tensor | None  # [M], floating-point


class Sums(NamedTuple):
    """Over what a row (or a column) sees, [N] float64 each; without totals the last two are empty."""

    lse: Tensor  # the logits' log-sum-exp: -inf of nothing
    total: Tensor  # their sum
    count: Tensor  # their number


class Slopes(NamedTuple):
    """The derivatives of a loss by a row's (or a column's) log-sum-exp and total, and the log-sum-exp itself.

    The loss's derivative by a logit that the row sees is `of_lse * exp(logit - lse) + of_total`.
    """

    lse: Tensor  # [N] float64
    of_lse: Tensor  # [N] float64, of either sign
    of_total: Tensor | None  # [N] float64


Scaling = TypeVar("Scaling")  # see composed.Engine, whose `scaling_of` it comes from


class VisibleEngine(Protocol[Scaling]):
    """Of `composed.Engine`, `sum_dtype` and `scaling_of` are needed; a logit is a similarity times the factor 1."""

    def sum_dtype(self, x: Tensor, /) -> torch.dtype: ...

    def scaling_of(self, factor: float | Tensor, bound: float | None, a: Tensor, b: Tensor, /) -> Scaling: ...

    def product_rows(self, x: Tensor, products: torch.dtype, /) -> Tensor:
        """Rows as they go into products: dense, in `products` where the device gains by that."""
        ...

    def visible_sums(
        self,
        a: Tensor,
        b: Tensor,
        scaling: Scaling,
        visible: Visible,
        columns: bool,  # whether the columns' sums are wanted, too
        totals: bool,
        /,
        *,
        symmetric: bool,  # b is a, and a column sees what a row of that number sees: half of the tiles are enough
    ) -> tuple[Sums, Sums | None]: ...

    def visible_products(
        self,
        a: Tensor,
        b: Tensor,
        scaling: Scaling,
        visible: Visible,
        of_rows: Slopes | None,
        of_columns: Slopes | None,
        a_sum: Tensor | None,  # [N, D], memory to write
        b_sum: Tensor | None,  # [M, D], the same
        /,
        *,
        symmetric: bool,  # as above, and both Slopes are the same; b_sum is None, as it would be a_sum
    ) -> None:
        """`a_sum = G @ b` and `b_sum = G.T @ a`, G [N, M] being the sum of both sides' derivatives by a logit."""
        ...


def _is_same(x: Tensor | None, y: Tensor | None) -> bool:
    return y is None if x is None else y is not None and same_memory(x, y)


def _is_symmetric(a: Tensor, b: Tensor, visible: Visible) -> bool:
    own = visible.own_image
    return (
        same_memory(a, b)
        and visible.exclude is None
        and _is_same(visible.row_ids, visible.column_ids)
        and (own.column_period == 0 or (own.offset == 0 and own.row_period == own.column_period))
    )


def similarity_logsumexp(
    engine: VisibleEngine,
    a: Tensor,  # [N, D]
    b: Tensor,  # [M, D]
    own_image: list[int],
    row_ids: Tensor | None,
    column_ids: Tensor | None,
    exclude: Tensor | None,
    row_limit: Tensor | None,
    column_limit: Tensor | None,
    columns: bool,
    totals: bool,
    products: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    visible = Visible(OwnImage(*own_image), row_ids, column_ids, exclude, row_limit, column_limit)
    symmetric = not columns and _is_symmetric(a, b, visible)
    if symmetric:
        visible = visible._replace(column_limit=row_limit)
    rows = engine.product_rows(a, products)
    candidates = rows if same_memory(a, b) else engine.product_rows(b, products)
    scaling = engine.scaling_of(1.0, None, rows, candidates)
    of_rows, of_columns = engine.visible_sums(
        rows, candidates, scaling, visible, columns, totals, symmetric=symmetric
    )  # fmt: skip
    if of_columns is None:
        of_columns = Sums(*(torch.empty(0, dtype=of_rows.lse.dtype, device=a.device) for _ in range(3)))
    row_lse, row_total, row_count = of_rows
    column_lse, column_total, column_count = of_columns
    return row_lse, row_total, row_count, column_lse, column_total, column_count


def similarity_logsumexp_backward(
    engine: VisibleEngine,
    a: Tensor,  # [N, D]
    b: Tensor,  # [M, D]
    own_image: list[int],
    row_ids: Tensor | None,
    column_ids: Tensor | None,
    exclude: Tensor | None,
    row_limit: Tensor | None,
    column_limit: Tensor | None,
    row_lse: Tensor | None,
    row_slope: Tensor | None,
    row_total_slope: Tensor | None,
    column_lse: Tensor | None,
    column_slope: Tensor | None,
    column_total_slope: Tensor | None,
    wanted: list[bool],
    products: torch.dtype,
) -> list[Tensor]:
    visible = Visible(OwnImage(*own_image), row_ids, column_ids, exclude, row_limit, column_limit)
    of_rows = _slopes(row_lse, row_slope, row_total_slope)
    of_columns = _slopes(column_lse, column_slope, column_total_slope)
    symmetric = (
        wanted == [True, False]
        and of_rows is not None
        and of_columns is not None
        and _is_symmetric(a, b, visible)
        and _is_same(row_limit, column_limit)
        and all(_is_same(x, y) for x, y in zip(of_rows, of_columns, strict=True))
    )
    rows = engine.product_rows(a, products)
    candidates = rows if same_memory(a, b) else engine.product_rows(b, products)
    scaling = engine.scaling_of(1.0, None, rows, candidates)
    sums = [
        torch.empty(x.shape, dtype=engine.sum_dtype(rows), device=a.device) if want else None
        for x, want in zip((rows, candidates), wanted, strict=True)
    ]
    engine.visible_products(rows, candidates, scaling, visible, of_rows, of_columns, *sums, symmetric=symmetric)
    return [
        x.new_empty(0) if total is None else total.to(x.dtype) for x, total in zip((a, b), sums, strict=True)
    ]  # fmt: skip


def _slopes(lse: Tensor | None, of_lse: Tensor | None, of_total: Tensor | None) -> Slopes | None:
    return None if lse is None or of_lse is None else Slopes(lse, of_lse, of_total)
