"""Log-sum-exps over what each row sees, differentiable, over ranks: the operator that losses with options are made of.

Over ranks it is a ring as those in `rings.py`: other ranks' rows come by, and in backward come by again with their
log-sum-exps and the derivatives by them. No gradient is communicated.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastjem.collectives import other_ranks
from fastjem.kernels.arithmetic import widest
from fastjem.ops.autograd import distinct, ops, refuse_second_order

NOWHERE = [1, 0, 0]  # no column shows a row's own image


class Side(NamedTuple):
    """Rows, or columns, and what the other side sees of them: constants but for the rows."""

    rows: Tensor  # [V, N, D] with the temperature in one side's; float32 or float64
    ids: Tensor | None = None  # [V, N] int64: equal ones aren't seen
    limit: Tensor | None = None  # [V, N]: a row sees no logit above it


class Sums(NamedTuple):
    """Over what each row sees, [V, N] in the widest dtype; without totals the last two are empty."""

    lse: Tensor
    total: Tensor
    count: Tensor


class View(NamedTuple):
    """How two sides look at one another, in numbers."""

    own_image: int | None  # column i + own_image shows row i's image, and it doesn't see it; None: there is none
    columns: bool  # the columns' sums are wanted, too
    totals: bool  # sums and numbers of logits are wanted
    products: torch.dtype  # the dtype of what the user gave: see the operator
    sizes: list[int]  # each rank's number of images
    group: dist.ProcessGroup | None


def sums_of_seen(rows: Side, columns: Side | None, exclude: Tensor | None, view: View) -> tuple[Sums, Sums | None]:
    """The sums of rows over columns, and if `view` says so of columns over rows. columns None: the rows themselves.

    Args:
        exclude: bool, for images (one for all views). [n, m]: which of this rank's rows and of all ranks' columns don't
            see one another. [m]: which of this rank's columns nobody sees; not with the columns' sums.
    """
    b, b_ids, b_limit = (None, None, None) if columns is None else columns
    if b_ids is not None and b_ids is rows.ids:
        _, b_ids = distinct((rows.ids, b_ids))
    results = _SumsOfSeen.apply(rows.rows, b, rows.ids, b_ids, exclude, rows.limit, b_limit, view)
    return Sums(*results[:3]), Sums(*results[3:]) if view.columns else None


def _flat(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.flatten(0, 1)


class _Masks:
    """`exclude` between this rank's rows and another's columns, or the other way round."""

    def __init__(self, exclude: Tensor | None, view: View):
        self.of_columns = exclude is not None and exclude.dim() == 1
        self.exclude = exclude[None] if exclude is not None and self.of_columns else exclude
        self.sizes = view.sizes
        self.group = view.group

    def columns_of(self, mask: Tensor | None, rank: int) -> Tensor | None:
        """The part [n, m] of a mask [n, all ranks' images] that is of a rank's images; a mask of columns is whole."""
        if mask is None or self.of_columns or self.group is None:
            return mask
        first = sum(self.sizes[:rank])
        return mask[:, first : first + self.sizes[rank]]


class _SumsOfSeen(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        a: Tensor,  # [V, N, D]
        b: Tensor | None,  # [V, M, D]
        a_ids: Tensor | None,
        b_ids: Tensor | None,
        exclude: Tensor | None,
        a_limit: Tensor | None,
        b_limit: Tensor | None,
        view: View,
    ):
        ctx.view = view
        ring = _Ring(a, b, a_ids, b_ids, exclude, a_limit, b_limit, view)
        of_rows, of_columns = ring.forward()
        # The columns' own log-sum-exps are saved where they were asked for.
        saved = (a, b, a_ids, b_ids, exclude, a_limit, b_limit, of_rows[0], of_columns[0])
        ctx.save_for_backward(*saved)
        results = (*of_rows, *of_columns)
        ctx.mark_non_differentiable(of_rows[2], of_columns[2])
        return results

    @staticmethod
    def backward(ctx, row_slope, row_total_slope, _row_count, column_slope, column_total_slope, _column_count):
        refuse_second_order("similarity_logsumexp")
        *given, row_lse, column_lse = ctx.saved_tensors
        view = ctx.view
        if not view.totals:
            row_total_slope = column_total_slope = None
        ring = _Ring(*given, view)
        of_rows = (row_lse, row_slope, row_total_slope)
        of_columns = (column_lse, column_slope, column_total_slope) if view.columns else (None, None, None)
        gradients = ring.backward(of_rows, of_columns, ctx.needs_input_grad[:2])
        return *gradients, None, None, None, None, None, None


class _Ring:
    """One rank's part of the sums and of their gradients."""

    def __init__(
        self,
        a: Tensor,
        b: Tensor | None,
        a_ids: Tensor | None,
        b_ids: Tensor | None,
        exclude: Tensor | None,
        a_limit: Tensor | None,
        b_limit: Tensor | None,
        view: View,
    ):
        self.view = view
        self.shared = b is None
        self.rows = Side(a, a_ids, a_limit)
        self.columns = self.rows if b is None else Side(b, b_ids, b_limit)
        self.masks = _Masks(exclude, view)
        self.me = 0 if view.group is None else dist.get_rank(view.group)

    def own_image(self) -> list[int]:
        if self.view.own_image is None:
            return NOWHERE
        return [self.rows.rows.shape[1], self.view.own_image, self.columns.rows.shape[1]]

    def others(self, *vectors: Tensor):
        """(rank, its rows' side, its columns' side, its exclude, its vectors) of each other rank."""
        view = self.view
        if view.group is None:
            return
        exclude = self.masks.exclude
        given = [*self.rows, *((None, None, None) if self.shared else self.columns)]
        given.append(None if exclude is None else exclude.T[None] if self.masks.of_columns else exclude[None])
        travelling = [*given, *vectors]
        dense = [x for x in travelling if x is not None]
        ranks = iter([rank for rank, size in enumerate(view.sizes) if size and rank != self.me])
        for received in other_ranks(dense, 1, view.sizes, view.group):
            left = iter(received)
            rebuilt = [None if x is None else next(left) for x in travelling]
            theirs = Side(*rebuilt[:3])
            columns = theirs if self.shared else Side(*rebuilt[3:6])
            mask = rebuilt[6]
            if mask is not None:
                mask = mask[0].T if self.masks.of_columns else mask[0]
            yield next(ranks), theirs, columns, mask, rebuilt[7:]

    def forward(self) -> tuple[list[Tensor], list[Tensor]]:
        view = self.view
        if view.group is not None and not self.rows.rows.shape[1]:
            own = [widest(self.rows.rows.new_zeros(0)) for _ in range(6)]
        else:
            own = _sums(self.rows, self.columns, self.own_image(), self.masks.columns_of(self.masks.exclude, self.me),
                        view.columns, view)  # fmt: skip
        of_rows, of_columns = own[:3], own[3:]
        for rank, theirs, columns, mask, _ in self.others():
            seen = mask if self.masks.of_columns else self.masks.columns_of(self.masks.exclude, rank)
            _join(of_rows, _sums(self.rows, columns, NOWHERE, seen, False, view))
            if view.columns:
                turned = _turned(self.masks.columns_of(mask, self.me))
                _join(of_columns, _sums(self.columns, theirs, NOWHERE, turned, False, view))
        of_rows = self._shaped(of_rows, self.rows)
        return of_rows, self._shaped(of_columns, self.columns) if view.columns else of_columns

    def _shaped(self, sums: list[Tensor], side: Side) -> list[Tensor]:
        """[V, N] each, but for the totals that aren't there."""
        wanted = sums if self.view.totals else sums[:1]
        return [*(x.view(side.rows.shape[:2]) for x in wanted), *sums[len(wanted) :]]

    def backward(self, of_rows: tuple, of_columns: tuple, wanted: tuple) -> list[Tensor | None]:
        a_gradient = torch.zeros_like(self.rows.rows) if wanted[0] else None
        b_gradient = torch.zeros_like(self.columns.rows) if wanted[1] and not self.shared else None
        if self.rows.rows.shape[1]:
            a_gradient, b_gradient = self._own_gradients(of_rows, of_columns, wanted)
        exclude = self.masks.exclude
        vectors = [x for x in (*of_rows, *of_columns) if x is not None]
        for rank, theirs, columns, mask, received in self.others(*vectors):
            left = iter(received)
            of_their_rows, of_their_columns = (
                tuple(None if x is None else next(left) for x in vectors) for vectors in (of_rows, of_columns)
            )
            seen = mask if self.masks.of_columns else self.masks.columns_of(exclude, rank)
            back = exclude if self.masks.of_columns else self.masks.columns_of(mask, self.me)
            if self.shared:
                of_candidates = of_their_rows if exclude is None else (None, None, None)
                add = [(self.rows, theirs, seen, of_rows, of_candidates)]
                if exclude is not None:
                    add.append((self.rows, theirs, _turned(back), (None, None, None), of_their_rows))
                for each in add:
                    a_gradient = a_gradient + _gradients(*each, NOWHERE, [True, False], self.view)[0]
                continue
            if a_gradient is not None:
                a_gradient = a_gradient + _gradients(
                    self.rows, columns, seen, of_rows, of_their_columns, NOWHERE, [True, False], self.view
                )[0]  # fmt: skip
            if b_gradient is not None:
                b_gradient = b_gradient + _gradients(
                    self.columns, theirs, _turned(back), of_columns, of_their_rows, NOWHERE, [True, False], self.view
                )[0]  # fmt: skip
        return [a_gradient, b_gradient]

    def _own_gradients(self, of_rows: tuple, of_columns: tuple, wanted: tuple) -> list[Tensor | None]:
        own = self.own_image()
        seen = self.masks.columns_of(self.masks.exclude, self.me)
        if self.shared and seen is None:  # a row is a column, whose numbers are the row's: half of the work
            of_a = _gradients(self.rows, self.rows, None, of_rows, of_rows, own, [True, False], self.view)
            return [of_a[0], None]
        asked = [True, True] if self.shared else list(wanted)
        of_a, of_b = _gradients(self.rows, self.columns, seen, of_rows, of_columns, own, asked, self.view)
        if self.shared:
            return [of_a + of_b, None]
        return [of_a if wanted[0] else None, of_b if wanted[1] else None]


def _turned(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.T


def _sums(
    rows: Side, columns: Side, own_image: list[int], exclude: Tensor | None, both: bool, view: View
) -> list[Tensor]:
    ids = (_flat(rows.ids), _flat(columns.ids))
    limits = (_flat(rows.limit), _flat(columns.limit) if both else None)
    a, b = (x.rows.flatten(0, 1) for x in (rows, columns))
    return list(
        ops.similarity_logsumexp(a, b, own_image, *ids, exclude, *limits, both, view.totals, view.products)
    )  # fmt: skip


def _join(sums: list[Tensor], others: list[Tensor]) -> None:
    """The sums over what is here, and over what is there."""
    sums[0] = torch.logaddexp(sums[0], others[0])
    sums[1] = sums[1] + others[1]
    sums[2] = sums[2] + others[2]


def _gradients(
    rows: Side,
    columns: Side,
    exclude: Tensor | None,
    of_rows: tuple,  # log-sum-exps and slopes; None where a side has none
    of_columns: tuple,
    own_image: list[int],
    wanted: list[bool],
    view: View,
) -> list[Tensor]:
    ids = (_flat(rows.ids), _flat(columns.ids))
    limits = (_flat(rows.limit), _flat(columns.limit))
    slopes = (*map(_flat, of_rows), *map(_flat, of_columns))
    a, b = (x.rows.flatten(0, 1) for x in (rows, columns))
    gradients = ops.similarity_logsumexp_backward(
        a, b, own_image, *ids, exclude, *limits, *slopes, wanted, view.products
    )  # fmt: skip
    return [
        gradient.view(side.rows.shape) if want else gradient
        for gradient, side, want in zip(gradients, (rows, columns), wanted, strict=True)
    ]
