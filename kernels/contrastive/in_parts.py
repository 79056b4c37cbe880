"""The specification of NT-Xent, CLIP and SigLIP where candidates come in parts, of this rank and then of each other.

Conventions, and why log-sum-exps are float64: reference.py.
"""

import math

import torch
from torch import Tensor

from ..arithmetic import no_gradient, through_unit_rows, unit_rows, widen, widest


def _unit_if(normalize: bool, x: Tensor) -> tuple[Tensor, Tensor]:
    return unit_rows(x) if normalize else (x, torch.ones_like(x[..., :1]))


def _views(rows: Tensor, candidates: Tensor, offset: int, temperature: float, normalize: bool):
    """(rows [V n, D] and their norms, candidates [V N, D], logits, itself, positive), the last three [V n, V N].

    `itself` is where a row meets itself, `positive` where it meets other views of its image.
    """
    v, n, d = rows.shape
    total = candidates.shape[1]
    a, norm = _unit_if(normalize, widen(rows).reshape(v * n, d))
    b, _ = _unit_if(normalize, widen(candidates).reshape(v * total, d))
    image = torch.arange(v * n, device=rows.device) % n + offset  # [V n], the image that a row shows
    columns = torch.arange(v * total, device=rows.device)
    same_image = columns % total == image[:, None]  # [V n, V N]
    itself = same_image & (columns // total == (torch.arange(v * n, device=rows.device) // n)[:, None])
    return a, norm, b, widest(a @ b.T) / temperature, itself, same_image & ~itself


def nt_xent(
    rows: Tensor,  # [V, n, D], the images offset .. offset + n of the candidates
    candidates: Tensor,  # [V, N, D]
    offset: int,  # -n: the candidates are other images
    temperature: float,
    decoupled: bool,
    normalize: bool,
) -> tuple[Tensor, Tensor]:
    """For each row the mean of s_ij over its V - 1 positives (0 without), and logsumexp_j(s_ij): both [V, n] float64.

    s are cosines / temperature, or dot products / temperature if not `normalize`. A row's candidates are all rows
    but itself (SimCLR, arXiv 2002.05709, equation 1; the loss is the mean of the difference), if `decoupled` all
    rows of other images (DCL, arXiv 2110.06848, equation 6).
    """
    *_, logits, itself, positive = _views(rows, candidates, offset, temperature, normalize)
    lse = logits.masked_fill(itself | positive if decoupled else itself, -math.inf).logsumexp(1)
    positives = logits.masked_fill(~positive, 0).sum(1) / max(len(rows) - 1, 1)
    return positives.reshape(rows.shape[:2]), lse.reshape(rows.shape[:2])


def nt_xent_backward(
    rows: Tensor,  # [V, n, D]
    candidates: Tensor,  # [V, N, D]
    rows_lse: Tensor,  # [V, n]
    candidates_lse: Tensor,  # [V, N]
    weights: Tensor | None,  # [V, N] of the candidates' positive terms; None: ones
    offset: int,
    temperature: float,
    decoupled: bool,
    normalize: bool,
) -> Tensor:
    """[V, n, D]: temperature times the gradient for `rows` of `sum(lse - weights * positives)`.

    The sum is over all candidates as rows. The gradient is
    `sum_j (P_ij + P_ji) z_j - sum_j((w_i + w_j) z_j over positives) / (V - 1)`, then through the normalisation.
    """
    v = len(rows)
    a, norm, b, logits, itself, positive = _views(rows, candidates, offset, temperature, normalize)
    p = (logits - rows_lse.reshape(-1, 1)).exp() + (logits - candidates_lse.reshape(1, -1)).exp()
    p = p.masked_fill(itself | positive if decoupled else itself, 0)
    w = torch.ones_like(candidates_lse) if weights is None else weights.to(p.dtype)  # [V, N]
    image = (torch.arange(rows.shape[1], device=rows.device) + offset).clamp(0, w.shape[1] - 1)
    pulled = (w[:, image].reshape(-1, 1) + w.reshape(1, -1)) / max(v - 1, 1)
    gradient = (p - pulled.masked_fill(~positive, 0)).to(b.dtype) @ b
    if normalize:
        gradient = through_unit_rows(gradient, a, norm)
    return gradient.reshape(rows.shape).to(rows.dtype)


def similarities_and_pairs(x: Tensor, y: Tensor, offset: int) -> tuple[Tensor, Tensor]:
    """The similarities [n, m], and whether column j is row i's own pair, j = offset + i."""
    own_pair = torch.arange(y.shape[0], device=y.device) == torch.arange(x.shape[0], device=x.device)[:, None] + offset
    return widen(x) @ widen(y).T, own_pair


def clip_loss(
    x: Tensor,  # [n, D], the pairs offset .. offset + n of y
    y: Tensor,  # [m, D]
    logit_scale: Tensor,  # 0-dim
    offset: int,  # -n: y are other pairs
) -> tuple[Tensor, Tensor, Tensor]:
    """Of the logits `logit_scale * x @ y.T`: each pair's own, logsumexp over y, both [n], logsumexp over x [m].

    All float64; the own logit is 0 for a row whose pair isn't among y.
    CLIP, arXiv 2103.00020, figure 3: the loss is half the mean of both log-sum-exps less the pair's own logit.
    """
    similarities, own_pair = similarities_and_pairs(x, y, offset)
    logits = widest(similarities) * widest(logit_scale)
    return logits.masked_fill(~own_pair, 0).sum(1), logits.logsumexp(1), logits.logsumexp(0)


def clip_loss_backward(
    x: Tensor,  # [n, D]
    y: Tensor,  # [m, D]
    logit_scale: Tensor,  # 0-dim
    x_lse: Tensor,  # [n], over the y of all ranks
    y_lse: Tensor,  # [m], over the x of all ranks
    offset: int,
    wanted: list[bool],
) -> tuple[list[Tensor], Tensor]:
    """The gradients of `sum(x_lse) + sum(y_lse) - 2 sum(own logits)`.

    With G = softmax over y + softmax over x - 2 own_pair: those for x and y over logit_scale, `G @ y` and `G.T @ x`,
    and that for logit_scale, `sum(G * (x @ y.T))`, float64.
    """
    similarities, own_pair = similarities_and_pairs(x, y, offset)
    logits = widest(similarities) * widest(logit_scale)
    g = (logits - x_lse[:, None]).exp() + (logits - y_lse).exp() - 2 * own_pair
    narrow = g.to(similarities.dtype)
    gradients = [
        (narrow @ widen(y)).to(x.dtype) if wanted[0] else no_gradient(x),
        (narrow.T @ widen(x)).to(y.dtype) if wanted[1] else no_gradient(y),
    ]
    return gradients, (g * similarities).sum()


def siglip_loss(
    x: Tensor,  # [n, D], the pairs offset .. offset + n of y
    y: Tensor,  # [m, D]
    logit_scale: Tensor,  # 0-dim
    logit_bias: Tensor,  # 0-dim
    offset: int,  # -n: y are other pairs
    wanted: list[bool],  # for x and y
) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    """`-logsigmoid(labels * (logit_scale * x @ y.T + logit_bias)).sum()`, labels 1 for pairs and -1 elsewhere.

    The loss and its gradients for logit_scale and logit_bias, the last two results, are float64; the gradients for x
    and y are over logit_scale. SigLIP, arXiv 2303.15343.
    """
    similarities, own_pair = similarities_and_pairs(x, y, offset)
    labels = 2 * own_pair.to(similarities.dtype) - 1
    logits = labels * (similarities * logit_scale.to(similarities.dtype) + logit_bias.to(similarities.dtype))
    g = -labels * (-logits).sigmoid()
    gradients = [
        (g @ widen(y)).to(x.dtype) if wanted[0] else no_gradient(x),
        (g.T @ widen(x)).to(y.dtype) if wanted[1] else no_gradient(y),
    ]
    loss = -widest(torch.nn.functional.logsigmoid(logits)).sum()
    return loss, gradients, (widest(g) * similarities).sum(), widest(g).sum()
