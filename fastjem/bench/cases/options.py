"""Contrastive losses with options: duplicates by ids, label smoothing, the losses of single rows, hard negatives."""

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, normalize

import fastjem.functional as F
from fastjem.bench.case import SMALL, Case, Draw

TEMPERATURE = 0.2
SMOOTHING = 0.1
SCALE = 14.0
HARDNESS = 0.5


def _logits_of_views(z0: Tensor, z1: Tensor) -> tuple[Tensor, Tensor]:
    """[2 N, 2 N], of a row with itself too, and each row's partner."""
    z = normalize(torch.cat([z0, z1]), dim=1)
    return z @ z.T / TEMPERATURE, torch.arange(len(z), device=z.device).roll(len(z0))


def nt_xent_with_ids(z0: Tensor, z1: Tensor, ids: Tensor) -> Tensor:
    logits, partner = _logits_of_views(z0, z1)
    both = ids.repeat(2)
    same = both[:, None] == both
    row = torch.arange(len(both), device=ids.device)
    seen = ~same | (row == partner[:, None])
    return cross_entropy(logits.masked_fill(~seen, -torch.inf), partner)


def nt_xent_smoothed(z0: Tensor, z1: Tensor) -> Tensor:
    """Without the diagonal, as label smoothing would make an infinite loss of its -inf."""
    logits, partner = _logits_of_views(z0, z1)
    n = len(logits)
    others = logits.flatten()[1:].view(n - 1, n + 1)[:, :-1].reshape(n, n - 1)
    row = torch.arange(n, device=logits.device)
    return cross_entropy(others, partner - (partner > row).long(), label_smoothing=SMOOTHING)


def clip_of_pairs(x: Tensor, y: Tensor, scale: Tensor, ids: Tensor) -> Tensor:
    """Pairs of equal ids aren't negatives of one another; a loss of each pair, which is weighed."""
    partner = torch.arange(len(x), device=x.device)
    same = (ids[:, None] == ids) & ~torch.eye(len(x), dtype=torch.bool, device=x.device)
    logits = (scale * (x @ y.T)).masked_fill(same, -torch.inf)
    of_x, of_y = (cross_entropy(side, partner, reduction="none") for side in (logits, logits.T))
    return ((of_x + of_y) / 2 * _weights(x)).sum()


def _weights(x: Tensor) -> Tensor:
    return torch.linspace(0, 1 / len(x), len(x), device=x.device)


def queue_with_ids(query: Tensor, key: Tensor, queue: Tensor, ids: Tensor, queue_ids: Tensor) -> Tensor:
    q = normalize(query, dim=1)
    k = normalize(key, dim=1)
    negatives = (q @ normalize(queue, dim=1).T).masked_fill(ids[:, None] == queue_ids, -torch.inf)
    logits = torch.cat([(q * k).sum(1, keepdim=True), negatives], 1) / TEMPERATURE
    return cross_entropy(logits, torch.zeros(len(q), dtype=torch.long, device=q.device), label_smoothing=0.0)


def _ids(draw: Draw, n: int, kinds: int) -> Tensor:
    return (draw.normal(n) * kinds).long()


def views_case(kind: str, n: int, d: int, dtype: torch.dtype = torch.float32, **options) -> Case:
    """FLOPs and bytes as in `contrastive.nt_xent_case`: options cost neither."""
    m = 2 * n
    if kind == "ids":
        inputs = lambda draw: (*draw.pair(n, d), _ids(draw, n, n))  # noqa: E731
        eager = nt_xent_with_ids
        ours = lambda z0, z1, ids: F.nt_xent(z0, z1, temperature=TEMPERATURE, ids=ids)  # noqa: E731
    else:
        inputs = lambda draw: draw.pair(n, d)  # noqa: E731
        eager = nt_xent_smoothed
        ours = lambda z0, z1: F.nt_xent(z0, z1, temperature=TEMPERATURE, label_smoothing=SMOOTHING)  # noqa: E731
    return Case(
        "similarity_logsumexp", f"nt_xent, {kind}: 2 x {n} x {d}", inputs, eager, ours, dtype=dtype,
        uses=("similarity_logsumexp_backward",), bytes=2 * m * d * dtype.itemsize, flops=4 * m * m * d, **options,
    )  # fmt: skip


def pairs_case(n: int, d: int, dtype: torch.dtype = torch.float32, **options) -> Case:
    """FLOPs and bytes as in `contrastive.image_text_case`."""

    def inputs(draw: Draw) -> tuple[Tensor, ...]:
        x, y = (normalize(z, dim=1).requires_grad_() for z in draw.pair(n, d, (False, False)))
        return x, y, torch.tensor(SCALE, device=draw.device, requires_grad=True), _ids(draw, n, n)

    def ours(x: Tensor, y: Tensor, scale: Tensor, ids: Tensor) -> Tensor:
        return (F.clip_loss(x, y, scale, ids=ids, reduction="none") * _weights(x)).sum()

    return Case(
        "similarity_logsumexp", f"clip_loss, ids, no reduction: {n} x {d}", inputs, clip_of_pairs, ours, dtype=dtype,
        uses=("similarity_logsumexp_backward",), bytes=4 * n * d * dtype.itemsize, flops=8 * n * n * d, **options,
    )  # fmt: skip


def queue_case(n: int, k: int, d: int, dtype: torch.dtype = torch.float32, **options) -> Case:
    """FLOPs: the logits, and their weights times the queue. Bytes: query, key, queue read, two gradients written."""

    def inputs(draw: Draw) -> tuple[Tensor, ...]:
        return *draw.pair(n, d), draw.normal(k, d), _ids(draw, n, k), _ids(draw, k, k)

    def ours(query: Tensor, key: Tensor, queue: Tensor, ids: Tensor, queue_ids: Tensor) -> Tensor:
        return F.info_nce(query, key, queue, temperature=TEMPERATURE, ids=ids, negative_ids=queue_ids)

    return Case(
        "similarity_logsumexp", f"info_nce, ids: {n} x {k} x {d}", inputs, queue_with_ids, ours, dtype=dtype,
        uses=("similarity_logsumexp_backward",), bytes=(k + 4 * n) * d * dtype.itemsize, flops=4 * n * k * d, **options,
    )  # fmt: skip


def siglip_of_pairs(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, ids: Tensor) -> Tensor:
    """Pairs of equal ids belong together; targets are smoothed."""
    target = (ids[:, None] == ids).to(x.dtype) * (1 - SMOOTHING) + SMOOTHING / 2
    return binary_cross_entropy_with_logits(scale * (x @ y.T) + bias, target, reduction="sum") / len(x)


def siglip_case(n: int, d: int, dtype: torch.dtype = torch.float32, **options) -> Case:
    """FLOPs: the gradients come with the loss. Bytes as in `contrastive.image_text_case`."""

    def inputs(draw: Draw) -> tuple[Tensor, ...]:
        x, y = (normalize(z, dim=1).requires_grad_() for z in draw.pair(n, d, (False, False)))
        scale, bias = (torch.tensor(value, device=draw.device, requires_grad=True) for value in (SCALE, -SCALE))
        return x, y, scale, bias, _ids(draw, n, n)

    def ours(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, ids: Tensor) -> Tensor:
        return F.siglip_loss(x, y, scale, bias, ids=ids, label_smoothing=SMOOTHING)

    return Case(
        "siglip_pairs", f"ids, label smoothing: {n} x {d}", inputs, siglip_of_pairs, ours, dtype=dtype,
        bytes=4 * n * d * dtype.itemsize, flops=6 * n * n * d, **options,
    )  # fmt: skip


def supcon_of_hard(z: Tensor, labels: Tensor) -> Tensor:
    """Negatives of other classes count by how hard they are."""
    rows = normalize(z, dim=2).flatten(0, 1)
    logits = rows @ rows.T / TEMPERATURE
    classes = labels.repeat(len(z))
    itself = torch.eye(len(rows), dtype=torch.bool, device=z.device)
    positive = (classes[:, None] == classes) & ~itself
    negative = classes[:, None] != classes
    share = (HARDNESS * logits).masked_fill(~negative, -torch.inf).softmax(1) * negative.sum(1, keepdim=True)
    mass = torch.where(negative, share, positive.to(share.dtype))
    of_all = (mass * logits.exp()).sum(1).log()
    return (of_all - (logits * positive).sum(1) / positive.sum(1)).mean()


def supcon_case(n: int, d: int, classes: int, **options) -> Case:
    """FLOPs and bytes as in `contrastive.nt_xent_case`."""

    def inputs(draw: Draw) -> tuple[Tensor, Tensor]:
        return draw.normal(2, n, d, gradient=True), draw.labels(n, classes)

    def ours(z: Tensor, labels: Tensor) -> Tensor:
        return F.supcon(z, labels, temperature=TEMPERATURE, hardness=HARDNESS)

    return Case(
        "similarity_logsumexp", f"supcon, hardness: 2 x {n} x {d}", inputs, supcon_of_hard, ours,
        uses=("similarity_logsumexp_backward",), bytes=4 * 4 * n * d, flops=4 * (2 * n) ** 2 * d, **options,
    )  # fmt: skip


CASES = [
    views_case("ids", 1024, 128, full_only=("cuda",)),
    views_case("label smoothing", 1024, 128, full_only=("cpu", "cuda")),
    views_case("label smoothing", 4096, 128, torch.bfloat16, devices=("cuda",)),
    pairs_case(1024, 512, full_only=("cpu", "cuda")),
    queue_case(256, 65536, 128, full_only=("cpu", "cuda")),
    siglip_case(1024, 512, full_only=("cpu", "cuda")),
    supcon_case(1024, 128, 100, full_only=("cpu", "cuda")),
    views_case("ids", 128, 128, **SMALL),
    views_case("ids", 256, 2048, **SMALL),
    views_case("ids", 512, 128, **SMALL),
    views_case("label smoothing", 256, 128, torch.bfloat16, **SMALL),
    pairs_case(256, 512, **SMALL),
    pairs_case(512, 768, torch.bfloat16, **SMALL),
    queue_case(128, 4096, 128, **SMALL),
    siglip_case(256, 512, **SMALL),
    supcon_case(256, 128, 10, **SMALL),
]
