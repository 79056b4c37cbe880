"""Contrastive losses with options, as a user would write them: all N x N logits, all masks, in the inputs' dtype."""

import math

import torch
import torch.nn.functional as TF
from torch import Tensor

NO_OPTIONS = {
    "reduction": "mean", "weights": None, "label_smoothing": 0.0, "ids": None, "exclude": None,
    "false_negative_margin": None, "hard_negatives": None, "prior": 0.0, "hardness": 0.0,
}  # fmt: skip


def _per_row(x: Tensor | float, like: Tensor) -> Tensor:
    """[R] of a number, a number of each image, or one of each row."""
    x = torch.as_tensor(x, dtype=like.dtype, device=like.device).reshape(-1)
    return x.repeat(like.shape[0] // x.shape[0])


def _logsumexp(logits: Tensor, of: Tensor) -> Tensor:
    return logits.masked_fill(~of, -math.inf).logsumexp(1)


def losses_of_logits(
    logits: Tensor,  # [R, C]
    positive: Tensor,  # [R, C] bool
    negative: Tensor,  # [R, C] bool
    hard: Tensor | None,  # [R, H] logits
    inverse_temperature: Tensor,  # [R]
    options: dict,
    decoupled: bool = False,
) -> Tensor:
    """[R]."""
    if options["false_negative_margin"] is not None:
        highest = logits.masked_fill(~positive, -math.inf).amax(1)
        limit = highest + options["false_negative_margin"] * inverse_temperature
        negative = negative & (logits <= limit[:, None])
    if hard is not None:
        logits = torch.cat([logits, hard], 1)
        negative = torch.cat([negative, torch.ones_like(hard, dtype=torch.bool)], 1)
        positive = torch.cat([positive, torch.zeros_like(hard, dtype=torch.bool)], 1)
    count = negative.sum(1).to(logits.dtype)
    some = count > 0
    of_negatives = _logsumexp(logits, negative)
    of_positives = _logsumexp(logits, positive)
    hardness = options["hardness"]
    if hardness:
        more, less = (_logsumexp(by * logits, negative) for by in (1 + hardness, hardness))
        of_negatives = torch.where(some, count.clamp_min(1).log() + more - less, of_negatives)
    prior = options["prior"]
    if isinstance(prior, Tensor) or prior:
        prior = _per_row(prior, logits)
        shift = torch.maximum(of_negatives, of_positives).detach()
        expected = count * prior * (of_positives - shift).exp() / positive.sum(1)
        rest = ((of_negatives - shift).exp() - expected) / (1 - prior)
        least = count * (-inverse_temperature - shift).exp()
        kept = torch.where(some, torch.maximum(rest, least), 1)
        of_negatives = torch.where(some, kept.log() + shift, of_negatives)
    log = of_negatives if decoupled else torch.logaddexp(of_negatives, of_positives)
    mean_positive = (logits * positive).sum(1) / positive.sum(1)
    smoothing = options["label_smoothing"]
    candidate = positive | negative
    uniform = (logits * candidate).sum(1) / candidate.sum(1)
    return log - (1 - smoothing) * mean_positive - smoothing * uniform


def reduced(losses: Tensor, options: dict) -> Tensor:
    weights = options["weights"]
    weights = torch.ones_like(losses) if weights is None else weights.to(losses).expand(losses.shape)
    if options["reduction"] == "none":
        return losses * weights
    total = (losses * weights).sum()
    return total if options["reduction"] == "sum" else total / weights.sum()


def nt_xent(
    z: Tensor,  # [V, N, D]
    temperature: float | Tensor = 0.5,
    decoupled: bool = False,
    **given,
) -> Tensor:
    options = NO_OPTIONS | given
    v, n, _ = z.shape
    rows = TF.normalize(z, dim=2).flatten(0, 1)
    inverse = 1 / _per_row(temperature, rows)
    logits = rows @ rows.T * inverse[:, None]
    image = torch.arange(v * n, device=z.device) % n
    same = image[:, None] == image
    positive = same & ~torch.eye(v * n, dtype=torch.bool, device=z.device)
    negative = ~same
    if options["ids"] is not None:
        ids = options["ids"].repeat(v)
        negative = negative & (ids[:, None] != ids)
    exclude = options["exclude"]
    if exclude is not None:
        negative = negative & ~exclude.expand(n, n).repeat(v, v)
    hard = None
    if options["hard_negatives"] is not None:
        of_images = TF.normalize(options["hard_negatives"], dim=2).repeat(v, 1, 1)
        hard = (of_images @ rows[:, :, None])[:, :, 0] * inverse[:, None]
    losses = losses_of_logits(logits, positive, negative, hard, inverse, options, decoupled)
    return reduced(losses.view(v, n), options)


def info_nce(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor,
    temperature: float | Tensor = 0.1,
    label_offset: int | None = None,
    negative_ids: Tensor | None = None,
    **given,
) -> Tensor:
    options = NO_OPTIONS | given
    q, p, k = (TF.normalize(x, dim=1) for x in (query, positive, negatives))
    n = q.shape[0]
    inverse = 1 / _per_row(temperature, q)
    logits = torch.cat([(q * p).sum(1, keepdim=True), q @ k.T], 1) * inverse[:, None]
    is_negative = torch.ones(n, k.shape[0], dtype=torch.bool, device=q.device)
    if label_offset is not None:
        is_negative &= (
            torch.arange(k.shape[0], device=q.device) != torch.arange(n, device=q.device)[:, None] + label_offset
        )
    if negative_ids is not None:
        is_negative &= options["ids"][:, None] != negative_ids
    if options["exclude"] is not None:
        is_negative &= ~options["exclude"]
    first = torch.zeros_like(logits, dtype=torch.bool)
    first[:, 0] = True
    hard = None
    if options["hard_negatives"] is not None:
        hard = (TF.normalize(options["hard_negatives"], dim=2) @ q[:, :, None])[:, :, 0] * inverse[:, None]
    negative = torch.cat([torch.zeros_like(is_negative[:, :1]), is_negative], 1)
    return reduced(losses_of_logits(logits, first, negative, hard, inverse, options), options)


def clip_loss(x: Tensor, y: Tensor, logit_scale: float | Tensor, **given) -> Tensor:
    options = NO_OPTIONS | given
    scale = _per_row(logit_scale, x)
    n = x.shape[0]
    pair = torch.eye(n, dtype=torch.bool, device=x.device)
    negative = ~pair
    if options["ids"] is not None:
        negative = negative & (options["ids"][:, None] != options["ids"])
    exclude = torch.zeros_like(pair) if options["exclude"] is None else options["exclude"].expand(n, n)
    back = exclude.T if options["exclude"] is not None and options["exclude"].dim() == 2 else exclude
    hard = None
    if options["hard_negatives"] is not None:
        hard = (options["hard_negatives"] @ x[:, :, None])[:, :, 0] * scale[:, None]
    similarities = x @ y.T
    of_x = losses_of_logits(similarities * scale[:, None], pair, negative & ~exclude, hard, scale, options)
    of_y = losses_of_logits(similarities.T * scale[:, None], pair, negative & ~back, None, scale, options)
    return reduced((of_x + of_y) / 2, options)


def supcon(
    z: Tensor,  # [V, N, D]
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float | Tensor = 0.07,
    anchors: str = "all",
    normalize: bool = True,
    **given,
) -> Tensor:
    """Khosla et al. 2020, equation 2: candidates are positives, by mask or labels, and negatives."""
    options = NO_OPTIONS | given
    v, n, _ = z.shape
    rows = (TF.normalize(z, dim=2) if normalize else z).flatten(0, 1)
    inverse = 1 / _per_row(temperature, rows)
    logits = rows @ rows.T * inverse[:, None]
    if mask is None:
        mask = torch.eye(n) if labels is None else (labels[:, None] == labels)
    itself = torch.eye(v * n, dtype=torch.bool, device=z.device)
    of_other_image = ~torch.eye(n, dtype=torch.bool, device=z.device)
    exclude = torch.zeros_like(of_other_image) if options["exclude"] is None else options["exclude"].expand(n, n)
    candidate = ~(exclude & of_other_image).repeat(v, v) & ~itself
    weight = mask.to(z).repeat(v, v) * candidate
    negative = candidate & (weight == 0)
    hard = options["hard_negatives"]
    if hard is not None:
        hard = (TF.normalize(hard, dim=2) if normalize else hard).repeat(v, 1, 1)
        logits = torch.cat([logits, (hard @ rows[:, :, None])[:, :, 0] * inverse[:, None]], 1)
        added = torch.ones(v * n, hard.shape[1], dtype=torch.bool, device=z.device)
        candidate = torch.cat([candidate, added], 1)
        negative = torch.cat([negative, added], 1)
        weight = torch.cat([weight, torch.zeros_like(added, dtype=z.dtype)], 1)
    mass = candidate.to(z)
    hardness = options["hardness"]
    if hardness:
        share = (hardness * logits).masked_fill(~negative, -math.inf).softmax(1) * negative.sum(1, keepdim=True)
        mass = torch.where(negative, share, mass)
    log = (logits.masked_fill(~candidate, -math.inf) + torch.where(candidate, mass, 1).log()).logsumexp(1)
    counts = weight.sum(1)
    some = counts > 0
    positives = (weight * logits).sum(1) / torch.where(some, counts, 1)
    losses = torch.where(some, log - positives, 0).view(v, n)
    return reduced(losses if anchors == "all" else losses[:1], options)
