"""Log-sum-exps over what each row sees, differentiable, over ranks: the operator that losses with options are made of.

Over ranks it is a ring as those in `rings.py`: other ranks' rows come by, and in backward come by again with their
log-sum-exps and the derivatives by them. No gradient is communicated.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastjem.collectives import columns_of_ranks, others_in_turn
from fastjem.kernels.arithmetic import widest
from fastjem.ops import transforms
from fastjem.ops.autograd import distinct, ops, refuse_second_order

NOWHERE = [1, 0, 0]  # no column shows a row's own image
NOTHING = (None, None, None)  # log-sum-exps and derivatives of a side that has no part in a loss


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

    op: str  # the function that the user called
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
        _, b_ids = distinct((b_ids, b_ids))
    function = _SumsWithinTransforms if transforms.active() else _SumsOfSeen
    results = function.apply(rows.rows, b, rows.ids, b_ids, exclude, rows.limit, b_limit, view)
    return Sums(*results[:3]), Sums(*results[3:]) if view.columns else None


def _flat(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.flatten(0, 1)


class _Other(NamedTuple):
    """What has come from another rank."""

    rows: Side
    columns: Side
    seen: Tensor | None  # exclude between this rank's rows and its columns
    back: Tensor | None  # exclude between this rank's columns and its rows
    vectors: list[Tensor]  # those that were sent along


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
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    def backward(ctx, row_slope, row_total_slope, _row_count, column_slope, column_total_slope, _column_count):
        refuse_second_order(ctx.view.op)
        for slope in (row_slope, row_total_slope, column_slope, column_total_slope):
            if slope is not None:
                transforms.refuse_batched_gradients(ctx.view.op, slope)
        a, b, a_ids, b_ids, exclude, a_limit, b_limit, row_lse, column_lse = ctx.saved_tensors
        view = ctx.view
        ring = _Ring(a, b, a_ids, b_ids, exclude, a_limit, b_limit, view)
        of_rows = _slopes(view, row_lse, row_slope, row_total_slope)
        of_columns = _slopes(view, column_lse, column_slope, column_total_slope) if view.columns else NOTHING
        wanted = ctx.needs_input_grad[:2]
        gradients = ring.backward(of_rows, of_columns, wanted)
        return *gradients, None, None, None, None, None, None


def _slopes(view: View, lse: Tensor, slope: Tensor | None, total_slope: Tensor | None) -> tuple:
    """Zeros where a loss has no part of them; of totals only over ranks, which exchange the same tensors."""
    if total_slope is None and view.totals and view.group is not None:
        total_slope = torch.zeros_like(lse)
    return lse, torch.zeros_like(lse) if slope is None else slope, total_slope if view.totals else None


class _SumsWithinTransforms(torch.autograd.Function):
    """The same within torch.func's transforms, where there are no other ranks: they ask for a `setup_context`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*given):
        of_rows, of_columns = _Ring(*given).forward()
        return (*of_rows, *of_columns)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.view = inputs
        ctx.save_for_backward(*tensors, output[0], output[3])
        ctx.mark_non_differentiable(output[2], output[5])

    @staticmethod
    def backward(ctx, row_slope, row_total_slope, _row_count, column_slope, column_total_slope, _column_count):
        a, b, a_ids, b_ids, exclude, a_limit, b_limit, row_lse, column_lse = ctx.saved_tensors
        view = ctx.view
        if not view.totals:
            row_total_slope = column_total_slope = None
        of_rows = (row_lse, row_slope, row_total_slope)
        of_columns = (column_lse, column_slope, column_total_slope) if view.columns else NOTHING
        ring = _Ring(a, b, a_ids, b_ids, exclude, a_limit, b_limit, view)
        gradients = ring.backward(of_rows, of_columns, ctx.needs_input_grad[:2])
        of_these = [x for x in (a, b, row_slope, row_total_slope, *of_columns[1:]) if x is not None]
        once = (g if g is None else transforms.once(view.op, g, *of_these) for g in gradients)
        return *once, None, None, None, None, None, None


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
        self.of_columns = exclude is not None and exclude.dim() == 1
        self.exclude = exclude[None] if exclude is not None and self.of_columns else exclude
        self.me = [0 if view.group is None else dist.get_rank(view.group)]

    def part(self, mask: Tensor | None, ranks: list[int]) -> Tensor | None:
        """Of a mask [n, all ranks' images] what is of some ranks' images."""
        if mask is None or self.of_columns or self.view.group is None:
            return mask
        return columns_of_ranks(mask, self.view.sizes, ranks)

    def own_image(self) -> list[int]:
        if self.view.own_image is None:
            return NOWHERE
        return [self.rows.rows.shape[1], self.view.own_image, self.columns.rows.shape[1]]

    def others(self, *vectors: Tensor) -> Iterator[_Other]:
        """Each other rank's, with those of its tensors that these vectors are here. The first are on their way."""
        view = self.view
        if view.group is None:
            return iter(())
        sides = [*self.rows] if self.shared else [*self.rows, *self.columns]
        mask = None
        if self.exclude is not None:  # images first
            mask = self.exclude.T[None] if self.of_columns else self.exclude[None]
        travelling = [*sides, mask, *vectors]
        turns = others_in_turn(travelling, 1, view.sizes, view.group)
        return self._others(turns, len(sides))

    def _others(self, turns: Iterator[tuple[list[int], list[Any]]], sides: int) -> Iterator[_Other]:
        """turns: of sides, so many tensors; the mask; vectors."""
        for ranks, rebuilt in turns:
            rows = Side(*rebuilt[:3])
            columns = rows if self.shared else Side(*rebuilt[3:6])
            their_mask = rebuilt[sides]
            if self.of_columns:
                seen = their_mask[0].T
                back = self.exclude
            else:
                seen = self.part(self.exclude, ranks)
                back = None if their_mask is None else self.part(their_mask[0], self.me)
            turned = None if back is None else back.T
            yield _Other(rows, columns, seen, turned, rebuilt[sides + 1 :])

    def forward(self) -> tuple[list[Tensor], list[Tensor]]:
        view = self.view
        others = self.others()
        if self.rows.rows.shape[1] or view.group is None:
            seen = self.part(self.exclude, self.me)
            own = _sums(self.rows, self.columns, self.own_image(), seen, view.columns, view)
        else:
            own = [widest(self.rows.rows.new_zeros(0)) for _ in range(6)]
        of_rows = own[:3]
        of_columns = own[3:]
        for other in others:
            _join(of_rows, _sums(self.rows, other.columns, NOWHERE, other.seen, False, view))
            if view.columns:
                _join(of_columns, _sums(self.columns, other.rows, NOWHERE, other.back, False, view))
        of_rows = self._shaped(of_rows, self.rows)
        return of_rows, self._shaped(of_columns, self.columns) if view.columns else of_columns

    def _shaped(self, sums: list[Tensor], side: Side) -> list[Tensor]:
        """[V, N] each, but for the totals that aren't there."""
        wanted = sums if self.view.totals else sums[:1]
        return [*(x.view(side.rows.shape[:2]) for x in wanted), *sums[len(wanted) :]]

    def backward(self, of_rows: tuple, of_columns: tuple, wanted: tuple) -> list[Tensor | None]:
        """of_rows, of_columns: log-sum-exps, and the loss's derivatives by them and by totals, or None."""
        vectors = [x for x in (*of_rows, *of_columns) if x is not None]
        others = self.others(*vectors)
        gradients: list[Tensor | None]
        if self.rows.rows.shape[1]:
            gradients = self._own_gradients(of_rows, of_columns, wanted)
        else:
            gradients = [torch.zeros_like(self.rows.rows), torch.zeros_like(self.columns.rows)]
        for other in others:
            left = iter(other.vectors)
            of_their_rows = tuple(None if x is None else next(left) for x in of_rows)
            of_their_columns = tuple(None if x is None else next(left) for x in of_columns)
            if self.shared and self.exclude is None:
                of_their_columns = of_their_rows
            if wanted[0]:
                self._add(gradients, 0, (self.rows, other.columns, other.seen, of_rows, of_their_columns))
            if self.shared and self.exclude is not None:  # which may be another one for columns than for rows
                self._add(gradients, 0, (self.rows, other.rows, other.back, NOTHING, of_their_rows))
            elif not self.shared and wanted[1]:
                self._add(gradients, 1, (self.columns, other.rows, other.back, of_columns, of_their_rows))
        return [x if want else None for x, want in zip(gradients, wanted, strict=True)]

    def _add(self, gradients: list[Tensor | None], which: int, of_pair: tuple) -> None:
        rows, columns, exclude, of_rows, of_columns = of_pair
        found, _ = _gradients(rows, columns, exclude, of_rows, of_columns, NOWHERE, [True, False], self.view)
        before = gradients[which]
        gradients[which] = found if before is None else before + found

    def _own_gradients(self, of_rows: tuple, of_columns: tuple, wanted: tuple) -> list[Tensor | None]:
        own = self.own_image()
        seen = self.part(self.exclude, self.me)
        if self.shared and seen is None:  # a row is a column, whose numbers are the row's: half of the work
            of_a, _ = _gradients(self.rows, self.rows, None, of_rows, of_rows, own, [True, False], self.view)
            return [of_a, None]
        asked = [True, True] if self.shared else list(wanted)
        of_a, of_b = _gradients(self.rows, self.columns, seen, of_rows, of_columns, own, asked, self.view)
        return [of_a + of_b, None] if self.shared else [of_a, of_b]


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
