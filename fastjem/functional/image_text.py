"""Contrastive losses of pairs from two encoders, with a learned scale: CLIP and SigLIP."""

import torch
import torch.distributed as dist
from torch import Tensor

from fastjem.collectives import Agreement
from fastjem.functional import checks, few, rings
from fastjem.functional.compiled import over_ranks
from fastjem.kernels.arithmetic import widest_dtype


def _scalar(op: str, name: str, value: Tensor | float, like: Tensor) -> Tensor:
    """0-dim. A Python number stays what it is: the default dtype, which may be bfloat16, has no part in it."""
    value = checks.number(op, name, value, like)
    if isinstance(value, Tensor):
        return value
    return torch.full((), value, dtype=widest_dtype(like.device), device=like.device)


def _checked(
    op: str, x: Tensor, y: Tensor, logit_scale: Tensor | float, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor, Tensor]:
    checks.matrices(op, "x and y must be [N, D] both", x, y, may_be_empty=None if group is None else 0)
    x, y = checks.common(x, y)
    return x, y, _scalar(op, "logit_scale", logit_scale, x)


@over_ranks()
def clip_loss(
    x: Tensor,
    y: Tensor,
    logit_scale: Tensor | float,
    *,
    group: dist.ProcessGroup | None = None,
    local_loss: bool = False,
    gather_with_grad: bool = True,
) -> Tensor:
    """CLIP's loss (Radford et al. 2021, arXiv 2103.00020, figure 3).

    `(cross_entropy(logits, arange(N)) + cross_entropy(logits.T, arange(N))) / 2` with `logits = logit_scale * x @ y.T`.

    Args:
        x, y: [N, D] each, pair by pair, as given: open_clip's convention is that they are normalised already.
        logit_scale: what similarities are multiplied by (the exponential of CLIP's parameter): a number, or a 0-dim
            tensor, which gets its gradient.
        group: as for `nt_xent`.
        local_loss: with a group, the mean over this rank's rows (and, for `logits.T`, its columns) alone, each against
            all ranks' candidates (0 for a rank without rows); the gradient is still that of the global loss, exact
            after averaging over ranks.
        gather_with_grad: False makes the candidates of a local loss constants, this rank's own among them: the
            gradient is that of this rank's rows alone, as open_clip's, and not the global loss's. Without `local_loss`
            it changes nothing.

    Returns:
        0-dim float32 (float64 for float64 inputs); the same on every rank of the group, unless `local_loss`.
    """
    loss = few.of_pairs("clip_loss", x, y, logit_scale, None, group, has_bias=False)
    if loss is not None:
        return loss
    constant_candidates = group is not None and local_loss and not gather_with_grad
    with Agreement("clip_loss", group) as ranks:
        x, y, scale = _checked("clip_loss", x, y, logit_scale, group)
        ranks.rows_of(x)
        ranks.backward_of(x, y, scale)
        if constant_candidates:
            ranks.alike("constant candidates")
    if group is not None and constant_candidates:
        return rings.clip_loss_of_constant_candidates(x, y, scale, ranks.sizes, group)
    return rings.clip_loss(x, y, scale, ranks.sizes, group, local_loss and group is not None)


@over_ranks()
def siglip_loss(
    x: Tensor,
    y: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    *,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """SigLIP's loss (Zhai et al. 2023, arXiv 2303.15343): every pair is a binary decision of its own.

    `-logsigmoid(labels * (logit_scale * x @ y.T + logit_bias)).sum() / N`, labels 1 on the diagonal and -1 elsewhere.

    Args:
        x, y, logit_scale, group: as for `clip_loss`.
        logit_bias: 0-dim, with its gradient.
    """
    loss = few.of_pairs("siglip_loss", x, y, logit_scale, logit_bias, group, has_bias=True)
    if loss is not None:
        return loss
    with Agreement("siglip_loss", group) as ranks:
        x, y, scale = _checked("siglip_loss", x, y, logit_scale, group)
        bias = _scalar("siglip_loss", "logit_bias", logit_bias, x)
        ranks.rows_of(x)
    return rings.siglip_loss(x, y, scale, bias, ranks.sizes, group)
