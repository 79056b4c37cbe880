"""NNCLR: nearest neighbours as positives."""

import torch
import torch.distributed as dist
from torch import Tensor

from fastjem.collectives import Agreement
from fastjem.functional import checks
from fastjem.functional.contrastive import nt_xent
from fastjem.functional.precision import without_autocast
from fastjem.ops.autograd import ops
from fastjem.ops.forward_mode import refuse_forward_mode


def nnclr(
    z0: Tensor,
    z1: Tensor,
    p0: Tensor,
    p1: Tensor,
    bank: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """NNCLR's loss (Dwibedi et al. 2021, arXiv 2104.14548, equation 4): nearest neighbours are the positives.

    `(nt_xent(nn(z0), p1) + nt_xent(nn(z1), p0)) / 2`, nn(z) being for each row the row of the bank of the highest
    cosine, as lightly has it with `NNMemoryBankModule` and `NTXentLoss`. Both views' neighbours are found in one pass
    over the bank, of which only these rows are copied.

    Args:
        z0, z1: [N, D], projections of two views; constants, as nothing is differentiated through the search.
        p0, p1: [N, D], predictions of the same.
        bank: [K, D], the support set; constants. May be changed in place before backward.
        temperature, group: as for `nt_xent`; each rank's neighbours are of its own bank, which ranks have alike.

    Returns:
        0-dim float32 (float64 for float64 inputs).

    Raises:
        ValueError: for other shapes, dtypes or temperatures.
    """
    op = "nnclr"
    contract = "z0, z1, p0 and p1 must be [N, D], bank [K, D]"
    with Agreement(op, group) as ranks:
        checks.matrices(op, contract, z0, z1, p0, p1, may_be_empty=None if group is None else 0)
        checks.matrices(op, contract, bank)
        if bank.shape[1] != z0.shape[1]:
            checks.fail(op, contract, f"{tuple(z0.shape)} and {tuple(bank.shape)}")
        checks.one_device(op, (z0, bank))
        ranks.rows_of(z0)
    with without_autocast(z0):
        both = torch.cat(checks.common(z0, z1))
    rows = bank.detach()[nearest_neighbors(both, bank)] if both.shape[0] else bank.detach()[:0]
    of_z0, of_z1 = rows.unflatten(0, (2, z0.shape[0])).unbind()
    first = nt_xent(of_z0, p1, temperature=temperature, group=group)
    second = nt_xent(of_z1, p0, temperature=temperature, group=group)
    return torch.stack([first, second]).mean()


def nearest_neighbors(query: Tensor, bank: Tensor) -> Tensor:
    """`(normalize(query) @ normalize(bank).T).argmax(1)`: NNCLR's nearest neighbours (arXiv 2104.14548).

    Args:
        query: [N, D].
        bank: [K, D].

    Returns:
        [N] int64: for each row of `query` the row of `bank` of the highest cosine.

    Raises:
        ValueError: for other shapes or dtypes.
    """
    contract = "query must be [N, D] and bank [K, D]"
    checks.matrices("nearest_neighbors", contract, query, bank, same=False)
    if query.shape[1] != bank.shape[1]:
        checks.fail("nearest_neighbors", contract, f"{tuple(query.shape)} and {tuple(bank.shape)}")
    refuse_forward_mode("nearest_neighbors", (query, bank))
    return ops.nearest_neighbors(*(x.detach() for x in checks.common(query, bank)))
