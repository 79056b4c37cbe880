"""What spreads embeddings, or their use of prototypes: KoLeo (DINOv2), mean entropy (MSN)."""

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from fastjem.collectives import Agreement, global_loss, sum_and_count_of_ranks
from fastjem.functional import checks
from fastjem.functional.compiled import over_ranks
from fastjem.functional.precision import loss_dtype
from fastjem.functional.prototypes import list_of_views, sum_of_elements
from fastjem.functional.temperature import over
from fastjem.ops.autograd import one_pass


def koleo(x: Tensor, *, p: float = 2, eps: float = 1e-8) -> Tensor:
    """`-log(||u_i - u_n(i) + eps||_p + eps)`, the mean over rows i: KoLeo, which spreads rows evenly.

    u are the rows at unit length; n(i) is the row of largest cosine with row i, other than itself (itself for N = 1).
    Finite for equal rows, whose distance is taken for eps. It is Kozachenko and Leonenko's differential entropy
    (Sablayrolles et al. 2019, arXiv 1806.03198, section 3).

    Args:
        x: [N, D]. Computed in float32 whatever autocast says.
        p: the norm's degree, at least 1.
        eps: added to differences and distances, and the least a norm is taken for.

    Returns:
        0-dim float32 (float64 for float64 inputs).

    Raises:
        ValueError: for other shapes, dtypes or options.
    """
    checks.matrices("koleo", "x must be [N, D]", x)
    p = checks.host_number("koleo", "p", p, low=1, inclusive=True)
    eps = checks.host_number("koleo", "eps", eps, low=0)
    return one_pass("koleo", (x,), p, eps)


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
