"""Contrastive losses of a few rows on the CPU: loss and gradients in one call of C++, in double.

Of 2 x 4 rows the engine's forty small steps take 500 us of the host's time, this takes 5. The gradients come with the
loss, as it is the call that costs. A square of similarities is written down, which few rows allow; more rows are the
engine's, whose products are torch.mm's.

Each function returns None where an argument isn't a plain dense tensor of the dtype and shape of the others. Whoever
calls then goes the long way, which says what is wrong, or computes it.
"""

from collections.abc import Sequence

from torch import Tensor

from .. import _C, tiling
from ..native import Found, gradients_for, loss_like, scalar
from . import one_tile


def few(rows: int, columns: int, width: int) -> bool:
    """Whether so many similarities of rows so wide are less work than the engine's steps."""
    return rows * columns * width <= tiling.CPU_SMALL_PRODUCT and rows * columns <= tiling.CPU_SMALL_SQUARE


def of_views(
    views: Sequence[Tensor],  # two [N, D], or one [V, N, D]
    temperature: float,
    wanted: Sequence[bool],
    *,
    decoupled: bool = False,
    normalize: bool = True,
    labels: Tensor | None = None,  # [N] int64: positives are rows of one class, and an anchor needs one
    one_anchor: bool = False,  # the first view's rows are the anchors
) -> Found | None:
    """The mean over anchors of the log-sum-exp over all other rows less the mean of the positives' logits."""
    first = views[0]
    number = first.shape[0] * (2 if len(views) == 2 else first.shape[1])
    if not few(number, number, first.shape[-1]):
        if len(views) != 2 or labels is not None or one_anchor:
            return None
        return one_tile.of_two_views(views[0], views[1], temperature, wanted, decoupled=decoupled, normalize=normalize)
    second = views[1] if len(views) == 2 else None
    gradients = gradients_for(views, wanted)
    given = (first, second, gradients[0], gradients[1] if second is not None else None, labels)
    total = _C.small_views(*given, temperature, normalize, decoupled, one_anchor)
    if total is None:
        return None
    anchors = first.shape[1] if one_anchor else number
    factor = 1 / (anchors * temperature)
    return Found(loss_like(first, total / anchors), gradients, (factor,) * len(gradients))


def info_nce(
    query: Tensor,  # [N, D]
    positive: Tensor,  # [N, D]
    negatives: Tensor,  # [K, D]
    offset: int,
    temperature: float,
    wanted: Sequence[bool],
) -> Found | None:
    n, width = query.shape
    if not few(n, negatives.shape[0], width):
        return None
    inputs = (query, positive, negatives)
    gradients = gradients_for(inputs, wanted)
    total = _C.small_info_nce(*inputs, *gradients, offset, temperature)
    if total is None:
        return None
    factor = 1 / (n * temperature)
    return Found(loss_like(query, total / n), gradients, (factor,) * 3)


def of_pairs(
    x: Tensor,  # [N, D]
    y: Tensor,  # [N, D]
    scale: Tensor,  # 0-dim, float32 or float64
    bias: Tensor | None,  # the same, SigLIP's; None: CLIP's loss
    wanted: Sequence[bool],
) -> Found | None:
    n, width = x.shape
    if not few(n, n, width):
        return (
            one_tile.clip_loss(x, y, scale, wanted) if bias is None else one_tile.siglip_loss(x, y, scale, bias, wanted)
        )
    gradients = gradients_for((x, y), wanted[:2])
    factor = scale.item()
    numbers = _C.small_pairs(x, y, *gradients, factor, 0.0 if bias is None else bias.item(), bias is not None)
    if numbers is None:
        return None
    total, *of_numbers = numbers
    each = 1 / (2 * n if bias is None else n)
    for parameter, want, value in zip((scale, bias), wanted[2:], of_numbers, strict=False):
        gradients.append(scalar(value, parameter.dtype) if want else None)
    return Found(loss_like(x, total * each), gradients, (factor * each, factor * each, each, each)[: len(gradients)])
