"""What spreads embeddings, or their use of prototypes: KoLeo (DINOv2), mean entropy (MSN)."""

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from fastjem.collectives import Agreement, gather_rows, global_loss, gradient_factor, sum_and_count_of_ranks
from fastjem.functional import checks
from fastjem.functional.compiled import over_ranks
from fastjem.functional.precision import loss_dtype
from fastjem.functional.prototypes import list_of_views, sum_of_elements
from fastjem.functional.temperature import over
from fastjem.ops.autograd import known, one_pass, ops
from fastjem.ops.forward_mode import refuse_forward_mode


@over_ranks()
def koleo(
    x: Tensor,
    *,
    p: float = 2,
    eps: float = 1e-8,
    topk: int = 1,
    group_size: int | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """`-log(||u_i - u_j + eps||_p + eps)`, the mean over rows i and their nearest j: KoLeo, which spreads rows evenly.

    u are the rows at unit length; the nearest are those of largest cosine with row i, other than itself (itself where
    it is alone). Finite for equal rows, whose distance is taken for eps. It is Kozachenko and Leonenko's differential
    entropy (Sablayrolles et al. 2019, arXiv 1806.03198, section 3); with one neighbour DINOv2's, with `topk`, groups
    and ranks DINOv3's (Simeoni et al. 2025, arXiv 2508.10104).

    Args:
        x: [N, D]. Computed in float32 whatever autocast says.
        p: the norm's degree, at least 1.
        eps: added to differences and distances, and the least a norm is taken for.
        topk: how many neighbours of each row.
        group_size: rows of the (global) batch, so many after one another, see each other alone; N must be a multiple
            of it. Views that are stacked are such groups. None: every row sees all others.
        group: the process group over whose global batch it is taken, in the order of ranks (batches may be uneven, even
            empty). Every rank holds the rows of all ranks for it, [N, D].

    Returns:
        0-dim float32 (float64 for float64 inputs), the same on every rank of the group.

    Raises:
        ValueError: for other shapes, dtypes or options.
    """
    op = "koleo"
    with Agreement(op, group) as ranks:
        checks.matrices(op, "x must be [N, D]", x, may_be_empty=None if group is None else 0)
        p = checks.host_number(op, "p", p, low=1, inclusive=True)
        eps = checks.host_number(op, "eps", eps, low=0)
        topk = checks.integer(op, "topk", topk, 1)
        if group_size is not None:
            group_size = checks.integer(op, "group_size", group_size, 1)
        ranks.rows_of(x)
        ranks.alike(p, eps, topk, group_size)
    refuse_forward_mode(op, (x,))
    everything, begin = (x.detach(), 0) if group is None else gather_rows(x, group, ranks.sizes)
    n = everything.shape[0]
    seen = n if group_size is None else group_size
    if n % seen:
        checks.fail(op, "the number of rows must be a multiple of group_size", f"{n} and {group_size}")
    if topk > 1 and topk >= seen:
        checks.fail(op, "topk must be less than the number of rows that see each other", f"{topk} and {seen}")
    if group is None:
        return one_pass(op, (x,), ops.koleo_neighbors(everything, everything, 0, topk, seen, eps), p, eps)
    own = everything.new_empty(0, topk, dtype=torch.int64)
    if len(x):
        own = ops.koleo_neighbors(x.detach(), everything, begin, topk, seen, eps)
    neighbors, _ = gather_rows(own, group, ranks.sizes)
    wanted = torch.is_grad_enabled() and x.requires_grad
    # Of all rows, on every rank: a small part of the work, and what other ranks' rows add to this rank's is in it.
    loss, (gradient,), scale = ops.koleo(everything, neighbors, p, eps, [wanted])
    own_rows = gradient[begin : begin + len(x)] if wanted else gradient
    return known(op, loss, (x,), [own_rows], [scale * gradient_factor(group)])


@over_ranks()
def mean_entropy(
    scores: Tensor | Sequence[Tensor], *, temperature: float | Tensor = 0.1, group: dist.ProcessGroup | None = None
) -> Tensor:
    """`sum_k p_k log p_k + log K`, p the mean over rows of `softmax(scores / temperature, 1)`: MSN's regulariser.

    0 where all prototypes are used alike, log K where one is (Assran et al. 2022, arXiv 2204.07141, equation 2).

    Args:
        scores: [B, K], or a sequence of V tensors [B, K], or [V, B, K].
        temperature: what the scores are divided by: a number, or a 0-dim tensor, which gets its gradient.
        group: the process group over whose global batch p is taken (batches may be uneven, even empty).

    Returns:
        0-dim float32 (float64 for float64 inputs), the same on every rank of the group.

    Raises:
        ValueError: for other shapes, dtypes or options.
    """
    op = "mean_entropy"
    contract = "scores must be [B, K], [V, B, K] or a list of [B, K]"
    with Agreement(op, group) as ranks:
        views = [scores] if isinstance(scores, Tensor) and scores.dim() == 2 else list_of_views(op, contract, scores)
        checks.matrices(op, contract, *views, may_be_empty=None if group is None else 0)
        temperature = checks.positive(op, "temperature", temperature, views[0])
        views = checks.common(*views)
        ranks.rows_of(views[0])
    if isinstance(temperature, Tensor):
        views = [over(x, temperature) for x in views]
        temperature = 1.0
    if group is None:
        return one_pass(op, views, temperature, None, None, listed=True)
    wide = loss_dtype(views[0])
    with torch.no_grad():
        of_rank = torch.stack([(x.to(wide) / temperature).softmax(1).sum(0) for x in views]).sum(0)  # [K]
        of_all, rows = sum_and_count_of_ranks(of_rank, len(views) * views[0].shape[0], group)
    if not views[0].shape[0]:  # a rank without rows: the others' loss, and gradients of no elements
        mean = of_all / rows
        value = torch.special.xlogy(mean, mean).sum() + math.log(mean.shape[0])
        return global_loss(sum_of_elements(views), value, group)
    loss = one_pass(op, views, temperature, of_all.clone(), rows.clone(), listed=True)
    return global_loss(loss, loss, group)
