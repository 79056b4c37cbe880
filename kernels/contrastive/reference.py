"""The specification of the contrastive losses; conventions are in kernels/__init__.py.

Log-sum-exps and positives' logits are float64 vectors: a loss is their difference, which at temperature 0.01 would
keep only two digits of a float32 log-sum-exp. Products and gradients stay in float32. On a device without float64
(`arithmetic.widest_dtype`) those vectors are float32 all the same.
"""

import math

import torch
from torch import Tensor

from ..arithmetic import add_at, no_gradient, scalar_like, through_unit_rows, unit_rows, widen, widest
from .in_parts import (
    clip_loss,
    clip_loss_backward,
    nt_xent,
    nt_xent_backward,
    siglip_loss,
    similarities_and_pairs,
)
from .of_classes import supcon, supcon_backward
from .of_pairs import (
    clip_loss_of_pairs,
    clip_loss_of_pairs_backward,
    siglip_loss_of_pairs,
    siglip_loss_of_pairs_backward,
)
from .of_queries import info_nce, info_nce_backward
from .of_views import nt_xent_of_views, nt_xent_of_views_backward

# The specifications that are in other files, as long as this one would be: an operator's is found here.
__all__ = [
    "clip_loss",
    "clip_loss_backward",
    "clip_loss_of_pairs",
    "clip_loss_of_pairs_backward",
    "info_nce",
    "info_nce_backward",
    "nt_xent",
    "nt_xent_backward",
    "nt_xent_of_views",
    "nt_xent_of_views_backward",
    "siglip_loss",
    "siglip_loss_of_pairs",
    "siglip_loss_of_pairs_backward",
    "supcon",
    "supcon_backward",
]


def siglip_pairs(
    x: Tensor,  # [n, D]
    y: Tensor,  # [m, D]
    logit_scale: Tensor,  # 0-dim
    logit_bias: Tensor,  # 0-dim
    label_smoothing: Tensor,  # 0-dim
    weights: Tensor | None,  # [n] of the rows' losses in the gradients; None: ones
    row_ids: Tensor | None,  # [n] int64
    column_ids: Tensor | None,  # [m] int64: pairs of equal ids belong together
    positives: Tensor | None,  # [n, m] bool: which pairs belong together, instead of ids and offset
    exclude: Tensor | None,  # [n, m] bool: pairs that don't count
    offset: int,  # row i and column offset + i belong together
    wanted: list[bool],  # for x and y
) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    """[n] float64: `sum_j (1 - t) softplus(logit) + t softplus(-logit)`, the target t being 1 - label_smoothing / 2 for
    pairs that belong together and label_smoothing / 2 for others.

    The gradients are those of `sum(weights * losses)`, as in `siglip_loss`.
    """
    similarities, together = similarities_and_pairs(x, y, offset)
    if positives is not None:
        together = positives
    elif row_ids is not None and column_ids is not None:
        together = together | (row_ids[:, None] == column_ids)
    low = label_smoothing.to(similarities.dtype) / 2
    target = torch.where(together, 1 - low, low)
    logits = similarities * logit_scale.to(similarities.dtype) + logit_bias.to(similarities.dtype)
    e = (-logits.abs()).exp()
    wrong = torch.where(logits > 0, 1 - target, target)
    losses = e.log1p() + torch.where(wrong != 0, wrong * logits.abs(), 0)
    up = torch.where(logits > 0, 1, e) / (1 + e)
    down = torch.where(logits > 0, e, 1) / (1 + e)
    g = (1 - target) * up - target * down
    if weights is not None:
        g = g * weights.to(g.dtype)[:, None]
    dots = g * similarities
    if exclude is not None:
        losses, g, dots = (z.masked_fill(exclude, 0) for z in (losses, g, dots))
    gradients = [
        (g @ widen(y)).to(x.dtype) if wanted[0] else no_gradient(x),
        (g.T @ widen(x)).to(y.dtype) if wanted[1] else no_gradient(y),
    ]
    return widest(losses).sum(1), gradients, widest(dots).sum(), widest(g).sum()


def normalize_rows(rows: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`torch.nn.functional.normalize(rows, eps=eps)` of [N, D], in float32 at least, and its divisors [N] float64."""
    unit, norm = unit_rows(widen(rows), eps)
    return unit, widest(norm[:, 0])


def normalize_rows_backward(
    gradient: Tensor,  # [N, D], for unit
    unit: Tensor,  # [N, D]
    divisors: Tensor,  # [N]
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """The gradient for the rows, in their dtype."""
    return through_unit_rows(gradient, unit, divisors[:, None].to(unit.dtype), eps).to(dtype)


def nearest_neighbors(
    query: Tensor,  # [N, D]
    bank: Tensor,  # [K, D]
) -> Tensor:
    """[N] int64: for each query the row of the bank of the highest cosine. NNCLR, arXiv 2104.14548."""
    return (unit_rows(widen(query))[0] @ unit_rows(widen(bank))[0].T).argmax(1)


def koleo_neighbors(
    rows: Tensor,  # [n, D]: the rows offset .. offset + n of the candidates
    candidates: Tensor,  # [N, D]
    offset: int,
    topk: int,
    group_size: int,  # so many candidates after one another are a group, whose rows see each other alone
    eps: float,
) -> Tensor:
    """[n, topk] int64: of each row the candidates of its group with the largest cosines, without itself, best first.

    A row that is alone in its group is its own neighbour. Similarities are looked at in blocks of rows, so that no
    [N, N] exists where N is more than a block.
    """
    unit, _ = unit_rows(widen(rows), eps)
    others, _ = unit_rows(widen(candidates), eps)
    n = rows.shape[0]
    column = torch.arange(candidates.shape[0], device=rows.device)
    nearest = []
    # torch.compile asks for the shapes of any number of rows: how many blocks there are isn't known then.
    block = 256 if isinstance(n, int) else n
    starts = range(0, n, block) if isinstance(n, int) else [0]
    for first in starts:
        similarities = unit[first : first + block] @ others.T
        itself = torch.arange(similarities.shape[0], device=rows.device)[:, None] + first + offset
        # less than any cosine
        similarities = similarities.masked_fill(column == itself, -2)
        similarities = similarities.masked_fill(column // group_size != itself // group_size, -3)
        if topk == 1:
            nearest.append(similarities.argmax(1, keepdim=True))
        else:  # of equal ones the first, as argmax has it; torch.topk takes any
            nearest.append(similarities.sort(dim=1, descending=True, stable=True).indices[:, :topk])
    return torch.cat(nearest)


def koleo(
    x: Tensor,  # [N, D]
    neighbors: Tensor,  # [N, k] int64
    p: float,
    eps: float,
    wanted: list[bool],
) -> tuple[Tensor, list[Tensor], Tensor]:
    """`-log(||u_i - u_j + eps||_p + eps)`, the mean over rows i and their neighbours j; u are rows of unit length.

    KoLeo, arXiv 1806.03198, section 3.
    """
    unit, norm = unit_rows(widen(x), eps)
    difference = unit[:, None] - unit[neighbors] + eps  # [N, k, D]
    distance = torch.linalg.vector_norm(difference, p, dim=2, keepdim=True)
    loss = -(distance + eps).log().mean()
    scale = scalar_like(x, 1 / (neighbors.shape[0] * neighbors.shape[1]))
    if not wanted[0]:
        return loss, [no_gradient(x)], scale
    direction = difference.sgn() * (difference.abs() / distance).pow(p - 1)  # of the distance: x / |x| for p = 2
    slope = -direction / (distance + eps)
    gradient = add_at(slope.sum(1), (neighbors.flatten(),), -slope.flatten(0, 1))
    gradient = through_unit_rows(gradient, unit, norm, eps)
    largest = torch.finfo(x.dtype).max  # what duplicates give, 1 / eps and more, is beyond float16
    return loss, [gradient.clamp(-largest, largest).to(x.dtype)], scale


def _hidden(
    a: Tensor,
    b: Tensor,
    own_image: list[int],
    row_ids: Tensor | None,
    column_ids: Tensor | None,
    exclude: Tensor | None,
    row_limit: Tensor | None,
    column_limit: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The logits [N, M] in the dtype to compute in, what a row doesn't see, and what a column doesn't see."""
    row_period, offset, column_period = own_image
    logits = widen(a) @ widen(b).T
    n, m = logits.shape
    hidden = torch.zeros_like(logits, dtype=torch.bool)
    if column_period > 0:
        image = torch.arange(n, device=a.device) % row_period + offset
        hidden = hidden | (torch.arange(m, device=a.device) % column_period == image[:, None])
    if row_ids is not None and column_ids is not None:
        hidden = hidden | (row_ids[:, None] == column_ids)
    if exclude is not None:
        hidden = hidden | exclude.repeat(n // exclude.shape[0], m // exclude.shape[1])
    from_rows = hidden if row_limit is None else hidden | (logits > row_limit.to(logits.dtype)[:, None])
    from_columns = hidden if column_limit is None else hidden | (logits > column_limit.to(logits.dtype))
    return logits, from_rows, from_columns


def similarity_logsumexp(
    a: Tensor,  # [N, D]
    b: Tensor,  # [M, D]
    own_image: list[int],  # row_period, offset, column_period: see composed.OwnImage
    row_ids: Tensor | None,  # what a row sees: see visible.Visible
    column_ids: Tensor | None,
    exclude: Tensor | None,
    row_limit: Tensor | None,
    column_limit: Tensor | None,
    columns: bool,  # whether the last three results are wanted
    totals: bool,  # whether sums and numbers are
    products: torch.dtype,  # in which an implementation may multiply rows, as the user's rows are no more exact
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Of the logits `a @ b.T` over the columns that each row sees: log-sum-exp, sum and number, [N] float64.

    Then the same over the rows that each column sees, [M]. What isn't wanted is empty.
    """
    logits, *hidden = _hidden(a, b, own_image, row_ids, column_ids, exclude, row_limit, column_limit)
    results = []
    for dim, unseen in ((1, hidden[0]), (0, hidden[1])):
        wide = widest(logits)
        nothing = wide.new_empty(0)
        wanted = columns or dim == 1
        results.append(wide.masked_fill(unseen, -math.inf).logsumexp(dim) if wanted else nothing)
        results.append(wide.masked_fill(unseen, 0).sum(dim) if wanted and totals else nothing.clone())
        results.append((~unseen).sum(dim).to(wide.dtype) if wanted and totals else nothing.clone())
    return tuple(results)


def similarity_logsumexp_backward(
    a: Tensor,  # [N, D]
    b: Tensor,  # [M, D]
    own_image: list[int],
    row_ids: Tensor | None,
    column_ids: Tensor | None,
    exclude: Tensor | None,
    row_limit: Tensor | None,
    column_limit: Tensor | None,
    row_lse: Tensor | None,  # [N]: over all columns there are, of which b may be a part
    row_slope: Tensor | None,  # [N], the loss's derivative by a row's log-sum-exp
    row_total_slope: Tensor | None,  # [N], that by its sum
    column_lse: Tensor | None,  # [M] and so on
    column_slope: Tensor | None,
    column_total_slope: Tensor | None,
    wanted: list[bool],  # for a and b
    products: torch.dtype,
) -> list[Tensor]:
    """The gradients of `similarity_logsumexp`, in the dtypes of a and b: `G @ b` and `G.T @ a`.

    G_ij = row_slope_i * exp(logit_ij - row_lse_i) + row_total_slope_i where row i sees column j, and what follows from
    the column's numbers where it sees the row.
    """
    logits, *hidden = _hidden(a, b, own_image, row_ids, column_ids, exclude, row_limit, column_limit)
    g = torch.zeros_like(widest(logits))
    of_rows = (row_lse, row_slope, row_total_slope)
    of_columns = (column_lse, column_slope, column_total_slope)
    for unseen, dim, (lse, slope, total_slope) in ((hidden[0], 1, of_rows), (hidden[1], 0, of_columns)):
        if lse is None or slope is None:
            continue
        term = (widest(logits) - lse.unsqueeze(dim)).exp() * slope.unsqueeze(dim)
        if total_slope is not None:
            term = term + total_slope.unsqueeze(dim)
        g = g + term.masked_fill(unseen, 0)
    narrow = g.to(logits.dtype)
    return [
        (narrow @ widen(b)).to(a.dtype) if wanted[0] else no_gradient(a),
        (narrow.T @ widen(a)).to(b.dtype) if wanted[1] else no_gradient(b),
    ]
