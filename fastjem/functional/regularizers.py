"""What spreads embeddings, or their use of prototypes: KoLeo (DINOv2), mean entropy (MSN)."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from fastjem.functional import _checks as check
from fastjem.functional._collectives import sum_over_ranks, world_size
from fastjem.functional.prototypes import _views
from fastjem.ops.autograd import one_pass


def koleo(x: Tensor, *, p: float = 2, eps: float = 1e-8) -> Tensor:
    """KoLeo, the differential entropy of Kozachenko and Leonenko (Sablayrolles et al. 2019, arXiv 1806.03198, section
    3).

    `-log(||u_i - u_n(i) + eps||_p + eps)`, the mean over rows: u are the rows at unit length, n(i) is the row of
    largest cosine with
    row i other than itself (itself for N = 1). Finite for equal rows, whose distance is taken for eps.

    Args:
        x: [N, D]. Computed in float32 whatever autocast says.
        p: the norm's degree, at least 1.
        eps: added to differences and distances, and the least a norm is taken for.

    Returns:
        0-dim float32 (float64 for float64 inputs).

    Raises:
        ValueError: for other shapes, dtypes or options.
    """
    check.matrices("koleo", "x must be [N, D]", x)
    check.positive("koleo", p=p, eps=eps)
    if p < 1:
        check.fail("koleo", "p must be at least 1", p)
    return one_pass("koleo", (x,), float(p), float(eps))


def mean_entropy(
    scores: Tensor | Sequence[Tensor], *, temperature: float = 0.1, group: dist.ProcessGroup | None = None
) -> Tensor:
    """MSN's mean entropy regulariser (Assran et al. 2022, arXiv 2204.07141, equation 2): `sum_k p_k log p_k + log K`.

    p is the mean over all rows of `softmax(scores / temperature, 1)`; 0 where all prototypes are used alike, log K
    where one is.

    Args:
        scores: [B, K], or a sequence of V tensors [B, K], or [V, B, K].
        temperature: what the scores are divided by.
        group: the process group over whose global batch p is taken (batches may be uneven).

    Returns:
        0-dim float32 (float64 for float64 inputs), the same on every rank of the group.

    Raises:
        ValueError: for other shapes, dtypes or options.
    """
    op, contract = "mean_entropy", "scores must be [B, K], [V, B, K] or a list of [B, K]"
    views = [scores] if isinstance(scores, Tensor) and scores.dim() == 2 else _views(op, contract, scores)
    check.matrices(op, contract, *views)
    check.positive(op, temperature=temperature)
    views, temperature = check.common(*views), float(temperature)
    if group is None:
        return one_pass(op, views, temperature, None, None, listed=True)
    wide = torch.float64 if views[0].dtype == torch.float64 else torch.float32
    with torch.no_grad():
        local = sum((x.to(wide) / temperature).softmax(1).sum(0) for x in views)
        rows = local.new_full((1,), len(views) * len(views[0]))
        packed = sum_over_ranks(torch.cat([local, rows]), group)
    loss = one_pass(op, views, temperature, packed[:-1].clone(), packed[-1].clone(), listed=True)
    return _Times.apply(loss, world_size(group))


class _Times(torch.autograd.Function):
    """The loss as it is, its gradient times the ranks, which DDP divides by."""

    @staticmethod
    def forward(ctx, loss: Tensor, factor: int) -> Tensor:
        ctx.factor = factor
        return loss.clone()

    @staticmethod
    def backward(ctx, upstream: Tensor):
        return upstream * ctx.factor, None
