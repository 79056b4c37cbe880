"""Contrastive losses: a log-sum-exp over similarities, less the positives."""

import torch
import torch.distributed as dist
from torch import Tensor

from fastjem.functional import _checks as check
from fastjem.functional._collectives import gather_rows, sum_over_ranks, world_size
from fastjem.ops.autograd import one_pass, ops, two_passes


def nt_xent(
    z0: Tensor,
    z1: Tensor | None = None,
    *,
    temperature: float = 0.5,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Normalised-temperature cross-entropy, SimCLR's loss (Chen et al. 2020, arXiv 2002.05709, equation 1).

    The mean, over all V N rows and their V - 1 positives, of `cross_entropy(cosines with all other rows / temperature,
    positive)`.

    Args:
        z0, z1: [N, D] each, two views of N images, or `z0` alone as [V, N, D]. Normalised inside.
        temperature: what the cosines are divided by.
        group: the process group whose ranks' rows are candidates and rows of one global batch (batches may be uneven);
            None: this rank's alone.

    Returns:
        0-dim float32 (float64 for float64 inputs); the same on every rank of the group.

    Raises:
        ValueError: for other shapes, dtypes or temperatures.
    """
    if z1 is None:
        contract = "z must be [V, N, D] with V >= 2, or two [N, D]"
        check.matrices("nt_xent", contract, z0, dims=3)
        if len(z0) < 2:
            check.fail("nt_xent", contract, tuple(z0.shape))
        z = z0
    else:
        check.matrices("nt_xent", "z0 and z1 must be [N, D] both", z0, z1)
        z = torch.stack(check.common(z0, z1))
    check.positive("nt_xent", temperature=temperature)

    candidates, offset = (z, 0) if group is None else gather_rows(z, group, dim=1)
    total, lse = ops.nt_xent(z.detach(), candidates.detach(), offset, temperature)
    count = candidates.shape[0] * candidates.shape[1]
    candidates_lse = lse if group is None else gather_rows(lse, group, dim=1)[0]
    loss = sum_over_ranks(total, group) / count
    scale = world_size(group) / (count * temperature)
    saved = (candidates.detach(), lse, candidates_lse)
    return two_passes("nt_xent_backward", loss, z, saved, offset, float(temperature), scale=scale)


def info_nce(query: Tensor, positive: Tensor, negatives: Tensor, *, temperature: float = 0.1) -> Tensor:
    """InfoNCE with given negatives, MoCo's loss (He et al. 2020, arXiv 1911.05722, equation 1).

    `cross_entropy(cat([<q, p>, q @ negatives.T], 1) / temperature, 0)` with every row normalised inside.

    Args:
        query, positive: [N, D] each.
        negatives: [K, D], for example a queue. Constants unless they require a gradient.
        temperature: what the cosines are divided by.

    Returns:
        0-dim float32 (float64 for float64 inputs).

    Raises:
        ValueError: for other shapes, dtypes or temperatures.
    """
    contract = "query and positive must be [N, D] both, negatives [K, D]"
    check.matrices("info_nce", contract, query, positive)
    check.matrices("info_nce", contract, negatives)
    if negatives.shape[1] != query.shape[1]:
        check.fail("info_nce", contract, f"{tuple(query.shape)} and {tuple(negatives.shape)}")
    check.one_device("info_nce", (query, positive, negatives))
    check.positive("info_nce", temperature=temperature)
    return one_pass("info_nce", check.common(query, positive, negatives), float(temperature))
