"""Sinkhorn codes: SwAV, DINOv2, MSN."""

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from fastjem.collectives import Agreement, logsumexp_of_ranks
from fastjem.functional import checks
from fastjem.functional.compiled import over_ranks
from fastjem.functional.precision import loss_dtype
from fastjem.functional.temperature import over
from fastjem.kernels.arithmetic import widest, widest_dtype
from fastjem.ops.autograd import ops
from fastjem.ops.forward_mode import refuse_forward_mode


@over_ranks(lambda scores, **_: [scores.shape], differentiable=False)
def sinkhorn(
    scores: Tensor,
    *,
    epsilon: float | Tensor = 0.05,
    iterations: int = 3,
    normalize_samples_first: bool = False,
    dtype: torch.dtype | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Sinkhorn-Knopp codes of SwAV (Caron et al. 2020, arXiv 2006.09882, section 3.1), DINOv2 and MSN.

    Q = exp(scores / epsilon), then `iterations` times: each prototype divided by its sum over samples, each sample by
    its sum over prototypes. In the log domain, so that no finite score overflows or underflows. Not differentiable.

    Args:
        scores: [B, K], samples by prototypes; or [P, B, K], P problems at once, each for itself: CAPI's positions
            (arXiv 2502.08769), whose `[B, P, K].transpose(0, 1)` needn't be copied.
        epsilon: temperature of the scores: a number or a 0-dim tensor.
        iterations: how often both are normalised. Few iterations do not converge, and their order matters. 0: Q is
            divided by its sum alone, and so the codes' mean sum over prototypes is 1 (lightly's convention).
        normalize_samples_first: divide each sample by its sum once before (MSN normalises probabilities).
        dtype: of the codes; None: float32 (float64 for float64 scores).
        group: the process group over whose global batch prototypes are normalised (batches may be uneven, even empty).

    Returns:
        Codes in the shape of the scores; every row sums to 1 (with iterations).

    Raises:
        ValueError: for other shapes, dtypes or options.
    """
    with Agreement("sinkhorn", group) as ranks:
        (scores,), epsilon, iterations = _checked("sinkhorn", epsilon, iterations, group, scores, least=0)
        if dtype is None:
            dtype = loss_dtype(scores)
        if not dtype.is_floating_point:
            checks.fail("sinkhorn", "dtype must be floating-point", dtype)
        ranks.rows_of(scores, scores.dim() - 2)
        ranks.alike(iterations, normalize_samples_first)
    if not iterations:
        return _unnormalised(scores.detach(), epsilon, normalize_samples_first, sum(ranks.sizes), group).to(dtype)
    if group is None:
        return ops.sinkhorn(scores, epsilon, iterations, normalize_samples_first, dtype)
    bias = _potentials([scores], epsilon, iterations, normalize_samples_first, group)
    if not scores.shape[-2]:
        return scores.new_empty(scores.shape, dtype=dtype)
    return ops.sinkhorn_codes(scores, bias, epsilon, dtype)


def _of_prototypes(scores: Tensor) -> tuple[int, ...]:
    """The shape of potentials, [K] or [P, K]."""
    return (*scores.shape[:-2], scores.shape[-1])


@over_ranks(
    lambda scores, **_: [_of_prototypes(scores if isinstance(scores, Tensor) else scores[0])], differentiable=False
)
def sinkhorn_bias(
    scores: Tensor | Sequence[Tensor],
    *,
    epsilon: float | Tensor = 0.05,
    iterations: int = 3,
    normalize_samples_first: bool = False,
    rows: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """The prototypes' log-potentials f [K] of `sinkhorn`: its codes are `softmax(scores / epsilon + f, 1)`.

    Given as `teacher_bias` to `prototype_cross_entropy`, the codes never need to exist in memory.

    Args:
        scores: [B, K], or a list of [B, K] whose B may differ: one batch in several tensors (SwAV's crop and queue,
            DINOv2's views), without a concatenation. Either with P in front of it as for `sinkhorn`.
        epsilon, iterations, normalize_samples_first, group: as for `sinkhorn`.
        rows: 0-dim int64, for scores in one tensor: so many of its first rows count, as if the others weren't there,
            which fill up to a shape that doesn't change (`masked_rows` with a count). It is never read on a GPU.

    Returns:
        [K], or [P, K], float32 (float64 for float64 scores); +inf of no rows at all.

    Raises:
        ValueError: for other shapes, dtypes or options.
    """
    parts = [scores] if isinstance(scores, Tensor) else scores
    with Agreement("sinkhorn_bias", group) as ranks:
        if not isinstance(parts, (list, tuple)) or not parts:
            checks.fail("sinkhorn_bias", "scores must be [B, K], or a list of them", checks.shape(scores))
        parts, epsilon, iterations = _checked("sinkhorn_bias", epsilon, iterations, group, *parts)
        if rows is not None:
            if not isinstance(rows, Tensor) or rows.shape or rows.dtype != torch.int64 or len(parts) > 1:
                came = f"{checks.shape(rows)} {getattr(rows, 'dtype', '')}".strip() + f" for {len(parts)}"
                checks.fail("sinkhorn_bias", "rows must be a 0-dim int64 tensor, for scores in one tensor", came)
            checks.one_device("sinkhorn_bias", [rows, parts[0]])
        ranks.rows_of(parts[0], parts[0].dim() - 2)
        ranks.alike(iterations, normalize_samples_first)
    if group is None:
        return ops.sinkhorn_bias(parts, epsilon, iterations, normalize_samples_first, rows)
    wide = torch.float64 if torch.float64 in {x.dtype for x in parts} else torch.float32
    return _potentials(parts, epsilon, iterations, normalize_samples_first, group, rows).to(wide)


@over_ranks(lambda scores, **_: [_of_prototypes(scores), scores.shape[:-1]], packed=tuple, differentiable=False)
def sinkhorn_with_floor(
    scores: Tensor,
    *,
    epsilon: float | Tensor,
    iterations: int,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """`sinkhorn` where 1e-8 is added to every sum that is divided by, as in CAPI's code: a sample whose scores are far
    below those of others for every prototype keeps less than 1.

    The official code takes exponentials of scores that are at most 50 for each prototype, so in the first sums over
    samples it is nothing.

    Args:
        scores, epsilon, iterations, group: as for `sinkhorn_bias`.

    Returns:
        Potentials f [K] or [P, K], and what samples keep, [B] or [P, B], within 0 and 1: codes are
        `kept * softmax(scores / epsilon + f, 1)`.
    """
    op = "sinkhorn_with_floor"
    with Agreement(op, group) as ranks:
        (scores,), epsilon, iterations = _checked(op, epsilon, iterations, group, scores)
        ranks.rows_of(scores, scores.dim() - 2)
        ranks.alike(iterations)
    wide = loss_dtype(scores)
    potentials = -_log_sums([scores], None, epsilon, group, None)
    log_floor = potentials.new_full((), math.log(1e-8))  # a constant by a name would be a number of the graph
    # In units of what stands in a row before it is divided, which earlier divisions have made another one.
    log_floors = log_floor.expand(scores.shape[:-1])
    for _ in range(iterations - 1):
        sums = potentials + _log_sums([scores], potentials, epsilon, group, None, log_floors)
        log_floors = log_floor + torch.logaddexp(_rows(scores, potentials, epsilon), log_floors)
        potentials = potentials - torch.logaddexp(sums, log_floor)
    kept = (_rows(scores, potentials, epsilon) - log_floors).sigmoid()
    return potentials.to(wide), kept.to(wide)


def _rows(scores: Tensor, potentials: Tensor, epsilon: float) -> Tensor:
    """[B] or [P, B]: the logarithms of samples' sums, of no samples too."""
    if not scores.shape[-2]:
        return potentials.new_empty(scores.shape[:-1])
    return ops.sinkhorn_rows(scores, potentials, epsilon)


def _unnormalised(
    scores: Tensor, epsilon: float, normalize_samples_first: bool, rows: int, group: dist.ProcessGroup | None
) -> Tensor:
    """The codes of no iteration: Q over its sum, times the rows of all ranks; samples that are normalised stay so."""
    logits = widest(scores) / epsilon
    if normalize_samples_first:
        return logits.softmax(-1)
    total = logits.logsumexp((-2, -1), keepdim=True)
    return rows * (logits - logsumexp_of_ranks(total, group)).exp()


def _checked(
    op: str, epsilon: float | Tensor, iterations: int, group: dist.ProcessGroup | None, *scores: Tensor, least: int = 1
) -> tuple[list[Tensor], float, int]:
    """The scores, constants; an epsilon that is a tensor goes into them."""
    contract = "scores must be [B, K] or [P, B, K]" + ("" if len(scores) == 1 else " with the same P and K")
    dims = 3 if isinstance(scores[0], Tensor) and scores[0].dim() == 3 else 2
    checks.matrices(op, contract, *scores, dims=dims, same=False, may_be_empty=None if group is None else dims - 2)
    if any(_of_prototypes(x) != _of_prototypes(scores[0]) for x in scores):
        checks.fail(op, contract, " and ".join(str(tuple(x.shape)) for x in scores))
    iterations = checks.integer(op, "iterations", iterations, least)
    epsilon = checks.positive(op, "epsilon", epsilon, scores[0])
    refuse_forward_mode(op, scores)
    constants = [x.detach() for x in scores]
    if isinstance(epsilon, Tensor):
        return [over(x, epsilon.detach()) for x in constants], 1.0, iterations
    return constants, epsilon, iterations


def _potentials(
    parts: list[Tensor],  # [B, K] or [P, B, K] each
    epsilon: float,
    iterations: int,
    normalize_samples_first: bool,
    group: dist.ProcessGroup | None,
    rows: Tensor | None = None,
) -> Tensor:
    """[K] or [P, K], in the widest dtype."""
    wide = widest_dtype(parts[0].device)
    start = parts[0].new_zeros(_of_prototypes(parts[0]), dtype=wide) if normalize_samples_first else None
    potentials = -_log_sums(parts, start, epsilon, group, rows)
    for _ in range(iterations - 1):
        potentials = -_log_sums(parts, potentials, epsilon, group, rows)
    return potentials


def _log_sums(
    parts: list[Tensor],
    potentials: Tensor | None,
    epsilon: float,
    group: dist.ProcessGroup | None,
    rows: Tensor | None,
    log_floors: Tensor | None = None,
) -> Tensor:
    """[K] or [P, K]: each prototype's log-sum-exp over all ranks' samples, normalised (with potentials).

    One collective, or two of more than a few ranks.
    """
    sums = [ops.sinkhorn_step(x, potentials, epsilon, rows, log_floors) for x in parts if x.shape[-2]]
    if not sums:  # a rank without samples
        sums = [parts[0].new_full(_of_prototypes(parts[0]), -torch.inf, dtype=widest_dtype(parts[0].device))]
    total = sums[0] if len(sums) == 1 else torch.stack(sums).logsumexp(0)
    return logsumexp_of_ranks(total, group)
